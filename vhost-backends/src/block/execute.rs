//! One queue's worker: a ring, an engine, one loop.

use super::poll::AdaptivePoll;
use super::request::{HEADER_LEN, LIFETIME_LEN, Request};
use super::thread::Stop;
use super::{Counters, Disk};
use crate::engine::{Engine, FailedEngine, Finished, Operation, Token, Wake, WakeSources};
use crate::limits::{MAX_BATCH, MAX_HOLD_MILLIS, MAX_IN_FLIGHT, MAX_UNPUBLISHED_BYTES};
use crate::ring::{Completion, DeviceRing, OwnedChain, Ring};
use crate::session::quota::PEER_LINES;
use crate::session::{Notifier, QueueStop};
use crate::stats::{Kind, Measure, QueueStats};
use pv_abi::virtio::block::{feature, status};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vm_memory::GuestMemoryMmap;

/// A request in flight.
#[derive(Debug)]
struct Pending {
    chain: OwnedChain,
    /// Bytes of data that the device writes if all goes well.
    data: u64,
    measure: Measure,
    /// A flush comes after it.
    then_flush: bool,
}

pub(super) struct Worker {
    disk: Arc<Disk>,
    index: u16,
    ring: Ring,
    engine: Box<dyn Engine>,
    memory: Arc<GuestMemoryMmap>,
    call: Arc<Notifier>,
    err: Arc<Notifier>,
    pending: Vec<Option<Pending>>,
    free: Vec<Token>,
    done: Vec<Completion>,
    /// What is in `done`, for the statistics.
    measured: Vec<Measure>,
    finished: Vec<Finished>,
    retired: bool,
    /// The limits hold the queue back for this long.
    hold: Option<Duration>,
    /// How long to look for what the host works on.
    host_poll: AdaptivePoll,
    /// How long to look for the driver's answer to completions.
    driver_poll: AdaptivePoll,
    /// When completions were published that the driver has not answered with new requests.
    unanswered: Option<u64>,
    cache: WriteCache,
    /// Bytes of requests that wait in `done`.
    unpublished: u64,
}

/// When a write is safe (virtio 1.3 §5.2.6.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WriteCache {
    /// After a flush.
    Back,
    /// At its end: a driver that cannot flush relies on that.
    Through,
    /// As the driver has it in configuration space.
    Chosen,
}

impl WriteCache {
    pub(super) fn of(features: u64) -> WriteCache {
        if features & feature::CONFIG_WCE != 0 {
            WriteCache::Chosen
        } else if features & feature::FLUSH != 0 {
            WriteCache::Back
        } else {
            WriteCache::Through
        }
    }
}

impl Worker {
    pub(super) fn new(
        disk: Arc<Disk>,
        index: u16,
        ring: Ring,
        engine: Box<dyn Engine>,
        memory: Arc<GuestMemoryMmap>,
        call: Arc<Notifier>,
        err: Arc<Notifier>,
        cache: WriteCache,
    ) -> Worker {
        // MAX_IN_FLIGHT fits a token.
        let free = (0..MAX_IN_FLIGHT as Token).rev().collect();
        Worker {
            disk,
            index,
            ring,
            engine,
            memory,
            call,
            err,
            pending: std::iter::repeat_with(|| None)
                .take(MAX_IN_FLIGHT)
                .collect(),
            free,
            done: Vec::with_capacity(MAX_BATCH),
            measured: Vec::with_capacity(MAX_BATCH),
            finished: Vec::with_capacity(MAX_IN_FLIGHT),
            retired: false,
            hold: None,
            host_poll: AdaptivePoll::default(),
            driver_poll: AdaptivePoll::default(),
            unanswered: None,
            cache,
            unpublished: 0,
        }
    }

    /// Serves the ring until it is asked to stop; everything that was taken is completed then, or
    /// stays in the ring's log if it may.
    pub(super) fn run(mut self, wake: WakeSources<'_>, stop: &Stop) -> QueueStop {
        self.with_stats(QueueStats::clear_in_flight);
        if let Err(error) = self.serve(stop) {
            self.engine_failed(&error, wake, stop);
        }
        let stopped = QueueStop {
            ring: self.ring.save(),
            retired: self.ring.retired(),
        };
        // The engine must go before the memory.
        drop(self.engine);
        if let Some(stats) = self.disk.stats.queue(self.index) {
            stats.clear_in_flight();
        }
        stopped
    }

