//! One queue of a device: its ring, what is in it, and what waits to be put into it.

use super::{Core, Lost, Segments, Step};
use crate::limits::{LOSS_POLL, RECOVERY_POLL, STRAY_POLL};
use crate::platform::{Arena, DeviceInfo, OutOfArena, Platform, Waiter};
use crate::sync::SpinLock;
use crate::virtqueue::{Broken, DriverQueue, Refused, RingMemory};
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::time::Duration;
use pv_abi::device::QueueSetup;

/// A driver's request, able to be given to a device more than once.
pub(crate) trait Submission: Send + 'static {
    /// Writes what the device reads into the arena, from private memory, and lists the segments.
    ///
    /// Called again for each generation of the device that gets the request.
    fn prepare(&mut self, segments: &mut Segments);
}

/// Why a channel has nothing more to give.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failed {
    /// The device broke the rules of the ring.
    Broken(Broken),
    /// The device is gone.
    Lost(Lost),
}

/// What the core does with a queue, whatever its requests are.
pub(crate) trait Ring: Send + Sync {
    /// How `DEVICE_ACTIVATE` describes it.
    fn setup(&self) -> QueueSetup;
    /// The vCPU that waits for it.
    fn vcpu(&self) -> u32;
    /// From the return on, nothing of the driver touches the ring.
    fn detach(&self);
    /// Takes what was completed, empties the ring, keeps the rest for the next generation. The device
    /// has stopped using the ring; nothing happens the second time.
    fn rebuild(&self, event_idx: bool, indirect: bool);
    /// Puts what is kept into the ring; whether the doorbell must be rung.
    fn attach(&self, generation: u32) -> bool;
}

/// A queue with requests of type `R`; shared between its owner and the core.
pub(crate) struct Channel<R> {
    state: SpinLock<State<R>>,
    index: u16,
    vcpu: u32,
    event: u32,
    config_event: u32,
}

struct State<R> {
    ring: DriverQueue<R>,
    /// The generation whose rings these are; `None` while nobody may touch them.
    attached: Option<u32>,
    /// Requests that are not in the ring, in order.
    backlog: VecDeque<R>,
    /// Completions that were reaped when the device went.
    reaped: VecDeque<(R, u32)>,
    /// Requests held, wherever.
    held: u16,
    /// Whether the ring asks for a signal now.
    armed: bool,
}

impl<R: Submission> Channel<R> {
    pub(crate) fn new(
        info: &DeviceInfo,
        index: u16,
        arena: &'static Arena,
        size: u16,
        vcpu: u32,
        table_entries: usize,
    ) -> Result<Self, OutOfArena> {
        let memory = RingMemory::new(arena, size, table_entries)?;
        Ok(Channel {
            state: SpinLock::new(State {
                ring: DriverQueue::new(memory, false, false),
                attached: None,
                backlog: VecDeque::new(),
                reaped: VecDeque::new(),
                held: 0,
                armed: false,
            }),
            index,
            vcpu,
            event: info.queue_event(index),
            config_event: info.config_event(),
        })
    }

    /// The queue's index in the device.
    pub(crate) fn index(&self) -> u16 {
        self.index
    }

    /// The event and doorbell.
    pub(crate) fn event(&self) -> u32 {
        self.event
    }

    /// Requests held: in the ring, waiting for room, or completed and not taken.
    pub(crate) fn held(&self) -> u16 {
        self.state.lock().held
    }

    /// Takes a request; the device sees it at the next [`kick`](Self::kick) or
    /// [`poll`](Self::poll). While the device is away, it waits with the others.
    pub(crate) fn submit(&self, mut request: R) -> Result<(), (R, Option<Broken>)> {
        let mut state = self.state.lock();
        if let Some(broken) = state.ring.broken() {
            return Err((request, Some(broken)));
        }
        if state.attached.is_none() || !state.backlog.is_empty() {
            if state.held >= state.ring.memory().size() {
                return Err((request, None));
            }
            state.backlog.push_back(request);
            state.held += 1;
            return Ok(());
        }
        let mut segments = Segments::new();
        request.prepare(&mut segments);
        match state.ring.add(segments.as_slice(), request) {
            Ok(_head) => {
                state.held += 1;
                Ok(())
            }
            Err(refused) => Err((
                refused.data,
                match refused.reason {
                    Refused::Broken(broken) => Some(broken),
                    Refused::Full | Refused::BadChain => None,
                },
            )),
        }
    }

    /// Takes what was completed when the device went, without a look at the ring.
    pub(crate) fn take_reaped(&self) -> Option<R> {
        let mut state = self.state.lock();
        let (request, _) = state.reaped.pop_front()?;
        state.held -= 1;
        Some(request)
    }

