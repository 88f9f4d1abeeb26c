//! The split ring (virtio 1.3 §2.7).
//!
//! `virtio_queue::Queue` keeps the indices, checks the alignment of addresses and does the
//! notification hand-shake towards the driver. Three things are ours, because its own are not
//! fit for a driver that is not trusted: the walk of a chain (its iterator ends silently on a
//! malformed chain, logs each one and follows indirect tables of 65,535 entries), the used ring
//! (it publishes element by element), and the test whether to signal (it ignores `NO_INTERRUPT`).

use super::chain::{Near, indirect_entries};
use super::crash::{Point, hit};
use super::dirty::RingDirty;
use super::inflight::{QueueLog, SplitLog};
use super::{
    Completion, DeviceRing, Mapped, OwnedChain, Retire, RingError, RingPart, RingState, at,
    avail_event_offset, map_part, used_elem_offset, used_event_offset,
};
use crate::limits::MAX_RING_SIZE;
use pv_abi::limits::MAX_CHAIN_LEN;
use pv_abi::virtio::{AVAIL_NO_INTERRUPT, Desc, UsedElem, desc_flag, split};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use zerocopy::{FromBytes, IntoBytes};

/// In the available ring.
const AVAIL_INDEX: u64 = 2;
/// How far ahead descriptors are asked for: about as long as memory takes.
const AHEAD: u16 = 6;
/// In the used ring.
const USED_INDEX: u64 = 2;

/// A ring's registers, frozen when the ring is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingConfig {
    /// Entries: a power of two.
    pub size: u16,
    /// Descriptor table, aligned to 16.
    pub desc: GuestAddress,
    /// Available ring, aligned to 2.
    pub avail: GuestAddress,
    /// Used ring, aligned to 4.
    pub used: GuestAddress,
    /// `EVENT_IDX` was negotiated.
    pub event_idx: bool,
    /// `INDIRECT_DESC` was negotiated.
    pub indirect: bool,
    /// `IN_ORDER` was negotiated, which a device may offer that completes chains in the order in
    /// which it took them.
    pub in_order: bool,
}

/// The device's half of a split virtqueue.
#[derive(Debug)]
pub struct SplitRing {
    queue: Queue,
    mem: Arc<GuestMemoryMmap>,
    size: u16,
    desc: GuestAddress,
    avail: GuestAddress,
    used: GuestAddress,
    desc_part: Mapped,
    avail_part: Mapped,
    used_part: Mapped,
    event_idx: bool,
    indirect: bool,
    in_order: bool,
    /// The driver's available index when it was last read; entries up to here may be taken.
    known_avail: u16,
    /// `next_used` when `should_signal` was last asked.
    signalled: u16,
    /// The first answer after a start is always yes: what the driver waits for is not known.
    signalled_valid: bool,
    /// Whether the driver was asked for kicks.
    armed: bool,
    in_flight: Vec<u64>,
    in_flight_count: usize,
    retired: Option<Retire>,
    near: Near,
    /// Heads that the last process had in flight: given out before new ones.
    resubmit: VecDeque<u16>,
    log: Option<SplitLog>,
    dirty: Option<RingDirty>,
}

