//! The packed ring (virtio 1.3 §2.8).
//!
//! One ring of descriptors: the driver makes them available, the device overwrites them with used
//! ones, and the flags of each say whose it is. A chain is read once, checked, and named by its
//! buffer id from then on; ids are below the ring's size, as every driver has it.

use super::chain::{Near, indirect_entries};
use super::crash::{Point, hit};
use super::dirty::RingDirty;
use super::inflight::{LoggedDesc, PackedLog, QueueLog};
use super::{
    Completion, DeviceRing, Mapped, OwnedChain, Retire, RingConfig, RingError, RingPart, RingState,
    at, map_part,
};
use crate::limits::MAX_RING_SIZE;
use pv_abi::limits::MAX_CHAIN_LEN;
use pv_abi::virtio::desc_flag::{INDIRECT, NEXT, WRITE};
use pv_abi::virtio::split::need_event;
use smallvec::SmallVec;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use zerocopy::IntoBytes;

/// Descriptor flags: available, in laps in which the wrap counter is one.
const AVAIL: u16 = 1 << 7;
/// Descriptor flags: used, in laps in which the wrap counter is one.
const USED: u16 = 1 << 15;
/// Bytes of a descriptor.
const DESC: u64 = 16;
/// In a descriptor.
const AT_LEN: u64 = 8;
const AT_ID: u64 = 12;
const AT_FLAGS: u64 = 14;
/// In an event suppression structure.
const AT_EVENT_FLAGS: u64 = 2;
/// Event flags: notify always, never, at one descriptor.
const ENABLE: u16 = 0;
const DISABLE: u16 = 1;
const AT_DESC: u16 = 2;
/// In [`RingState`] and in events: the wrap counter.
const WRAP: u16 = 1 << 15;

/// A descriptor of the ring: its index, and the wrap counter of the lap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Position {
    index: u16,
    wrap: bool,
}

impl Position {
    /// `count` is at most `size`.
    fn advanced(self, count: u16, size: u16) -> Position {
        let index = self.index + count;
        if index >= size {
            Position {
                index: index - size,
                wrap: !self.wrap,
            }
        } else {
            Position { index, ..self }
        }
    }

    /// `count` is at most `size`.
    fn moved_back(self, count: u16, size: u16) -> Position {
        match self.index.checked_sub(count) {
            Some(index) => Position { index, ..self },
            None => Position {
                index: self.index + (size - count),
                wrap: !self.wrap,
            },
        }
    }

    fn from_state(state: u16) -> Position {
        Position {
            index: state & !WRAP,
            wrap: state & WRAP != 0,
        }
    }

    fn to_state(self) -> u16 {
        self.index | if self.wrap { WRAP } else { 0 }
    }

    fn available(self, flags: u16) -> bool {
        (flags & AVAIL != 0) == self.wrap && (flags & USED != 0) != self.wrap
    }
}

/// A chain in flight.
#[derive(Clone, Copy, Debug, Default)]
struct Taken {
    /// Descriptors that it takes in the ring; zero if this id is not in flight.
    count: u16,
    /// Where it is logged.
    entry: u16,
}

/// Descriptors of a chain; most have a few.
type Descs = SmallVec<[LoggedDesc; 4]>;

/// The parts of a descriptor.
fn parse_desc([addr, rest]: [u64; 2]) -> LoggedDesc {
    LoggedDesc {
        addr,
        // 32, 16 and 16 bits.
        len: rest as u32,
        id: (rest >> 32) as u16,
        flags: (rest >> 48) as u16,
    }
}

/// A chain that the last process had in flight.
#[derive(Debug)]
struct Resubmit {
    id: u16,
    descs: Vec<LoggedDesc>,
}

/// The device's half of a packed virtqueue. `desc`, `avail` and `used` of its [`RingConfig`] are
/// the descriptor ring, the driver's and the device's event suppression structure.
#[derive(Debug)]
pub struct PackedRing {
    config: RingConfig,
    mem: Arc<GuestMemoryMmap>,
    desc_part: Mapped,
    driver_part: Mapped,
    device_part: Mapped,
    next_avail: Position,
    next_used: Position,
    /// By buffer id.
    taken: Vec<Taken>,
    in_flight: usize,
    /// Descriptors in flight.
    outstanding: u16,
    /// Descriptors used since `should_signal` was last asked.
    unsignalled: u16,
    /// The first answer after a start is always yes: what the driver waits for is not known.
    signalled_valid: bool,
    /// Whether the driver was asked for kicks.
    armed: bool,
    retired: Option<Retire>,
    near: Near,
    resubmit: VecDeque<Resubmit>,
    log: Option<PackedLog>,
    dirty: Option<RingDirty>,
}

