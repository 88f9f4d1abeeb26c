//! The block device (virtio 1.3 §5.2).
//!
//! In come chains from a ring; out go a status byte, data and a completion for each. A chain is
//! parsed into a typed request or a refusal (`request`), carried out by an engine (`execute`), and
//! its status byte is written last. A host's error is the guest's I/O error and a counter.

mod config;
mod execute;
mod poll;
mod request;
mod resize;
#[cfg(test)]
mod tests;
mod thread;

pub use config::BlockOptions;
pub(crate) use poll::AdaptivePoll;
pub use request::{RefusedRequest, Request, parse};
pub use resize::{ResizeRefused, Resized};

use crate::engine::{Geometry, Store};
use crate::limit::Limiter;
use crate::session::{ConfigRefused, Device, FrontendLink, QueueSetup, QueueWorker};
use crate::stats::DeviceStats;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// A block device on any store. Serves any number of sessions, one after the other.
#[derive(Debug)]
pub struct BlockDevice {
    disk: Arc<Disk>,
    options: BlockOptions,
    /// To tell the driver's side that the configuration changed.
    frontend: Mutex<Option<Arc<FrontendLink>>>,
    /// The capacity grew, and no frontend has been told so far.
    untold: AtomicBool,
}

/// What all queues of a device share.
#[derive(Debug)]
pub(crate) struct Disk {
    pub(crate) store: Arc<dyn Store>,
    /// As it was at the start; only the capacity changes.
    pub(crate) geometry: Geometry,
    /// In sectors.
    capacity: AtomicU64,
    pub(crate) read_only: bool,
    pub(crate) id: [u8; pv_abi::virtio::block::ID_LEN],
    /// The driver may leave writes in a cache until it flushes.
    writeback: AtomicBool,
    pub(crate) counters: Counters,
    pub(crate) limiter: Limiter,
    pub(crate) stats: DeviceStats,
}

impl Disk {
    pub(crate) fn capacity(&self) -> u64 {
        // Ordering: Relaxed, a number that stands for itself.
        self.capacity.load(Ordering::Relaxed)
    }

    pub(crate) fn writeback(&self) -> bool {
        // Ordering: Relaxed, as for the capacity; a change holds for requests after its answer.
        self.writeback.load(Ordering::Relaxed)
    }
}

/// Counts since the device was made.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) requests: AtomicU64,
    pub(crate) refused: AtomicU64,
    pub(crate) host_errors: AtomicU64,
    pub(crate) no_space: AtomicU64,
    pub(crate) truncated: AtomicU64,
    pub(crate) not_writable: AtomicU64,
    pub(crate) calls: AtomicU64,
    pub(crate) wakes: AtomicU64,
    pub(crate) retired: AtomicU64,
}

impl Counters {
    pub(crate) fn add(counter: &AtomicU64, n: u64) {
        // Ordering: Relaxed, a count says nothing about other memory.
        counter.fetch_add(n, Ordering::Relaxed);
    }

    /// Counts a request that failed on the host, by its reason.
    pub(crate) fn failed(&self, error: &io::Error) {
        Counters::add(&self.host_errors, 1);
        let reason = match error.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => &self.no_space,
            Some(libc::EROFS | libc::EPERM | libc::EACCES | libc::EBADF) => &self.not_writable,
            None if error.kind() == io::ErrorKind::UnexpectedEof => &self.truncated,
            _ => return,
        };
        Counters::add(reason, 1);
    }
}

/// A snapshot of a block device's counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockStats {
    /// Requests completed, in whatever way.
    pub requests: u64,
    /// Requests refused: malformed, out of range, unsupported, or writes to a read-only disk.
    pub refused: u64,
    /// Requests that failed on the host, for whatever reason.
    pub host_errors: u64,
    /// Of these: no space, or over a quota or a size limit.
    pub no_space: u64,
    /// Of these: the image is shorter than it was.
    pub truncated: u64,
    /// Of these: the host does not let the image be written (any more).
    pub not_writable: u64,
    /// Times the driver was called.
    pub calls: u64,
    /// Times a worker slept and was woken.
    pub wakes: u64,
    /// Rings that broke a rule.
    pub retired: u64,
}

impl BlockDevice {
    /// A device on `store`.
    pub fn new(store: impl Store + 'static, options: BlockOptions) -> BlockDevice {
        BlockDevice::on(Arc::new(store), options)
    }

    /// A device on `store`, which may be shared. Queues are brought into the store's range.
    pub fn on(store: Arc<dyn Store>, mut options: BlockOptions) -> BlockDevice {
        if let Some(most) = store.max_queues() {
            options.queues = options.queues.min(most).max(1);
        }
        let geometry = store.geometry();
        let disk = Arc::new(Disk {
            capacity: AtomicU64::new(sectors(geometry)),
            read_only: store.read_only(),
            geometry,
            id: options.id,
            store,
            writeback: AtomicBool::new(true),
            counters: Counters::default(),
            limiter: Limiter::default(),
            stats: DeviceStats::new(options.queues),
        });
        BlockDevice {
            disk,
            options,
            frontend: Mutex::default(),
            untold: AtomicBool::new(false),
        }
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
            no_space: get(&counters.no_space),
            truncated: get(&counters.truncated),
            not_writable: get(&counters.not_writable),
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

    fn write_config(&self, offset: u32, data: &[u8]) -> Result<(), ConfigRefused> {
        let writeback = config::parse_write(offset, data).ok_or(ConfigRefused)?;
        // Ordering: Relaxed, as in `Disk::writeback`.
        self.disk.writeback.store(writeback, Ordering::Relaxed);
        Ok(())
    }

    fn saved_config(&self) -> Vec<(u32, Vec<u8>)> {
        let chosen = config::write_of(self.disk.writeback());
        // What a new device has anyhow, a read-only one could not be told.
        chosen
            .into_iter()
            .filter(|_| !self.disk.writeback())
            .collect()
    }

    fn resume_config(&self, told: &[u8]) -> bool {
        // A disk that grew is as large as the frontend knows it, until somebody asks it to look; of
        // one that became smaller, what is missing are I/O errors.
        let capacity = config::capacity_in(told).filter(|sectors| *sectors <= MOST_SECTORS);
        if let Some(capacity) = capacity {
            // Ordering: Relaxed, as in `Disk::capacity`.
            self.disk.capacity.store(capacity, Ordering::Relaxed);
        }
        self.config() == told
    }

    fn set_frontend(&self, frontend: Option<Arc<FrontendLink>>) {
        *self.frontend.lock().unwrap_or_else(PoisonError::into_inner) = frontend;
    }

    fn reset(&self) {
        // Ordering: Relaxed, as in `Disk::writeback`.
        self.disk.writeback.store(true, Ordering::Relaxed);
    }

    fn open_queue(&self, setup: QueueSetup) -> io::Result<Box<dyn QueueWorker>> {
        thread::spawn(Arc::clone(&self.disk), setup)
    }
}

/// Of a disk whose every byte has an offset that the host knows.
const MOST_SECTORS: u64 = i64::MAX as u64 / pv_abi::virtio::block::SECTOR_SIZE;

/// A tail that is no whole sector is not part of the disk.
fn sectors(geometry: Geometry) -> u64 {
    geometry.len / pv_abi::virtio::block::SECTOR_SIZE
}