    /// Puts requests in front of all others, and forgets those that are not to be kept. For the time
    /// between [`Ring::rebuild`] and [`Ring::attach`], when all of them wait.
    pub(crate) fn go_first(&self, keep: impl Fn(&R) -> bool, list: Vec<R>) {
        let mut state = self.state.lock();
        let before = state.backlog.len();
        state.backlog.retain(keep);
        let forgotten = before - state.backlog.len();
        let held = usize::from(state.held) + list.len() - forgotten;
        state.held = u16::try_from(held).unwrap_or(u16::MAX);
        for request in list.into_iter().rev() {
            state.backlog.push_front(request);
        }
    }

    /// Shows the device what was submitted.
    pub(crate) fn kick<P: Platform>(&self, core: &Core<P>) {
        let mut state = self.state.lock();
        // A device that is gone must not see it: the next poll brings it back first.
        let kick = core.is_live(state.attached) && state.ring.publish();
        drop(state);
        if kick {
            core.platform().notify(self.event);
        }
    }

    /// Shows the device what was submitted, and takes the next completion.
    pub(crate) fn poll<P: Platform>(&self, core: &Core<P>) -> Result<Option<(R, u32)>, Failed> {
        let mut state = self.state.lock();
        if let Some((request, written)) = state.reaped.pop_front() {
            state.held -= 1;
            return Ok(Some((request, written)));
        }
        if !core.is_live(state.attached) {
            drop(state);
            match core.step() {
                Ok(Step::Waiting) => return Ok(None),
                Ok(Step::Live) => state = self.state.lock(),
                Err(lost) => return Err(Failed::Lost(lost)),
            }
            if let Some((request, written)) = state.reaped.pop_front() {
                state.held -= 1;
                return Ok(Some((request, written)));
            }
            if state.attached.is_none() {
                return Ok(None);
            }
        }
        state.disarm();
        let mut kick = state.ring.publish();
        let popped = state.ring.pop().map_err(Failed::Broken);
        if let Ok(Some(_)) = popped {
            state.held -= 1;
            if !state.backlog.is_empty() {
                state.refill();
                kick |= state.ring.publish();
            }
        }
        drop(state);
        if kick {
            core.platform().notify(self.event);
        }
        Ok(popped?.map(|used| (used.data, used.written)))
    }

    /// Takes the next group of completions, which `count` tells the size of when it sees the first of
    /// them; whether there was one. What was submitted is published when nothing else is to be had.
    ///
    /// A device publishes the completions of a group together. One that says a count that cannot be,
    /// or publishes a part, breaks the queue; what a device that went away left of a group is
    /// submitted again.
    pub(crate) fn poll_group<P: Platform>(
        &self,
        core: &Core<P>,
        count: impl Fn(&R, u32) -> Result<u16, Broken>,
        group: &mut Vec<(R, u32)>,
    ) -> Result<bool, Failed> {
        let mut state = self.state.lock();
        if !core.is_live(state.attached) {
            drop(state);
            let step = core.step();
            state = self.state.lock();
            // What was reaped before it went is good all the same.
            if state.reaped.is_empty() {
                match step {
                    Ok(Step::Live) => {}
                    Ok(Step::Waiting) => return Ok(false),
                    Err(lost) => return Err(Failed::Lost(lost)),
                }
            }
        }
        if state.take_reaped_group(&count, group) {
            return Ok(true);
        }
        if state.attached.is_none() {
            return Ok(false);
        }
        state.disarm();
        let found = state.take_group(&count, group).map_err(Failed::Broken)?;
        // While there is something to take, what was given back meanwhile goes in batches.
        let kick = (!found || state.ring.unpublished() >= state.ring.memory().size() / 4)
            && state.ring.publish();
        drop(state);
        if kick {
            core.platform().notify(self.event);
        }
        Ok(found)
    }

    /// Waits for the next completion; `None` if nothing is held that could complete.
    pub(crate) fn next<P: Platform>(&self, core: &Core<P>) -> Result<Option<(R, u32)>, Failed> {
        if let Some(done) = self.poll(core)? {
            return Ok(Some(done));
        }
        let mut waiter = self.waiter(core);
        loop {
            waiter.clear();
            if let Some(done) = self.poll(core)? {
                return Ok(Some(done));
            }
            if self.held() == 0 {
                return Ok(None);
            }
            if self.arm(1) {
                waiter.idle(self.idle_limit(core, None));
            }
        }
    }

    /// Takes a request out of a device that is gone for good.
    pub(crate) fn take_lost(&self) -> Option<R> {
        let mut state = self.state.lock();
        let request = match state.reaped.pop_front() {
            Some((request, _)) => request,
            None => {
                if state.ring.in_flight() != 0 {
                    // Nobody touches the ring any more; `backlog` keeps the order.
                    state.keep(false, false);
                }
                state.backlog.pop_front()?
            }
        };
        state.held -= 1;
        Some(request)
    }

    /// Asks for an event after `after` completions; whether its owner may idle now.
    pub(crate) fn arm(&self, after: u16) -> bool {
        let mut state = self.state.lock();
        if !state.reaped.is_empty() {
            return false;
        }
        if state.attached.is_none() {
            return true;
        }
        state.armed = true;
        state.ring.arm(after)
    }

