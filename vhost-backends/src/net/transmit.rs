//! The way from the guest: a transmit queue's thread.
//!
//! In come chains; out go batches of checked frames to the port, and the chains, given back once
//! the port is done with them. Nothing of a frame is copied here but its first bytes.

use super::capture::Direction;
use super::frame::{Frame, asks_nothing, check_header, check_len};
use super::limits::MAX_BATCH;
use super::offload::{Offloads, Scratch, complete};
use super::port::Port;
use super::stats::{Drop, Tally};
use super::worker::{self, Wake};
use super::{Link, header_len};
use crate::block::AdaptivePoll;
use crate::limits::MAX_HOLD_MILLIS;
use crate::ring::{Completion, DeviceRing, Finder, OwnedChain, Ring, cut, will_read};
use crate::session::quota::PEER_LINES;
use crate::session::{QueueSetup, QueueStop, QueueWorker};
use pv_abi::virtio::net::Header;
use smallvec::SmallVec;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vm_memory::{GuestMemoryMmap, VolatileMemory, VolatileSlice};
use zerocopy::IntoBytes;

/// Looks at the ring for each look at the clock.
const LOOKS: usize = 8;

/// Starts a transmit queue.
pub(super) fn spawn(
    link: Arc<Link>,
    port: Arc<dyn Port>,
    pair: u16,
    setup: QueueSetup,
) -> io::Result<Box<dyn QueueWorker>> {
    worker::spawn(format!("net-tx-{pair}"), setup, None, move |setup, wake| {
        let (call, err) = (setup.call, setup.err);
        let mut worker = Worker {
            ring: setup.ring,
            link,
            port,
            pair,
            features: setup.features,
            header_len: header_len(setup.features),
            scratch: Scratch::default(),
            retired: false,
            hold: None,
        };
        let mut poll = AdaptivePoll::default();
        let memory = Arc::clone(worker.ring.memory());
        let mut batch = Batch::default();
        while !wake.stop.is_set() {
            if worker.turn(&memory, &mut batch) {
                let wanted = worker.ring.should_signal();
                (worker.link).call(setup.index, batch.done.len(), wanted, &call);
                continue;
            }
            if worker.retired {
                err.signal();
            }
            if let Err(error) = worker.rest(&wake, &mut poll) {
                if PEER_LINES.may_say() {
                    tracing::error!(%error, "transmit queue stopped");
                }
                err.signal();
                break;
            }
        }
        QueueStop {
            ring: worker.ring.save(),
            retired: worker.ring.retired(),
        }
    })
}

struct Worker {
    ring: Ring,
    link: Arc<Link>,
    port: Arc<dyn Port>,
    pair: u16,
    features: u64,
    header_len: usize,
    scratch: Scratch,
    retired: bool,
    /// The limits hold the queue back for this long.
    hold: Option<Duration>,
}

/// What one turn works on, kept for its allocations.
#[derive(Default)]
struct Batch<'m> {
    /// The first `taken` of these are chains; the rest is room for more.
    chains: Vec<OwnedChain>,
    taken: usize,
    /// Of the frames, without their headers.
    pieces: Vec<VolatileSlice<'m, ()>>,
    found: Vec<Found<'m>>,
    /// Headers that are not in one piece in front of their frames, in order.
    copied: Vec<Header>,
    done: Vec<Completion>,
    finder: Finder,
}

/// A frame whose header was not looked at yet.
struct Found<'m> {
    /// Where the header is, nearly always in front of its frame. Elsewhere it was copied when it
    /// was found: then this is empty, and the next of the batch's copies is it.
    header: VolatileSlice<'m, ()>,
    /// Where in the batch's pieces its bytes are.
    from: usize,
    to: usize,
    len: usize,
}

/// The header in front of a frame as it is now, copied once, in two words: all of it but what
/// counts the buffers.
#[inline]
fn copy_header(view: &VolatileSlice<'_, ()>) -> Option<(u64, u16)> {
    let (first, second) = (view.get_ref::<u64>(0).ok()?, view.get_ref::<u16>(8).ok()?);
    Some((first.load(), second.load()))
}

