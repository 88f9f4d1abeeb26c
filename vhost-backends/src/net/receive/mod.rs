//! The way to the guest: frames into receive buffers.
//!
//! In come frames, pushed by whoever has them (another guest's queue, a loop) or read by a port
//! right into the guest's buffers; out go used buffers and one signal for a batch. What does not
//! fit is dropped and counted, and costs nobody else anything.

mod buffers;
mod copy;

use super::capture::Direction;
use super::filter::Filter;
use super::frame::{ETHERNET_LEN, Frame, asks_nothing};
use super::limits::{MAX_FRAME_LEN, MAX_MERGED, MIN_FRAME_LEN};
use super::offload::{Offloads, Scratch, complete};
use super::port::vectors::MOST as MOST_VECTORS;
use super::stats::{Drop, Tally};
use super::{Link, header_len};
use crate::ring::{Completion, DeviceRing, Finder, OwnedChain, Ring, cut, will_write};
use crate::session::{Notifier, QueueSetup, QueueStop};
use buffers::Buffers;
use copy::{Source, put_header};
use pv_abi::limits::MAX_CHAIN_LEN;
use pv_abi::virtio::net::{HashReport, Header, feature, gso};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vm_memory::{GuestMemoryMmap, VolatileSlice};

/// Buffers that are on their way to this processor while one is filled: about as many as it waits
/// for at a time.
const AHEAD: usize = 16;
/// Frames that a driver gets to see together: it takes them while the next ones are copied, and
/// each time costs both sides a trip of the ring's memory.
const SHOWN_TOGETHER: usize = 16;

/// A guest's receive side. Any thread may deliver to it; without open queues, frames are dropped.
#[derive(Debug)]
pub struct Inlet {
    queues: Box<[Mutex<Option<RxQueue>>]>,
    link: Arc<Link>,
}

impl Inlet {
    pub(super) fn new(link: Arc<Link>, pairs: u16) -> Inlet {
        let queues = (0..pairs).map(|_| Mutex::new(None)).collect();
        Inlet { queues, link }
    }

    /// Gives frames to the guest. Those that it has no room for, or does not want, are dropped.
    pub fn deliver<'f>(&self, frames: &mut dyn Iterator<Item = &'f Frame<'f>>) {
        let filter = self.link.filter();
        if !self.link.is_up() {
            let count = frames.count() as u64;
            return self.link.stats.drop(Drop::LinkDown, count);
        }
        let active = self.link.active_pairs();
        let hashing = if active > 1 {
            self.link.hashing()
        } else {
            None
        };
        let mut held: Option<(u16, MutexGuard<'_, Option<RxQueue>>)> = None;
        let mut tally = Tally::default();
        // At most so many come, this one included.
        let mut expected = frames.size_hint().1.unwrap_or(0).saturating_add(1);
        for frame in frames {
            expected = expected.saturating_sub(1);
            if !filter.takes(frame) {
                tally.drop(Drop::Filtered);
                continue;
            }
            let index = if active > 1 {
                let hashed = hashing.as_ref().and_then(|hashing| hashing.pair(frame));
                hashed.unwrap_or_else(|| self.link.steering.queue_for(frame, active))
            } else {
                0
            };
            if held.as_ref().is_none_or(|(now, _)| *now != index) {
                if let Some((_, mut guard)) = held.take()
                    && let Some(queue) = guard.as_mut()
                {
                    queue.publish();
                }
                held = self.lock(index).map(|guard| (index, guard));
            }
            match held.as_mut().and_then(|(_, guard)| guard.as_mut()) {
                Some(queue) => {
                    queue.stage_ahead(expected.min(AHEAD));
                    queue.deliver(frame, &mut tally);
                    queue.show(SHOWN_TOGETHER);
                }
                None => tally.drop(Drop::NoQueue),
            }
        }
        if let Some((_, mut guard)) = held
            && let Some(queue) = guard.as_mut()
        {
            queue.publish();
        }
        self.link.stats.received(&tally);
    }

    /// Counts a frame of this guest's that came to nothing.
    pub(super) fn count_drop(&self, reason: Drop) {
        self.link.stats.drop(reason, 1);
    }

