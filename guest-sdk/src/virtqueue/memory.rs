//! The bytes of a split ring that driver and device share (virtio 1.3 §2.7).
//!
//! Every access is one atomic load or store on a field of its natural width.

use crate::platform::{Arena, DmaBuf, OutOfArena};
use core::sync::atomic::{Ordering, fence};
use pv_abi::virtio::{AVAIL_NO_INTERRUPT, Desc, USED_NO_NOTIFY, split};

/// Keeps what the driver writes and what the device writes on different cache lines.
const PART_ALIGN: usize = 64;

/// A split ring's three parts, and the tables for indirect chains, in one piece of an arena.
#[derive(Debug)]
pub struct RingMemory {
    buf: DmaBuf,
    size: u16,
    avail: usize,
    used: usize,
    tables: usize,
    table_entries: usize,
}

impl RingMemory {
    /// Memory for a ring of `size` entries (a power of two of at most 32,768) with one indirect table
    /// of `table_entries` for each of them.
    ///
    /// # Errors
    ///
    /// [`OutOfArena`].
    pub fn new(arena: &'static Arena, size: u16, table_entries: usize) -> Result<Self, OutOfArena> {
        let avail = (split::desc_len(size) as usize).next_multiple_of(PART_ALIGN);
        let used = (avail + split::avail_len(size) as usize).next_multiple_of(PART_ALIGN);
        let tables = (used + split::used_len(size) as usize).next_multiple_of(PART_ALIGN);
        let len = tables + usize::from(size) * table_entries * size_of::<Desc>();
        Ok(RingMemory {
            buf: arena.alloc(len)?,
            size,
            avail,
            used,
            tables,
            table_entries,
        })
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Addresses of descriptor table, available ring and used ring, as the device knows them.
    pub fn addresses(&self) -> (u64, u64, u64) {
        let gpa = self.buf.gpa();
        (gpa, gpa + self.avail as u64, gpa + self.used as u64)
    }

    /// Entries of each indirect table.
    pub(super) fn table_entries(&self) -> usize {
        self.table_entries
    }

    /// Address of the indirect table that belongs to a head.
    pub(super) fn table_gpa(&self, head: u16) -> u64 {
        self.buf.gpa() + self.table_offset(head, 0) as u64
    }

    /// Makes the ring what it is before its first use. The device must not be using it.
    pub(super) fn clear(&self, event_idx: bool) {
        self.buf.zero();
        if event_idx {
            // One before the first completion: nothing is signalled until the queue is armed.
            self.set_used_event(u16::MAX);
        } else {
            self.set_avail_flags(AVAIL_NO_INTERRUPT);
        }
    }

    pub(super) fn write_desc(&self, index: u16, desc: Desc) {
        self.store_desc(usize::from(index) * size_of::<Desc>(), desc);
    }

    pub(super) fn write_table_desc(&self, head: u16, entry: usize, desc: Desc) {
        self.store_desc(self.table_offset(head, entry), desc);
    }

    pub(super) fn write_avail(&self, position: u16, head: u16) {
        let slot = usize::from(position & (self.size - 1));
        // Ordering: Relaxed, published by the Release store of the index.
        self.buf
            .atomic_u16(self.avail + 4 + 2 * slot)
            .store(head, Ordering::Relaxed);
    }

    /// Makes everything up to this index the device's.
    pub(super) fn publish(&self, index: u16) {
        // Ordering: Release, so that a device that reads this index (Acquire) finds descriptors,
        // ring slots and buffers as they were written before.
        self.buf
            .atomic_u16(self.avail + 2)
            .store(index, Ordering::Release);
    }

    /// Whether the device wants to hear of the move from `old` to `new` that was just published.
    pub(super) fn wants_kick(&self, event_idx: bool, old: u16, new: u16) -> bool {
        // Ordering: a full fence. The store of the index must be visible before the field is read,
        // and a store followed by a load is the one pair that x86 reorders and Acquire/Release allow
        // to be. Without it both sides can miss each other: we read an old event, the device, about
        // to sleep, an old index (virtio 1.3 §2.7.13.4).
        fence(Ordering::SeqCst);
        if event_idx {
            let at = self.used + 4 + 8 * usize::from(self.size);
            // Ordering: Relaxed, the fence above orders it.
            let event = self.buf.atomic_u16(at).load(Ordering::Relaxed);
            split::need_event(event, new, old)
        } else {
            // Ordering: Relaxed, the fence above orders it.
            let flags = self.buf.atomic_u16(self.used).load(Ordering::Relaxed);
            flags & USED_NO_NOTIFY == 0
        }
    }

    /// The device's running index.
    pub(super) fn used_index(&self) -> u16 {
        // Ordering: Acquire pairs with the device's Release, so that the elements below the index
        // and what the device wrote into buffers are visible.
        self.buf.atomic_u16(self.used + 2).load(Ordering::Acquire)
    }

    /// The used element at this position: head and length.
    pub(super) fn used_elem(&self, position: u16) -> (u32, u32) {
        let at = self.used + 4 + 8 * usize::from(position & (self.size - 1));
        // Ordering: Relaxed, ordered after the index by its Acquire load. Each field is read once.
        let id = self.buf.atomic_u32(at).load(Ordering::Relaxed);
        let len = self.buf.atomic_u32(at + 4).load(Ordering::Relaxed);
        (id, len)
    }

    /// Asks for a signal when the device's index moves past `index`.
    pub(super) fn set_used_event(&self, index: u16) {
        let at = self.avail + 4 + 2 * usize::from(self.size);
        // Ordering: Relaxed, the caller's full fence orders it before the look at the index.
        self.buf.atomic_u16(at).store(index, Ordering::Relaxed);
    }

    /// `AVAIL_NO_INTERRUPT` or 0.
    pub(super) fn set_avail_flags(&self, flags: u16) {
        // Ordering: Relaxed, as in `set_used_event`.
        self.buf
            .atomic_u16(self.avail)
            .store(flags, Ordering::Relaxed);
    }

    fn table_offset(&self, head: u16, entry: usize) -> usize {
        self.tables + (usize::from(head) * self.table_entries + entry) * size_of::<Desc>()
    }

    fn store_desc(&self, at: usize, desc: Desc) {
        let rest = u64::from(desc.len) | u64::from(desc.flags) << 32 | u64::from(desc.next) << 48;
        // Ordering: Relaxed, both published by the Release store of the available index.
        self.buf.atomic_u64(at).store(desc.addr, Ordering::Relaxed);
        self.buf.atomic_u64(at + 8).store(rest, Ordering::Relaxed);
    }
}
