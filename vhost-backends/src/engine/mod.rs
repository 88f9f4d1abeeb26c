//! Storage engines: where the bytes of a disk come from and go to.
//!
//! In come [`Operation`]s on ranges that were checked against the disk's capacity, with the
//! guest's buffers as a chain; out come results, at once or later. One engine serves one queue,
//! in that queue's thread, and also does its sleeping, so that a worker makes at most one
//! blocking system call for each time it has nothing to do.
//!
//! | store | is | its engine |
//! |---|---|---|
//! | [`RawFile`] | a raw file or block device | [`UringEngine`]: tries the page cache inline, io_uring for the rest; [`SyncEngine`], plain system calls, where io_uring is refused |
//! | [`MemoryStore`] | memory of this process | inline copies |
//! | [`NullStore`] | nothing: reads leave the buffers as they are | inline |
//! | [`BlockingStore`] | any [`BlockingDisk`] | a few threads for each queue |
//! | [`Qcow2Disk`] | a qcow2 image with its backing files, or an overlay | as a [`BlockingDisk`] |
//! | [`NbdStore`] | an export of an NBD server | one connection for each queue |

mod aside;
mod bounce;
mod buffer;
mod file;
mod geometry;
mod inline;
mod memory;
mod nbd;
mod null;
mod overlay;
mod pool;
mod qcow2;
mod qcow2_check;
mod sleep;
mod sync;
#[cfg(test)]
mod tests;
mod transfer;
mod uring;

pub use file::{FileOptions, RawFile};
pub use geometry::{Geometry, Lifetime};
pub use memory::MemoryStore;
pub use nbd::{NbdAddress, NbdError, NbdStore};
pub use null::NullStore;
pub use overlay::create_overlay;
pub use pool::{BlockingDisk, BlockingStore};
pub use qcow2::Qcow2Disk;
pub use sync::SyncEngine;
pub use uring::UringEngine;

pub(crate) use inline::FailedEngine;

use crate::ring::OwnedChain;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;
use vm_memory::GuestMemoryMmap;

/// How long an engine sleeps that cannot wait with a limit.
const LOOK_AGAIN: Duration = Duration::from_millis(1);

/// A disk that all queues of a device share.
pub trait Store: Send + Sync + std::fmt::Debug {
    /// Its size and shape now. Asked again when the disk may have been resized.
    fn geometry(&self) -> Geometry;

    /// Whether it must not be written.
    fn read_only(&self) -> bool {
        false
    }

    /// Queues that it can serve at a time, if that is limited.
    fn max_queues(&self) -> Option<u16> {
        None
    }

    /// An engine for one queue. Called in the thread that will use it. The descriptors in `wake`
    /// stay open as long as the engine exists.
    fn open_engine(
        self: Arc<Self>,
        memory: Arc<GuestMemoryMmap>,
        wake: WakeSources<'_>,
    ) -> io::Result<Box<dyn Engine>>;
}

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
    /// Nobody can read the range's content after this, with whatever means.
    SecureErase {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
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

    /// More will be begun at once: hands over what the host should work on meanwhile.
    fn more_follows(&mut self) -> io::Result<()> {
        Ok(())
    }

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

    /// Nobody waits for what is in flight any more, for somebody else will begin it again. Forgets
    /// all of it, unless the host is at work on it; whether it did.
    fn abandon(&mut self) -> bool {
        false
    }
}

/// What [`Engine::start`] gives where this says whether the operation is over already.
fn started(over: io::Result<bool>) -> Option<io::Result<()>> {
    over.map(|over| over.then_some(())).transpose()
}

/// Events that end an engine's wait.
#[derive(Clone, Copy, Debug)]
pub struct WakeSources<'f> {
    /// The driver's kick; edges count.
    pub kick: BorrowedFd<'f>,
    /// Stays readable once set.
    pub stop: BorrowedFd<'f>,
}