impl SplitRing {
    /// Sets a ring up in `mem`, at the indices zero.
    pub fn new(config: RingConfig, mem: Arc<GuestMemoryMmap>) -> Result<SplitRing, RingError> {
        let size = config.size;
        if size > MAX_RING_SIZE || !size.is_power_of_two() {
            return Err(RingError::BadSize(size));
        }
        let desc_part = map_part(
            &mem,
            RingPart::DescriptorTable,
            config.desc,
            16,
            split::desc_len(size),
        )?;
        let avail_part = map_part(
            &mem,
            RingPart::AvailableRing,
            config.avail,
            2,
            split::avail_len(size),
        )?;
        let used_part = map_part(
            &mem,
            RingPart::UsedRing,
            config.used,
            4,
            split::used_len(size),
        )?;
        // The alignments were checked above; a size the queue does not take was refused.
        let mut queue = Queue::new(size).map_err(|_| RingError::BadSize(size))?;
        let misaligned = |part, addr: GuestAddress| RingError::Misaligned { part, addr: addr.0 };
        queue
            .try_set_desc_table_address(config.desc)
            .map_err(|_| misaligned(RingPart::DescriptorTable, config.desc))?;
        queue
            .try_set_avail_ring_address(config.avail)
            .map_err(|_| misaligned(RingPart::AvailableRing, config.avail))?;
        queue
            .try_set_used_ring_address(config.used)
            .map_err(|_| misaligned(RingPart::UsedRing, config.used))?;
        queue.set_event_idx(config.event_idx);
        queue.set_ready(true);
        Ok(SplitRing {
            queue,
            mem,
            size,
            desc: config.desc,
            avail: config.avail,
            used: config.used,
            desc_part,
            avail_part,
            used_part,
            event_idx: config.event_idx,
            indirect: config.indirect,
            in_order: config.in_order,
            known_avail: 0,
            signalled: 0,
            signalled_valid: false,
            armed: true,
            in_flight: vec![0; usize::from(size).div_ceil(64)],
            in_flight_count: 0,
            retired: None,
            near: Near::default(),
            resubmit: VecDeque::new(),
            log: None,
            dirty: None,
        })
    }

    /// Keeps an in-flight log from here on. What an old one holds decides where the ring goes on,
    /// and its chains are given out first.
    pub(crate) fn attach_log(&mut self, queue: QueueLog) -> Result<(), RingError> {
        let used = self.published_used();
        let (log, heads) = SplitLog::open(queue, self.size, used)?;
        if let Some(heads) = heads {
            // At most as many as there are entries.
            let count = heads.len() as u16;
            self.restore(RingState {
                next_avail: used.wrapping_add(count),
                next_used: used,
            });
            for head in &heads {
                self.set_in_flight(*head, true);
            }
            self.resubmit = heads.into();
        }
        self.log = Some(log);
        Ok(())
    }

    pub(crate) fn is_logged(&self) -> bool {
        self.log.is_some()
    }

    /// Marks dirty what is written from here on.
    pub(crate) fn attach_dirty(&mut self, dirty: RingDirty) {
        self.dirty = Some(dirty);
    }

    /// Entries of the ring.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The registers that it was made with.
    pub fn config(&self) -> RingConfig {
        RingConfig {
            size: self.size,
            desc: self.desc,
            avail: self.avail,
            used: self.used,
            event_idx: self.event_idx,
            indirect: self.indirect,
            in_order: self.in_order,
        }
    }

    /// The memory that the ring and its buffers lie in.
    pub fn memory(&self) -> &Arc<GuestMemoryMmap> {
        &self.mem
    }

    /// Why the ring was retired, if it was.
    pub fn retired(&self) -> Option<Retire> {
        self.retired
    }

    /// The used index that stands in memory: where a ring goes on whose last device is gone.
    pub fn published_used(&self) -> u16 {
        self.queue
            .used_idx(&*self.mem, Ordering::Acquire)
            .map_or(0, |index| index.0)
    }

    /// Gives back the chain that was taken last, untouched: it will be taken again.
    pub(super) fn put_back(&mut self, head: u16) {
        // Under a log it stays in flight there, and comes first in the next ring.
        if self.log.is_none() && self.set_in_flight(head, false) {
            let next = self.queue.next_avail();
            self.queue.set_next_avail(next.wrapping_sub(1));
            if let Some(dirty) = &mut self.dirty {
                dirty.given_back(head);
            }
        }
    }

    fn retire<T>(&mut self, reason: Retire) -> Result<T, Retire> {
        Err(*self.retired.get_or_insert(reason))
    }

