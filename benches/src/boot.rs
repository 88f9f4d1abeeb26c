//! From the builder to the guest's first call, and to the first that its embedder sees.
//!
//! Included: everything from `VmBuilder::new` on: memory, loading, accel, threads. A guest's first
//! call is its `NEGOTIATE`, which the library answers; the embedder's first comes after it, when the
//! guest's runtime has started too, one more exit and one more wake-up later. Not included: reading
//! and parsing the image, which an embedder does once. The floor is made on the measuring thread,
//! and runs a few bytes of guest to its first exit.
//!
//! On process each round starts a VM that takes a spare process, one that starts its own, and the
//! floor. The bar is for the first, which is what an embedder of many VMs does; the other is printed
//! beside the same floor. Nothing is made in the background while anything is timed that does not
//! wait for it.

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
use vmm_core::{Accel, Access, Image, Spares, VmBuilder};

const BENCH: &str = "build to the first guest call";
/// Bytes of the guest's memory.
const MEMORY: u64 = 64 << 20;
/// Spare processes that are kept.
const SPARES: usize = 2;
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
    /// To the guest's `NEGOTIATE`.
    first: f64,
    /// To the embedder's first call.
    own: f64,
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

fn start(accel: Accel, image: &Image, spares: Option<&Spares>) -> Result<Start> {
    let image = image.clone();
    let (sender, arrived) = channel();
    let begin = Instant::now();
    let mut builder = VmBuilder::new(image)
        .accel(accel)
        .memory(MEMORY)
        .call(NEXT, move |call| {
            let _ = sender.send((Instant::now(), call));
        });
    if let Some(spares) = spares {
        builder = builder.spares(spares);
    }
    // What the library counts begins here.
    let ready = begin.elapsed();
    let vm = builder.build()?;
    let built = Instant::now();
    let handle = vm.run()?;
    let (own, call) = arrived
        .recv_timeout(LIMIT)
        .with_context(|| format!("no call from the guest: {:?}", handle.exit()))?;
    let stats = handle.stats();
    let negotiated = stats.negotiated_after.context("it has not negotiated")?;
    // The guest waits for its answer, and is ended there; untimed.
    handle.stop();
    drop(call);
    drop(handle);
    Ok(Start {
        build: millis(built - begin),
        first: millis(ready + negotiated),
        own: millis(own - begin),
    })
}

fn one(plan: &Plan, accel: Accel, report: &mut Report) -> Result<()> {
    let image = image()?;
    let rounds: u64 = if plan.quick { 15 } else { 100 };
    let mut floor = Floor::new(accel, &image)?;
    let spares = match accel {
        Accel::Process => Some(Spares::new(SPARES)?),
        _ => None,
    };
    let (mut warm, mut cold, mut floors) = (Vec::new(), Vec::new(), Vec::new());
    let full = |spares: &Spares| {
        anyhow::ensure!(spares.wait_full(LIMIT), "no spare process");
        Ok(())
    };
    spares.as_ref().map_or(Ok(()), full)?;
    for round in 0..rounds + 2 {
        let of_spare = match &spares {
            Some(spares) => {
                let started = start(accel, &image, Some(spares))?;
                full(spares)?;
                Some(started)
            }
            None => None,
        };
        let own = start(accel, &image, None)?;
        let bare = floor.take()?;
        if round >= 2 {
            warm.extend(of_spare);
            cold.push(own);
            floors.push(bare);
        }
    }
    if let Some(spares) = &spares {
        let counts = spares.counts();
        let all = counts.taken == rounds + 2 && counts.missed + counts.lost == 0;
        anyhow::ensure!(all, "not every VM took a spare process: {counts:?}");
    }
    let floors = Summary::of(&floors).context("no samples")?;
    let mut rows = |starts: &[Start], how: &str, bar: Option<Bar>| -> Result<()> {
        let row = |what: &str, of: &dyn Fn(&Start) -> f64| -> Result<Row> {
            let samples: Vec<f64> = starts.iter().map(of).collect();
            let summary = Summary::of(&samples).context("no samples")?;
            Ok(Row::new(
                BENCH,
                accel,
                format!("{how}{what}"),
                "ms",
                summary,
            ))
        };
        let first = row("to the guest's first call: NEGOTIATE", &|s| s.first)?;
        let first = first.floor(floor.name(), floors);
        report.rows.extend([
            bar.map_or(first.clone(), |bar| first.bar(bar)),
            row("to the embedder's first call", &|s| s.own)?.floor(floor.name(), floors),
            row("of which: build", &|s| s.build)?,
            row("of which: run to that call", &|s| s.own - s.build)?,
        ]);
        Ok(())
    };
    let bar = Some(Bar::RatioAtMost(1.25));
    if warm.is_empty() {
        return rows(&cold, "", bar);
    }
    rows(&warm, "spare process: ", bar)?;
    rows(&cold, "own process: ", None)
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
