//! A disk that an NBD server has: a file elsewhere, or anything that nbdkit can serve.
//!
//! Connections are made, and handshakes done, when the store is opened, one for each queue, so that a
//! daemon may give up the right to make sockets afterwards. Where it is told how to dial again, a
//! connection that breaks is replaced: what was in flight is sent once more, in its order, and
//! waits for that as long as it may. Otherwise, and after that time, requests fail.
//!
//! | file | does |
//! |---|---|
//! | `handshake` | fixed newstyle negotiation, up to transmission |
//! | `redial` | a new connection for one that broke |
//! | `engine` | requests and simple replies, straight from and to guest memory |

mod engine;
mod handshake;
mod redial;

use super::{Engine, Geometry, Store, WakeSources};
use crate::dial;
use crate::limits::NBD_HANDSHAKE_SECS;
use engine::NbdEngine;
use handshake::Export;
use redial::{Redial, greet_until};
use std::io;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use vm_memory::GuestMemoryMmap;

/// Where an export is: `unix:PATH` or `unix:PATH:EXPORT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdAddress {
    /// The server's socket.
    pub socket: PathBuf,
    /// The export's name; the default one is empty.
    pub export: String,
}

impl std::str::FromStr for NbdAddress {
    type Err = NbdError;

    fn from_str(text: &str) -> Result<NbdAddress, NbdError> {
        let rest = text.strip_prefix("unix:").ok_or(NbdError::Address)?;
        let (socket, export) = rest.split_once(':').unwrap_or((rest, ""));
        if socket.is_empty() || export.len() > handshake::MAX_NAME {
            return Err(NbdError::Address);
        }
        Ok(NbdAddress {
            socket: socket.into(),
            export: export.into(),
        })
    }
}

/// Why an export cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum NbdError {
    /// Not `unix:PATH[:EXPORT]`.
    #[error("not of the form unix:PATH or unix:PATH:EXPORT")]
    Address,
    /// The socket failed, or the server took too long.
    #[error("the connection failed")]
    Connection(#[from] io::Error),
    /// It does not speak the newstyle protocol.
    #[error("not an NBD server of the fixed newstyle protocol")]
    NotNbd,
    /// It said no.
    #[error("the server refuses the export: {0}")]
    Refused(String),
    /// It broke the protocol.
    #[error("the server broke the protocol: {0}")]
    Protocol(&'static str),
    /// Several queues, and a server that allows one connection only.
    #[error("the server allows one connection only; use one queue")]
    OneConnection,
}

/// An export of an NBD server.
#[derive(Debug)]
pub struct NbdStore {
    export: Export,
    /// Its name.
    name: String,
    redial: Option<Redial>,
    read_only: bool,
    /// Connections that no queue uses now.
    idle: Mutex<Vec<UnixStream>>,
}

impl NbdStore {
    /// Connects, once for each queue. A server has [`crate::limits::NBD_HANDSHAKE_SECS`] for all of it.
    pub fn connect(
        address: NbdAddress,
        queues: u16,
        read_only: bool,
    ) -> Result<NbdStore, NbdError> {
        let patience = Duration::from_secs(NBD_HANDSHAKE_SECS);
        NbdStore::connect_within(patience, address, queues, read_only)
    }

    /// The same for who has less time.
    pub(crate) fn connect_within(
        patience: Duration,
        address: NbdAddress,
        queues: u16,
        read_only: bool,
    ) -> Result<NbdStore, NbdError> {
        let deadline = Instant::now() + patience;
        let connect = || {
            let stream = dial::connect(&address.socket)?;
            greet_until(deadline, stream, &address.export)
        };
        let (first, export) = connect()?;
        if queues > 1 && !export.multi_conn {
            return Err(NbdError::OneConnection);
        }
        let mut idle = vec![first];
        for _ in 1..queues {
            let (stream, again) = connect()?;
            if again != export {
                return Err(NbdError::Protocol("the export changed"));
            }
            idle.push(stream);
        }
        Ok(NbdStore {
            name: address.export,
            redial: None,
            read_only: read_only || export.read_only,
            export,
            idle: Mutex::new(idle),
        })
    }

    /// Replaces connections that break: `dial` connects to the server once more, from whatever
    /// thread and without a limit of its own on how often. Requests wait for that up to `patience`
    /// after the connection broke.
    ///
    /// They are sent again to a server that may have carried them out already. One that is not
    /// dead but slow must not carry out what came over a connection that it has lost.
    pub fn redialling(
        mut self,
        dial: impl Fn() -> io::Result<UnixStream> + Send + Sync + 'static,
        patience: Duration,
    ) -> NbdStore {
        self.redial = Some(Redial::new(Box::new(dial), patience));
        self
    }

    /// A connection that nothing uses.
    fn take(&self) -> Option<UnixStream> {
        self.idle().pop()
    }

    /// Takes a connection back that has nothing in flight.
    fn give_back(&self, stream: UnixStream) {
        self.idle().push(stream);
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<UnixStream>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Store for NbdStore {
    fn geometry(&self) -> Geometry {
        let block = self.export.block_min.max(512);
        Geometry {
            logical_block: block,
            physical_block: self.export.block_preferred.max(block),
            discard: self.export.trim,
            ..Geometry::plain(self.export.len)
        }
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn max_queues(&self) -> Option<u16> {
        (!self.export.multi_conn).then_some(1)
    }

    fn open_engine(
        self: Arc<Self>,
        memory: Arc<GuestMemoryMmap>,
        wake: WakeSources<'_>,
    ) -> io::Result<Box<dyn Engine>> {
        Ok(Box::new(NbdEngine::new(self, memory, wake)?))
    }
}