    /// The engine itself failed, not a request. What it had in flight is an I/O error, and so is
    /// everything after it, until the frontend starts the queue anew.
    fn engine_failed(&mut self, error: &io::Error, wake: WakeSources<'_>, stop: &Stop) {
        tracing::error!(%error, "a block queue's engine failed; its requests fail from now on");
        Counters::add(&self.disk.counters.host_errors, 1);
        self.err.signal();
        // The old one waits for what the host still works on.
        self.engine = Box::new(FailedEngine::new(wake));
        self.fail_pending();
        if let Err(error) = self.serve(stop) {
            tracing::error!(%error, "block queue stopped");
        }
    }

    /// Completes what a failed engine will not give back.
    fn fail_pending(&mut self) {
        for (token, slot) in (0..).zip(&self.pending) {
            let known = self.finished.iter().any(|done| done.token == token);
            if slot.is_some() && !known {
                let result = Err(io::Error::from_raw_os_error(libc::EIO));
                self.finished.push(Finished { token, result });
            }
        }
        self.publish();
    }

    fn serve(&mut self, stop: &Stop) -> io::Result<()> {
        loop {
            // First, so that the engine knows what the host still has when it gets more.
            let wake = self.engine.reap(&mut self.finished)?;
            self.publish();
            if wake.stop {
                break;
            }
            let took = self.take(stop)?;
            self.publish();
            if stop.is_asked() {
                break;
            }
            if took == MAX_BATCH {
                // More is likely there; the host should work on this meanwhile.
                self.engine.submit()?;
                continue;
            }
            if let Some(hold) = self.hold {
                if self.held_back(hold)?.stop {
                    break;
                }
                continue;
            }
            let may_take = !self.free.is_empty();
            if self.poll_briefly(may_take)? || (may_take && self.ring.arm()) {
                continue;
            }
            Counters::add(&self.disk.counters.wakes, 1);
            let asleep = self.disk.stats.now();
            let wake = self.engine.wait(&mut self.finished)?;
            if !self.finished.is_empty() {
                self.host_poll.slept(self.since(asleep));
                self.ring.disarm();
            }
            self.publish();
            if wake.stop {
                break;
            }
        }
        let may_leave = stop.may_leave() && self.ring.is_logged();
        while self.engine.in_flight() > 0 && !(may_leave && self.engine.abandon()) {
            self.engine.wait(&mut self.finished)?;
            self.publish();
        }
        Ok(())
    }

    /// Sleeps while the limits hold the queue back; what is in flight goes on.
    fn held_back(&mut self, hold: Duration) -> io::Result<Wake> {
        let asleep = Instant::now();
        let limit = hold.min(Duration::from_millis(MAX_HOLD_MILLIS));
        let wake = self.engine.wait_for(&mut self.finished, limit)?;
        self.with_stats(|stats| stats.held(asleep.elapsed()));
        self.publish();
        Ok(wake)
    }

    fn with_stats(&self, measure: impl FnOnce(&QueueStats)) {
        if let Some(stats) = self.disk.stats.queue(self.index) {
            measure(stats);
        }
    }

    /// Looks for work for as long as recent sleeps suggest. Whether there is some.
    fn poll_briefly(&mut self, may_take: bool) -> io::Result<bool> {
        let working = self.engine.in_flight() > 0;
        let mut budget = Duration::ZERO;
        if self.unanswered.is_some() {
            budget = self.driver_poll.budget();
        }
        // A driver that takes its time does not wait for the disk either.
        if working && !self.driver_poll.budget().is_zero() {
            budget = budget.max(self.host_poll.budget());
        }
        if budget.is_zero() {
            return Ok(false);
        }
        if working {
            self.engine.submit()?;
        }
        let start = Instant::now();
        loop {
            if may_take && self.ring.has_more() {
                return Ok(true);
            }
            if self.engine.has_finished() {
                return Ok(true);
            }
            if start.elapsed() >= budget {
                return Ok(false);
            }
            std::hint::spin_loop();
        }
    }