    pub(super) fn lock(&self, index: u16) -> Option<MutexGuard<'_, Option<RxQueue>>> {
        let queue = self.queues.get(usize::from(index))?;
        Some(queue.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn open(&self, pair: u16, setup: QueueSetup) {
        if let Some(mut slot) = self.lock(pair) {
            *slot = Some(RxQueue::new(setup, Arc::clone(&self.link)));
        }
    }

    /// Ends a queue; buffers that were taken and not used go back into the ring.
    pub(super) fn close(&self, pair: u16) -> Option<QueueStop> {
        let queue = self.lock(pair)?.take()?;
        Some(queue.stop())
    }
}

/// One receive queue.
#[derive(Debug)]
pub(super) struct RxQueue {
    index: u16,
    ring: Ring,
    memory: Arc<GuestMemoryMmap>,
    call: Arc<Notifier>,
    err: Arc<Notifier>,
    link: Arc<Link>,
    features: u64,
    header_len: usize,
    mergeable: bool,
    /// The most that the driver was told of.
    mtu: Option<usize>,
    /// Taken from the ring and not used yet, in order.
    staged: Buffers,
    staged_room: usize,
    finder: Finder,
    /// Published, and the driver not called for them yet.
    shown: usize,
    done: Vec<Completion>,
    scratch: Scratch,
    retired: bool,
    /// The ring was empty when a frame of this batch needed a buffer.
    empty: bool,
}

/// Why a frame did not get into buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NoRoom {
    /// There are none now.
    Empty,
    /// They are too small for this frame.
    Small,
}

impl RxQueue {
    fn new(setup: QueueSetup, link: Arc<Link>) -> RxQueue {
        RxQueue {
            index: setup.index,
            memory: Arc::clone(setup.ring.memory()),
            ring: setup.ring,
            call: setup.call,
            err: setup.err,
            mtu: (link.options.mtu)
                .filter(|_| setup.features & feature::MTU != 0)
                .map(usize::from),
            link,
            features: setup.features,
            header_len: header_len(setup.features),
            mergeable: setup.features & feature::MRG_RXBUF != 0,
            staged: Buffers::default(),
            staged_room: 0,
            finder: Finder::default(),
            shown: 0,
            done: Vec::new(),
            scratch: Scratch::default(),
            retired: false,
            empty: false,
        }
    }

    fn stop(mut self) -> QueueStop {
        self.publish();
        let staged = std::mem::take(&mut self.staged);
        self.ring.put_back(staged.into_chains());
        QueueStop {
            ring: self.ring.save(),
            retired: self.ring.retired(),
        }
    }

    /// What this guest takes now.
    pub(super) fn offloads(&self) -> Offloads {
        Offloads::of_guest(self.link.guest_offloads(self.features))
    }

    /// Puts a frame into buffers, made plain where the guest does not take it as it is. `false`:
    /// there is no room for it, or for the rest of it.
    pub(super) fn deliver(&mut self, frame: &Frame<'_>, tally: &mut Tally) -> bool {
        if self.link.capture.is_on() {
            self.link.capture.frame(frame, Direction::ToGuest);
        }
        if is_plain(&frame.header) || self.offloads().take(frame) {
            return self.put(frame, tally);
        }
        let mut scratch = std::mem::take(&mut self.scratch);
        let mut fits = true;
        let done = complete(frame, &mut scratch, &mut |plain| {
            fits = self.put(plain, tally);
            fits
        });
        if !done {
            tally.drop(Drop::BadHeader);
        }
        self.scratch = scratch;
        fits
    }

    /// Whether a frame of this length may be longer than the driver expects.
    pub(super) fn may_be_over_mtu(&self, len: usize) -> bool {
        self.mtu.is_some_and(|mtu| len > mtu + ETHERNET_LEN)
    }

    /// Whether this frame is longer than the driver expects (virtio 1.3 §5.1.4.1).
    pub(super) fn is_over_mtu(&self, frame: &Frame<'_>) -> bool {
        if frame.header.gso_type != gso::NONE || !self.may_be_over_mtu(frame.len()) {
            return false;
        }
        let tag = if frame.vlan().is_some() { 4 } else { 0 };
        self.may_be_over_mtu(frame.len().saturating_sub(tag))
    }

    fn put(&mut self, frame: &Frame<'_>, tally: &mut Tally) -> bool {
        if self.is_over_mtu(frame) {
            tally.drop(Drop::Length);
            return false;
        }
        match self.gather(self.header_len + frame.len()) {
            Ok(1) if self.fill_one(frame) => {
                tally.frame(frame.len());
                return true;
            }
            Ok(count) => {
                let mut source = Source::new(frame.pieces(), self.report(frame));
                let mut header = frame.header;
                header.num_buffers = count as u16;
                self.fill(count, (frame.len(), 0), header, &mut source);
                tally.frame(frame.len());
                return true;
            }
            Err(NoRoom::Empty) => tally.drop(Drop::NoBuffer),
            Err(NoRoom::Small) => tally.drop(Drop::TooSmall),
        }
        false
    }

