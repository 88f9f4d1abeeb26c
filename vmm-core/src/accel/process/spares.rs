//! Spare processes for guests: started and confined before there is a VM for them.
//!
//! In: how many, and the ends of those that are there. Out: a [`Stub`] for a VM, at once, or nothing,
//! and then the VM starts its own. A keeper thread makes them; each has a supervisor thread from its
//! first moment on, as a VM's own process does, which stays with it when a VM takes it. So a spare
//! process dies when the embedder's does, and whoever holds none of it keeps none of it alive.

use super::stub::Stub;
use crate::accel::Accel;
use crate::limits::{MAX_SPARES, SPARE_DELAY, SPARE_PAUSE};
use crate::own_thread;
use crate::owner::Owner;
use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Spare processes for VMs on [`Accel::Process`](crate::Accel::Process).
///
/// Starting a guest's process and confining it is most of what building such a VM takes. Who builds
/// many holds this, and gives it to each builder ([`VmBuilder::spares`](crate::VmBuilder::spares)):
/// the VM takes a process that waits, and another one is made in the background. Where none waits,
/// or one turns out to be dead, the VM starts its own, as it does without this.
///
/// A spare process has what the VM's own would have: the same confinement and the same filter, which
/// is installed when it becomes a guest. Affinity, priority, cgroup and limits are those of the thread
/// that called [`Spares::new`]. Each costs a process without memory to speak of, a thread, and two
/// descriptors. Clones share the same spares; the last one that is dropped, builders' too, ends those
/// that wait and not those that VMs have taken. In a process that the embedder forks there are none, and
/// a builder there starts its own.
///
/// ```no_run
/// use vmm_core::{Accel, Image, Spares, VmBuilder};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let image = Image::open("guest.elf")?;
/// let spares = Spares::new(4)?;
/// for _ in 0..100 {
///     let builder = VmBuilder::new(image.clone()).accel(Accel::Process);
///     builder.spares(&spares).build()?.run()?.wait();
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Spares(Arc<Keeper>);

/// What has become of spare processes so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SpareCounts {
    /// They wait now.
    pub waiting: usize,
    /// VMs have taken them.
    pub taken: u64,
    /// They ended before a VM took them, or could not be made.
    pub lost: u64,
    /// Times that a VM found none.
    pub missed: u64,
}

