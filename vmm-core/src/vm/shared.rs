//! What the threads of one VM share: state, exit reason, and how vCPUs are brought to a halt.

use super::LogLevel;
use super::calls::Registry;
use super::clock::Clock;
use super::events::{EventTable, signal};
use super::stats::{Counters, Stats};
use super::turns::Turns;
use crate::accel::{AccelVm, Reporter};
use crate::device::Slot;
use crate::fault::{ExitReason, GuestFault, Violation};
use crate::limits::VCPU_KICK_PAUSE;
use crate::memory::GuestMemory;
use crate::memory::map::AddressMap;
use crate::owner::Owner;
use pv_abi::layout::{VMM_BASE, vcpu_page};
use pv_abi::vcpu::VcpuPage;
use std::io;
use std::mem::offset_of;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::Killable;

pub(super) type LogSink = Box<dyn Fn(LogLevel, &str) + Send + Sync>;

pub(super) struct Shared {
    pub(super) owner: Owner,
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
    /// The signal that takes a vCPU thread out of the guest, if that is how the accel does it.
    pub(super) kick_signal: Option<libc::c_int>,
    /// When the building of this VM began.
    pub(super) began: Instant,
    /// How long after that the guest negotiated.
    pub(super) negotiated_after: OnceLock<Duration>,
    pub(super) exited: EventFd,
    /// What all of this VM's spans and events are in, on whichever thread.
    pub(super) span: tracing::Span,
    /// The vCPU threads, in order.
    pub(super) threads: Mutex<Vec<JoinHandle<()>>>,
    /// By vCPU: a kick is on its way that the thread has not seen yet.
    kicked: Vec<AtomicBool>,
    reason: Mutex<Option<ExitReason>>,
    pub(super) turns: Turns,
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
    pub(super) kick_signal: Option<libc::c_int>,
    pub(super) began: Instant,
    pub(super) exited: EventFd,
    pub(super) span: tracing::Span,
}

/// The span of a new VM, which has a number of its own in this process.
pub(super) fn new_span() -> tracing::Span {
    static VMS: AtomicU64 = AtomicU64::new(0);
    // Ordering: nothing but a number.
    let vm = VMS.fetch_add(1, Ordering::Relaxed);
    tracing::debug_span!("vm", vm)
}

impl Shared {
    pub(super) fn new(parts: SharedParts) -> Shared {
        Shared {
            owner: Owner::here(),
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
            kick_signal: parts.kick_signal,
            began: parts.began,
            negotiated_after: OnceLock::new(),
            exited: parts.exited,
            span: parts.span,
            threads: Mutex::default(),
            kicked: (0..parts.vcpus).map(|_| AtomicBool::new(false)).collect(),
            reason: Mutex::new(None),
            turns: Turns::new(parts.vcpus),
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
        !self.turns.stopped()
    }

    /// Ends the VM. The first reason counts.
    pub(super) fn finish(&self, reason: ExitReason) {
        {
            let mut slot = self.reason.lock().unwrap_or_else(PoisonError::into_inner);
            if slot.is_some() {
                return;
            }
            *slot = Some(reason.clone());
        }
        self.turns.stop();
        if let Some(accel) = self.accel.get() {
            accel.kill();
        }
        self.kick();
        let _ = signal(&self.exited);
        // Last, with nothing locked: the embedder's subscriber may ask the handle, or panic. Where
        // something panics already, a second panic would end the process.
        if !std::thread::panicking() {
            let _vm = self.span.enter();
            tracing::debug!(%reason, "the VM ends");
        }
    }

    /// Makes every vCPU thread look at what is wanted of it.
    pub(super) fn kick(&self) {
        if let Some(number) = self.kick_signal {
            let threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
            for (thread, kicked) in threads.iter().zip(&self.kicked) {
                // Real-time signals queue, so one that was not seen yet is enough.
                if !thread.is_finished()
                    // Ordering: SeqCst, for `kick_seen`.
                    && !kicked.swap(true, Ordering::SeqCst)
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
            // Ordering: SeqCst, before the load in `Turns::turn`: a kick that is not sent because of
            // this flag is not missed, as what it is for is seen there.
            kicked.store(false, Ordering::SeqCst);
        }
    }

    /// There are no threads for the vCPUs from this one on, and there will be none.
    pub(super) fn no_threads_from(&self, vcpu: u32) {
        for missing in vcpu..self.vcpus {
            self.turns
                .done(usize::try_from(missing).unwrap_or(usize::MAX));
        }
    }

    /// Waits until no vCPU thread runs the guest or serves it. `false`: it took too long.
    ///
    /// `frozen`: the guest has been halted already, so that a thread that waits for it is halted too.
    pub(super) fn wait_halted(&self, frozen: bool, deadline: Instant) -> bool {
        loop {
            self.kick();
            let halted = |turns: &Turns| turns.halted(frozen);
            if self.turns.wait_for(halted, Some(VCPU_KICK_PAUSE)) {
                return true;
            }
            if Instant::now() >= deadline {
                return false;
            }
        }
    }

    /// Waits until all vCPU threads are done, kicking them meanwhile if the VM has ended.
    /// `false`: the time limit came first.
    pub(super) fn wait_done(&self, limit: Option<Instant>) -> bool {
        loop {
            let stopped = self.turns.stopped();
            let at_most = if stopped {
                self.kick();
                Some(VCPU_KICK_PAUSE)
            } else {
                limit.map(|l| l.saturating_duration_since(Instant::now()))
            };
            // A VM that has just ended is to be kicked first.
            let over = |turns: &Turns| turns.all_done() || turns.stopped() != stopped;
            if self.turns.wait_for(over, at_most) && self.turns.all_done() {
                return true;
            }
            if limit.is_some_and(|l| Instant::now() >= l) {
                return false;
            }
        }
    }

    /// Counters, with those that the gate keeps in the guest's pages where these are mapped.
    pub(super) fn stats(&self) -> Stats {
        let mut stats = self.counters.snapshot();
        stats.negotiated_after = self.negotiated_after.get().copied();
        if !self.owner.is_here() {
            return stats;
        }
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
            stats.events = stats
                .events
                .wrapping_add(read(offset_of!(VcpuPage, events)));
        }
        stats
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