    /// What the driver is told about a frame's hash, if it wants that.
    pub(super) fn report(&self, frame: &Frame<'_>) -> Option<HashReport> {
        if !self.reports() {
            return None;
        }
        self.link.hashing().map(|hashing| hashing.report(frame))
    }

    /// Whether the driver negotiated hash reports.
    pub(super) fn reports(&self) -> bool {
        self.features & feature::HASH_REPORT != 0
    }

    /// Puts a frame of one piece into the first buffer, which has the room, where that is one
    /// piece as well: as nearly all are. Whether they are.
    #[inline]
    fn fill_one(&mut self, frame: &Frame<'_>) -> bool {
        let (head, len) = (self.header_len, frame.len());
        let (Some(buffer), [piece]) = (self.staged.front(), frame.pieces()) else {
            return false;
        };
        let [segment] = buffer.chain.writable() else {
            return false;
        };
        if self.reports() || piece.len() != len || head > size_of::<Header>() {
            return false;
        }
        let Some(to) = self.finder.view(&self.memory, *segment) else {
            return false;
        };
        let Some((first, rest)) = cut(to, head) else {
            return false;
        };
        put_header(&first, &frame.header, 1, head);
        piece.copy_to_volatile_slice(rest);
        self.done.push(used(&buffer.chain, head + len));
        self.staged_room -= buffer.room;
        self.staged.drop_front();
        true
    }

    /// Takes buffers for so many frames, if they are there, so that they are on their way to this
    /// processor while the first is filled.
    fn stage_ahead(&mut self, count: usize) {
        while self.staged.len() < count && self.stage() {}
    }

    /// Makes sure that the first staged buffers have this much room together. How many it takes.
    fn gather(&mut self, need: usize) -> Result<usize, NoRoom> {
        while self.staged.front().is_some_and(|buffer| buffer.room == 0) {
            if let Some(buffer) = self.staged.front() {
                self.done.push(used(&buffer.chain, 0));
            }
            self.staged.drop_front();
        }
        let (mut room, mut count) = (0, 0);
        loop {
            if count == self.staged.len() && !self.stage() {
                return Err(NoRoom::Empty);
            }
            let Some(buffer) = self.staged.get(count) else {
                return Err(NoRoom::Empty);
            };
            room += buffer.room;
            count += 1;
            if room >= need {
                return Ok(count);
            }
            if !self.mergeable || count == MAX_MERGED {
                return Err(NoRoom::Small);
            }
        }
    }

    /// Takes one more buffer from the ring, if there is one.
    fn stage(&mut self) -> bool {
        if self.empty {
            return false;
        }
        loop {
            let Some(buffer) = self.staged.free_place() else {
                return false;
            };
            match self.ring.pop_into(&mut buffer.chain) {
                Ok(true) => {}
                Ok(false) => {
                    self.empty = true;
                    return false;
                }
                Err(reason) => {
                    if !std::mem::replace(&mut self.retired, true) {
                        self.link.ring_retired(&reason);
                        self.err.signal();
                    }
                    return false;
                }
            }
            let chain = &buffer.chain;
            let room = usize::try_from(chain.writable_len()).unwrap_or(usize::MAX);
            if room < self.header_len || !chain.readable().is_empty() {
                // Not a receive buffer: given back in its turn, with nothing in it.
                self.link.stats.drop(Drop::BadBuffer, 1);
                buffer.room = 0;
                let unused = used(chain, 0);
                if self.staged.is_empty() {
                    self.done.push(unused);
                    continue;
                }
                self.staged.push();
                return true;
            }
            buffer.room = room;
            self.staged_room += room;
            if let Some(first) = chain.writable().first()
                && let Some(view) = self.finder.view(&self.memory, *first)
            {
                will_write(&view);
            }
            self.staged.push();
            return true;
        }
    }

    /// Uses the first `count` buffers, which have the room, for a frame whose first `in_place`
    /// bytes are there already; the others come from `source`.
    fn fill(
        &mut self,
        count: usize,
        (len, in_place): (usize, usize),
        header: Header,
        source: &mut Source<'_>,
    ) {
        let (mut left, mut in_place) = (len, in_place);
        for index in 0..count {
            let Some(buffer) = self.staged.front() else {
                break;
            };
            self.staged_room -= buffer.room;
            let head = if index == 0 { self.header_len } else { 0 };
            let take = left.min(buffer.room.saturating_sub(head));
            let there = take.min(in_place);
            in_place -= there;
            // The header goes first, with the frame where that is not in place yet.
            if index == 0 {
                source.head(header, self.header_len);
            }
            if there > 0 && head > 0 {
                self.copy(&buffer.chain, 0, head, source);
            }
            let from = if there > 0 { head + there } else { 0 };
            self.copy(&buffer.chain, from, head + take - from, source);
            left -= take;
            self.done.push(used(&buffer.chain, head + take));
            self.staged.drop_front();
        }
    }

