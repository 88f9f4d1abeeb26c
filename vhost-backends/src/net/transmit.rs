//! The way from the guest: a transmit queue's thread.
//!
//! In come chains; out go batches of checked frames to the port, and the chains, given back once
//! the port is done with them. Nothing of a frame is copied here but its first bytes.

use super::capture::Direction;
use super::frame::{Frame, check_header, check_len};
use super::limits::MAX_BATCH;
use super::offload::{Offloads, Scratch, complete};
use super::port::Port;
use super::stats::{Drop, Tally};
use super::worker::{self, Wake};
use super::{Link, header_len};
use crate::block::AdaptivePoll;
use crate::limits::MAX_HOLD_MILLIS;
use crate::ring::{Completion, DeviceRing, Finder, OwnedChain, Ring, will_read};
use crate::session::quota::PEER_LINES;
use crate::session::{QueueSetup, QueueStop, QueueWorker};
use pv_abi::virtio::net::Header;
use smallvec::SmallVec;
use std::io;
use std::ops::Range;
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
    done: Vec<Completion>,
    finder: Finder,
}

/// A frame whose header was not looked at yet.
struct Found<'m> {
    header: HeaderAt<'m>,
    /// Where in the batch's pieces its bytes are.
    at: Range<usize>,
    len: usize,
}

/// Where a header is: nearly always in front of its frame.
enum HeaderAt<'m> {
    Memory(VolatileSlice<'m, ()>),
    Copied(Header),
}

impl HeaderAt<'_> {
    /// The header as it is now, copied once.
    #[inline]
    fn copy(&self) -> Header {
        let view = match self {
            HeaderAt::Copied(header) => return *header,
            HeaderAt::Memory(view) => view,
        };
        let mut header = Header::default();
        let bytes = header.as_mut_bytes();
        // All of it but what counts the buffers, in two steps; then that, where there is one.
        if let (Ok(first), Ok(second), Some(to)) = (
            view.get_ref::<u64>(0),
            view.get_ref::<u16>(8),
            bytes.get_mut(..10),
        ) {
            let (first, second) = (first.load().to_ne_bytes(), second.load().to_ne_bytes());
            for (to, from) in to.iter_mut().zip(first.into_iter().chain(second)) {
                *to = from;
            }
        }
        header
    }
}

/// Finds what a chain has to read: a header of `header_len` bytes, and the frame behind it, which
/// goes to the end of `pieces`. `None`: it is not in memory.
#[inline]
fn find<'m>(
    chain: &OwnedChain,
    header_len: usize,
    memory: &'m GuestMemoryMmap,
    finder: &mut Finder,
    pieces: &mut Vec<VolatileSlice<'m, ()>>,
) -> Option<HeaderAt<'m>> {
    if let [segment] = chain.readable()
        && let Some(view) = finder.view(memory, *segment)
        && let (Ok(header), Ok(frame)) = (view.subslice(0, header_len), view.offset(header_len))
    {
        will_read(&view);
        pieces.push(frame);
        return Some(HeaderAt::Memory(header));
    }
    let mut header = Header::default();
    let known = header_len.min(size_of::<Header>());
    let bytes = header.as_mut_bytes().get_mut(..known)?;
    chain.read_at(memory, 0, bytes).ok()?;
    let head = header_len as u64;
    let each = |view| pieces.push(view);
    let frame = chain.readable_slices(memory, head, chain.readable_len() - head, each);
    frame.ok().map(|()| HeaderAt::Copied(header))
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
        for found in &batch.found {
            match check_header(found.header.copy(), found.len, self.features) {
                Ok(header) => {
                    let pieces = batch.pieces.get(found.at.clone()).unwrap_or_default();
                    frames.push(Frame::new(header, pieces, found.len));
                }
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
            let Some(header) = find(chain, self.header_len, memory, finder, pieces) else {
                batch.pieces.truncate(from);
                tally.drop(Drop::BadChain);
                continue;
            };
            let at = from..batch.pieces.len();
            batch.found.push(Found { header, at, len });
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