impl PackedRing {
    /// Sets a ring up in `mem`, at its beginning.
    pub fn new(config: RingConfig, mem: Arc<GuestMemoryMmap>) -> Result<PackedRing, RingError> {
        let size = config.size;
        if size == 0 || size > MAX_RING_SIZE {
            return Err(RingError::BadSize(size));
        }
        let len = DESC * u64::from(size);
        let desc_part = map_part(&mem, RingPart::DescriptorRing, config.desc, 16, len)?;
        let driver_part = map_part(&mem, RingPart::DriverEvent, config.avail, 4, 4)?;
        let device_part = map_part(&mem, RingPart::DeviceEvent, config.used, 4, 4)?;
        let start = Position {
            index: 0,
            wrap: true,
        };
        Ok(PackedRing {
            config,
            mem,
            desc_part,
            driver_part,
            device_part,
            next_avail: start,
            next_used: start,
            taken: vec![Taken::default(); usize::from(size)],
            in_flight: 0,
            outstanding: 0,
            unsignalled: 0,
            signalled_valid: false,
            armed: true,
            retired: None,
            near: Near::default(),
            resubmit: VecDeque::new(),
            log: None,
            dirty: None,
        })
    }

    /// Entries of the ring.
    pub fn size(&self) -> u16 {
        self.config.size
    }

    /// The registers that it was made with.
    pub fn config(&self) -> RingConfig {
        self.config
    }

    /// The memory that the ring and its buffers lie in.
    pub fn memory(&self) -> &Arc<GuestMemoryMmap> {
        &self.mem
    }

    /// Why the ring was retired, if it was.
    pub fn retired(&self) -> Option<Retire> {
        self.retired
    }

    /// Goes on from what a frontend said. Some say zero for a new ring, which would be the wrap
    /// counters of every second lap: a ring in which nothing was ever used is at its first.
    pub(crate) fn set_base(&mut self, state: RingState) -> Result<(), RingError> {
        for value in [state.next_avail, state.next_used] {
            if value & !WRAP >= self.size() {
                return Err(RingError::BadState(value));
            }
        }
        let mut state = state;
        if state == RingState::default() && self.is_untouched() {
            (state.next_avail, state.next_used) = (WRAP, WRAP);
        }
        self.restore(state);
        Ok(())
    }

    fn is_untouched(&self) -> bool {
        (0..self.size()).all(|index| self.flags(index).is_ok_and(|flags| flags & USED == 0))
    }

    /// Keeps an in-flight log from here on. What an old one holds decides where the ring goes on,
    /// and its chains are given out first.
    pub(crate) fn attach_log(&mut self, queue: QueueLog) -> Result<(), RingError> {
        let fresh = (self.next_used.index, self.next_used.wrap);
        let (log, recovered) = PackedLog::open(queue, self.size(), fresh, |(index, wrap)| {
            let flags = self.flags(index);
            flags.is_ok_and(|flags| !Position { index, wrap }.available(flags))
        })?;
        self.log = Some(log);
        let Some(recovered) = recovered else {
            return Ok(());
        };
        let (index, wrap) = recovered.used;
        let used = Position { index, wrap };
        let state = used.to_state();
        self.restore(RingState {
            next_avail: state,
            next_used: state,
        });
        for (entry, descs) in recovered.chains {
            let id = descs.last().map_or(u16::MAX, |desc| desc.id);
            // The log's reader has bounded the sum by the ring's size.
            self.mark_taken(id, descs.len() as u16, entry)
                .map_err(|_| RingError::BadInflightLog)?;
            self.resubmit.push_back(Resubmit { id, descs });
        }
        self.next_avail = used.advanced(self.outstanding, self.size());
        Ok(())
    }

    pub(crate) fn is_logged(&self) -> bool {
        self.log.is_some()
    }