    /// Fills a part of a chain.
    fn copy(&self, chain: &OwnedChain, from: usize, len: usize, source: &mut Source<'_>) {
        let (from, len) = (from as u64, len as u64);
        // The chain was checked against this memory; there is no other.
        let _ = chain.writable_slices(&self.memory, from, len, |to| source.copy_into(&to));
    }

    /// Publishes what was filled, if that is so much: the driver can work on it meanwhile. It is
    /// called when the batch is over.
    fn show(&mut self, least: usize) {
        if self.done.len() >= least {
            self.ring.complete(&self.done);
            self.shown += self.done.len();
            self.done.clear();
        }
    }

    /// Publishes what was filled, and calls the driver if it wants that.
    pub(super) fn publish(&mut self) {
        self.empty = false;
        self.show(1);
        let shown = std::mem::take(&mut self.shown);
        if shown > 0 {
            let wanted = self.ring.should_signal();
            (self.link).call(self.index, shown, wanted, &self.call);
            // The next batch finds its first buffers here.
            self.stage_ahead(AHEAD);
            self.empty = false;
        }
    }

    // ---- for ports that read right into buffers

    /// Room of at least `want` bytes for a frame, or as much as one frame can have here, as views
    /// of the guest's memory. `false`: there is none at all.
    pub(super) fn views<'s>(
        &mut self,
        want: usize,
        memory: &'s GuestMemoryMmap,
        views: &mut Vec<VolatileSlice<'s, ()>>,
    ) -> bool {
        let most = if self.mergeable { MAX_MERGED } else { 1 };
        while self.staged.is_empty()
            || (self.staged_room < want + self.header_len && self.staged.len() < most)
        {
            if !self.stage() {
                break;
            }
        }
        // What is no buffer ends the run.
        let (mut room, mut head) = (0, self.header_len);
        for buffer in self.staged.iter().take(most) {
            // One more buffer must fit a call.
            let full = views.len() + 2 * MAX_CHAIN_LEN > MOST_VECTORS;
            if room >= want || buffer.room == 0 || full {
                break;
            }
            let len = buffer.room - head.min(buffer.room);
            let _ = buffer
                .chain
                .writable_slices(memory, head as u64, len as u64, |view| {
                    views.push(view);
                });
            room += len;
            head = 0;
        }
        !self.staged.is_empty()
    }

    /// A frame of `len` bytes is in the buffers of [`views`](RxQueue::views), whose room was
    /// `room`; what did not fit there is in `rest`.
    pub(super) fn commit(
        &mut self,
        (header, hash): (Header, Option<HashReport>),
        (len, room): (usize, usize),
        rest: &mut [u8],
        tally: &mut Tally,
    ) {
        if !(MIN_FRAME_LEN..=MAX_FRAME_LEN).contains(&len) {
            return tally.drop(Drop::Length);
        }
        match self.gather(self.header_len + len) {
            Ok(count) => {
                let more = len.saturating_sub(room);
                let pieces = [VolatileSlice::from(
                    rest.get_mut(..more).unwrap_or_default(),
                )];
                let mut source = Source::new(&pieces, hash);
                let header = Header {
                    num_buffers: count as u16,
                    ..header
                };
                self.fill(count, (len, room), header, &mut source);
                tally.frame(len);
            }
            Err(NoRoom::Empty) => tally.drop(Drop::NoBuffer),
            Err(NoRoom::Small) => tally.drop(Drop::TooSmall),
        }
    }

    /// Asks for a kick at the next buffer. `true`: there is one already.
    pub(super) fn arm(&mut self) -> bool {
        self.ring.arm()
    }

    /// Whether frames are wanted whose header says this.
    pub(super) fn filter(&self) -> Arc<Filter> {
        self.link.filter()
    }
}

fn used(chain: &OwnedChain, written: usize) -> Completion {
    Completion {
        head: chain.head(),
        // A chain has at most u32::MAX bytes.
        written: u32::try_from(written).unwrap_or(u32::MAX),
    }
}

/// Whether a header asks for anything.
pub(super) fn is_plain(header: &Header) -> bool {
    asks_nothing(header.flags, header.gso_type)
}
