//! Whose turn it is: what the embedder wants of the vCPUs, and where each vCPU's thread is.
//!
//! A vCPU's thread takes a turn before it enters the guest and before it serves what the guest asked
//! for. Mostly nothing else is wanted, and a turn is one store and one load, with a fence in between;
//! who wants a halt stores that, fences and looks at the places, so one of the two always sees the
//! other. `tests/loom` runs this file under every order that the memory model allows, and gives it
//! the atomics and locks for that.

use crate::accel::StartState;
use crate::limits::RUN_LOOK;
#[cfg(loom)]
use loom::sync::atomic::{AtomicU8, Ordering, fence};
#[cfg(loom)]
use loom::sync::{Condvar, Mutex, MutexGuard};
use std::sync::PoisonError;
#[cfg(not(loom))]
use std::sync::atomic::{AtomicU8, Ordering, fence};
#[cfg(not(loom))]
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// What is wanted of all vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Want {
    Run,
    Pause,
    Stop,
}

/// Where one vCPU's thread is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Place {
    /// Not started yet.
    Unborn,
    /// To be started.
    Starting,
    /// In the guest, or about to be.
    Running,
    /// Carrying out what the guest asked for.
    Serving,
    /// Waiting for the embedder to answer a call.
    Deferred,
    /// Halted for a pause.
    Parked,
    /// Its thread is done.
    Done,
}

/// Registers of the vCPUs that are to be started, by vCPU.
type Starts = Vec<Option<StartState>>;

/// The turns of one VM's vCPUs.
pub(super) struct Turns {
    /// A [`Want`]; changed under the lock, so that no waiter misses it.
    want: AtomicU8,
    /// A [`Place`] for each vCPU.
    places: Vec<AtomicU8>,
    starts: Mutex<Starts>,
    changed: Condvar,
}