    /// Takes up to a batch of chains and begins them, until it is asked to stop. How many there were.
    fn take(&mut self, stop: &Stop) -> io::Result<usize> {
        let mut took = 0;
        let mut began = 0;
        self.hold = None;
        while took < MAX_BATCH && !stop.is_asked() {
            let Some(token) = self.free.pop() else { break };
            self.hold = self.disk.limiter.delay();
            if self.hold.is_some() {
                // Only what is there can be held back.
                if !self.ring.has_more() {
                    self.hold = None;
                }
                self.free.push(token);
                break;
            }
            match self.ring.pop() {
                Ok(Some(chain)) => {
                    if took == 0 {
                        // Once for a batch: its chains were all there by now.
                        began = self.disk.stats.now();
                        if let Some(asked) = self.unanswered.take() {
                            let took = Duration::from_nanos(began.saturating_sub(asked));
                            self.driver_poll.answered(took);
                        }
                    } else {
                        self.engine.more_follows()?;
                    }
                    took += 1;
                    self.begin(token, chain, began);
                    if self.unpublished >= MAX_UNPUBLISHED_BYTES {
                        self.publish();
                    }
                }
                Ok(None) => {
                    self.free.push(token);
                    break;
                }
                Err(reason) => {
                    self.free.push(token);
                    self.retire(reason);
                    break;
                }
            }
        }
        Ok(took)
    }

    fn retire(&mut self, reason: crate::ring::Retire) {
        if !std::mem::replace(&mut self.retired, true) {
            Counters::add(&self.disk.counters.retired, 1);
            // A driver can reset and break its ring again, as often as it likes.
            if PEER_LINES.may_say() {
                tracing::warn!(%reason, "ring retired");
            }
            self.err.signal();
        }
    }

    /// Begins a request; it may be over when this returns.
    fn begin(&mut self, token: Token, chain: OwnedChain, began: u64) {
        let request = match self.disk.parse(&chain, &self.memory) {
            Ok(request) => request,
            Err(refused) => {
                Counters::add(&self.disk.counters.refused, 1);
                self.disk.limiter.charge(0);
                self.free.push(token);
                let (kind, bytes) = (Kind::Other, 0);
                self.measured.push(Measure { kind, bytes, began });
                return self.finish(&chain, refused.status(), 0);
            }
        };
        let (kind, bytes) = request.measure();
        let measure = Measure { kind, bytes, began };
        self.disk.limiter.charge(bytes);
        let (operation, data) = match request {
            Request::GetId => {
                let id = self.disk.id;
                self.measured.push(measure);
                return self.answer(token, &chain, &id);
            }
            Request::GetLifetime => {
                let life = self.disk.geometry.lifetime;
                let mut bytes = [0; LIFETIME_LEN];
                let fields = [life.pre_eol, life.type_a, life.type_b];
                for (to, from) in bytes.chunks_exact_mut(2).zip(fields) {
                    to.copy_from_slice(&from.to_le_bytes());
                }
                self.measured.push(measure);
                return self.answer(token, &chain, &bytes);
            }
            Request::Read { offset, len } => {
                let chain = &chain;
                (Operation::Read { chain, offset, len }, len)
            }
            Request::Write { offset, len } => {
                let (chain, from) = (&chain, HEADER_LEN);
                let write = Operation::Write {
                    chain,
                    from,
                    offset,
                    len,
                };
                (write, 0)
            }
            Request::Flush => (Operation::Flush, 0),
            Request::SecureErase { offset, len } => (Operation::SecureErase { offset, len }, 0),
            Request::Discard { offset, len } => (Operation::Discard { offset, len }, 0),
            Request::WriteZeroes { offset, len, unmap } => {
                (Operation::WriteZeroes { offset, len, unmap }, 0)
            }
        };
        let then_flush = match operation {
            Operation::Write { .. } | Operation::WriteZeroes { .. } => self.writes_through(),
            _ => false,
        };
        let result = self.engine.start(token, operation);
        let (result, then_flush) = match result {
            Some(Ok(())) if then_flush => (self.engine.start(token, Operation::Flush), false),
            result => (result, then_flush),
        };
        match result {
            Some(result) => {
                self.free.push(token);
                self.unpublished += chain.readable_len() + chain.writable_len();
                let code = self.status_of(result);
                self.measured.push(measure);
                self.finish(&chain, code, data);
            }
            None => {
                self.with_stats(|stats| stats.flies(token, measure));
                if let Some(slot) = self.pending.get_mut(usize::from(token)) {
                    *slot = Some(Pending {
                        chain,
                        data,
                        measure,
                        then_flush,
                    });
                }
            }
        }
    }

