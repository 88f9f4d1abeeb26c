//! What the threads of one VM share: state, exit reason, and how vCPUs are brought to a halt.

use super::LogLevel;
use super::calls::Registry;
use super::clock::Clock;
use super::events::{EventTable, signal};
use super::stats::{Counters, Stats};
use crate::accel::{AccelVm, Reporter, StartState};
use crate::device::Slot;
use crate::fault::{ExitReason, GuestFault, Violation};
use crate::limits::VCPU_KICK_PAUSE;
use crate::memory::GuestMemory;
use crate::memory::map::AddressMap;
use pv_abi::layout::{VMM_BASE, vcpu_page};
use pv_abi::vcpu::VcpuPage;
use std::io;
use std::mem::offset_of;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::EventFd;

/// What the embedder wants of the vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Want {
    Run,
    Pause,
    Stop,
}

/// Where one vCPU's thread is.
#[derive(Clone, Copy, Debug)]
pub(super) enum Place {
    /// Not started by the guest yet.
    Unborn,
    /// To be started with these registers.
    Starting(StartState),
    /// In the guest, or serving it.
    Running,
    /// Halted for a pause.
    Parked,
    /// Its thread is done.
    Done,
}

struct RunState {
    want: Want,
    places: Vec<Place>,
}

pub(super) type LogSink = Box<dyn Fn(LogLevel, &str) + Send + Sync>;

pub(super) struct Shared {
    pub(super) accel: OnceLock<Arc<dyn AccelVm>>,
    pub(super) memory: Arc<GuestMemory>,
    pub(super) map: Arc<AddressMap>,
    pub(super) events: Arc<EventTable>,
    pub(super) devices: Vec<Arc<Slot>>,
    pub(super) registry: Registry,
    pub(super) counters: Arc<Counters>,
    pub(super) clock: Clock,
    pub(super) log: LogSink,
    pub(super) log_budget: Mutex<(Instant, u32)>,
    pub(super) negotiated: AtomicBool,
    pub(super) features: AtomicU64,
    pub(super) vcpus: u32,
    pub(super) exited: EventFd,
    reason: Mutex<Option<ExitReason>>,
    run: Mutex<RunState>,
    changed: Condvar,
}

pub(super) struct SharedParts {
    pub(super) memory: Arc<GuestMemory>,
    pub(super) map: Arc<AddressMap>,
    pub(super) events: Arc<EventTable>,
    pub(super) devices: Vec<Arc<Slot>>,
    pub(super) registry: Registry,
    pub(super) counters: Arc<Counters>,
    pub(super) clock: Clock,
    pub(super) log: LogSink,
    pub(super) vcpus: u32,
    pub(super) exited: EventFd,
}

