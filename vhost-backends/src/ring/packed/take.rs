//! Chains out of a packed ring.
//!
//! In come descriptors that the driver made available; out goes a chain, each of its descriptors
//! copied once before it is looked at, and its id is in flight from then on.

use super::PackedRing;
use super::position::{AT_REST, DESC, Position, Taken, flags_of, parse};
use crate::ring::chain::indirect_entries;
use crate::ring::crash::{Point, hit};
use crate::ring::inflight::LoggedDesc;
use crate::ring::place::LINE;
use crate::ring::{OwnedChain, Retire, at};
use pv_abi::limits::MAX_CHAIN_LEN;
use pv_abi::virtio::desc_flag::{INDIRECT, NEXT, WRITE};
use smallvec::SmallVec;
use std::sync::atomic::Ordering;
use vm_memory::{Bytes, GuestAddress};
use zerocopy::IntoBytes;

/// How far ahead descriptors are asked for, in bytes.
const AHEAD: u64 = 2 * LINE as u64;

/// Descriptors of a chain; most have a few.
type Descs = SmallVec<[LoggedDesc; 4]>;

impl PackedRing {
    #[inline]
    pub(super) fn take(&mut self, chain: &mut OwnedChain) -> Result<bool, Retire> {
        if !self.resubmit.is_empty() {
            return self.take_again(chain);
        }
        let first = self.next_avail;
        // Ordering: Acquire pairs with the driver's release of the flags, so that the address and
        // the rest of the chain are seen. Length and id come with the flags in one read.
        let rest = (self.desc_part).load64(first.offset() + AT_REST, Ordering::Acquire)?;
        if !first.available(flags_of(rest)) {
            return Ok(false);
        }
        let desc = parse(self.address(first)?, rest);
        let count = if desc.flags & (NEXT | INDIRECT) == 0 && self.log.is_none() {
            // Nearly all chains.
            hit(Point::P1);
            chain.restart(desc.id);
            let writable = desc.flags & WRITE != 0;
            self.fetch_ahead(first, writable);
            let place = (&*self.mem, &mut self.near);
            chain.take(place, desc.addr, desc.len, writable)?;
            self.mark_taken(desc.id, Taken::new(1, first, !writable))?;
            hit(Point::P2);
            1
        } else {
            self.take_several(desc, chain)?
        };
        self.next_avail = first.advanced(count, self.size());
        if std::mem::take(&mut self.armed) {
            // Kicks are of no use while the device is looking anyway.
            self.ask_for_no_kicks()?;
        }
        Ok(true)
    }

    /// Asks for a line of descriptors that comes next, at the start of another one. What is
    /// written to will be written here as well, one used descriptor for each.
    #[inline]
    fn fetch_ahead(&self, at: Position, writable: bool) {
        let offset = at.offset();
        if !offset.is_multiple_of(LINE as u64) {
            return;
        }
        if writable {
            self.desc_part.prefetch_to_write(offset + AHEAD);
        } else {
            self.desc_part.prefetch(offset + AHEAD);
        }
    }

    /// A chain that the last process had in flight.
    #[cold]
    fn take_again(&mut self, chain: &mut OwnedChain) -> Result<bool, Retire> {
        let Some(old) = self.resubmit.pop_front() else {
            return Ok(false);
        };
        if let Err(reason) = self.build(old.id, &old.descs, chain) {
            self.resubmit.push_front(old);
            return Err(reason);
        }
        hit(Point::P2);
        Ok(true)
    }

    /// A chain of several descriptors, or one that is logged. How many descriptors it takes.
    fn take_several(&mut self, first: LoggedDesc, chain: &mut OwnedChain) -> Result<u16, Retire> {
        let descs = self.collect(first)?;
        // `collect` takes at most the ring's size.
        let count = descs.len() as u16;
        let id = descs.last().map_or(u16::MAX, |desc| desc.id);
        self.mark_taken(id, Taken::new(count, self.next_avail, false))?;
        let entry = match &mut self.log {
            Some(log) => log.taken(&descs).ok_or(Retire::RingAccess)?,
            None => 0,
        };
        hit(Point::P1);
        if let Err(reason) = self.build(id, &descs, chain) {
            // Not taken: it would be found again at the same place.
            self.clear_taken(id);
            if let Some(log) = &self.log {
                log.not_taken(entry);
            }
            return Err(reason);
        }
        hit(Point::P2);
        if let Some(taken) = self.taken.get_mut(usize::from(id)) {
            let read_only = chain.writable_len() == 0;
            *taken = Taken::new(count, self.next_avail, read_only).logged(entry);
        }
        Ok(count)
    }

    /// Copies the descriptors of a chain out of the ring; the first one was copied already.
    fn collect(&self, first: LoggedDesc) -> Result<Descs, Retire> {
        let mut descs = Descs::new();
        let (mut desc, mut at) = (first, self.next_avail);
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
            at = at.advanced(1, self.size());
            // Ordering: Relaxed, the first one's flags were acquired.
            let rest = (self.desc_part).load64(at.offset() + AT_REST, Ordering::Relaxed)?;
            desc = parse(self.address(at)?, rest);
        }
    }

    /// The address in a descriptor whose chain is available.
    #[inline]
    fn address(&self, at: Position) -> Result<u64, Retire> {
        // Ordering: Relaxed, the first one's flags were acquired.
        self.desc_part.load64(at.offset(), Ordering::Relaxed)
    }

    /// A descriptor of an indirect table.
    fn table_desc(&self, addr: GuestAddress) -> Result<LoggedDesc, Retire> {
        let mut words = [0u64; 2];
        self.mem
            .read_slice(words.as_mut_bytes(), addr)
            .map_err(|_| Retire::RingAccess)?;
        let [addr, rest] = words.map(u64::from_le);
        Ok(parse(addr, rest))
    }

    /// Descriptors to a chain, each looked at as it was copied.
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

    #[inline]
    pub(super) fn mark_taken(&mut self, id: u16, taken: Taken) -> Result<(), Retire> {
        let size = self.size();
        let slot = self.taken.get_mut(usize::from(id));
        let slot = slot.ok_or(Retire::BadHead { head: id })?;
        if slot.count() != 0 {
            return Err(Retire::HeadInFlight { head: id });
        }
        let moved = self.outstanding + taken.count();
        if moved > size {
            return Err(Retire::AvailJump { moved, size });
        }
        *slot = taken;
        self.outstanding = moved;
        self.in_flight += 1;
        Ok(())
    }

    /// Takes an id out of flight; `None` if it was not in it.
    #[inline]
    pub(super) fn clear_taken(&mut self, id: u16) -> Option<Taken> {
        let slot = self.taken.get_mut(usize::from(id))?;
        let taken = std::mem::take(slot);
        if taken.count() == 0 {
            return None;
        }
        self.outstanding -= taken.count();
        self.in_flight -= 1;
        Some(taken)
    }

    /// Gives back the chain that was taken last, untouched: it will be taken again.
    pub(in crate::ring) fn put_back(&mut self, id: u16) {
        // Under a log it stays in flight there, and comes first in the next ring.
        if self.log.is_some() {
            return;
        }
        if let Some(taken) = self.clear_taken(id) {
            self.next_avail = self.next_avail.moved_back(taken.count(), self.size());
            if let Some(dirty) = &mut self.dirty {
                dirty.given_back(id);
            }
        }
    }
}
