//! The layout for split rings: `QueueRegionSplit`, `DescStateSplit`.

use super::QueueLog;
use crate::ring::RingError;

const AT_LAST_BATCH_HEAD: usize = 12;
const AT_USED_IDX: usize = 14;
const HEADER: usize = 16;
const ENTRY: usize = 16;
/// In an entry.
const AT_INFLIGHT: usize = 0;
const AT_NEXT: usize = 6;
const AT_COUNTER: usize = 8;

/// Bytes of a log of `size` entries.
pub(super) const fn len(size: u16) -> usize {
    HEADER + ENTRY * size as usize
}

const fn entry(head: u16) -> usize {
    HEADER + ENTRY * head as usize
}

/// The log of one split ring.
#[derive(Debug)]
pub(crate) struct SplitLog {
    queue: QueueLog,
    /// What the next chain that is taken gets, for the order.
    counter: u64,
}

impl SplitLog {
    /// The log for a ring of `size` entries whose used index is `used` in memory, and the heads
    /// in flight in the order in which they were taken. `None`: the log was new.
    pub(crate) fn open(
        queue: QueueLog,
        size: u16,
        used: u16,
    ) -> Result<(SplitLog, Option<Vec<u16>>), RingError> {
        let new = queue.is_new(size, len(queue.size()));
        if new.ok_or(RingError::BadInflightLog)? {
            for head in 0..queue.size() {
                queue.put(entry(head) + AT_INFLIGHT, 0u8);
            }
            queue.put(AT_USED_IDX, used);
            queue.set_in_use();
            return Ok((SplitLog { queue, counter: 0 }, None));
        }
        finish_last_batch(&queue, used)?;
        let mut heads: Vec<(u64, u16)> = (0..queue.size())
            .filter(|head| is_in_flight(&queue, *head))
            .map(|head| (queue.get::<u64>(entry(head) + AT_COUNTER), head))
            .collect();
        heads.sort_unstable();
        // A head that this ring cannot have is not from this ring.
        if heads.iter().any(|(_, head)| *head >= size) {
            return Err(RingError::BadInflightLog);
        }
        let counter = heads.last().map_or(0, |(last, _)| last.wrapping_add(1));
        let heads = heads.into_iter().map(|(_, head)| head).collect();
        Ok((SplitLog { queue, counter }, Some(heads)))
    }

    /// A chain was taken.
    pub(crate) fn taken(&mut self, head: u16) {
        self.queue.put(entry(head) + AT_COUNTER, self.counter);
        self.counter = self.counter.wrapping_add(1);
        self.queue.put(entry(head) + AT_INFLIGHT, 1u8);
    }

    /// A chain is about to be given back with the next publication.
    pub(crate) fn batched(&self, head: u16) {
        let last: u16 = self.queue.get(AT_LAST_BATCH_HEAD);
        self.queue.put(entry(head) + AT_NEXT, last);
        self.queue.put(AT_LAST_BATCH_HEAD, head);
    }

    /// The chain is not in flight any more.
    pub(crate) fn given_back(&self, head: u16) {
        self.queue.put(entry(head) + AT_INFLIGHT, 0u8);
    }

    /// All of the batch was given back; the used index in memory is this.
    pub(crate) fn batch_done(&self, used: u16) {
        self.queue.put(AT_USED_IDX, used);
    }
}

fn is_in_flight(queue: &QueueLog, head: u16) -> bool {
    queue.get::<u8>(entry(head) + AT_INFLIGHT) != 0
}

/// The last process may have ended between publishing a batch and noting that. The batch hangs on
/// `last_batch_head`; how many of that list are of it, the used indices tell.
fn finish_last_batch(queue: &QueueLog, used: u16) -> Result<(), RingError> {
    let batch = used.wrapping_sub(queue.get(AT_USED_IDX));
    if batch > queue.size() {
        // A ring that started over under a log in which nothing is in flight.
        if (0..queue.size()).any(|head| is_in_flight(queue, head)) {
            return Err(RingError::BadInflightLog);
        }
    } else {
        let mut head: u16 = queue.get(AT_LAST_BATCH_HEAD);
        for _ in 0..batch {
            if head >= queue.size() {
                return Err(RingError::BadInflightLog);
            }
            queue.put(entry(head) + AT_INFLIGHT, 0u8);
            head = queue.get(entry(head) + AT_NEXT);
        }
    }
    queue.put(AT_USED_IDX, used);
    Ok(())
}
