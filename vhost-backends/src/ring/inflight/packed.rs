//! The layout for packed rings: `QueueRegionPacked`, `DescStatePacked`.
//!
//! A packed ring's descriptors are overwritten by used ones, so the log holds copies of them. Its
//! entries are one free list, from which chains are taken; `old_*` is what was true before the
//! step that is under way.

use super::QueueLog;
use crate::ring::RingError;

const AT_FREE_HEAD: usize = 12;
const AT_OLD_FREE_HEAD: usize = 14;
/// `used_idx`, `old_used_idx`, `used_wrap_counter`, `old_used_wrap_counter` and two bytes of
/// padding: always stored together, for an index without its wrap counter means nothing.
const AT_USED: usize = 16;
const HEADER: usize = 32;
const ENTRY: usize = 32;
/// In an entry.
const AT_INFLIGHT: usize = 0;
const AT_NEXT: usize = 2;
const AT_LAST: usize = 4;
const AT_NUM: usize = 6;
const AT_COUNTER: usize = 8;
const AT_ID: usize = 16;
const AT_FLAGS: usize = 18;
const AT_LEN: usize = 20;
const AT_ADDR: usize = 24;

/// Bytes of a log of `size` entries.
pub(super) const fn len(size: u16) -> usize {
    HEADER + ENTRY * size as usize
}

const fn entry(index: u16) -> usize {
    HEADER + ENTRY * index as usize
}

/// A descriptor as the log keeps it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LoggedDesc {
    pub(crate) addr: u64,
    pub(crate) len: u32,
    pub(crate) id: u16,
    pub(crate) flags: u16,
}

/// An index of the used side and its wrap counter.
pub(crate) type UsedPosition = (u16, bool);

/// What a log says about the ring that it was for.
#[derive(Debug)]
pub(crate) struct Recovered {
    pub(crate) used: UsedPosition,
    /// Chains in flight, in the order in which they were taken, and where they are logged.
    pub(crate) chains: Vec<(u16, Vec<LoggedDesc>)>,
}

/// The log of one packed ring.
#[derive(Debug)]
pub(crate) struct PackedLog {
    queue: QueueLog,
    counter: u64,
}

impl PackedLog {
    /// The log for a ring of `size` entries that a new log says stands at `fresh`, and what an old
    /// one says. `is_used` tells whether the descriptor at a position was published.
    pub(crate) fn open(
        queue: QueueLog,
        size: u16,
        fresh: UsedPosition,
        is_used: impl FnOnce(UsedPosition) -> bool,
    ) -> Result<(PackedLog, Option<Recovered>), RingError> {
        let new = queue.is_new(size, len(queue.size()));
        let mut log = PackedLog { queue, counter: 0 };
        if new.ok_or(RingError::BadInflightLog)? {
            log.start_over(fresh);
            return Ok((log, None));
        }
        let recovered = log.recover(size, is_used)?;
        Ok((log, Some(recovered)))
    }

    fn start_over(&self, used: UsedPosition) {
        for index in 0..self.queue.size() {
            self.queue.put(entry(index) + AT_INFLIGHT, 0u8);
            // One past the last entry ends the list.
            self.queue.put(entry(index) + AT_NEXT, index + 1);
        }
        self.queue.put(AT_FREE_HEAD, 0u16);
        self.queue.put(AT_OLD_FREE_HEAD, 0u16);
        self.set_used(used, used);
        self.queue.set_in_use();
    }

    fn recover(
        &mut self,
        size: u16,
        is_used: impl FnOnce(UsedPosition) -> bool,
    ) -> Result<Recovered, RingError> {
        let queue = &self.queue;
        let (now, old) = self.used();
        if now != old && old.0 < size && is_used(old) {
            // Published, but not noted.
            self.commit();
        }
        // Otherwise what was under way did not happen.
        queue.put(AT_FREE_HEAD, queue.get::<u16>(AT_OLD_FREE_HEAD));
        let (_, used) = self.used();
        self.set_used(used, used);
        if used.0 >= size {
            return Err(RingError::BadInflightLog);
        }
        let mut free: u16 = queue.get(AT_FREE_HEAD);
        let mut left = queue.size();
        while free < queue.size() {
            left = left.checked_sub(1).ok_or(RingError::BadInflightLog)?;
            queue.put(entry(free) + AT_INFLIGHT, 0u8);
            free = queue.get(entry(free) + AT_NEXT);
        }
        let mut heads: Vec<(u64, u16)> = (0..queue.size())
            .filter(|index| queue.get::<u8>(entry(*index) + AT_INFLIGHT) != 0)
            .map(|index| (queue.get::<u64>(entry(index) + AT_COUNTER), index))
            .collect();
        heads.sort_unstable();
        let mut total = 0;
        let mut chains = Vec::with_capacity(heads.len());
        for (_, head) in &heads {
            let descs = self.descs(*head)?;
            total += descs.len();
            if total > usize::from(size) {
                return Err(RingError::BadInflightLog);
            }
            chains.push((*head, descs));
        }
        self.counter = heads.last().map_or(0, |(last, _)| last.wrapping_add(1));
        Ok(Recovered { used, chains })
    }