    fn writes_through(&self) -> bool {
        match self.cache {
            WriteCache::Back => false,
            WriteCache::Through => true,
            WriteCache::Chosen => !self.disk.writeback(),
        }
    }

    /// Ends a request whose whole answer is these bytes.
    fn answer(&mut self, token: Token, chain: &OwnedChain, bytes: &[u8]) {
        let written = chain.write_at(&self.memory, 0, bytes);
        let code = if written.is_ok() {
            status::OK
        } else {
            status::IOERR
        };
        self.free.push(token);
        self.finish(chain, code, bytes.len() as u64);
    }

    fn status_of(&self, result: io::Result<()>) -> u8 {
        match result {
            Ok(()) => status::OK,
            Err(error) => {
                self.disk.counters.failed(&error);
                self.with_stats(|stats| stats.failed(&error));
                status::IOERR
            }
        }
    }

    /// Writes the status byte, the last thing written, and queues the completion.
    fn finish(&mut self, chain: &OwnedChain, code: u8, data: u64) {
        let room = chain.writable_len();
        let written = match room.checked_sub(1) {
            // Nowhere to put it: the driver gets its chain back, with nothing written.
            None => 0,
            Some(at) => {
                // The chain was checked against this memory; there is no other.
                let _ = chain.write_at(&self.memory, at, &[code]);
                // The used length counts from the first writable byte without a gap
                // (virtio 1.3 §2.7.8.2): the status byte only where the data reaches it.
                match code {
                    status::OK if data == at => room,
                    status::OK => data,
                    _ if at == 0 => 1,
                    _ => 0,
                }
            }
        };
        self.done.push(Completion {
            head: chain.head(),
            // A chain has at most u32::MAX bytes.
            written: u32::try_from(written).unwrap_or(u32::MAX),
        });
    }

    /// Completes what is over and calls the driver if it wants that.
    fn publish(&mut self) {
        let mut finished = std::mem::take(&mut self.finished);
        for Finished { token, result } in finished.drain(..) {
            let slot = self.pending.get_mut(usize::from(token));
            let Some(Pending {
                chain,
                data,
                measure,
                then_flush,
            }) = slot.and_then(Option::take)
            else {
                continue;
            };
            let result = match result {
                Ok(()) if then_flush => match self.engine.start(token, Operation::Flush) {
                    Some(result) => result,
                    None => {
                        if let Some(slot) = self.pending.get_mut(usize::from(token)) {
                            *slot = Some(Pending {
                                chain,
                                data,
                                measure,
                                then_flush: false,
                            });
                        }
                        continue;
                    }
                },
                result => result,
            };
            self.free.push(token);
            self.with_stats(|stats| stats.landed(token));
            self.measured.push(measure);
            let code = self.status_of(result);
            self.finish(&chain, code, data);
        }
        self.finished = finished;
        if self.done.is_empty() {
            return;
        }
        Counters::add(&self.disk.counters.requests, self.done.len() as u64);
        self.unpublished = 0;
        self.ring.complete(&self.done);
        self.done.clear();
        self.measure();
        if self.ring.should_signal() {
            Counters::add(&self.disk.counters.calls, 1);
            self.call.signal();
        }
    }

    /// How long ago that was, which was a time of the statistics.
    fn since(&self, then: u64) -> Duration {
        Duration::from_nanos(self.disk.stats.now().saturating_sub(then))
    }

    /// Counts what was just published.
    fn measure(&mut self) {
        let now = self.disk.stats.now();
        self.unanswered = Some(now);
        let mut measured = std::mem::take(&mut self.measured);
        self.with_stats(|stats| {
            for measure in measured.drain(..) {
                stats.done(measure, now);
            }
        });
        self.measured = measured;
    }
}
