//! The dirty log (vhost-user: migration): a bit for every page that the device wrote.
//!
//! In come the chains of a ring as they are taken and given back, and writes to the ring itself;
//! out go bits in memory of the frontend. A page is marked after the write, and before the driver
//! can see that the request is over: a frontend that copies pages as it clears bits then copies
//! the bytes, at the latest when the ring has stopped.

use super::{OwnedChain, Segment};
use crate::session::{Notifier, memfd};
use std::collections::HashMap;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use vm_memory::VolatileMemory;
use vm_memory::mmap::MmapRegion;

/// Bytes that one bit stands for (vhost-user: `VHOST_LOG_PAGE`).
const PAGE: u64 = 0x1000;

/// Why a file cannot be a dirty log.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DirtyLogError {
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

/// One bit for every page of guest memory, from address zero on.
#[derive(Debug)]
pub struct DirtyLog {
    map: MmapRegion,
}

impl DirtyLog {
    /// Maps `len` bytes at `offset` of a file that a frontend keeps.
    pub fn map(file: File, offset: u64, len: u64) -> Result<DirtyLog, DirtyLogError> {
        let file_len = file.metadata().map_or(0, |m| m.len());
        let bad = DirtyLogError::BadRange {
            offset,
            len,
            file: file_len,
        };
        if len == 0 || offset.checked_add(len).is_none_or(|end| end > file_len) {
            return Err(bad);
        }
        let bytes = usize::try_from(len).map_err(|_| bad)?;
        let map = memfd::map(file, offset, bytes)
            .map_err(|error| DirtyLogError::Map(error.to_string()))?;
        Ok(DirtyLog { map })
    }

    /// Marks the pages of `len` bytes at `addr`. Pages past the end of the log are the
    /// frontend's loss: it said how long the log is.
    fn mark(&self, addr: u64, len: u64) {
        let Some(last) = len.checked_sub(1).and_then(|more| addr.checked_add(more)) else {
            return;
        };
        let end = 8 * self.map.len() as u64;
        for page in addr / PAGE..(last / PAGE).saturating_add(1).min(end) {
            // Below `end`, so it fits.
            let byte = (page / 8) as usize;
            if let Ok(byte) = self.map.get_atomic_ref::<AtomicU8>(byte) {
                // Ordering: Release, whoever sees the bit and copies the page sees the write.
                byte.fetch_or(1 << (page % 8), Ordering::Release);
            }
        }
    }
}

/// What one ring marks.
#[derive(Debug)]
pub(crate) struct RingDirty {
    log: Arc<DirtyLog>,
    call: Arc<Notifier>,
    /// Where the log has the part of the ring that the device writes, if that is to be marked.
    ring: Option<u64>,
    /// Writable buffers of the chains in flight.
    writable: HashMap<u16, Box<[Segment]>>,
}

impl RingDirty {
    pub(crate) fn new(log: Arc<DirtyLog>, call: Arc<Notifier>, ring: Option<u64>) -> RingDirty {
        RingDirty {
            log,
            call,
            ring,
            writable: HashMap::new(),
        }
    }

    /// Whether the ring itself is marked.
    pub(super) fn marks_ring(&self) -> bool {
        self.ring.is_some()
    }

    /// A chain is in flight: the device may write any byte of it until it is given back.
    pub(super) fn taken(&mut self, chain: &OwnedChain) {
        self.writable.insert(chain.head(), chain.writable().into());
    }

    /// The device writes nothing more into this chain.
    pub(super) fn given_back(&mut self, head: u16) {
        for segment in self.writable.remove(&head).unwrap_or_default() {
            self.log.mark(segment.addr.0, u64::from(segment.len));
        }
    }

    /// Bytes of the ring were written, `offset` from where its logged part starts.
    pub(super) fn ring_written(&self, offset: u64, len: u64) {
        if let Some(start) = self.ring {
            self.log.mark(start.wrapping_add(offset), len);
        }
    }

    /// Bytes of the ring were written, at this guest-physical address.
    pub(super) fn written(&self, addr: u64, len: u64) {
        if self.marks_ring() {
            self.log.mark(addr, len);
        }
    }

    /// Tells the frontend that there is something in the log.
    pub(super) fn signal(&self) {
        self.call.signal();
    }
}
