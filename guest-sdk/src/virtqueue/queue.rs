//! The private half: what is free, what is in flight, and what the device may say about it.

use super::{Broken, RingMemory, Segment};
use alloc::vec::Vec;
use core::sync::atomic::{Ordering, fence};
use pv_abi::virtio::{AVAIL_NO_INTERRUPT, Desc, desc_flag};

/// A driver's half of a split virtqueue, whose requests are values of type `T`.
#[derive(Debug)]
pub struct DriverQueue<T> {
    memory: RingMemory,
    event_idx: bool,
    indirect: bool,
    /// The next descriptor of each: of its chain while in flight, of the free list otherwise.
    next: Vec<u16>,
    free_head: u16,
    free: u16,
    /// By head.
    in_flight: Vec<Option<InFlight<T>>>,
    in_flight_count: u16,
    /// The available index as the device sees it, and as it will be after the next publish.
    published: u16,
    added: u16,
    /// The used index up to which completions were taken, and the last one read and believed.
    taken: u16,
    seen: u16,
    /// Numbers requests in the order of their submission.
    sequence: u64,
    broken: Option<Broken>,
}

#[derive(Debug)]
struct InFlight<T> {
    data: T,
    sequence: u64,
    /// Descriptors of the ring that it holds; 1 for an indirect chain.
    descriptors: u16,
    /// Bytes that the device may write.
    room: u32,
    /// Position in the available ring.
    position: u16,
}

/// A completed request.
#[derive(Debug)]
pub struct Used<T> {
    /// The driver's value.
    pub data: T,
    /// Bytes that the device says it wrote; at most what it could write.
    pub written: u32,
}

/// A request that was not taken, with the driver's value.
#[derive(Debug)]
pub struct AddError<T> {
    /// The driver's value.
    pub data: T,
    /// Why.
    pub reason: Refused,
}

/// Why a request was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// Not enough free descriptors; completions make room.
    Full,
    /// No segments, more than the ring has entries, or too many bytes: a bug of the driver.
    BadChain,
    /// The queue is broken.
    Broken(Broken),
}

impl<T> DriverQueue<T> {
    /// An empty queue over this memory, which the device must not be using.
    pub fn new(memory: RingMemory, event_idx: bool, indirect: bool) -> Self {
        let size = memory.size();
        let mut queue = DriverQueue {
            memory,
            event_idx,
            indirect,
            next: Vec::with_capacity(usize::from(size)),
            free_head: 0,
            free: 0,
            in_flight: core::iter::repeat_with(|| None)
                .take(usize::from(size))
                .collect(),
            in_flight_count: 0,
            published: 0,
            added: 0,
            taken: 0,
            seen: 0,
            sequence: 0,
            broken: None,
        };
        queue.start(event_idx, indirect);
        queue
    }

    /// The memory, for its addresses.
    pub fn memory(&self) -> &RingMemory {
        &self.memory
    }

    /// Requests that were added and not completed.
    pub fn in_flight(&self) -> u16 {
        self.in_flight_count
    }

    /// Why the queue is broken, if it is.
    pub fn broken(&self) -> Option<Broken> {
        self.broken
    }

    /// Adds a request; the device sees it at the next [`publish`](Self::publish).
    ///
    /// # Errors
    ///
    /// [`AddError`], with the value; the queue is then as it was before.
    pub fn add(&mut self, segments: &[Segment], data: T) -> Result<u16, AddError<T>> {
        let refuse = |data, reason| Err(AddError { data, reason });
        if let Some(broken) = self.broken {
            return refuse(data, Refused::Broken(broken));
        }
        let size = self.memory.size();
        let Some(count) = u16::try_from(segments.len())
            .ok()
            .filter(|&count| count > 0 && count <= size)
        else {
            return refuse(data, Refused::BadChain);
        };
        let Some(room) = segments
            .iter()
            .filter(|segment| segment.writable)
            .try_fold(0u32, |sum, segment| sum.checked_add(segment.len))
        else {
            return refuse(data, Refused::BadChain);
        };
        // A direct chain saves the device a look-up, an indirect one saves descriptors: direct while
        // half of the ring is free, so that a shallow queue never pays for depth that it has not.
        let fits_table = self.indirect && segments.len() <= self.memory.table_entries();
        let indirect = fits_table && count > 1 && self.free.saturating_sub(count) < size / 2;
        let needed = if indirect { 1 } else { count };
        if needed > self.free {
            return refuse(data, Refused::Full);
        }
        let head = self.free_head;
        if indirect {
            self.write_indirect(head, segments);
        } else {
            self.write_direct(segments);
        }
        self.free -= needed;
        self.memory.write_avail(self.added, head);
        self.in_flight[usize::from(head)] = Some(InFlight {
            data,
            sequence: self.sequence,
            descriptors: needed,
            room,
            position: self.added,
        });
        self.sequence += 1;
        self.in_flight_count += 1;
        self.added = self.added.wrapping_add(1);
        Ok(head)
    }