fn header_of((first, second): (u64, u16)) -> Header {
    let mut header = Header::default();
    let bytes = first.to_ne_bytes().into_iter().chain(second.to_ne_bytes());
    for (to, from) in header.as_mut_bytes().iter_mut().zip(bytes) {
        *to = from;
    }
    header
}

/// Finds what a chain has to read: a header of `header_len` bytes, and the frame behind it, which
/// goes to the end of the batch's pieces. Where the header is; `None`: it is not in memory.
#[inline]
fn find<'m>(
    chain: &OwnedChain,
    header_len: usize,
    memory: &'m GuestMemoryMmap,
    finder: &mut Finder,
    pieces: &mut Vec<VolatileSlice<'m, ()>>,
) -> Option<VolatileSlice<'m, ()>> {
    let [segment] = chain.readable() else {
        return None;
    };
    let view = finder.view(memory, *segment)?;
    let (header, frame) = cut(view, header_len)?;
    will_read(&view);
    pieces.push(frame);
    Some(header)
}

/// Finds the frame of a chain of several buffers, and copies its header.
fn find_pieces<'m>(
    chain: &OwnedChain,
    header_len: usize,
    memory: &'m GuestMemoryMmap,
    pieces: &mut Vec<VolatileSlice<'m, ()>>,
) -> Option<Header> {
    let mut header = Header::default();
    let known = header_len.min(size_of::<Header>());
    let bytes = header.as_mut_bytes().get_mut(..known)?;
    chain.read_at(memory, 0, bytes).ok()?;
    let head = header_len as u64;
    let each = |view| pieces.push(view);
    let frame = chain.readable_slices(memory, head, chain.readable_len() - head, each);
    frame.ok().map(|()| header)
}

impl Worker {
    /// Takes a batch and sends it. Whether there was anything.
    fn turn<'m>(&mut self, memory: &'m GuestMemoryMmap, batch: &mut Batch<'m>) -> bool {
        let mut tally = Tally::default();
        self.take(memory, batch, &mut tally);
        if batch.taken == 0 {
            return false;
        }
        let mut frames: SmallVec<[Frame<'_>; MAX_BATCH]> = SmallVec::new();
        let mut copied = batch.copied.iter();
        for found in &batch.found {
            let pieces = batch.pieces.get(found.from..found.to).unwrap_or_default();
            let words = copy_header(&found.header);
            if let Some((first, _)) = words
                && let [flags, gso_type, ..] = first.to_ne_bytes()
                && asks_nothing(flags, gso_type)
            {
                frames.push(Frame::new(Header::default(), pieces, found.len));
                continue;
            }
            let header = words.map(header_of).or_else(|| copied.next().copied());
            match check_header(header.unwrap_or_default(), found.len, self.features) {
                Ok(header) => frames.push(Frame::new(header, pieces, found.len)),
                Err(_) => tally.drop(Drop::BadHeader),
            }
        }
        if self.link.capture.is_on() {
            for frame in &frames {
                self.link.capture.frame(frame, Direction::FromGuest);
            }
        }
        if self.link.is_up() {
            self.send(&frames, &mut tally);
        } else {
            frames.iter().for_each(|_| tally.drop(Drop::LinkDown));
        }
        if !self.link.limiter.is_open() {
            // What may have cost something, whether it arrived or not.
            let bytes = frames.iter().map(|frame| frame.len() as u64).sum();
            let segments = frames.iter().map(Frame::segments).sum();
            self.link.limiter.charge_many(segments, bytes);
        }
        self.link.stats.sent(&tally);
        batch.done.clear();
        let chains = batch.chains.iter().take(batch.taken);
        batch.done.extend(chains.map(|chain| Completion {
            head: chain.head(),
            written: 0,
        }));
        self.ring.complete(&batch.done);
        true
    }

