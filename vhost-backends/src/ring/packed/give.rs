//! Chains back into a packed ring, and what each side wants to be told.
//!
//! In come completions; out go used descriptors, the first of a batch last, so that the driver
//! sees all of them with it. Where buffers are used in the order in which they were made
//! available, and nothing was to be written to them, one used descriptor stands for many.

use super::PackedRing;
use super::position::{AT_REST, AVAIL, DESC, Position, Taken, USED, flags_of, used_word};
use crate::ring::crash::{Point, hit};
use crate::ring::{Completion, Retire};
use pv_abi::virtio::desc_flag::WRITE;
use pv_abi::virtio::split::need_event;
use std::sync::atomic::{Ordering, fence};

/// In an event suppression structure.
const AT_EVENT_FLAGS: u64 = 2;
/// Event flags: notify always, never, at one descriptor.
const ENABLE: u16 = 0;
const DISABLE: u16 = 1;
const AT_DESC: u16 = 2;

/// A used descriptor that was not written yet.
#[derive(Clone, Copy, Debug)]
struct Element {
    slot: Position,
    id: u16,
    written: u32,
    /// One with the next chain's, if that was taken next, may stand for both.
    joins: bool,
}

impl Element {
    /// Where it goes, and what is written there.
    #[inline]
    fn word(self) -> (Position, u64) {
        let lap = if self.slot.wrap() { AVAIL | USED } else { 0 };
        let wrote = if self.written > 0 { WRITE } else { 0 };
        (self.slot, used_word(self.written, self.id, lap | wrote))
    }
}

impl PackedRing {
    pub(super) fn publish(&mut self, batch: &[Completion]) -> Result<(), Retire> {
        let mut last = None::<Element>;
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
            self.next_used = slot.advanced(taken.count(), self.size());
            self.unsignalled = self.unsignalled.saturating_add(taken.count());
            let element = Element {
                slot,
                id: done.head,
                written: done.written,
                joins: self.may_join(taken, slot, done),
            };
            if self.log.is_some() {
                self.publish_logged(taken, element)?;
                continue;
            }
            match &mut last {
                // The same place, and the id of the last one (virtio 1.3 §2.8.9).
                Some(before) if before.joins && element.joins => before.id = element.id,
                _ => {
                    if let Some(before) = last.replace(element) {
                        self.unwritten.push(before.word());
                    }
                }
            }
        }
        if let Some(element) = last {
            self.unwritten.push(element.word());
        }
        // The driver sees all of them with the first, which goes out last. It is looking at that
        // one's line, which is taken from it once so.
        while let Some((slot, word)) = self.unwritten.pop() {
            self.put_element(slot, word)?;
        }
        if let Some(dirty) = &self.dirty {
            dirty.signal();
        }
        Ok(())
    }

    /// Whether a used descriptor may stand for this chain and others: it is used in its turn, and
    /// the driver need not be told how much was written.
    #[inline]
    fn may_join(&self, taken: Taken, slot: Position, done: &Completion) -> bool {
        self.config.in_order && taken.is_read_only_at(slot) && done.written == 0
    }

    fn publish_logged(&mut self, taken: Taken, element: Element) -> Result<(), Retire> {
        let used = (self.next_used.index(), self.next_used.wrap());
        if let Some(log) = &self.log {
            log.giving_back(taken.entry(), used);
            hit(Point::P4);
            let (slot, word) = element.word();
            self.put_element(slot, word)?;
            hit(Point::P5);
            log.given_back(taken.entry());
            hit(Point::P6);
            log.commit();
        }
        Ok(())
    }

    #[inline]
    fn put_element(&self, slot: Position, word: u64) -> Result<(), Retire> {
        let offset = slot.offset();
        // Ordering: Release, so a driver that sees the flags sees the data, and what was written
        // before; length and id are stored with them.
        self.desc_part
            .store64(offset + AT_REST, word, Ordering::Release)?;
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

    pub(super) fn ask_for_no_kicks(&self) -> Result<(), Retire> {
        self.set_event_flags(DISABLE)
    }

    pub(super) fn ask_for_kicks(&mut self) -> Result<bool, Retire> {
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
        Ok(!self.resubmit.is_empty() || self.is_available(self.next_avail)?)
    }

    /// Whether the driver made the descriptor at this position available.
    #[inline]
    pub(super) fn is_available(&self, position: Position) -> Result<bool, Retire> {
        // Ordering: Relaxed, who takes it acquires it then.
        let rest = (self.desc_part).load64(position.offset() + AT_REST, Ordering::Relaxed)?;
        Ok(position.available(flags_of(rest)))
    }

    pub(super) fn wants_signal(&mut self) -> Result<bool, Retire> {
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
                let new = self.next_used.index();
                // In the lap before, seen from the used side's lap.
                let behind = if wanted.wrap() == self.next_used.wrap() {
                    0
                } else {
                    self.size()
                };
                let old = new.wrapping_sub(count);
                need_event(wanted.index().wrapping_sub(behind), new, old)
            }
            _ => true,
        })
    }
}
