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
use crate::ring::{Completion, DeviceRing, OwnedChain, Ring};
use crate::session::quota::PEER_LINES;
use crate::session::{QueueSetup, QueueStop, QueueWorker};
use pv_abi::virtio::net::Header;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestMemoryMmap, VolatileSlice};
use zerocopy::IntoBytes;

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
                if worker.ring.should_signal() {
                    worker.link.stats.called();
                    call.signal();
                }
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
    chains: Vec<OwnedChain>,
    pieces: Vec<VolatileSlice<'m, ()>>,
    /// Header, and where in `pieces` the frame is.
    parsed: Vec<(Header, usize, usize, usize)>,
    done: Vec<Completion>,
}

/// Takes `count` bytes off the front of the pieces from `first` on, and copies as many of them as
/// there is room for. There are more.
fn take_front(
    pieces: &mut Vec<VolatileSlice<'_, ()>>,
    first: usize,
    count: usize,
    mut into: &mut [u8],
) {
    let (mut left, mut empty) = (count, 0);
    for piece in pieces.iter_mut().skip(first) {
        let take = piece.len().min(left);
        let n = piece.read(into, 0).unwrap_or(0).min(take);
        into = into.get_mut(n..).unwrap_or_default();
        left -= take;
        if take < piece.len() {
            if let Ok(rest) = piece.offset(take) {
                *piece = rest;
            }
            break;
        }
        empty += 1;
    }
    pieces.drain(first..first + empty);
}

impl Worker {
    /// Takes a batch and sends it. Whether there was anything.
    fn turn<'m>(&mut self, memory: &'m GuestMemoryMmap, batch: &mut Batch<'m>) -> bool {
        self.take(batch);
        if batch.chains.is_empty() {
            return false;
        }
        let mut tally = Tally::default();
        batch.pieces.clear();
        batch.parsed.clear();
        for chain in &batch.chains {
            self.parse(
                chain,
                memory,
                &mut batch.pieces,
                &mut batch.parsed,
                &mut tally,
            );
        }
        let frames: Vec<Frame<'_>> = batch
            .parsed
            .iter()
            .map(|&(header, from, to, len)| {
                Frame::new(header, batch.pieces.get(from..to).unwrap_or_default(), len)
            })
            .collect();
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
        // What may have cost something, whether it arrived or not.
        let bytes = frames.iter().map(|frame| frame.len() as u64).sum();
        let segments = frames.iter().map(Frame::segments).sum();
        self.link.limiter.charge_many(segments, bytes);
        self.link.stats.sent(&tally);
        let done = batch.chains.iter().map(|chain| Completion {
            head: chain.head(),
            written: 0,
        });
        batch.done.clear();
        batch.done.extend(done);
        self.ring.complete(&batch.done);
        true
    }

    /// Takes up to a batch of chains.
    fn take(&mut self, batch: &mut Batch<'_>) {
        batch.chains.clear();
        self.hold = self.link.limiter.delay();
        if self.hold.is_some() {
            // Only what is there can be held back.
            if !self.ring.has_more() {
                self.hold = None;
            }
            return;
        }
        while batch.chains.len() < MAX_BATCH {
            match self.ring.pop() {
                Ok(Some(chain)) => batch.chains.push(chain),
                Ok(None) => return,
                Err(reason) => {
                    if !std::mem::replace(&mut self.retired, true) {
                        self.link.ring_retired(&reason);
                    }
                    return;
                }
            }
        }
    }

    fn parse<'m>(
        &self,
        chain: &OwnedChain,
        memory: &'m GuestMemoryMmap,
        pieces: &mut Vec<VolatileSlice<'m, ()>>,
        parsed: &mut Vec<(Header, usize, usize, usize)>,
        tally: &mut Tally,
    ) {
        let total = chain.readable_len();
        let Some(data) = total.checked_sub(self.header_len as u64) else {
            return tally.drop(Drop::Length);
        };
        let Ok(len) = check_len(data) else {
            return tally.drop(Drop::Length);
        };
        let from = pieces.len();
        if chain
            .readable_slices(memory, 0, total, |piece| pieces.push(piece))
            .is_err()
        {
            pieces.truncate(from);
            return tally.drop(Drop::BadChain);
        }
        let mut header = Header::default();
        let known = self.header_len.min(size_of::<Header>());
        let bytes = header.as_mut_bytes().get_mut(..known);
        take_front(pieces, from, self.header_len, bytes.unwrap_or_default());
        match check_header(header, len, self.features) {
            Ok(header) => parsed.push((header, from, pieces.len(), len)),
            Err(_) => tally.drop(Drop::BadHeader),
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
                if self.ring.has_more() || wake.stop.is_set() {
                    return Ok(());
                }
                std::hint::spin_loop();
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