    /// Takes up to a batch of chains, and finds their bytes: those are on their way to this
    /// processor while the other chains are looked at.
    fn take<'m>(&mut self, memory: &'m GuestMemoryMmap, batch: &mut Batch<'m>, tally: &mut Tally) {
        batch.taken = 0;
        batch.pieces.clear();
        batch.found.clear();
        batch.copied.clear();
        self.hold = self.link.limiter.delay();
        if self.hold.is_some() {
            // Only what is there can be held back.
            if !self.ring.has_more() {
                self.hold = None;
            }
            return;
        }
        while batch.taken < MAX_BATCH {
            if batch.taken == batch.chains.len() {
                batch.chains.push(OwnedChain::empty());
            }
            let Some(chain) = batch.chains.get_mut(batch.taken) else {
                return;
            };
            match self.ring.pop_into(chain) {
                Ok(true) => batch.taken += 1,
                Ok(false) => return,
                Err(reason) => {
                    if !std::mem::replace(&mut self.retired, true) {
                        self.link.ring_retired(&reason);
                    }
                    return;
                }
            }
            let data = chain.readable_len().checked_sub(self.header_len as u64);
            let Some(Ok(len)) = data.map(check_len) else {
                tally.drop(Drop::Length);
                continue;
            };
            let from = batch.pieces.len();
            let (finder, pieces) = (&mut batch.finder, &mut batch.pieces);
            let header = match find(chain, self.header_len, memory, finder, pieces) {
                Some(header) => header,
                None => match find_pieces(chain, self.header_len, memory, pieces) {
                    Some(header) => {
                        batch.copied.push(header);
                        VolatileSlice::from(&mut [][..])
                    }
                    None => {
                        pieces.truncate(from);
                        tally.drop(Drop::BadChain);
                        continue;
                    }
                },
            };
            let to = pieces.len();
            batch.found.push(Found {
                header,
                from,
                to,
                len,
            });
        }
    }

    /// Hands frames to the port, made plain where it does not take them as they are.
    fn send(&mut self, frames: &[Frame<'_>], tally: &mut Tally) {
        if self.link.active_pairs() > 1 {
            for frame in frames {
                self.link.steering.sent(frame, self.pair);
            }
        }
        let offloads = self.port.offloads();
        if offloads == Offloads::ALL {
            self.hand(frames, tally);
            return;
        }
        let mut rest = frames;
        while let Some(at) = rest.iter().position(|frame| !offloads.take(frame)) {
            let (ready, more) = rest.split_at(at);
            self.hand(ready, tally);
            let Some((large, more)) = more.split_first() else {
                return;
            };
            let mut scratch = std::mem::take(&mut self.scratch);
            let mut each = |plain: &Frame<'_>| self.hand(std::slice::from_ref(plain), tally);
            if !complete(large, &mut scratch, &mut each) {
                tally.drop(Drop::BadHeader);
            }
            self.scratch = scratch;
            rest = more;
        }
        self.hand(rest, tally);
    }

    /// Whether the port took all of them.
    fn hand(&self, frames: &[Frame<'_>], tally: &mut Tally) -> bool {
        if frames.is_empty() {
            return true;
        }
        let taken = self.port.send(self.pair, frames);
        for (index, frame) in frames.iter().enumerate() {
            if index < taken {
                tally.frame(frame.len());
            } else {
                tally.drop(Drop::PortFull);
            }
        }
        taken >= frames.len()
    }

    /// Looks for a moment if that was worth it lately, and sleeps.
    fn rest(&mut self, wake: &Wake, poll: &mut AdaptivePoll) -> io::Result<()> {
        if let Some(hold) = self.hold {
            return wake.for_kick(Some(hold.min(Duration::from_millis(MAX_HOLD_MILLIS))));
        }
        let budget = poll.budget();
        if !budget.is_zero() {
            let start = Instant::now();
            while start.elapsed() < budget {
                // Reading the clock takes longer than looking.
                for _ in 0..LOOKS {
                    if self.ring.has_more() || wake.stop.is_set() {
                        return Ok(());
                    }
                    std::hint::spin_loop();
                }
            }
        }
        if self.ring.arm() {
            return Ok(());
        }
        self.link.stats.woke();
        let asleep = Instant::now();
        wake.for_kick(None)?;
        poll.slept(asleep.elapsed());
        Ok(())
    }
}