    /// Marks dirty what is written from here on.
    pub(crate) fn attach_dirty(&mut self, dirty: RingDirty) {
        self.dirty = Some(dirty);
    }

    fn flags(&self, index: u16) -> Result<u16, Retire> {
        let offset = DESC * u64::from(index) + AT_FLAGS;
        // Ordering: Acquire pairs with the driver's release of the flags, so the rest of the
        // chain is seen.
        self.desc_part.load16(offset, Ordering::Acquire)
    }

    /// A descriptor of the ring.
    fn ring_desc(&self, index: u16) -> Result<LoggedDesc, Retire> {
        let offset = DESC * u64::from(index);
        let words = [
            self.desc_part.load64(offset)?,
            self.desc_part.load64(offset + 8)?,
        ];
        Ok(parse_desc(words))
    }

    /// A descriptor of an indirect table.
    fn table_desc(&self, addr: GuestAddress) -> Result<LoggedDesc, Retire> {
        let mut words = [0u64; 2];
        self.mem
            .read_slice(words.as_mut_bytes(), addr)
            .map_err(|_| Retire::RingAccess)?;
        Ok(parse_desc(words.map(u64::from_le)))
    }

    #[inline]
    fn pop_inner(&mut self, chain: &mut OwnedChain) -> Result<bool, Retire> {
        if let Some(old) = self.resubmit.pop_front() {
            if let Err(reason) = self.build(old.id, &old.descs, chain) {
                self.resubmit.push_front(old);
                return Err(reason);
            }
            hit(Point::P2);
            return Ok(true);
        }
        let first = self.next_avail;
        if !first.available(self.flags(first.index)?) {
            return Ok(false);
        }
        // Most chains are one descriptor.
        let one = self.ring_desc(first.index)?;
        let (single, several);
        let descs: &[LoggedDesc] = if one.flags & NEXT == 0 {
            single = [one];
            &single
        } else {
            several = self.collect(one, first.index)?;
            &several
        };
        // `collect` takes at most the ring's size.
        let count = descs.len() as u16;
        let id = descs.last().map_or(u16::MAX, |desc| desc.id);
        self.mark_taken(id, count, 0)?;
        let entry = match &mut self.log {
            Some(log) => log.taken(descs).ok_or(Retire::RingAccess)?,
            None => 0,
        };
        if let Some(taken) = self.taken.get_mut(usize::from(id)) {
            taken.entry = entry;
        }
        hit(Point::P1);
        if let Err(reason) = self.build(id, descs, chain) {
            // Not taken: it would be found again at the same place.
            self.clear_taken(id);
            if let Some(log) = &self.log {
                log.not_taken(entry);
            }
            return Err(reason);
        }
        hit(Point::P2);
        self.next_avail = first.advanced(count, self.size());
        if std::mem::take(&mut self.armed) {
            // Kicks are of no use while the device is looking anyway.
            self.set_event_flags(DISABLE)?;
        }
        Ok(true)
    }

    /// Copies the descriptors of a chain out of the ring; `first`, at `index`, was copied already.
    fn collect(&self, first: LoggedDesc, index: u16) -> Result<Descs, Retire> {
        let mut descs = Descs::new();
        let (mut desc, mut index) = (first, index);
        loop {
            descs.push(desc);
            if desc.flags & NEXT == 0 {
                return Ok(descs);
            }
            let head = desc.id;
            if descs.len() >= usize::from(self.size()) {
                return Err(Retire::Loop { head });
            }
            if descs.len() >= MAX_CHAIN_LEN {
                return Err(Retire::TooLong { head });
            }
            index = if index + 1 == self.size() {
                0
            } else {
                index + 1
            };
            desc = self.ring_desc(index)?;
        }
    }