    /// Shows the device everything that was added; returns whether it must be kicked.
    ///
    /// One store and at most one kick for a batch of any length.
    #[must_use = "a device that is not kicked may sleep for ever"]
    pub fn publish(&mut self) -> bool {
        if self.added == self.published || self.broken.is_some() {
            return false;
        }
        let old = self.published;
        self.memory.publish(self.added);
        self.published = self.added;
        self.memory.wants_kick(self.event_idx, old, self.added)
    }

    /// Takes the next completion, if there is one.
    ///
    /// # Errors
    ///
    /// [`Broken`] the first time that the device says what cannot be, and ever after.
    pub fn pop(&mut self) -> Result<Option<Used<T>>, Broken> {
        if let Some(broken) = self.broken {
            return Err(broken);
        }
        if self.taken == self.seen {
            self.seen = self.check_index()?;
            if self.taken == self.seen {
                return Ok(None);
            }
        }
        let (id, len) = self.memory.used_elem(self.taken);
        let entry = self.check_elem(id, len)?;
        let data = entry.data;
        self.taken = self.taken.wrapping_add(1);
        Ok(Some(Used { data, written: len }))
    }

    /// Requests that were added and not published.
    pub fn unpublished(&self) -> u16 {
        self.added.wrapping_sub(self.published)
    }

    /// Completions that can be taken now, as far as the device's index is to be believed.
    ///
    /// # Errors
    ///
    /// As [`pop`](Self::pop).
    pub fn completed(&mut self) -> Result<u16, Broken> {
        if let Some(broken) = self.broken {
            return Err(broken);
        }
        self.seen = self.check_index()?;
        Ok(self.seen.wrapping_sub(self.taken))
    }

    /// Breaks the queue for something that its owner found out; returns why it is broken.
    pub fn condemn(&mut self, broken: Broken) -> Broken {
        match self.broken {
            Some(before) => before,
            None => self.break_with(broken),
        }
    }

    /// Asks for a signal once `after` more completions are there (at most what is in flight), and
    /// returns whether the caller may sleep now; if not, completions are waiting.
    #[must_use = "the answer says whether sleeping loses a completion"]
    pub fn arm(&mut self, after: u16) -> bool {
        if self.broken.is_some() {
            return false;
        }
        let has = self.with_device();
        let after = after.min(has).max(1);
        if self.event_idx {
            self.memory
                .set_used_event(self.taken.wrapping_add(after - 1));
        } else {
            self.memory.set_avail_flags(0);
        }
        // Ordering: a full fence. The request for a signal must be visible before we look whether
        // there is something already, or the device can complete in between and see the old request
        // (virtio 1.3 §2.7.14: the mirror image of `wants_kick`).
        fence(Ordering::SeqCst);
        self.memory.used_index().wrapping_sub(self.taken) < after
    }

    /// Takes the wish for a signal back, where the device would signal every completion.
    pub fn disarm(&mut self) {
        // With event index, an event that was passed is not signalled again.
        if !self.event_idx {
            self.memory.set_avail_flags(AVAIL_NO_INTERRUPT);
        }
    }

    /// Empties the queue for a new start and returns what was in flight, in submission order.
    ///
    /// The device must have stopped using it.
    pub fn reset(&mut self, event_idx: bool, indirect: bool) -> Vec<T> {
        let mut held: Vec<InFlight<T>> =
            self.in_flight.iter_mut().filter_map(Option::take).collect();
        held.sort_unstable_by_key(|entry| entry.sequence);
        self.start(event_idx, indirect);
        held.into_iter().map(|entry| entry.data).collect()
    }