    #[inline]
    fn pop_inner(&mut self, chain: &mut OwnedChain) -> Result<bool, Retire> {
        if let Some(head) = self.resubmit.front().copied() {
            self.walk(head, chain)?;
            self.resubmit.pop_front();
            hit(Point::P2);
            return Ok(true);
        }
        let next = self.queue.next_avail();
        if next == self.known_avail {
            // Ordering: Acquire pairs with the driver's release of the index, so the entries and
            // descriptors before it are seen.
            let avail = self.avail_part.load16(AVAIL_INDEX, Ordering::Acquire)?;
            let moved = avail.wrapping_sub(next);
            if moved > self.size {
                let size = self.size;
                return Err(Retire::AvailJump { moved, size });
            }
            if moved == 0 {
                return Ok(false);
            }
            self.known_avail = avail;
        }
        // Ordering: Relaxed, the index was acquired.
        let slot = 4 + 2 * u64::from(next % self.size);
        let head = self.avail_part.load16(slot, Ordering::Relaxed)?;
        if head >= self.size {
            return Err(Retire::BadHead { head });
        }
        if self.known_avail.wrapping_sub(next) > AHEAD {
            let soon = 4 + 2 * u64::from(next.wrapping_add(AHEAD) % self.size);
            let soon = self.avail_part.load16(soon, Ordering::Relaxed)?;
            self.desc_part.prefetch(16 * u64::from(soon));
        }
        if self.is_in_flight(head) {
            return Err(Retire::HeadInFlight { head });
        }
        if let Some(log) = &mut self.log {
            log.taken(head);
        }
        hit(Point::P1);
        if let Err(reason) = self.walk(head, chain) {
            // Not taken: it would be found again at the same place.
            if let Some(log) = &self.log {
                log.given_back(head);
            }
            return Err(reason);
        }
        hit(Point::P2);
        self.queue.set_next_avail(next.wrapping_add(1));
        self.set_in_flight(head, true);
        // Kicks are of no use while the device is looking anyway. With EVENT_IDX they have already
        // stopped: the index has passed the event.
        if self.event_idx {
            self.armed = false;
        } else if self.armed {
            self.disarm_inner()?;
        }
        Ok(true)
    }

    fn disarm_inner(&mut self) -> Result<(), Retire> {
        if !std::mem::take(&mut self.armed) {
            return Ok(());
        }
        if self.event_idx {
            // An event that the driver's index has passed.
            let event = self.queue.next_avail().wrapping_sub(1);
            let offset = avail_event_offset(self.size);
            // Ordering: Relaxed; a kick that comes all the same is a wake for nothing.
            self.used_part.store16(offset, event, Ordering::Relaxed)?;
            self.dirty_used(offset, 2);
        } else {
            self.queue
                .disable_notification(&*self.mem)
                .map_err(|_| Retire::RingAccess)?;
            self.dirty_used(0, 2);
        }
        Ok(())
    }

    /// Walks a chain once. Every descriptor is copied before it is looked at, so a driver that
    /// changes it meanwhile changes nothing here.
    #[inline]
    fn walk(&mut self, head: u16, chain: &mut OwnedChain) -> Result<(), Retire> {
        chain.restart(head);
        let desc = self.descriptor(None, head)?;
        if desc.flags & (desc_flag::NEXT | desc_flag::INDIRECT) == 0 {
            let writable = desc.flags & desc_flag::WRITE != 0;
            return chain.take((&self.mem, &mut self.near), desc.addr, desc.len, writable);
        }
        self.walk_on(desc, chain)
    }