impl Spares {
    /// Keeps so many processes spare, 1 to 64; returns before the first of them is there.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] for a number outside that range; where the process accel
    /// cannot be used ([`Accel::check`]); when the thread that makes them cannot be started.
    pub fn new(count: usize) -> io::Result<Spares> {
        if !(1..=MAX_SPARES).contains(&count) {
            let range = format!("the number of spares is {count}; it must be 1 to {MAX_SPARES}");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, range));
        }
        Accel::Process.check().map_err(io::Error::other)?;
        let shelf = Arc::new(Shelf {
            wanted: count,
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let own = Arc::clone(&shelf);
        let thread = own_thread::start("pv-spares", move || keep(&own))?;
        Ok(Spares(Arc::new(Keeper {
            owner: Owner::here(),
            shelf,
            thread: Some(thread),
        })))
    }

    /// Waits until as many wait as shall, at most so long. `false`: not in time.
    pub fn wait_full(&self, limit: Duration) -> bool {
        if !self.0.owner.is_here() {
            return false;
        }
        let shelf = &self.0.shelf;
        let lacking = |state: &mut State| state.living() < shelf.wanted;
        let waited = shelf
            .changed
            .wait_timeout_while(shelf.lock(), limit, lacking);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// How many wait, and what has become of the others.
    pub fn counts(&self) -> SpareCounts {
        if !self.0.owner.is_here() {
            return SpareCounts::default();
        }
        let state = self.0.shelf.lock();
        SpareCounts {
            waiting: state.living(),
            ..state.counts
        }
    }

    /// One that waits; `None` if there is none.
    pub(super) fn take(&self) -> Option<Stub> {
        if !self.0.owner.is_here() {
            return None;
        }
        let shelf = &self.0.shelf;
        let mut state = shelf.lock();
        // The dead are left to the keeper: their threads are waited for.
        let place = state.waiting.iter().position(|stub| !stub.has_ended());
        let Some(stub) = place.and_then(|place| state.waiting.remove(place)) else {
            state.counts.missed += 1;
            return None;
        };
        state.counts.taken += 1;
        state.pause = SPARE_PAUSE.0;
        let soon = Instant::now() + SPARE_DELAY;
        // Those that come after it do not put it off.
        state.not_before.get_or_insert(soon);
        drop(state);
        shelf.changed.notify_all();
        Some(stub)
    }
}

/// Ends the keeper's thread.
#[derive(Debug)]
struct Keeper {
    owner: Owner,
    shelf: Arc<Shelf>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Keeper {
    fn drop(&mut self) {
        if !self.owner.is_here() {
            std::mem::forget((Arc::clone(&self.shelf), self.thread.take()));
            return;
        }
        self.shelf.lock().stop = true;
        self.shelf.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Shelf {
    wanted: usize,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    waiting: VecDeque<Stub>,
    counts: SpareCounts,
    /// None is made before this.
    not_before: Option<Instant>,
    /// After the next loss.
    pause: Duration,
    stop: bool,
}

impl Default for State {
    fn default() -> State {
        State {
            waiting: VecDeque::new(),
            counts: SpareCounts::default(),
            not_before: None,
            pause: SPARE_PAUSE.0,
            stop: false,
        }
    }
}

impl State {
    fn living(&self) -> usize {
        self.waiting.iter().filter(|stub| !stub.has_ended()).count()
    }

    /// Something went wrong: the next one is made later, and the one after it later still.
    fn note_loss(&mut self, lost: usize) {
        self.counts.lost += lost as u64;
        self.not_before = Some(Instant::now() + self.pause);
        self.pause = (self.pause * 2).min(SPARE_PAUSE.1);
    }

    fn take_dead(&mut self) -> VecDeque<Stub> {
        let all = std::mem::take(&mut self.waiting);
        let (dead, living) = all.into_iter().partition(Stub::has_ended);
        self.waiting = living;
        dead
    }
}

impl std::fmt::Debug for Shelf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shelf")
            .field("wanted", &self.wanted)
            .finish_non_exhaustive()
    }
}

impl Shelf {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What there is to do next; waits for it.
    fn next(&self) -> Next {
        let mut state = self.lock();
        loop {
            if state.stop {
                return Next::End(std::mem::take(&mut state.waiting));
            }
            let dead = state.take_dead();
            if !dead.is_empty() {
                state.note_loss(dead.len());
                return Next::Bury(dead);
            }
            if state.waiting.len() >= self.wanted {
                state.not_before = None;
                let waited = self.changed.wait(state);
                state = waited.unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let left = state
                .not_before
                .map(|at| at.saturating_duration_since(Instant::now()));
            match left {
                Some(left) if !left.is_zero() => {
                    let waited = self.changed.wait_timeout(state, left);
                    state = waited.unwrap_or_else(PoisonError::into_inner).0;
                }
                _ => return Next::Make,
            }
        }
    }
}

enum Next {
    Make,
    /// Dropping a process waits for its thread, which may be about to lock the shelf.
    Bury(VecDeque<Stub>),
    End(VecDeque<Stub>),
}

/// The keeper's thread.
fn keep(shelf: &Arc<Shelf>) {
    loop {
        match shelf.next() {
            Next::Make => {
                let own = Arc::downgrade(shelf);
                let ended = move || {
                    if let Some(shelf) = own.upgrade() {
                        // Under the lock, so that who is about to wait has not looked yet.
                        drop(shelf.lock());
                        shelf.changed.notify_all();
                    }
                };
                let made = Stub::start(true, ended).and_then(Stub::confined);
                let mut state = shelf.lock();
                match made {
                    Ok(stub) => state.waiting.push_back(stub),
                    Err(error) => {
                        tracing::warn!(%error, "no spare process can be made");
                        state.note_loss(1);
                    }
                }
                drop(state);
                shelf.changed.notify_all();
            }
            Next::Bury(dead) => drop(dead),
            Next::End(waiting) => return drop(waiting),
        }
    }
}
