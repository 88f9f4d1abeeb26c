//! From the builder to the guest's first call of its own.
//!
//! Included: everything from `VmBuilder::new` on: memory, loading, accel, threads, the guest's
//! runtime start and its `NEGOTIATE`. Not included: reading and parsing the image, which an
//! embedder does once. The floor is made on the measuring thread, and runs a few bytes of guest.

use crate::Plan;
use crate::guest::image;
use crate::protocol::NEXT;
use crate::raw_kvm::{RawVm, System};
use crate::raw_process::{ChildMap, SpawnPlan, Spawned, executable};
use crate::report::{Bar, Report, Row};
use crate::sample::Summary;
use anyhow::{Context, Result};
use pv_abi::layout::{
    CONTROL_RO_BASE, CONTROL_RO_LEN, GATE_BASE, GATE_LEN, PAGE_SIZE, RAM_BASE, VCPU_PAGES_BASE,
    VMM_BASE, VMM_LEN,
};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};
use vmm_core::{Accel, Access, Image, VmBuilder};

const BENCH: &str = "build to the first guest call";
/// Bytes of the guest's memory.
const MEMORY: u64 = 64 << 20;
/// How long one start may take.
const LIMIT: Duration = Duration::from_secs(20);

pub(crate) fn run(plan: &Plan, report: &mut Report) -> Result<()> {
    for accel in &plan.accels {
        eprintln!("boot on {accel} ...");
        one(plan, *accel, report).with_context(|| accel.to_string())?;
    }
    Ok(())
}

/// One start, in milliseconds.
struct Start {
    /// `VmBuilder::new` to a `Vm`.
    build: f64,
    /// All of it.
    total: f64,
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

fn start(accel: Accel, image: &Image) -> Result<Start> {
    let image = image.clone();
    let (sender, arrived) = channel();
    let begin = Instant::now();
    let vm = VmBuilder::new(image)
        .accel(accel)
        .memory(MEMORY)
        .call(NEXT, move |call| {
            let _ = sender.send((Instant::now(), call));
        })
        .build()?;
    let built = Instant::now();
    let handle = vm.run()?;
    let (first, call) = arrived
        .recv_timeout(LIMIT)
        .with_context(|| format!("no call from the guest: {:?}", handle.exit()))?;
    // The guest waits for its answer, and is ended there; untimed.
    handle.stop();
    drop(call);
    drop(handle);
    Ok(Start {
        build: millis(built - begin),
        total: millis(first - begin),
    })
}

fn one(plan: &Plan, accel: Accel, report: &mut Report) -> Result<()> {
    let image = image()?;
    let rounds = if plan.quick { 15 } else { 100 };
    let (mut totals, mut builds, mut floors) = (Vec::new(), Vec::new(), Vec::new());
    let mut floor = Floor::new(accel, &image)?;
    for round in 0..rounds + 2 {
        let measured = start(accel, &image)?;
        let bare = floor.take()?;
        if round >= 2 {
            totals.push(measured.total);
            builds.push(measured.build);
            floors.push(bare);
        }
    }
    let summary = |samples: &[f64]| Summary::of(samples).context("no samples");
    let all = Row::new(BENCH, accel, "to the first call", "ms", summary(&totals)?)
        .floor(floor.name(), summary(&floors)?)
        .bar(Bar::RatioAtMost(1.25));
    report.rows.push(all);
    let rests: Vec<f64> = totals.iter().zip(&builds).map(|(t, b)| t - b).collect();
    for (what, samples) in [
        ("of which: build", &builds),
        ("of which: run to the first call", &rests),
    ] {
        let row = Row::new(BENCH, accel, what, "ms", summary(samples)?);
        report.rows.push(row);
    }
    Ok(())
}

enum Floor {
    Kvm(System),
    Process {
        executable: std::ffi::CString,
        plan: SpawnPlan,
    },
}

impl Floor {
    fn new(accel: Accel, image: &Image) -> Result<Floor> {
        Ok(match accel {
            Accel::Process => Floor::Process {
                executable: executable()?,
                plan: spawn_plan(image),
            },
            _ => Floor::Kvm(System::open()?),
        })
    }

    fn name(&self) -> &'static str {
        match self {
            Floor::Kvm(_) => {
                "bare ioctls: VM, same slots, vCPU, CPUID, sregs, run to the first out"
            }
            Floor::Process { .. } => {
                "posix_spawn of a static program, same memfds mapped, one futex wake"
            }
        }
    }

    fn take(&mut self) -> Result<f64> {
        let begin = Instant::now();
        match self {
            Floor::Kvm(system) => {
                let mut vm = RawVm::new(system, MEMORY)?;
                vm.run()?;
                Ok(millis(begin.elapsed()))
            }
            Floor::Process { executable, plan } => {
                let _spawned = Spawned::start(executable, plan)?;
                Ok(millis(begin.elapsed()))
            }
        }
    }
}

impl Drop for Floor {
    fn drop(&mut self) {
        if let Floor::Process { executable, .. } = self {
            let path = executable.to_string_lossy().into_owned();
            let _ = std::fs::remove_file(path);
        }
    }
}

/// The mappings that the library makes for this image: the same memories, sizes and protections.
fn spawn_plan(image: &Image) -> SpawnPlan {
    let (read, write, exec) = (libc::PROT_READ, libc::PROT_WRITE, libc::PROT_EXEC);
    let control = |at, len, prot| ChildMap {
        memory: 0,
        at,
        len,
        offset: at - VMM_BASE,
        prot,
    };
    let ram = |at, len, prot| ChildMap {
        memory: 1,
        at,
        len,
        offset: at - RAM_BASE,
        prot,
    };
    let mut maps = vec![
        control(GATE_BASE, GATE_LEN, read | exec),
        control(CONTROL_RO_BASE, CONTROL_RO_LEN, read),
        control(VCPU_PAGES_BASE, PAGE_SIZE, read | write),
    ];
    maps.extend(image.segments().iter().map(|segment| {
        let prot = match segment.access {
            Access::Read => read,
            Access::ReadWrite => read | write,
            Access::ReadExecute => read | exec,
        };
        ram(segment.gpa, segment.len, prot)
    }));
    let stack = 256 << 10;
    let bottom = image.end() + PAGE_SIZE;
    maps.push(ram(bottom, stack, read | write));
    let heap = bottom + stack + PAGE_SIZE;
    maps.push(ram(heap, RAM_BASE + MEMORY - heap, read | write));
    SpawnPlan {
        memories: vec![VMM_LEN, MEMORY],
        maps,
    }
}
