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
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::Killable;

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
    /// The vCPU threads, in order; joined by the handle.
    pub(super) threads: Mutex<Vec<JoinHandle<()>>>,
    /// By vCPU: a kick is on its way that the thread has not seen yet.
    kicked: Vec<AtomicBool>,
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
            threads: Mutex::default(),
            kicked: (0..parts.vcpus).map(|_| AtomicBool::new(false)).collect(),
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
        self.kick();
        let _ = signal(&self.exited);
    }

    /// Makes every vCPU thread look at what is wanted of it.
    pub(super) fn kick(&self) {
        if let Some(number) = self.accel.get().and_then(|a| a.kick_signal()) {
            let threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
            for (thread, kicked) in threads.iter().zip(&self.kicked) {
                // Real-time signals queue, so one that was not seen yet is enough.
                if !thread.is_finished()
                    && !kicked.swap(true, Ordering::AcqRel)
                    && thread.kill(number).is_err()
                {
                    kicked.store(false, Ordering::Release);
                }
            }
        }
        for (_, wake) in self.events.wakes() {
            let _ = signal(wake);
        }
    }

    /// A vCPU thread has left the guest because of a kick.
    pub(super) fn kick_seen(&self, vcpu: usize) {
        if let Some(kicked) = self.kicked.get(vcpu) {
            // Ordering: before `turn` looks at what is wanted, so that a kick that is not sent
            // because of this flag is not missed.
            kicked.store(false, Ordering::SeqCst);
        }
    }

    /// A vCPU thread's next step: `true` to take it, `false` when it is all over.
    ///
    /// Halts here while a pause is wanted.
    pub(super) fn turn(&self, vcpu: usize, step: Place) -> bool {
        let mut run = self.lock();
        loop {
            match run.want {
                Want::Stop => return false,
                Want::Run => {
                    set(&mut run, vcpu, step);
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

    /// The embedder has not answered yet: this vCPU does nothing until it has.
    pub(super) fn defer(&self, vcpu: u32) {
        let slot = usize::try_from(vcpu).unwrap_or(usize::MAX);
        set(&mut self.lock(), slot, Place::Deferred);
        self.changed.notify_all();
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

    /// There are no threads for the vCPUs from this one on, and there will be none.
    pub(super) fn no_threads_from(&self, vcpu: u32) {
        for missing in vcpu..self.vcpus {
            self.thread_done(usize::try_from(missing).unwrap_or(usize::MAX));
        }
    }

    /// Asks for a pause.
    pub(super) fn want_pause(&self) {
        let mut run = self.lock();
        if run.want == Want::Run {
            run.want = Want::Pause;
        }
    }

    /// Waits until no vCPU thread runs the guest or serves it. `false`: it took too long.
    ///
    /// `frozen`: the guest has been halted already, so that a thread that waits for it is halted too.
    pub(super) fn wait_halted(&self, frozen: bool, deadline: Instant) -> bool {
        let halted = |place: &Place| match place {
            Place::Running | Place::Starting(_) => frozen,
            Place::Serving => false,
            Place::Unborn | Place::Deferred | Place::Parked | Place::Done => true,
        };
        loop {
            self.kick();
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
    pub(super) fn wait_done(&self, limit: Option<Instant>) -> bool {
        let mut run = self.lock();
        loop {
            if run.places.iter().all(|p| matches!(p, Place::Done)) {
                return true;
            }
            let turn = if run.want == Want::Stop {
                drop(run);
                self.kick();
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