    fn descs(&self, head: u16) -> Result<Vec<LoggedDesc>, RingError> {
        let num: u16 = self.queue.get(entry(head) + AT_NUM);
        if num == 0 || num > self.queue.size() {
            return Err(RingError::BadInflightLog);
        }
        let mut index = head;
        (0..num)
            .map(|_| {
                if index >= self.queue.size() {
                    return Err(RingError::BadInflightLog);
                }
                let at = entry(index);
                index = self.queue.get(at + AT_NEXT);
                Ok(LoggedDesc {
                    addr: self.queue.get(at + AT_ADDR),
                    len: self.queue.get(at + AT_LEN),
                    id: self.queue.get(at + AT_ID),
                    flags: self.queue.get(at + AT_FLAGS),
                })
            })
            .collect()
    }

    /// A chain was taken. Gives the entry that it is logged at, or `None` if the frontend broke
    /// the free list.
    pub(crate) fn taken(&mut self, descs: &[LoggedDesc]) -> Option<u16> {
        let queue = &self.queue;
        let head: u16 = queue.get(AT_OLD_FREE_HEAD);
        if head >= queue.size() {
            return None;
        }
        queue.put(entry(head) + AT_NUM, 0u16);
        queue.put(entry(head) + AT_COUNTER, self.counter);
        queue.put(entry(head) + AT_INFLIGHT, 1u8);
        self.counter = self.counter.wrapping_add(1);
        let mut index = head;
        for (n, desc) in (1u16..).zip(descs) {
            if index >= queue.size() {
                return None;
            }
            let at = entry(index);
            queue.put(at + AT_ADDR, desc.addr);
            queue.put(at + AT_LEN, desc.len);
            queue.put(at + AT_FLAGS, desc.flags);
            queue.put(at + AT_ID, desc.id);
            queue.put(entry(head) + AT_LAST, index);
            queue.put(entry(head) + AT_NUM, n);
            index = queue.get(at + AT_NEXT);
            queue.put(AT_FREE_HEAD, index);
        }
        // From here on it is taken.
        queue.put(AT_OLD_FREE_HEAD, index);
        Some(head)
    }

    /// The chain logged at `head` is about to be given back; the used side then stands at `used`.
    pub(crate) fn giving_back(&self, head: u16, used: UsedPosition) {
        self.free(head);
        let (_, old) = self.used();
        self.set_used(used, old);
    }

    /// It was published.
    pub(crate) fn given_back(&self, head: u16) {
        self.queue.put(entry(head) + AT_INFLIGHT, 0u8);
    }

    /// What was under way is done.
    pub(crate) fn commit(&self) {
        let queue = &self.queue;
        queue.put(AT_OLD_FREE_HEAD, queue.get::<u16>(AT_FREE_HEAD));
        let (now, _) = self.used();
        self.set_used(now, now);
    }

    /// The chain turned out to be none: it was not taken.
    pub(crate) fn not_taken(&self, head: u16) {
        self.free(head);
        self.queue
            .put(AT_OLD_FREE_HEAD, self.queue.get::<u16>(AT_FREE_HEAD));
        self.given_back(head);
    }

    fn free(&self, head: u16) {
        let queue = &self.queue;
        let last: u16 = queue.get(entry(head) + AT_LAST);
        if last < queue.size() {
            queue.put(entry(last) + AT_NEXT, queue.get::<u16>(AT_FREE_HEAD));
            queue.put(AT_FREE_HEAD, head);
        }
    }

    /// Where the used side stands, and where it stood before the step that is under way.
    fn used(&self) -> (UsedPosition, UsedPosition) {
        let [i0, i1, o0, o1, wrap, old_wrap, _, _] = self.queue.get::<u64>(AT_USED).to_le_bytes();
        let now = (u16::from_le_bytes([i0, i1]), wrap != 0);
        let old = (u16::from_le_bytes([o0, o1]), old_wrap != 0);
        (now, old)
    }

    fn set_used(&self, now: UsedPosition, old: UsedPosition) {
        let [i0, i1] = now.0.to_le_bytes();
        let [o0, o1] = old.0.to_le_bytes();
        let bytes = [i0, i1, o0, o1, u8::from(now.1), u8::from(old.1), 0, 0];
        self.queue.put(AT_USED, u64::from_le_bytes(bytes));
    }
}

#[cfg(test)]
mod tests {
    use super::super::InflightLog;
    use super::*;
    use std::sync::Arc;

    #[test]
    fn a_step_under_way_counts_if_the_driver_can_see_it() {
        const SIZE: u16 = 8;
        let desc = LoggedDesc {
            addr: 0x1000,
            len: 16,
            id: 5,
            flags: 0,
        };
        for published in [false, true] {
            let file = tempfile::tempfile().unwrap();
            let len = InflightLog::len_for(1, SIZE);
            file.set_len(len).unwrap();
            let log = Arc::new(InflightLog::map(file, 0, len, 1, SIZE).unwrap());
            let open = || {
                PackedLog::open(log.queue(0).unwrap(), SIZE, (0, true), |old| {
                    assert_eq!(old, (0, true), "what the step began with");
                    published
                })
                .unwrap()
            };
            let (mut first, new) = open();
            assert!(new.is_none());
            let head = first.taken(&[desc]).unwrap();
            first.giving_back(head, (1, true));
            // Here it is killed.
            let recovered = open().1.unwrap();
            let (used, chains) = if published {
                ((1, true), vec![])
            } else {
                ((0, true), vec![(head, vec![desc])])
            };
            assert_eq!((recovered.used, recovered.chains), (used, chains));
        }
    }
}