    /// Descriptors to a chain, each looked at as it was copied.
    #[inline]
    fn build(
        &mut self,
        id: u16,
        descs: &[LoggedDesc],
        chain: &mut OwnedChain,
    ) -> Result<(), Retire> {
        chain.restart(id);
        let mut total = 0;
        for desc in descs {
            if desc.flags & INDIRECT == 0 {
                total += 1;
                let place = (&*self.mem, &mut self.near);
                chain.take(place, desc.addr, desc.len, desc.flags & WRITE != 0)?;
                continue;
            }
            let more = desc.flags & NEXT != 0;
            let place = (desc.addr, desc.len);
            let count = indirect_entries(&self.mem, self.config.indirect, place, more)?;
            total += usize::from(count);
            // All entries belong to the chain, in order (virtio 1.3 §2.8.7).
            for n in 0..u64::from(count) {
                let inner = self.table_desc(at(GuestAddress(desc.addr), DESC * n))?;
                if inner.flags & INDIRECT != 0 {
                    return Err(Retire::NestedIndirect);
                }
                let place = (&*self.mem, &mut self.near);
                chain.take(place, inner.addr, inner.len, inner.flags & WRITE != 0)?;
            }
        }
        if total > MAX_CHAIN_LEN {
            return Err(Retire::TooLong { head: id });
        }
        Ok(())
    }

    fn mark_taken(&mut self, id: u16, count: u16, entry: u16) -> Result<(), Retire> {
        let size = self.size();
        let slot = self.taken.get_mut(usize::from(id));
        let slot = slot.ok_or(Retire::BadHead { head: id })?;
        if slot.count != 0 {
            return Err(Retire::HeadInFlight { head: id });
        }
        let moved = self.outstanding + count;
        if moved > size {
            return Err(Retire::AvailJump { moved, size });
        }
        *slot = Taken { count, entry };
        self.outstanding = moved;
        self.in_flight += 1;
        Ok(())
    }

    /// Takes an id out of flight; `None` if it was not in it.
    fn clear_taken(&mut self, id: u16) -> Option<Taken> {
        let slot = self.taken.get_mut(usize::from(id))?;
        let taken = std::mem::take(slot);
        if taken.count == 0 {
            return None;
        }
        self.outstanding -= taken.count;
        self.in_flight -= 1;
        Some(taken)
    }

    /// Gives back the chain that was taken last, untouched: it will be taken again.
    pub(super) fn put_back(&mut self, id: u16) {
        // Under a log it stays in flight there, and comes first in the next ring.
        if self.log.is_some() {
            return;
        }
        if let Some(taken) = self.clear_taken(id) {
            self.next_avail = self.next_avail.moved_back(taken.count, self.size());
            if let Some(dirty) = &mut self.dirty {
                dirty.given_back(id);
            }
        }
    }

    fn publish(&mut self, batch: &[Completion]) -> Result<(), Retire> {
        // The flags of a batch's first element go out last, and the rest becomes visible with
        // them. Under a log each element is a batch of its own: one that was written but not
        // published would become visible in the next process with the element before it.
        let mut first = None;
        for done in batch {
            let Some(taken) = self.clear_taken(done.head) else {
                debug_assert!(false, "id {} completed but not in flight", done.head);
                continue;
            };
            hit(Point::P3);
            if let Some(dirty) = &mut self.dirty {
                dirty.given_back(done.head);
            }
            let slot = self.next_used;
            self.next_used = slot.advanced(taken.count, self.size());
            self.unsignalled = self.unsignalled.saturating_add(taken.count);
            self.write_element(slot, done)?;
            if let Some(log) = &self.log {
                log.giving_back(taken.entry, (self.next_used.index, self.next_used.wrap));
                hit(Point::P4);
                self.publish_element(slot, done)?;
                hit(Point::P5);
                log.given_back(taken.entry);
                hit(Point::P6);
                log.commit();
            } else if first.is_none() {
                first = Some((slot, done));
            } else {
                self.publish_element(slot, done)?;
            }
        }
        if let Some((slot, done)) = first {
            self.publish_element(slot, done)?;
        }
        if let Some(dirty) = &self.dirty {
            dirty.signal();
        }
        Ok(())
    }

    fn write_element(&self, slot: Position, done: &Completion) -> Result<(), Retire> {
        let offset = DESC * u64::from(slot.index);
        self.desc_part.store32(offset + AT_LEN, done.written)?;
        // Ordering: Relaxed, the flags publish it.
        self.desc_part
            .store16(offset + AT_ID, done.head, Ordering::Relaxed)
    }

