//! The driver's half of one block queue: a split ring with `EVENT_IDX` and indirect tables, as
//! Linux has it.
//!
//! Everything but the sector is written once for a whole load, so that a request costs the
//! frontend a few stores: what is measured is the backend.

use std::sync::atomic::{Ordering, fence};
use vm_memory::mmap::MmapRegion;
use vm_memory::{Bytes, VolatileMemory, VolatileSlice};

/// Entries of the ring, and so the most that is in flight.
pub(crate) const RING_SIZE: u16 = 128;
/// Where the parts of the ring lie in the shared memory.
pub(crate) const DESC: u64 = 0;
pub(crate) const AVAIL: u64 = 0x1000;
pub(crate) const USED: u64 = 0x2000;
/// Indirect tables, headers, status bytes and data of the slots.
const TABLES: u64 = 0x4000;
const HEADERS: u64 = 0x8000;
const STATUS: u64 = 0x9000;
const DATA: u64 = 0x1_0000;
/// Bytes between two tables.
const TABLE: u64 = 64;
/// Descriptor flags.
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// The driver's wish for a call, and the device's for a kick.
const USED_EVENT: u64 = AVAIL + 4 + 2 * RING_SIZE as u64;
const AVAIL_EVENT: u64 = USED + 4 + 8 * RING_SIZE as u64;

/// A ring in memory that the backend maps too.
pub(crate) struct Driver {
    map: MmapRegion,
    /// Guest-physical address of the memory.
    base: u64,
    avail: u16,
    /// `avail` when a kick was last thought of.
    told: u16,
    used: u16,
}

impl Driver {
    /// Bytes of memory for a load of so many bytes in flight.
    pub(crate) fn memory_len(data: usize) -> usize {
        DATA as usize + data
    }

    pub(crate) fn new(map: MmapRegion, base: u64) -> Driver {
        Driver {
            map,
            base,
            avail: 0,
            told: 0,
            used: 0,
        }
    }

    fn memory(&self) -> VolatileSlice<'_, ()> {
        self.map.as_volatile_slice()
    }

    fn put<T: vm_memory::AtomicAccess>(&self, at: u64, value: T, order: Ordering) {
        // Offsets are of the layout above; a load that does not fit is refused at its start.
        let _ = self.memory().store(value, at as usize, order);
    }

    fn get<T: vm_memory::AtomicAccess + Default>(&self, at: u64, order: Ordering) -> T {
        self.memory().load(at as usize, order).unwrap_or_default()
    }

    /// Whether the memory has room for it.
    pub(crate) fn fits(&self, depth: usize, block: usize) -> bool {
        depth <= usize::from(RING_SIZE) && Driver::memory_len(depth * block) <= self.map.size()
    }

    /// Writes the slots' descriptors and headers. Nothing is in flight.
    pub(crate) fn prepare(&self, depth: usize, block: u32, write: bool) {
        let order = Ordering::Relaxed;
        for slot in 0..depth as u64 {
            let table = TABLES + TABLE * slot;
            let data_flags = if write { NEXT } else { NEXT | WRITE };
            let data = DATA + u64::from(block) * slot;
            let chain = [
                (HEADERS + 16 * slot, 16, NEXT),
                (data, block, data_flags),
                (STATUS + slot, 1, WRITE),
            ];
            for (index, (addr, len, flags)) in (0u16..).zip(chain) {
                self.descriptor(table + 16 * u64::from(index), addr, len, flags, index + 1);
            }
            self.descriptor(DESC + 16 * slot, table, 48, INDIRECT, 0);
            self.put(HEADERS + 16 * slot, u32::from(write), order);
        }
    }

    fn descriptor(&self, at: u64, addr: u64, len: u32, flags: u16, next: u16) {
        let order = Ordering::Relaxed;
        self.put(at, self.base + addr, order);
        self.put(at + 8, len, order);
        self.put(at + 12, flags, order);
        self.put(at + 14, next, order);
    }

    /// Makes a slot's request available, at once.
    pub(crate) fn submit(&mut self, slot: u16, sector: u64) {
        let order = Ordering::Relaxed;
        let at = u64::from(slot);
        self.put(HEADERS + 16 * at + 8, sector, order);
        self.put(STATUS + at, 0xffu8, order);
        let entry = AVAIL + 4 + 2 * u64::from(self.avail % RING_SIZE);
        self.put(entry, slot, order);
        self.avail = self.avail.wrapping_add(1);
        // Ordering: Release, so that a backend that sees the index sees the request.
        self.put(AVAIL + 2, self.avail, Ordering::Release);
    }

    /// Whether the backend wants a kick for what was submitted since the last question.
    pub(crate) fn wants_kick(&mut self) -> bool {
        let told = std::mem::replace(&mut self.told, self.avail);
        // Ordering: the index must be out before the event is read; the backend writes its event,
        // fences, and reads the index.
        fence(Ordering::SeqCst);
        let event: u16 = self.get(AVAIL_EVENT, Ordering::Relaxed);
        self.avail.wrapping_sub(event).wrapping_sub(1) < self.avail.wrapping_sub(told)
    }

    /// Asks for a call at the next completion. `false`: there is one already.
    pub(crate) fn want_call(&self) -> bool {
        self.put(USED_EVENT, self.used, Ordering::Relaxed);
        // Ordering: the wish must be out before the index is read; the backend writes the index,
        // fences, and reads the wish.
        fence(Ordering::SeqCst);
        !self.has_completions()
    }

    pub(crate) fn has_completions(&self) -> bool {
        self.get::<u16>(USED + 2, Ordering::Relaxed) != self.used
    }

    /// Takes the slots that are over. `Err`: one that failed, with its status.
    pub(crate) fn reap(&mut self, ready: &mut Vec<u16>) -> Result<(), u8> {
        // Ordering: Acquire, so that the elements and the status are seen with the index.
        let published: u16 = self.get(USED + 2, Ordering::Acquire);
        while self.used != published {
            let entry = USED + 4 + 8 * u64::from(self.used % RING_SIZE);
            // Below RING_SIZE, as it was submitted.
            let slot = self.get::<u32>(entry, Ordering::Relaxed) as u16;
            self.used = self.used.wrapping_add(1);
            match self.get(STATUS + u64::from(slot), Ordering::Relaxed) {
                0u8 => ready.push(slot),
                status => return Err(status),
            }
        }
        Ok(())
    }
}
