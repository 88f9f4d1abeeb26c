//! New connections for those that broke.
//!
//! A thread of its own dials and shakes hands, so that no queue waits for a server that does not
//! answer. One at a time for a store, and only while a queue asks for it.

use super::handshake::{Export, negotiate};
use super::{NbdError, NbdStore};
use crate::dial;
use crate::limits::NBD_HANDSHAKE_SECS;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Connects to the server once more.
pub(super) type Dial = dyn Fn() -> io::Result<UnixStream> + Send + Sync;

/// How to come back to a server.
pub(super) struct Redial {
    pub(super) dial: Box<Dial>,
    /// How long requests wait for it.
    pub(super) patience: Duration,
    /// A thread is at it.
    busy: AtomicBool,
}

impl std::fmt::Debug for Redial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Redial")
            .field("patience", &self.patience)
            .finish_non_exhaustive()
    }
}

impl Redial {
    pub(super) fn new(dial: Box<Dial>, patience: Duration) -> Redial {
        Redial {
            dial,
            patience,
            busy: AtomicBool::new(false),
        }
    }
}

/// Tries once, in the background; a connection that is made becomes an idle one of the store's.
pub(super) fn try_once(store: &Arc<NbdStore>) {
    let Some(redial) = &store.redial else { return };
    // Ordering: Acquire and Release; the flag alone says who may dial.
    if redial.busy.swap(true, Ordering::AcqRel) {
        return;
    }
    let ours = Arc::clone(store);
    let thread = std::thread::Builder::new().name("nbd-dial".into());
    let spawned = thread.spawn(move || {
        let Some(redial) = &ours.redial else { return };
        let made = (redial.dial)()
            .map_err(NbdError::from)
            .and_then(|stream| greet(stream, &ours.name));
        match made {
            Ok((stream, export)) if export == ours.export => ours.give_back(stream),
            Ok(_) => tracing::warn!("the NBD server came back with another export"),
            // It is not there yet, which is nothing to speak of.
            Err(NbdError::Connection(_)) => {}
            Err(error) => tracing::warn!(%error, "the NBD server came back, and"),
        }
        redial.busy.store(false, Ordering::Release);
    });
    if spawned.is_err() {
        redial.busy.store(false, Ordering::Release);
    }
}

/// Makes a fresh connection ready for requests.
pub(super) fn greet(stream: UnixStream, export: &str) -> Result<(UnixStream, Export), NbdError> {
    let limit = Some(Duration::from_secs(NBD_HANDSHAKE_SECS));
    stream.set_read_timeout(limit)?;
    stream.set_write_timeout(limit)?;
    let export = negotiate(&stream, export).map_err(|error| match error {
        NbdError::Connection(error) => dial::in_words(error).into(),
        error => error,
    })?;
    stream.set_nonblocking(true)?;
    Ok((stream, export))
}
