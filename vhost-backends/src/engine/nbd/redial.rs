//! New connections for those that broke.
//!
//! A thread of its own dials and shakes hands, so that no queue waits for a server that does not
//! answer. One at a time for a store, and only while a queue asks for it.

use super::handshake::{Export, negotiate};
use super::{NbdError, NbdStore};
use crate::dial;
use crate::limits::NBD_HANDSHAKE_SECS;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

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
        let made = (redial.dial)().map_err(NbdError::from).and_then(|stream| {
            let deadline = Instant::now() + Duration::from_secs(NBD_HANDSHAKE_SECS);
            greet_until(deadline, stream, &ours.name)
        });
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
pub(super) fn greet_until(
    deadline: Instant,
    stream: UnixStream,
    export: &str,
) -> Result<(UnixStream, Export), NbdError> {
    let timed = Timed {
        stream: &stream,
        deadline,
    };
    let export = negotiate(timed, export).map_err(|error| match error {
        NbdError::Connection(error) => dial::in_words(error).into(),
        error => error,
    })?;
    stream.set_nonblocking(true)?;
    Ok((stream, export))
}

/// A connection until a deadline, however many small pieces come before it.
struct Timed<'s> {
    stream: &'s UnixStream,
    deadline: Instant,
}

impl Timed<'_> {
    fn left(&self) -> io::Result<Option<Duration>> {
        match self.deadline.saturating_duration_since(Instant::now()) {
            Duration::ZERO => Err(io::ErrorKind::TimedOut.into()),
            left => Ok(Some(left)),
        }
    }
}

impl Read for Timed<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(self.left()?)?;
        self.stream.read(bytes)
    }
}

impl Write for Timed<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(self.left()?)?;
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_says_a_byte_at_a_time_is_left() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let server = std::thread::spawn(move || {
            // The first words of a good one, and nobody is there any more at their end.
            for byte in b"NBDMAGICIHAVEOPT" {
                let _ = (&theirs).write_all(&[*byte]);
                std::thread::sleep(Duration::from_millis(30));
            }
            (&theirs).write_all(&[0, 3]).is_err()
        });
        let deadline = Instant::now() + Duration::from_millis(200);
        let left = greet_until(deadline, ours, "").unwrap_err();
        let NbdError::Connection(why) = left else {
            panic!("{left}")
        };
        assert!(why.to_string().contains("does not answer in time"), "{why}");
        assert!(server.join().unwrap(), "it was left");
    }
}