impl Turns {
    pub(super) fn new(vcpus: u32) -> Turns {
        Turns {
            want: AtomicU8::new(Want::Run as u8),
            places: (0..vcpus)
                .map(|_| AtomicU8::new(Place::Unborn as u8))
                .collect(),
            starts: Mutex::new((0..vcpus).map(|_| None).collect()),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Starts> {
        self.starts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(
        &self,
        guard: MutexGuard<'a, Starts>,
        at_most: Option<Duration>,
    ) -> MutexGuard<'a, Starts> {
        match at_most {
            None => self
                .changed
                .wait(guard)
                .unwrap_or_else(PoisonError::into_inner),
            Some(limit) => {
                self.changed
                    .wait_timeout(guard, limit)
                    .unwrap_or_else(PoisonError::into_inner)
                    .0
            }
        }
    }

    fn wants(&self, want: Want) -> bool {
        // Ordering: Acquire pairs with the Release in `set_want`; `turn` has the fence that it needs.
        self.want.load(Ordering::Acquire) == want as u8
    }

    fn set_want(&self, from: Option<Want>, to: Want) {
        let guard = self.lock();
        if from.is_none_or(|from| self.wants(from)) {
            // Ordering: Release, for `wants`.
            self.want.store(to as u8, Ordering::Release);
            // Ordering: SeqCst, for `turn`: the places are looked at after this.
            fence(Ordering::SeqCst);
        }
        drop(guard);
        self.changed.notify_all();
    }

    /// Sets a place that others may wait for.
    fn announce(&self, vcpu: usize, place: Place) {
        let guard = self.lock();
        if let Some(slot) = self.places.get(vcpu) {
            // Ordering: Release, for `all`.
            slot.store(place as u8, Ordering::Release);
        }
        drop(guard);
        self.changed.notify_all();
    }

    fn all(&self, is: impl Fn(u8) -> bool) -> bool {
        // Ordering: Acquire, so that what a thread did before it halted is seen.
        let mut places = self.places.iter();
        places.all(|place| is(place.load(Ordering::Acquire)))
    }

    /// Nothing shall run any more.
    pub(super) fn stop(&self) {
        self.set_want(None, Want::Stop);
    }

    pub(super) fn stopped(&self) -> bool {
        self.wants(Want::Stop)
    }

    #[cfg_attr(loom, allow(dead_code))]
    pub(super) fn pause_wanted(&self) -> bool {
        self.wants(Want::Pause)
    }

    /// Asks for a pause.
    pub(super) fn want_pause(&self) {
        self.set_want(Some(Want::Run), Want::Pause);
    }

    pub(super) fn resume(&self) {
        self.set_want(Some(Want::Pause), Want::Run);
    }

    /// A vCPU thread's next step: `true` to take it, `false` when it is all over.
    ///
    /// Halts here while a pause is wanted.
    pub(super) fn turn(&self, vcpu: usize, step: Place) -> bool {
        let Some(place) = self.places.get(vcpu) else {
            return false;
        };
        // Ordering: Release, for `all`.
        place.store(step as u8, Ordering::Release);
        // Ordering: SeqCst between this store and the load, as there is one between the store in
        // `set_want` and the loads in `all`. Whichever of the two fences comes first, a place that was
        // seen as it was before this store means a want that is seen here.
        fence(Ordering::SeqCst);
        if self.wants(Want::Run) {
            return true;
        }
        let mut guard = self.lock();
        loop {
            if self.stopped() {
                return false;
            }
            if self.wants(Want::Run) {
                // Ordering: Release, for `all`; who looks holds the lock, here and below.
                place.store(step as u8, Ordering::Release);
                return true;
            }
            place.store(Place::Parked as u8, Ordering::Release);
            self.changed.notify_all();
            guard = self.wait(guard, None);
        }
    }

    /// The embedder has not answered yet: this vCPU does nothing until it has.
    pub(super) fn defer(&self, vcpu: usize) {
        self.announce(vcpu, Place::Deferred);
    }

    /// This vCPU's thread has ended, or there is none and will be none.
    pub(super) fn done(&self, vcpu: usize) {
        self.announce(vcpu, Place::Done);
    }

    /// Waits until this vCPU is started; `None` when the VM ends first.
    ///
    /// The first looks for it for a while, because a VM that was built is most often run at once.
    pub(super) fn wait_for_start(&self, vcpu: usize) -> Option<StartState> {
        let waiting = Instant::now();
        let mut starts = self.lock();
        loop {
            if self.stopped() {
                return None;
            }
            if let Some(state) = starts.get_mut(vcpu)?.take() {
                return Some(state);
            }
            starts = if vcpu == 0 && waiting.elapsed() < RUN_LOOK {
                drop(starts);
                std::thread::yield_now();
                self.lock()
            } else {
                self.wait(starts, None)
            };
        }
    }

    /// Starts a vCPU; `false` if it has been started before.
    pub(super) fn start(&self, vcpu: usize, state: StartState) -> bool {
        let mut starts = self.lock();
        let (Some(place), Some(start)) = (self.places.get(vcpu), starts.get_mut(vcpu)) else {
            return false;
        };
        // Ordering: Relaxed, until its thread is started a place is stored to under the lock only.
        if place.load(Ordering::Relaxed) != Place::Unborn as u8 {
            return false;
        }
        place.store(Place::Starting as u8, Ordering::Release);
        *start = Some(state);
        drop(starts);
        self.changed.notify_all();
        true
    }

    /// Whether no vCPU thread runs the guest or serves it, or all is over.
    ///
    /// `frozen`: the guest has been halted already, so a thread that waits for it is halted too.
    pub(super) fn halted(&self, frozen: bool) -> bool {
        let runs = [Place::Running as u8, Place::Starting as u8];
        let serves = Place::Serving as u8;
        self.stopped() || self.all(|place| place != serves && (frozen || !runs.contains(&place)))
    }

    /// Whether all vCPU threads are done.
    pub(super) fn all_done(&self) -> bool {
        self.all(|place| place == Place::Done as u8)
    }

    /// Waits until this holds, or something changes, or so long; says whether it holds.
    pub(super) fn wait_for(
        &self,
        holds: impl Fn(&Turns) -> bool,
        at_most: Option<Duration>,
    ) -> bool {
        let guard = self.lock();
        if holds(self) {
            return true;
        }
        // Held while it is looked at: what is true without it may not be at the caller's.
        let _guard = self.wait(guard, at_most);
        holds(self)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;

    #[test]
    fn nothing_is_served_while_paused() {
        let turns = Turns::new(2);
        let served = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for vcpu in 0..2 {
                let (turns, served) = (&turns, &served);
                assert!(turns.start(vcpu, StartState::default()));
                assert!(!turns.start(vcpu, StartState::default()), "only once");
                scope.spawn(move || {
                    assert!(turns.wait_for_start(vcpu).is_some());
                    while turns.turn(vcpu, Place::Running) && turns.turn(vcpu, Place::Serving) {
                        served.fetch_add(1, Ordering::Relaxed);
                    }
                    turns.done(vcpu);
                });
            }
            for _ in 0..500 {
                turns.want_pause();
                let deadline = Instant::now() + Duration::from_secs(20);
                while !turns.wait_for(|t| t.halted(false), Some(Duration::from_millis(5))) {
                    assert!(Instant::now() < deadline);
                }
                let halted = served.load(Ordering::Relaxed);
                std::thread::yield_now();
                assert_eq!(served.load(Ordering::Relaxed), halted);
                turns.resume();
            }
            turns.stop();
        });
        assert!(turns.all_done() && turns.stopped());
        assert!(!turns.turn(0, Place::Running) && turns.wait_for_start(0).is_none());
    }

    #[test]
    fn what_is_waited_for_is_looked_at_under_the_lock() {
        let turns = Turns::new(1);
        let looks = AtomicU32::new(0);
        let holds = |turns: &Turns| {
            looks.fetch_add(1, Ordering::Relaxed);
            assert!(turns.starts.try_lock().is_err(), "a start may come between");
            false
        };
        assert!(!turns.wait_for(holds, Some(Duration::from_millis(1))));
        assert_eq!(looks.into_inner(), 2);
    }

    #[test]
    fn a_frozen_guest_counts_as_halted_and_one_that_is_served_does_not() {
        let turns = Turns::new(1);
        assert!(turns.halted(false), "never started");
        assert!(turns.turn(0, Place::Running) && !turns.halted(false) && turns.halted(true));
        assert!(turns.turn(0, Place::Serving) && !turns.halted(true));
        turns.defer(0);
        assert!(turns.halted(false));
        assert!(!turns.turn(1, Place::Running), "there is no such vCPU");
    }
}