    fn publish_element(&self, slot: Position, done: &Completion) -> Result<(), Retire> {
        let mut flags = if slot.wrap { AVAIL | USED } else { 0 };
        if done.written > 0 {
            flags |= WRITE;
        }
        // Ordering: Release, so a driver that sees the flags sees the element and the data.
        let offset = DESC * u64::from(slot.index);
        self.desc_part
            .store16(offset + AT_FLAGS, flags, Ordering::Release)?;
        if let Some(dirty) = &self.dirty {
            dirty.written(self.config.desc.0.wrapping_add(offset), DESC);
        }
        Ok(())
    }

    fn set_event_flags(&self, flags: u16) -> Result<(), Retire> {
        // Ordering: Release, after the index that the flags make valid.
        self.device_part
            .store16(AT_EVENT_FLAGS, flags, Ordering::Release)?;
        if let Some(dirty) = &self.dirty {
            dirty.written(self.config.used.0, 4);
        }
        Ok(())
    }

    fn arm_inner(&mut self) -> Result<bool, Retire> {
        self.armed = true;
        if self.config.event_idx {
            let event = self.next_avail.to_state();
            // Ordering: Relaxed, the flags publish it.
            self.device_part.store16(0, event, Ordering::Relaxed)?;
            self.set_event_flags(AT_DESC)?;
        } else {
            self.set_event_flags(ENABLE)?;
        }
        // Ordering: the wish for a kick must be out before the ring is looked at again; the
        // driver makes descriptors available, fences, and reads the wish. One of the two sees
        // the other.
        fence(Ordering::SeqCst);
        let next = self.next_avail;
        Ok(!self.resubmit.is_empty() || next.available(self.flags(next.index)?))
    }

    fn wants_signal(&mut self) -> Result<bool, Retire> {
        let known = std::mem::replace(&mut self.signalled_valid, true);
        let count = std::mem::take(&mut self.unsignalled);
        if known && count == 0 {
            return Ok(false);
        }
        // Ordering: the used flags must be out before the driver's event is read; the driver
        // writes its event, fences, and reads the flags. One of the two sees the other.
        fence(Ordering::SeqCst);
        // Ordering: Acquire for the flags, so that the index is at least as new.
        let load = |offset| self.driver_part.load16(offset, Ordering::Acquire);
        Ok(match load(AT_EVENT_FLAGS)? {
            DISABLE => false,
            AT_DESC if self.config.event_idx && known => {
                let wanted = Position::from_state(load(0)?);
                let new = self.next_used.index;
                // In the lap before, seen from the used side's lap.
                let behind = if wanted.wrap == self.next_used.wrap {
                    0
                } else {
                    self.size()
                };
                let old = new.wrapping_sub(count);
                need_event(wanted.index.wrapping_sub(behind), new, old)
            }
            _ => true,
        })
    }
}

impl DeviceRing for PackedRing {
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
            Err(reason) => Err(*self.retired.get_or_insert(reason)),
        }
    }

    fn complete(&mut self, batch: &[Completion]) {
        if let Err(reason) = self.publish(batch) {
            self.retired.get_or_insert(reason);
        }
    }

    fn arm(&mut self) -> bool {
        if self.retired.is_some() {
            return false;
        }
        match self.arm_inner() {
            Ok(more) => more,
            Err(reason) => {
                self.retired = Some(reason);
                false
            }
        }
    }

    fn disarm(&mut self) {
        if self.retired.is_none()
            && std::mem::take(&mut self.armed)
            && let Err(reason) = self.set_event_flags(DISABLE)
        {
            self.retired = Some(reason);
        }
    }

    fn has_more(&self) -> bool {
        let next = self.next_avail;
        self.retired.is_none()
            && (!self.resubmit.is_empty()
                || self
                    .flags(next.index)
                    .is_ok_and(|flags| next.available(flags)))
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
        self.in_flight - self.resubmit.len()
    }

    fn save(&self) -> RingState {
        RingState {
            next_avail: self.next_avail.to_state(),
            next_used: self.next_used.to_state(),
        }
    }

    fn restore(&mut self, state: RingState) {
        let size = self.size();
        let position = |value| {
            let position = Position::from_state(value);
            let index = position.index % size;
            Position { index, ..position }
        };
        self.next_avail = position(state.next_avail);
        self.next_used = position(state.next_used);
        self.taken.fill(Taken::default());
        self.in_flight = 0;
        self.outstanding = 0;
        self.unsignalled = 0;
        self.signalled_valid = false;
        self.armed = true;
        self.resubmit.clear();
    }
}