    fn start(&mut self, event_idx: bool, indirect: bool) {
        let size = self.memory.size();
        self.event_idx = event_idx;
        self.indirect = indirect;
        self.next.clear();
        self.next
            .extend((0..size).map(|index| index.wrapping_add(1)));
        self.free_head = 0;
        self.free = size;
        self.in_flight_count = 0;
        (self.published, self.added, self.taken, self.seen) = (0, 0, 0, 0);
        self.broken = None;
        self.memory.clear(event_idx);
    }

    /// Published and not completed: what the device can speak of.
    fn with_device(&self) -> u16 {
        self.published.wrapping_sub(self.taken)
    }

    fn check_index(&mut self) -> Result<u16, Broken> {
        let index = self.memory.used_index();
        let in_flight = self.with_device();
        if index.wrapping_sub(self.taken) > in_flight {
            return Err(self.break_with(Broken::UsedIndex {
                index,
                last: self.taken,
                in_flight,
            }));
        }
        Ok(index)
    }

    /// Takes the entry that a used element speaks of, if everything about it can be true.
    fn check_elem(&mut self, id: u32, len: u32) -> Result<InFlight<T>, Broken> {
        let Some(head) = u16::try_from(id)
            .ok()
            .filter(|&head| head < self.memory.size())
        else {
            return Err(self.break_with(Broken::HeadOutOfRange { id }));
        };
        let place = &mut self.in_flight[usize::from(head)];
        // A head that was added and not published is as unknown to the device as a free one. The
        // position's distance from the end of what is published tells, at any wrap.
        let unpublished = self.added.wrapping_sub(self.published);
        let known = place.as_ref().is_some_and(|entry| {
            unpublished == 0 || entry.position.wrapping_sub(self.published) >= unpublished
        });
        let Some(entry) = place.take_if(|entry| known && len <= entry.room) else {
            let room = place.as_ref().map(|entry| entry.room);
            return Err(self.break_with(match room {
                Some(room) if known => Broken::Length {
                    id: head,
                    len,
                    room,
                },
                _ => Broken::HeadNotInFlight { id: head },
            }));
        };
        // Back to the free list: the chain's last descriptor goes on to the old list.
        let mut last = head;
        for _ in 1..entry.descriptors {
            last = self.next[usize::from(last)];
        }
        self.next[usize::from(last)] = self.free_head;
        self.free_head = head;
        self.free += entry.descriptors;
        self.in_flight_count -= 1;
        Ok(entry)
    }

    fn break_with(&mut self, broken: Broken) -> Broken {
        log::error!("virtqueue: {broken}");
        self.broken = Some(broken);
        broken
    }

    /// Writes a chain over the first descriptors of the free list, and moves the list past them.
    fn write_direct(&mut self, segments: &[Segment]) {
        let last = segments.len() - 1;
        for (position, segment) in segments.iter().enumerate() {
            let index = self.free_head;
            let next = self.next[usize::from(index)];
            self.memory.write_desc(
                index,
                Desc {
                    addr: segment.gpa,
                    len: segment.len,
                    flags: flags(segment, position < last),
                    next: if position < last { next } else { 0 },
                },
            );
            self.free_head = next;
        }
    }

    fn write_indirect(&mut self, head: u16, segments: &[Segment]) {
        let last = segments.len() - 1;
        for (position, segment) in segments.iter().enumerate() {
            self.memory.write_table_desc(
                head,
                position,
                Desc {
                    addr: segment.gpa,
                    len: segment.len,
                    flags: flags(segment, position < last),
                    // At most `table_entries`, which is small.
                    next: if position < last {
                        position as u16 + 1
                    } else {
                        0
                    },
                },
            );
        }
        self.memory.write_desc(
            head,
            Desc {
                addr: self.memory.table_gpa(head),
                len: (segments.len() * size_of::<Desc>()) as u32,
                flags: desc_flag::INDIRECT,
                next: 0,
            },
        );
        self.free_head = self.next[usize::from(head)];
    }
}

fn flags(segment: &Segment, more: bool) -> u16 {
    let write = if segment.writable {
        desc_flag::WRITE
    } else {
        0
    };
    let next = if more { desc_flag::NEXT } else { 0 };
    write | next
}