    /// Walks on from a chain's first descriptor.
    fn walk_on(&mut self, first: Desc, chain: &mut OwnedChain) -> Result<(), Retire> {
        let head = chain.head();
        let mut first = Some(first);
        let (mut table, mut count, mut indirect) = (None, self.size, false);
        // Descriptors taken from this table, and from both.
        let (mut taken, mut total) = (0u16, 0usize);
        let mut next = head;
        loop {
            if taken >= count {
                return Err(Retire::Loop { head });
            }
            let desc = match first.take() {
                Some(first) => first,
                None => self.descriptor(table, next)?,
            };
            taken += 1;
            if desc.flags & desc_flag::INDIRECT != 0 {
                if indirect {
                    return Err(Retire::NestedIndirect);
                }
                let more = desc.flags & desc_flag::NEXT != 0;
                let place = (desc.addr, desc.len);
                count = indirect_entries(&self.mem, self.indirect, place, more)?;
                table = Some(GuestAddress(desc.addr));
                (indirect, taken, next) = (true, 0, 0);
                continue;
            }
            total += 1;
            if total > MAX_CHAIN_LEN {
                return Err(Retire::TooLong { head });
            }
            let writable = desc.flags & desc_flag::WRITE != 0;
            chain.take((&self.mem, &mut self.near), desc.addr, desc.len, writable)?;
            if desc.flags & desc_flag::NEXT == 0 {
                return Ok(());
            }
            if desc.next >= count {
                return Err(Retire::BadNext { next: desc.next });
            }
            next = desc.next;
        }
    }

    /// A descriptor of the ring's own table, or of an indirect one.
    fn descriptor(&self, table: Option<GuestAddress>, index: u16) -> Result<Desc, Retire> {
        let offset = 16 * u64::from(index);
        let Some(table) = table else {
            let words = [
                // Ordering: Relaxed, the index was acquired.
                self.desc_part.load64(offset, Ordering::Relaxed)?,
                self.desc_part.load64(offset + 8, Ordering::Relaxed)?,
            ];
            return Desc::read_from_bytes(words.as_bytes()).map_err(|_| Retire::RingAccess);
        };
        let mut bytes = [0; size_of::<Desc>()];
        self.mem
            .read_slice(&mut bytes, at(table, offset))
            .map_err(|_| Retire::RingAccess)?;
        Desc::read_from_bytes(&bytes).map_err(|_| Retire::RingAccess)
    }

    fn is_in_flight(&self, head: u16) -> bool {
        self.in_flight
            .get(usize::from(head / 64))
            .is_some_and(|word| word >> (head % 64) & 1 == 1)
    }

    /// Whether this changed anything.
    fn set_in_flight(&mut self, head: u16, value: bool) -> bool {
        if self.is_in_flight(head) == value {
            return false;
        }
        let Some(word) = self.in_flight.get_mut(usize::from(head / 64)) else {
            return false;
        };
        *word ^= 1 << (head % 64);
        if value {
            self.in_flight_count += 1;
        } else {
            self.in_flight_count -= 1;
        }
        true
    }

    fn publish(&mut self, batch: &[Completion]) -> Result<(), Retire> {
        let mut next = self.queue.next_used();
        for done in batch {
            if !self.set_in_flight(done.head, false) {
                debug_assert!(false, "head {} completed but not in flight", done.head);
                continue;
            }
            hit(Point::P3);
            if let Some(dirty) = &mut self.dirty {
                dirty.given_back(done.head);
            }
            let offset = used_elem_offset(next, self.size);
            self.used_part.store32(offset, u32::from(done.head))?;
            self.used_part.store32(offset + 4, done.written)?;
            self.dirty_used(offset, size_of::<UsedElem>() as u64);
            if let Some(log) = &self.log {
                log.batched(done.head);
            }
            next = next.wrapping_add(1);
            hit(Point::P4);
        }
        self.queue.set_next_used(next);
        // Ordering: Release, so a driver that sees the index sees the elements and the data.
        self.used_part
            .store16(USED_INDEX, next, Ordering::Release)?;
        hit(Point::P5);
        if let Some(log) = &self.log {
            for done in batch.iter().filter(|done| done.head < self.size) {
                log.given_back(done.head);
                hit(Point::P6);
            }
            log.batch_done(next);
        }
        self.dirty_used(2, 2);
        if let Some(dirty) = &self.dirty {
            dirty.signal();
        }
        Ok(())
    }