    /// A wait for this queue's events and the device's.
    pub(crate) fn waiter<'p, P: Platform>(&self, core: &'p Core<P>) -> Waiter<'p, P> {
        Waiter::new(core.platform(), &[self.event, self.config_event])
    }

    /// How long an idle may last: until the caller's deadline, and no longer than the loss of the
    /// device may go unnoticed. On a vCPU that the queue's event does not go to, it is short.
    pub(crate) fn idle_limit<P: Platform>(
        &self,
        core: &Core<P>,
        deadline_ns: Option<u64>,
    ) -> Option<Duration> {
        let attached = self.state.lock().attached;
        let watch = if !core.is_live(attached) {
            Some(RECOVERY_POLL)
        } else if core.platform().vcpu_index() != self.vcpu {
            Some(STRAY_POLL)
        } else if core.platform().vcpu_index() != core.config_vcpu() {
            Some(LOSS_POLL)
        } else {
            None
        };
        let left = deadline_ns.map(|deadline| {
            Duration::from_nanos(deadline.saturating_sub(core.platform().now_ns()))
        });
        match (watch, left) {
            (Some(watch), Some(left)) => Some(watch.min(left)),
            (watch, left) => watch.or(left),
        }
    }
}

impl<R> State<R> {
    /// Nobody waits any more: takes the wish for a signal back.
    fn disarm(&mut self) {
        if core::mem::take(&mut self.armed) {
            self.ring.disarm();
        }
    }

    /// Takes a group out of the ring, all of it or nothing.
    fn take_group(
        &mut self,
        count: impl Fn(&R, u32) -> Result<u16, Broken>,
        group: &mut Vec<(R, u32)>,
    ) -> Result<bool, Broken> {
        let Some(first) = self.ring.pop()? else {
            return Ok(false);
        };
        self.held -= 1;
        let said = count(&first.data, first.written);
        group.push((first.data, first.written));
        let said = said.map_err(|broken| self.ring.condemn(broken))?;
        let here = self.ring.completed()?.saturating_add(1);
        if said == 0 || said > here {
            return Err(self.ring.condemn(Broken::GroupCount { said, here }));
        }
        for _ in 1..said {
            if let Some(used) = self.ring.pop()? {
                self.held -= 1;
                group.push((used.data, used.written));
            }
        }
        Ok(true)
    }
}

impl<R: Submission> State<R> {
    /// Takes a group of what was reaped. What is no whole group goes back to the device.
    fn take_reaped_group(
        &mut self,
        count: impl Fn(&R, u32) -> Result<u16, Broken>,
        group: &mut Vec<(R, u32)>,
    ) -> bool {
        while let Some((first, written)) = self.reaped.front() {
            let said = count(first, *written).map_or(0, usize::from);
            if (1..=self.reaped.len()).contains(&said) {
                self.held = self
                    .held
                    .saturating_sub(u16::try_from(said).unwrap_or(u16::MAX));
                group.extend(self.reaped.drain(..said));
                return true;
            }
            let rest = core::mem::take(&mut self.reaped);
            self.backlog
                .extend(rest.into_iter().map(|(request, _)| request));
            if self.attached.is_some() {
                self.refill();
            }
        }
        false
    }

    /// Moves what fits from the backlog into the ring.
    fn refill(&mut self) {
        while let Some(mut request) = self.backlog.pop_front() {
            let mut segments = Segments::new();
            request.prepare(&mut segments);
            if let Err(refused) = self.ring.add(segments.as_slice(), request) {
                self.backlog.push_front(refused.data);
                return;
            }
        }
    }

    /// Empties the ring; what was in flight goes before what is in the backlog.
    fn keep(&mut self, event_idx: bool, indirect: bool) {
        self.armed = false;
        for request in self.ring.reset(event_idx, indirect).into_iter().rev() {
            self.backlog.push_front(request);
        }
    }
}

impl<R: Submission> Ring for Channel<R> {
    fn setup(&self) -> QueueSetup {
        let state = self.state.lock();
        let (desc, avail, used) = state.ring.memory().addresses();
        QueueSetup {
            desc,
            avail,
            used,
            size: state.ring.memory().size(),
            flags: 0,
            vcpu: self.vcpu,
        }
    }

    fn vcpu(&self) -> u32 {
        self.vcpu
    }

    fn detach(&self) {
        self.state.lock().attached = None;
    }

    fn rebuild(&self, event_idx: bool, indirect: bool) {
        let mut state = self.state.lock();
        while let Ok(Some(used)) = state.ring.pop() {
            state.reaped.push_back((used.data, used.written));
        }
        state.keep(event_idx, indirect);
    }

    fn attach(&self, generation: u32) -> bool {
        let mut state = self.state.lock();
        state.attached = Some(generation);
        state.refill();
        state.ring.publish()
    }
}
