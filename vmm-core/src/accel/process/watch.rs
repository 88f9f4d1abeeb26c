//! What a supervisor and the VM that its process belongs to tell each other.
//!
//! | state | means | leaves by |
//! |---|---|---|
//! | starting | the supervisor makes the process | started, or not |
//! | spare | no VM has it: whatever ends it ends nobody | adopted |
//! | adopted | it becomes a guest: its end wakes who waits for that | armed, or its end |
//! | armed | the guest may run: its end is the VM's, with a reason | its end |

use super::{futex, page};
use crate::accel::Reporter;
use crate::fault::Violation;
use crate::memory::GuestMemory;
use pv_abi::layout::{VMM_BASE, vcpu_page};
use std::io;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

/// The VM that a process belongs to.
pub(super) struct Guest {
    pub(super) memory: Arc<GuestMemory>,
    pub(super) vcpus: u32,
    pub(super) reporter: Weak<dyn Reporter>,
}

impl Guest {
    /// Tells the VM, unless it is gone. What panics in there is the embedder's, a subscriber or the
    /// destructor of a handler: the supervisor, which does this, has more to do.
    pub(super) fn tell(&self, what: impl FnOnce(&dyn Reporter)) {
        let told = catch_unwind(AssertUnwindSafe(|| {
            if let Some(reporter) = self.reporter.upgrade() {
                what(&*reporter);
            }
        }));
        if told.is_err() {
            // Does nothing where the first has come to its reason.
            let _ = catch_unwind(AssertUnwindSafe(|| {
                if let Some(reporter) = self.reporter.upgrade() {
                    reporter.host_error(io::Error::other("code of the embedder's panicked"));
                }
            }));
        }
    }
}

/// What the supervisor shares with the VM.
#[derive(Default)]
pub(super) struct Watch {
    /// The process is dead.
    pub(super) gone: Arc<AtomicBool>,
    /// The end was asked for.
    pub(super) ending: AtomicBool,
    pub(super) traced: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    process: Option<Result<Arc<OwnedFd>, io::Error>>,
    guest: Option<Arc<Guest>>,
    armed: bool,
    stop_wanted: bool,
    /// Every thread is in a stop, whoever asked for it: a second stop signal makes no news of it.
    stopped: bool,
    ended: bool,
    dead: bool,
}

impl Watch {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn update<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.state());
        self.changed.notify_all();
        result
    }

    /// Waits until this is so of the state. `false`: not in time.
    fn wait(&self, deadline: Option<Instant>, done: impl Fn(&State) -> bool) -> bool {
        let mut state = self.state();
        while !done(&state) {
            let left = deadline.map(|d| d.saturating_duration_since(Instant::now()));
            state = match left {
                Some(left) if left.is_zero() => return false,
                Some(left) => {
                    let waited = self.changed.wait_timeout(state, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                None => {
                    let waited = self.changed.wait(state);
                    waited.unwrap_or_else(PoisonError::into_inner)
                }
            };
        }
        true
    }

    /// The process is there.
    pub(super) fn started(&self, pidfd: Arc<OwnedFd>, traced: bool) {
        self.traced.store(traced, Ordering::Release);
        self.update(|state| state.process = Some(Ok(pidfd)));
    }

    /// There is none, and will be none; does nothing where there was one.
    pub(super) fn not_started(&self, error: io::Error) {
        self.update(|state| {
            if state.process.is_none() {
                state.process = Some(Err(error));
                (state.ended, state.dead) = (true, true);
                self.gone.store(true, Ordering::Release);
            }
        });
    }

    /// The process, once it was started.
    ///
    /// # Errors
    /// Why it could not be; the reason itself goes to the first who asks.
    pub(super) fn process(&self) -> io::Result<Arc<OwnedFd>> {
        self.wait(None, |state| state.process.is_some());
        match &mut self.state().process {
            Some(Ok(pidfd)) => Ok(Arc::clone(pidfd)),
            Some(Err(error)) => {
                let again = io::Error::from(error.kind());
                Err(std::mem::replace(error, again))
            }
            None => Err(io::Error::other("the supervisor thread ended")),
        }
    }

    /// Gives the process to a VM. `false`: it has ended.
    pub(super) fn adopt(&self, guest: Guest) -> bool {
        self.update(|state| {
            state.guest = Some(Arc::new(guest));
            !state.ended
        })
    }

    /// From here on, its end is the VM's. `false`: it has ended before.
    pub(super) fn arm(&self) -> bool {
        self.update(|state| {
            state.armed = !state.ended;
            state.armed
        })
    }

    /// The VM whose guest it runs.
    pub(super) fn armed(&self) -> Option<Arc<Guest>> {
        let state = self.state();
        state.guest.clone().filter(|_| state.armed)
    }

    /// The process has ended in this way, and was waited for.
    pub(super) fn end(&self, how: Violation) {
        let (guest, armed) = self.update(|state| {
            state.ended = true;
            (state.guest.clone(), state.armed)
        });
        // Why first: who sees that it is gone may ask at once.
        if armed
            && !self.ending.load(Ordering::Acquire)
            && let Some(guest) = &guest
        {
            // First reason counts: a fault that was reported before stays the reason.
            guest.tell(|reporter| reporter.violation(how));
        }
        self.gone.store(true, Ordering::Release);
        if let Some(guest) = guest {
            for vcpu in 0..guest.vcpus {
                for field in [page::HANDOFF, page::READY] {
                    let at = vcpu_page(vcpu) - VMM_BASE + field as u64;
                    if let Ok(word) = guest.memory.vmm.word32(at) {
                        // Always a change, whatever the guest left there: no waiter can miss it.
                        word.fetch_add(1, Ordering::AcqRel);
                        futex::wake(word);
                    }
                }
            }
        }
        self.update(|state| state.dead = true);
    }

    /// Notes that a stop is wanted, or no longer; `true` if that is news.
    ///
    /// The stop itself is awaited with [`Watch::wait_stopped`].
    pub(super) fn want_stop(&self, wanted: bool) -> bool {
        self.update(|state| {
            let news = state.stop_wanted != wanted;
            state.stop_wanted = wanted;
            if news && !wanted {
                // They are about to leave it, before the supervisor sees that.
                state.stopped = false;
            }
            news
        })
    }

    /// Whether every thread of the guest is in a stop now.
    pub(super) fn note_stopped(&self, all: bool) {
        self.update(|state| state.stopped = all);
    }

    /// Waits until every thread of the guest has stopped. `false`: it took too long.
    pub(super) fn wait_stopped(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        self.wait(Some(deadline), |state| state.stopped || state.dead)
    }

    /// Waits until the process is dead and has been waited for. `false`: not in time.
    pub(super) fn wait_dead(&self, deadline: Option<Instant>) -> bool {
        self.wait(deadline, |state| state.dead)
    }
}
