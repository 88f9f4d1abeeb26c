//! The in-flight log (vhost-user: in-flight I/O tracking).
//!
//! In come the steps of a ring: a chain was taken, used elements are about to be published, they
//! are published. Out come, for the process after one that was killed, the chains that it had
//! taken and not given back, in the order in which it took them. The log lies in a file that the
//! frontend keeps, so it outlives the backend; the layouts are those of the specification.
//!
//! The frontend can write the log at any time. Nothing that is read from it is used without a
//! check, and no walk over it is longer than it has entries.

mod packed;
mod split;

pub(super) use packed::{LoggedDesc, PackedLog};
pub(super) use split::SplitLog;

use crate::limits::MAX_QUEUES;
use crate::session::memfd;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vm_memory::mmap::MmapRegion;
use vm_memory::{AtomicAccess, Bytes, VolatileMemory};

/// What `version` says in a log that is in use.
const VERSION: u16 = 1;
/// Both layouts: `version`, where zero means a new log.
const AT_VERSION: usize = 8;
/// Both layouts: `desc_num`.
const AT_DESC_NUM: usize = 10;
/// Where one queue's log may start.
const ALIGN: usize = 64;

/// Why a file cannot be an in-flight log.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InflightError {
    /// No queues, no entries, or more than a device or ring may have.
    #[error("{queues} queues of {size} entries")]
    BadShape {
        /// Queues.
        queues: u16,
        /// Entries.
        size: u16,
    },
    /// The area is empty, ends after the file, or has an offset that cannot be mapped.
    #[error("{len} bytes at {offset} are not in a file of {file} bytes")]
    BadRange {
        /// First byte in the file.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Bytes of the file.
        file: u64,
    },
    /// The kernel did not map it.
    #[error("mapping failed: {0}")]
    Map(String),
}

/// The in-flight log of a device: one part for each queue.
#[derive(Debug)]
pub struct InflightLog {
    map: MmapRegion,
    queues: u16,
    size: u16,
    /// Bytes from one queue's part to the next.
    stride: usize,
}

impl InflightLog {
    /// Bytes that a log of `queues` queues of `size` entries takes, in either layout.
    pub fn len_for(queues: u16, size: u16) -> u64 {
        let one = packed::len(size).max(split::len(size));
        u64::from(queues) * one.next_multiple_of(ALIGN) as u64
    }

    /// Maps `len` bytes at `offset` of a file that a frontend keeps.
    pub fn map(
        file: File,
        offset: u64,
        len: u64,
        queues: u16,
        size: u16,
    ) -> Result<InflightLog, InflightError> {
        if queues == 0 || queues > MAX_QUEUES || size == 0 || size > crate::limits::MAX_RING_SIZE {
            return Err(InflightError::BadShape { queues, size });
        }
        let file_len = file.metadata().map_or(0, |m| m.len());
        let bad = InflightError::BadRange {
            offset,
            len,
            file: file_len,
        };
        let fits = len > 0 && offset.checked_add(len).is_some_and(|end| end <= file_len);
        let bytes = usize::try_from(len).map_err(|_| bad.clone())?;
        // As the frontend got it from whoever made it: the parts are equal and aligned.
        let stride = (bytes / usize::from(queues)) & !(ALIGN - 1);
        if !fits || stride < split::len(size) {
            return Err(bad);
        }
        let map = memfd::map(file, offset, bytes)
            .map_err(|error| InflightError::Map(error.to_string()))?;
        Ok(InflightLog {
            map,
            queues,
            size,
            stride,
        })
    }

    /// The part of one queue.
    pub(crate) fn queue(self: &Arc<Self>, index: u16) -> Option<QueueLog> {
        (index < self.queues).then(|| QueueLog {
            start: usize::from(index) * self.stride,
            log: Arc::clone(self),
        })
    }

    /// Makes every queue's part new. Nothing may be in flight.
    pub(crate) fn clear(self: &Arc<Self>) {
        for queue in (0..self.queues).filter_map(|q| self.queue(q)) {
            queue.put(AT_VERSION, 0u16);
        }
    }
}

/// One queue's part of the log.
#[derive(Clone, Debug)]
pub(crate) struct QueueLog {
    log: Arc<InflightLog>,
    start: usize,
}

impl QueueLog {
    /// Entries.
    fn size(&self) -> u16 {
        self.log.size
    }

    fn get<T: AtomicAccess + Default>(&self, offset: usize) -> T {
        // Ordering: Acquire, as `put`. What lies outside reads as zero; callers check indices.
        self.log
            .map
            .get_slice(self.start, self.log.stride)
            .and_then(|part| part.load(offset, Ordering::Acquire))
            .unwrap_or_default()
    }

    fn put<T: AtomicAccess>(&self, offset: usize, value: T) {
        // Ordering: Release keeps the order of the steps: whoever maps the file after a kill
        // finds a step only with all the steps before it.
        let part = self.log.map.get_slice(self.start, self.log.stride);
        if let Ok(part) = part {
            let _ = part.store(value, offset, Ordering::Release);
        }
    }

    /// Whether the log is new. `None`: it is not one for a ring of `ring` entries.
    fn is_new(&self, ring: u16, len: usize) -> Option<bool> {
        if ring > self.size() || len > self.log.stride {
            return None;
        }
        match self.get::<u16>(AT_VERSION) {
            0 => Some(true),
            VERSION if self.get::<u16>(AT_DESC_NUM) == self.size() => Some(false),
            _ => None,
        }
    }

    /// The log is in use from here on.
    fn set_in_use(&self) {
        self.put(AT_DESC_NUM, self.size());
        self.put(AT_VERSION, VERSION);
    }
}
