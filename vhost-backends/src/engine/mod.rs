//! Storage engines: where the bytes of a disk come from and go to.
//!
//! In come [`Operation`]s on ranges that were checked against the disk's capacity, with the
//! guest's buffers as a chain; out come results, at once or later. One engine serves one queue,
//! in that queue's thread, and also does its sleeping, so that a worker makes at most one
//! blocking system call for each time it has nothing to do.
//!
//! | engine | is |
//! |---|---|
//! | [`UringEngine`] | tries the page cache inline, io_uring for the rest; O_DIRECT by io_uring |
//! | [`SyncEngine`] | plain system calls, where io_uring is refused |

mod file;
mod sync;
#[cfg(test)]
mod tests;
mod transfer;
mod uring;

pub use file::{FileOptions, RawFile};
pub use sync::SyncEngine;
pub use uring::UringEngine;

use crate::ring::OwnedChain;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;
use vm_memory::GuestMemoryMmap;

/// How long an engine sleeps that cannot wait with a limit.
const LOOK_AGAIN: Duration = Duration::from_millis(1);

/// One thing to do on a disk. Offsets and lengths of the disk are in bytes.
#[derive(Clone, Copy, Debug)]
pub enum Operation<'c> {
    /// Disk to the chain's writable bytes, from its first on.
    Read {
        /// Where to.
        chain: &'c OwnedChain,
        /// First byte on the disk.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// The chain's readable bytes to the disk.
    Write {
        /// Where from.
        chain: &'c OwnedChain,
        /// First readable byte to take.
        from: u64,
        /// First byte on the disk.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// What was written before is safe after this.
    Flush,
    /// The range's content is no longer of interest.
    Discard {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// The range reads as zeroes after this.
    WriteZeroes {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// The space may be given back.
        unmap: bool,
    },
}

/// Names an operation to its engine's caller: below [`crate::limits::MAX_IN_FLIGHT`].
pub type Token = u16;

/// An operation that is over.
#[derive(Debug)]
pub struct Finished {
    /// As given to [`Engine::start`].
    pub token: Token,
    /// All of it was done, or how it failed.
    pub result: io::Result<()>,
}

/// What ended a wait.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wake {
    /// The stop event is set; stays so.
    pub stop: bool,
}

/// A disk, for one queue.
pub trait Engine {
    /// Begins an operation. `Some`: it is over already. `None`: it is in flight under `token`,
    /// which no other operation may use meanwhile.
    fn start(&mut self, token: Token, operation: Operation<'_>) -> Option<io::Result<()>>;

    /// Hands what was begun to the host, without waiting.
    fn submit(&mut self) -> io::Result<()>;

    /// Takes what is over, without waiting.
    fn reap(&mut self, finished: &mut Vec<Finished>) -> io::Result<Wake>;

    /// Hands over what was begun, and sleeps until something is over, the driver kicks, or the
    /// stop event is set. Takes what is over.
    fn wait(&mut self, finished: &mut Vec<Finished>) -> io::Result<Wake>;

    /// As [`wait`](Engine::wait), for this long at most. One that cannot do it sleeps for a moment
    /// and looks.
    fn wait_for(&mut self, finished: &mut Vec<Finished>, limit: Duration) -> io::Result<Wake> {
        self.submit()?;
        std::thread::sleep(limit.min(LOOK_AGAIN));
        self.reap(finished)
    }

    /// Whether a [`reap`](Engine::reap) would find something; makes no system call.
    fn has_finished(&mut self) -> bool;

    /// Operations in flight.
    fn in_flight(&self) -> usize;
}

/// Events that end an engine's wait.
#[derive(Clone, Copy, Debug)]
pub struct WakeSources<'f> {
    /// The driver's kick; edges count.
    pub kick: BorrowedFd<'f>,
    /// Stays readable once set.
    pub stop: BorrowedFd<'f>,
}

/// The best engine that this host allows, on `file`. Called in the thread that will use it.
pub fn open_engine(
    file: Arc<RawFile>,
    memory: Arc<GuestMemoryMmap>,
    wake: WakeSources<'_>,
) -> io::Result<Box<dyn Engine>> {
    match UringEngine::new(Arc::clone(&file), Arc::clone(&memory), wake) {
        Ok(engine) => Ok(Box::new(engine)),
        // Refused by a sysctl, a seccomp filter, or a memory limit.
        Err(_) => Ok(Box::new(SyncEngine::new(file, memory, wake)?)),
    }
}