    /// Bytes of the used ring were written.
    fn dirty_used(&self, offset: u64, len: u64) {
        if let Some(dirty) = &self.dirty {
            dirty.ring_written(offset, len);
        }
    }

    fn wants_signal(&mut self) -> Result<bool, Retire> {
        let (old, new) = (self.signalled, self.queue.next_used());
        let known = std::mem::replace(&mut self.signalled_valid, true);
        if known && old == new {
            return Ok(false);
        }
        self.signalled = new;
        // Ordering: the used index must be out before the driver's event field is read; the
        // driver writes its event, fences, and reads the index. One of the two sees the other.
        fence(Ordering::SeqCst);
        let offset = if self.event_idx {
            used_event_offset(self.size)
        } else {
            0
        };
        let field = self.avail_part.load16(offset, Ordering::Relaxed)?;
        Ok(if self.event_idx {
            !known || split::need_event(field, new, old)
        } else {
            field & AVAIL_NO_INTERRUPT == 0
        })
    }
}

impl DeviceRing for SplitRing {
    #[inline]
    fn pop_into(&mut self, chain: &mut OwnedChain) -> Result<bool, Retire> {
        if let Some(reason) = self.retired {
            return Err(reason);
        }
        match self.pop_inner(chain) {
            Ok(taken) => {
                if taken && let Some(dirty) = &mut self.dirty {
                    dirty.taken(chain);
                }
                Ok(taken)
            }
            Err(reason) => self.retire(reason),
        }
    }

    fn complete(&mut self, batch: &[Completion]) {
        if batch.is_empty() {
            return;
        }
        if let Err(reason) = self.publish(batch) {
            self.retired.get_or_insert(reason);
        }
    }

    fn arm(&mut self) -> bool {
        if self.retired.is_some() {
            return false;
        }
        self.armed = true;
        // Writes `avail_event` or the flags, fences, and reads the available index again.
        let more = self.queue.enable_notification(&*self.mem);
        if self.event_idx {
            self.dirty_used(avail_event_offset(self.size), 2);
        } else {
            self.dirty_used(0, 2);
        }
        match more {
            Ok(more) => more || !self.resubmit.is_empty(),
            Err(_) => {
                self.retired = Some(Retire::RingAccess);
                false
            }
        }
    }

    fn disarm(&mut self) {
        if self.retired.is_none()
            && let Err(reason) = self.disarm_inner()
        {
            self.retired = Some(reason);
        }
    }

    fn has_more(&self) -> bool {
        // Ordering: Relaxed, `pop` acquires before it believes anything.
        self.retired.is_none()
            && (!self.resubmit.is_empty()
                || self
                    .avail_part
                    .load16(AVAIL_INDEX, Ordering::Relaxed)
                    .is_ok_and(|index| index != self.queue.next_avail()))
    }

    fn should_signal(&mut self) -> bool {
        match self.wants_signal() {
            Ok(wanted) => wanted,
            Err(reason) => {
                self.retired.get_or_insert(reason);
                false
            }
        }
    }

    fn in_flight(&self) -> usize {
        self.in_flight_count - self.resubmit.len()
    }

    fn save(&self) -> RingState {
        RingState {
            next_avail: self.queue.next_avail(),
            next_used: self.queue.next_used(),
        }
    }

    fn restore(&mut self, state: RingState) {
        self.queue.set_next_avail(state.next_avail);
        self.queue.set_next_used(state.next_used);
        self.known_avail = state.next_avail;
        self.signalled = state.next_used;
        self.signalled_valid = false;
        self.in_flight.fill(0);
        self.in_flight_count = 0;
        self.resubmit.clear();
        self.armed = true;
    }
}
