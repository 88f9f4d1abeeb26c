//! Daemons: a command line, sockets, signals, and connection after connection
//! (vhost-user: backend program conventions).
//!
//! In comes a command line; out goes an exit code. Errors of the user are one sentence on
//! standard error. Everything is opened first, then the sandbox is entered, then served.
//!
//! What one kind of daemon has of its own is a `Fleet` and the way to open it; the rest is here
//! for all of them.
//!
//! | file | what it does |
//! |---|---|
//! | `program` | logs, exit codes, and what is printed instead of serving |
//! | `options` | the part of the command line that all daemons share |
//! | `listen` | sockets: made, inherited, or passed by a service manager |
//! | `descriptors` | how many descriptors there may be |
//! | `serve` | opens, confines itself, and serves the fleet until the end |
//! | `admin` | the statistics and control sockets |
//! | `handover` | hot upgrade: what one process serves, another takes over |
//! | `notify`, `remover`, `signals` | the service manager, socket files, the end |
//! | `keys` | devices on the command line |
//! | `connector` | connections to paths, from inside the sandbox |
//! | `blk` | `pv-blkd` |
//! | `net` | `pv-netd` |

mod admin;
mod blk;
mod connector;
mod descriptors;
mod handover;
mod keys;
mod listen;
mod net;
mod notify;
mod options;
mod program;
mod remover;
mod serve;
mod signals;

pub use blk::pv_blkd_main;
pub(crate) use connector::Connector;
pub(crate) use listen::Sockets;
pub use net::pv_netd_main;
pub(crate) use options::{Operation, SocketArgs};
pub(crate) use program::{parse, start};
pub(crate) use serve::serve;

use crate::session::{ConnectionEvent, Device};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

/// What a daemon serves, and what may be asked of it meanwhile.
pub(crate) trait Fleet: Sync {
    /// What its devices are called in requests: `disks`.
    const DEVICES: &'static str;

    /// Its devices, in the order in which their sockets were opened.
    fn members(&self) -> Vec<Member>;

    /// The statistics as Prometheus text.
    fn prometheus(&self) -> String;

    /// The same as JSON.
    fn json(&self) -> String;

    /// Carries out `PUT /DEVICES/NAME/WHAT`; the answer is a sentence.
    fn put(&self, name: &str, what: &str, body: &str) -> Result<String, Denied>;

    /// What the device at `index` needs to be served by another process. The error is a sentence.
    fn hand_over(&self, index: usize) -> Result<Handed, String> {
        let members = self.members();
        let name = members.get(index).map_or("", |member| &member.name);
        Err(format!("{name} cannot be handed over"))
    }

    /// Takes what another process handed over for the device at `index`, which was opened with
    /// [`Sockets::taking_over`] in mind. The error is a sentence.
    fn take_over(&self, index: usize, handed: Handed) -> Result<(), String> {
        let _ = (index, handed);
        Err("this device cannot be taken over".into())
    }

    /// Everything is drained, and no other process goes on with it.
    fn over(&self) {}

    /// What `GET /DEVICES/NAME/WHAT` gives without an end: takes over the client's connection.
    fn follow(&self, _name: &str, _what: &str) -> Option<Follow<'_>> {
        None
    }

    /// The requests that [`put`](Fleet::put) knows, for people.
    fn requests(&self) -> &'static str;
}

/// Writes to a client from here on, and waits for nothing.
pub(crate) type Follow<'f> = Box<dyn FnOnce(UnixStream) -> io::Result<()> + 'f>;

/// One device, and who is told about its connections.
pub(crate) struct Member {
    pub(crate) name: String,
    pub(crate) device: Arc<dyn Device>,
    pub(crate) watch: Arc<dyn Fn(ConnectionEvent) + Send + Sync>,
}

/// A device on its way to another process.
#[derive(Debug)]
pub(crate) struct Handed {
    /// What it is: the same on both sides.
    pub(crate) identity: String,
    /// At most [`crate::limits::MAX_MESSAGE_FDS`].
    pub(crate) fds: Vec<OwnedFd>,
}

/// Why a request was not carried out.
#[derive(Debug)]
pub(crate) enum Denied {
    /// There is no such thing.
    NotFound(&'static str),
    /// It makes no sense.
    Bad(String),
    /// Not as things are.
    Refused(String),
}
