//! Control calls, `notify` and `idle`, each beside the bare thing that it is made of.
//!
//! One sample is the mean of a short run; runs of the guest and of the floor take turns. While one
//! side runs, the other waits without using the CPU.

use crate::Plan;
use crate::guest::{Guest, image};
use crate::protocol::{Command, Work};
use crate::raw_kvm::{Code, RawVm, System};
use crate::raw_process::{Epoll, HandOff, ppoll_once, signal};
use crate::report::{Bar, Report, Row};
use crate::sample::{Summary, ns_per_tick, ticks};
use anyhow::{Context, Result};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use vmm_core::{Accel, VmBuilder};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const BENCH: &str = "control call, notify, idle";
/// Descriptors that the guest's idle looks at: its wake-up, the device's queue, its configuration.
const IDLE_FDS: usize = 3;
/// Bytes of the guest's memory.
const MEMORY: u64 = 64 << 20;

pub(crate) fn run(plan: &Plan, report: &mut Report) -> Result<()> {
    for accel in &plan.accels {
        eprintln!("calls on {accel} ...");
        one(plan, *accel, report).with_context(|| accel.to_string())?;
    }
    Ok(())
}

/// Microseconds for each of `count` pieces of work.
fn micros(ticks: u64, count: u32) -> f64 {
    ticks as f64 * ns_per_tick() / 1000.0 / f64::from(count)
}

fn one(plan: &Plan, accel: Accel, report: &mut Report) -> Result<()> {
    let builder = VmBuilder::new(image()?)
        .accel(accel)
        .memory(MEMORY)
        .huge_pages(false)
        .rng();
    let mut guest = Guest::start(builder)?;
    // Opens the device, so that idle looks at its descriptors from the start.
    guest.command(Command::new(Work::Notify, 1))?;
    let mut floor = Floor::new(accel)?;
    let rounds = if plan.quick { 30 } else { 500 };
    for (work, count, what) in [
        (Work::Calls, 50, "control call (NOP), round trip"),
        (Work::Notify, 50, "notify"),
        (Work::Idle, 50, "idle(0)"),
    ] {
        let (mut measured, mut bare) = (Vec::new(), Vec::new());
        for round in 0..rounds + 3 {
            let outcome = guest.command(Command::new(work, count))?;
            let taken = floor.take(work, count)?;
            // The first rounds warm both sides up.
            if round >= 3 {
                measured.push(micros(outcome.ticks, count));
                bare.push(micros(taken, count));
            }
        }
        let measured = Summary::of(&measured).context("no samples")?;
        let bare = Summary::of(&bare).context("no samples")?;
        let row = Row::new(BENCH, accel, what, "us", measured).floor(floor.name(work), bare);
        report.rows.push(match (work, accel) {
            (Work::Calls, Accel::Kvm) => row.bar(Bar::DifferenceAtMost(0.5)),
            (Work::Calls, _) => row.bar(Bar::RatioAtMost(1.25)),
            _ => row,
        });
    }
    Ok(())
}

/// The bare things of one accel.
enum Floor {
    Kvm {
        calls: RawVm,
        notify: RawVm,
        epoll: Epoll,
        _idle: Vec<EventFd>,
        _reader: Reader,
    },
    Process {
        hand_off: HandOff,
        idle: Vec<EventFd>,
        reader: Reader,
    },
}

/// The value that the floor's doorbell is registered for.
const DOORBELL: u32 = 7;

impl Floor {
    fn new(accel: Accel) -> Result<Floor> {
        let idle = (0..IDLE_FDS)
            .map(|_| EventFd::new(EFD_NONBLOCK))
            .collect::<std::io::Result<Vec<_>>>()?;
        if accel == Accel::Process {
            return Ok(Floor::Process {
                // First: it forks.
                hand_off: HandOff::start()?,
                idle,
                reader: Reader::start()?,
            });
        }
        let reader = Reader::start()?;
        let system = System::open()?;
        let notify = RawVm::new(&system, MEMORY)?;
        notify.doorbell(&reader.event, DOORBELL)?;
        Ok(Floor::Kvm {
            calls: RawVm::new(&system, MEMORY)?,
            notify,
            epoll: Epoll::new(idle.iter().map(AsRawFd::as_raw_fd))?,
            _idle: idle,
            _reader: reader,
        })
    }

    fn name(&self, work: Work) -> &'static str {
        match (self, work) {
            (Floor::Kvm { .. }, Work::Notify) => {
                "out to an ioeventfd from ring 3, a thread drains it"
            }
            (Floor::Kvm { .. }, Work::Idle) => "bare KVM_RUN exit + epoll_pwait2(0) of 3 eventfds",
            (Floor::Kvm { .. }, _) => "bare KVM_RUN, out from ring 3, re-entered at once",
            (Floor::Process { .. }, Work::Notify) => "write to an eventfd, a thread drains it",
            (Floor::Process { .. }, Work::Idle) => "ppoll(0) of 3 eventfds",
            (Floor::Process { .. }, _) => {
                "futex hand-off of two processes kept on one CPU, there and back"
            }
        }
    }

    /// Ticks that so many bare pieces of work take.
    fn take(&mut self, work: Work, count: u32) -> Result<u64> {
        match (self, work) {
            (Floor::Kvm { notify, .. }, Work::Notify) => {
                notify.enter(Code::Notify, count.into(), DOORBELL)?;
                let start = ticks();
                notify.run()?;
                Ok(ticks() - start)
            }
            (Floor::Kvm { calls, epoll, .. }, Work::Idle) => {
                let start = ticks();
                for _ in 0..count {
                    calls.run()?;
                    epoll.wait(0)?;
                }
                Ok(ticks() - start)
            }
            (Floor::Kvm { calls, .. }, _) => {
                let start = ticks();
                for _ in 0..count {
                    calls.run()?;
                }
                Ok(ticks() - start)
            }
            (Floor::Process { reader, .. }, Work::Notify) => {
                let start = ticks();
                for _ in 0..count {
                    signal(reader.event.as_raw_fd());
                }
                Ok(ticks() - start)
            }
            (Floor::Process { idle, .. }, Work::Idle) => {
                let entry = |event: &EventFd| libc::pollfd {
                    fd: event.as_raw_fd(),
                    events: libc::POLLIN,
                    revents: 0,
                };
                let mut entries: Vec<_> = idle.iter().map(entry).collect();
                let start = ticks();
                for _ in 0..count {
                    ppoll_once(&mut entries)?;
                }
                Ok(ticks() - start)
            }
            (Floor::Process { hand_off, .. }, _) => Ok(hand_off.serve(count)),
        }
    }
}

/// A thread that drains an eventfd, as the library's device thread does with a doorbell.
struct Reader {
    event: Arc<EventFd>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Reader {
    fn start() -> Result<Reader> {
        let event = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let stop = Arc::new(AtomicBool::new(false));
        let epoll = Epoll::new([event.as_raw_fd()])?;
        let (own, ended) = (Arc::clone(&event), Arc::clone(&stop));
        let thread = std::thread::Builder::new()
            .name("floor-reader".into())
            .spawn(move || {
                while !ended.load(Ordering::Acquire) {
                    if matches!(epoll.wait(1_000_000_000), Ok(1..)) {
                        let _ = own.read();
                    }
                }
            })?;
        Ok(Reader {
            event,
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        signal(self.event.as_raw_fd());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
