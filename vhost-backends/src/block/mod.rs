//! The block device (virtio 1.3 §5.2).
//!
//! In come chains from a ring; out go a status byte, data and a completion for each. A chain is
//! parsed into a typed request or a refusal (`request`), carried out by an engine (`execute`), and
//! its status byte is written last. A host's error is the guest's I/O error and a counter.

mod config;
mod execute;
mod poll;
mod request;
#[cfg(test)]
mod tests;

pub use config::BlockOptions;
pub use request::{RefusedRequest, Request, parse};

use crate::engine::RawFile;
use crate::limit::Limiter;
use crate::session::{Device, QueueSetup, QueueWorker};
use crate::stats::DeviceStats;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A block device on a raw file. Serves any number of sessions, one after the other.
#[derive(Debug)]
pub struct BlockDevice {
    disk: Arc<Disk>,
    options: BlockOptions,
}

/// What all queues of a device share.
#[derive(Debug)]
pub(crate) struct Disk {
    pub(crate) file: Arc<RawFile>,
    /// In sectors.
    pub(crate) capacity: u64,
    pub(crate) read_only: bool,
    pub(crate) id: [u8; pv_abi::virtio::block::ID_LEN],
    pub(crate) counters: Counters,
    pub(crate) limiter: Limiter,
    pub(crate) stats: DeviceStats,
}

/// Counts since the device was made.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) requests: AtomicU64,
    pub(crate) refused: AtomicU64,
    pub(crate) host_errors: AtomicU64,
    pub(crate) calls: AtomicU64,
    pub(crate) wakes: AtomicU64,
    pub(crate) retired: AtomicU64,
}

impl Counters {
    pub(crate) fn add(counter: &AtomicU64, n: u64) {
        // Ordering: Relaxed, a count says nothing about other memory.
        counter.fetch_add(n, Ordering::Relaxed);
    }
}

/// A snapshot of a block device's counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockStats {
    /// Requests completed, in whatever way.
    pub requests: u64,
    /// Requests refused: malformed, out of range, unsupported, or writes to a read-only disk.
    pub refused: u64,
    /// Requests that failed on the host.
    pub host_errors: u64,
    /// Times the driver was called.
    pub calls: u64,
    /// Times a worker slept and was woken.
    pub wakes: u64,
    /// Rings that broke a rule.
    pub retired: u64,
}

impl BlockDevice {
    /// A device on `file`.
    pub fn new(file: RawFile, options: BlockOptions) -> BlockDevice {
        let disk = Arc::new(Disk {
            capacity: file.len() / pv_abi::virtio::block::SECTOR_SIZE,
            read_only: file.options().read_only,
            id: options.id,
            file: Arc::new(file),
            counters: Counters::default(),
            limiter: Limiter::default(),
            stats: DeviceStats::new(options.queues),
        });
        BlockDevice { disk, options }
    }

    /// The device's limits, to be changed at any time.
    pub fn limiter(&self) -> &Limiter {
        &self.disk.limiter
    }

    /// Latencies, errors and connections.
    pub fn measurements(&self) -> &DeviceStats {
        &self.disk.stats
    }

    /// The counters now.
    pub fn stats(&self) -> BlockStats {
        // Ordering: Relaxed, as in `Counters::add`.
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &self.disk.counters;
        BlockStats {
            requests: get(&counters.requests),
            refused: get(&counters.refused),
            host_errors: get(&counters.host_errors),
            calls: get(&counters.calls),
            wakes: get(&counters.wakes),
            retired: get(&counters.retired),
        }
    }
}

impl Device for BlockDevice {
    fn queue_count(&self) -> u16 {
        self.options.queues
    }

    fn features(&self) -> u64 {
        config::features(&self.disk, &self.options)
    }

    fn config(&self) -> Vec<u8> {
        config::space(&self.disk, &self.options)
    }

    fn open_queue(&self, setup: QueueSetup) -> io::Result<Box<dyn QueueWorker>> {
        execute::spawn(Arc::clone(&self.disk), setup)
    }
}