impl Shared {
    pub(super) fn new(parts: SharedParts) -> Shared {
        let places = (0..parts.vcpus).map(|_| Place::Unborn).collect();
        Shared {
            accel: OnceLock::new(),
            memory: parts.memory,
            map: parts.map,
            events: parts.events,
            devices: parts.devices,
            registry: parts.registry,
            counters: parts.counters,
            clock: parts.clock,
            log: parts.log,
            log_budget: Mutex::new((Instant::now(), 0)),
            negotiated: AtomicBool::new(false),
            features: AtomicU64::new(0),
            vcpus: parts.vcpus,
            exited: parts.exited,
            reason: Mutex::new(None),
            run: Mutex::new(RunState {
                want: Want::Run,
                places,
            }),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, RunState> {
        self.run.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(
        &self,
        guard: MutexGuard<'a, RunState>,
        at_most: Option<Duration>,
    ) -> MutexGuard<'a, RunState> {
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

    /// The reason for which the VM has ended, if it has.
    pub(super) fn reason(&self) -> Option<ExitReason> {
        self.reason
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    pub(super) fn is_running(&self) -> bool {
        self.lock().want != Want::Stop
    }

    /// Ends the VM. The first reason counts.
    pub(super) fn finish(&self, reason: ExitReason) {
        {
            let mut slot = self.reason.lock().unwrap_or_else(PoisonError::into_inner);
            if slot.is_some() {
                return;
            }
            tracing::debug!(%reason, "the VM ends");
            *slot = Some(reason);
        }
        self.lock().want = Want::Stop;
        self.changed.notify_all();
        if let Some(accel) = self.accel.get() {
            accel.kill();
        }
        let _ = signal(&self.exited);
    }

    /// A vCPU thread's turn: returns `true` to enter the guest, `false` when it is over.
    ///
    /// Halts here while a pause is wanted.
    pub(super) fn may_run(&self, vcpu: usize) -> bool {
        let mut run = self.lock();
        loop {
            match run.want {
                Want::Stop => return false,
                Want::Run => {
                    set(&mut run, vcpu, Place::Running);
                    return true;
                }
                Want::Pause => {
                    set(&mut run, vcpu, Place::Parked);
                    self.changed.notify_all();
                    run = self.wait(run, None);
                }
            }
        }
    }

    /// Waits until the guest starts this vCPU; `None` when the VM ends first.
    pub(super) fn wait_for_start(&self, vcpu: usize) -> Option<StartState> {
        let mut run = self.lock();
        loop {
            if run.want == Want::Stop {
                return None;
            }
            if let Some(Place::Starting(state)) = run.places.get(vcpu).copied() {
                return Some(state);
            }
            run = self.wait(run, None);
        }
    }

    /// Starts a vCPU; `false` if it has been started before.
    pub(super) fn start_vcpu(&self, vcpu: usize, state: StartState) -> bool {
        let mut run = self.lock();
        if !matches!(run.places.get(vcpu), Some(Place::Unborn)) {
            return false;
        }
        set(&mut run, vcpu, Place::Starting(state));
        self.changed.notify_all();
        true
    }

    pub(super) fn thread_done(&self, vcpu: usize) {
        set(&mut self.lock(), vcpu, Place::Done);
        self.changed.notify_all();
    }

    /// Asks for a pause and waits until no vCPU runs guest code. `false`: it took too long.
    pub(super) fn pause(&self, kick: &dyn Fn(), deadline: Instant) -> bool {
        {
            let mut run = self.lock();
            if run.want == Want::Run {
                run.want = Want::Pause;
            }
        }
        let halted = |p: &Place| !matches!(p, Place::Running | Place::Starting(_));
        loop {
            kick();
            let run = self.lock();
            if run.want == Want::Stop || run.places.iter().all(halted) {
                return true;
            }
            drop(self.wait(run, Some(VCPU_KICK_PAUSE)));
            if Instant::now() >= deadline {
                return false;
            }
        }
    }

    pub(super) fn resume(&self) {
        let mut run = self.lock();
        if run.want == Want::Pause {
            run.want = Want::Run;
        }
        drop(run);
        self.changed.notify_all();
    }

    /// Waits until all vCPU threads are done, kicking them meanwhile if the VM has ended.
    /// `false`: the time limit came first.
    pub(super) fn wait_done(&self, kick: &dyn Fn(), limit: Option<Instant>) -> bool {
        let mut run = self.lock();
        loop {
            if run.places.iter().all(|p| matches!(p, Place::Done)) {
                return true;
            }
            let turn = if run.want == Want::Stop {
                drop(run);
                kick();
                run = self.lock();
                Some(VCPU_KICK_PAUSE)
            } else {
                limit.map(|l| l.saturating_duration_since(Instant::now()))
            };
            if limit.is_some_and(|l| Instant::now() >= l) {
                return false;
            }
            if !run.places.iter().all(|p| matches!(p, Place::Done)) {
                run = self.wait(run, turn);
            }
        }
    }

    /// Counters, with those that the gate keeps in the guest's pages.
    pub(super) fn stats(&self) -> Stats {
        let mut stats = self.counters.snapshot();
        for vcpu in 0..self.vcpus {
            let page = vcpu_page(vcpu) - VMM_BASE;
            let read = |field: usize| {
                self.memory
                    .vmm
                    .read::<u64>(page + field as u64)
                    .unwrap_or(0)
            };
            stats.kicks = stats.kicks.wrapping_add(read(offset_of!(VcpuPage, kicks)));
            stats.idles = stats.idles.wrapping_add(read(offset_of!(VcpuPage, idles)));
        }
        stats
    }
}

fn set(run: &mut RunState, vcpu: usize, place: Place) {
    if let Some(slot) = run.places.get_mut(vcpu) {
        *slot = place;
    }
}

impl Reporter for Shared {
    fn fault(&self, fault: Box<GuestFault>) {
        self.counters.exits_fault.add(1);
        self.finish(ExitReason::Fault(fault));
    }

    fn violation(&self, violation: Violation) {
        self.counters.exits_fault.add(1);
        self.finish(ExitReason::Violation(violation));
    }

    fn host_error(&self, error: io::Error) {
        self.finish(ExitReason::Host(Arc::new(error)));
    }
}
