//! What an idle VM costs in memory: a hundred of them, in a process in a cgroup of its own.
//!
//! Growth of the cgroup from before the first VM to after the last, kernel memory included, minus
//! the guests' resident private RAM, divided by how many there are.

use crate::Plan;
use crate::block::{backend, disk_image};
use crate::cgroup::Cgroup;
use crate::guest::{Guest, image};
use crate::protocol::{Command, Work};
use crate::raw_kvm::{RawVm, System};
use crate::report::{Bar, Report, Row};
use crate::sample::Summary;
use anyhow::{Context, Result, bail};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command as Program, ExitCode, Stdio};
use std::time::Duration;
use vmm_core::{Accel, VmBuilder};

/// The name under which this program, started again, is the process with the VMs.
pub(crate) const CHILD: &str = "paravane-idle-vms";

const BENCH: &str = "an idle VM of 64 MiB and one vCPU";
/// Bytes of each guest's memory.
const MEMORY: u64 = 64 << 20;
const VMS: u32 = 100;
/// Time for what is freed or charged late.
const SETTLE: Duration = Duration::from_millis(400);
const MIB: f64 = (1 << 20) as f64;

pub(crate) fn run(plan: &Plan, report: &mut Report) -> Result<()> {
    backend_size(plan, report)?;
    if let Err(error) = Cgroup::new("paravane-probe") {
        report.skip("memory of idle VMs", format!("no usable cgroup: {error:#}"));
        return Ok(());
    }
    let rounds = if plan.quick { 1 } else { 5 };
    for accel in &plan.accels {
        eprintln!("{VMS} idle VMs on {accel} ...");
        let (mut measured, mut floor) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            measured.push(measure(&accel.to_string())?);
            if *accel == Accel::Kvm {
                floor.push(measure("bare")?);
            }
        }
        let of = |list: &[Cost], field: fn(&Cost) -> f64| {
            let samples: Vec<f64> = list.iter().map(field).collect();
            Summary::of(&samples)
        };
        let all = of(&measured, |c| c.per_vm).context("no samples")?;
        let mut row = Row::new(BENCH, accel, "memory beside guest RAM", "MiB", all);
        if let Some(floor) = of(&floor, |c| c.per_vm) {
            let is = "same slots and vCPU by bare ioctls, a parked thread each";
            row = row.floor(is, floor).bar(Bar::AtMostOrRatio(2.0, 1.2));
        } else {
            row = row.bar(Bar::AtMost(2.0));
        }
        report.rows.push(row);
        type Field = fn(&Cost) -> f64;
        let kernel: Field = |c| c.kernel;
        let resident: Field = |c| c.resident;
        for (what, field) in [
            ("of which: kernel memory", kernel),
            ("apart: resident guest RAM", resident),
        ] {
            let summary = of(&measured, field).context("no samples")?;
            let mut row = Row::new(BENCH, accel, what, "MiB", summary);
            if let Some(floor) = of(&floor, field) {
                row = row.floor("the same of the bare VMs", floor);
            }
            report.rows.push(row);
        }
    }
    Ok(())
}

/// MiB for each VM.
struct Cost {
    per_vm: f64,
    kernel: f64,
    resident: f64,
}

/// Runs the child once, step by step.
fn measure(kind: &str) -> Result<Cost> {
    let cgroup = Cgroup::new("paravane-idle")?;
    let mut child = Running::start(kind, &cgroup)?;
    child.expect("inside")?;
    std::thread::sleep(SETTLE);
    let before = (cgroup.usage()?, cgroup.kernel());
    child.say("make")?;
    child.expect("idle")?;
    std::thread::sleep(SETTLE);
    let after = (cgroup.usage()?, cgroup.kernel());
    child.say("resident")?;
    let resident: u64 = child.line()?.trim().parse().context("resident bytes")?;
    child.say("end")?;
    child.end()?;
    let per = |bytes: u64| bytes as f64 / MIB / f64::from(VMS);
    let grown = after.0.saturating_sub(before.0);
    let kernel = match (before.1, after.1) {
        (Some(before), Some(after)) => per(after.saturating_sub(before)),
        _ => f64::NAN,
    };
    Ok(Cost {
        per_vm: per(grown) - per(resident),
        kernel,
        resident: per(resident),
    })
}

/// The child, as its parent holds it; killed when dropped.
struct Running {
    child: Child,
    lines: BufReader<std::process::ChildStdout>,
}

impl Running {
    fn start(kind: &str, cgroup: &Cgroup) -> Result<Running> {
        let mut child = Program::new("/proc/self/exe")
            .arg0(CHILD)
            .arg(kind)
            .arg(cgroup.door())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let lines = BufReader::new(child.stdout.take().context("no pipe")?);
        Ok(Running { child, lines })
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        if self.lines.read_line(&mut line)? == 0 {
            bail!("the process with the VMs ended: {}", self.child.wait()?);
        }
        Ok(line)
    }

    fn expect(&mut self, word: &str) -> Result<()> {
        let line = self.line()?;
        if line.trim() != word {
            bail!("the process with the VMs said {line:?}, not {word:?}");
        }
        Ok(())
    }

    fn say(&mut self, word: &str) -> Result<()> {
        let input = self.child.stdin.as_mut().context("no pipe")?;
        Ok(writeln!(input, "{word}")?)
    }

    fn end(mut self) -> Result<()> {
        let status = self.child.wait()?;
        if !status.success() {
            bail!("the process with the VMs: {status}");
        }
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The process with the VMs.
pub(crate) fn child_main() -> ExitCode {
    match child() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{CHILD}: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Next line of the parent; the end of its pipe ends this process.
fn hear() -> Result<()> {
    let mut line = String::new();
    if std::io::stdin().read_line(&mut line)? == 0 {
        bail!("the parent is gone");
    }
    Ok(())
}

fn child() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let kind = args.next().context("which kind of VM?")?;
    let door = args.next().context("which cgroup?")?;
    std::fs::write(&door, "0").with_context(|| door.clone())?;
    let kind = match kind.as_str() {
        "bare" => None,
        accel => Some(accel.parse::<Accel>().map_err(anyhow::Error::msg)?),
    };
    // What there is once in a process is there before: one VM comes and goes.
    let mut vms = Vms::default();
    vms.add(kind)?;
    drop(vms);
    println!("inside");
    hear()?;
    let mut vms = Vms::default();
    for _ in 0..VMS {
        vms.add(kind)?;
    }
    println!("idle");
    hear()?;
    println!("{}", vms.resident(kind));
    hear()
}

#[derive(Default)]
struct Vms {
    guests: Vec<Guest>,
    bare: Vec<(std::thread::JoinHandle<()>, std::sync::mpsc::Sender<()>)>,
    bare_resident: u64,
}

impl Vms {
    fn add(&mut self, kind: Option<Accel>) -> Result<()> {
        let Some(accel) = kind else {
            return self.add_bare();
        };
        let builder = VmBuilder::new(image()?).accel(accel).memory(MEMORY);
        let mut guest = Guest::start(builder)?;
        guest.give(Command::new(Work::Sleep, 0))?;
        self.guests.push(guest);
        Ok(())
    }

    fn add_bare(&mut self) -> Result<()> {
        let system = System::open()?;
        let mut vm = RawVm::new(&system, MEMORY)?;
        let (ran, outcome) = std::sync::mpsc::channel();
        let (end, ended) = std::sync::mpsc::channel();
        let thread = std::thread::Builder::new().spawn(move || {
            let result = vm.run().map(|()| vm.ram.resident());
            let _ = ran.send(result);
            // Until the other end is dropped.
            let _ = ended.recv();
        })?;
        self.bare_resident += outcome.recv().context("the bare vCPU's thread")??;
        self.bare.push((thread, end));
        Ok(())
    }

    /// Bytes of private RAM that are resident.
    fn resident(&self, kind: Option<Accel>) -> u64 {
        match kind {
            None => self.bare_resident,
            // The library looks at its own mappings; the guest's process has others.
            Some(Accel::Process) => private_memfds(),
            Some(_) => self
                .guests
                .iter()
                .map(|guest| guest.handle.memory_report().resident)
                .sum(),
        }
    }
}

impl Drop for Vms {
    fn drop(&mut self) {
        for (thread, end) in self.bare.drain(..) {
            drop(end);
            let _ = thread.join();
        }
    }
}

/// Bytes that exist of this process's private RAM files.
fn private_memfds() -> u64 {
    let Ok(entries) = std::fs::read_dir("/proc/self/fd") else {
        return 0;
    };
    // A file may be open twice.
    let mut sizes = std::collections::BTreeMap::new();
    for entry in entries.flatten() {
        let is_ram = std::fs::read_link(entry.path())
            .is_ok_and(|to| to.to_string_lossy().starts_with("/memfd:pv-ram"));
        if is_ram && let Ok(meta) = std::fs::metadata(entry.path()) {
            sizes.insert(meta.ino(), meta.blocks() * 512);
        }
    }
    sizes.values().sum()
}

/// What a backend takes, which is not in the figures above.
fn backend_size(plan: &Plan, report: &mut Report) -> Result<()> {
    let Some(accel) = plan.accels.first() else {
        return Ok(());
    };
    let path = disk_image(&plan.dir)?;
    let builder = VmBuilder::new(image()?)
        .accel(*accel)
        .memory(MEMORY)
        .block(backend(&path, false));
    let mut guest = Guest::start(builder)?;
    guest.command(Command {
        work: Work::Read,
        depth: 32,
        batch: 16,
        spin_us: 0,
        count: 100,
    })?;
    let pid = guest.handle.backend_pids().first().copied().unwrap_or(0);
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))
        .with_context(|| format!("smaps of pv-blkd ({pid})"))?;
    for (what, key) in [
        ("apart: pv-blkd, resident", "Rss:"),
        ("apart: pv-blkd, private memory", "Private_Dirty:"),
    ] {
        let line = text.lines().find_map(|line| line.strip_prefix(key));
        let kib = line
            .and_then(|rest| rest.trim().trim_end_matches(" kB").parse::<f64>().ok())
            .context("smaps_rollup")?;
        let summary = Summary::of(&[kib / 1024.0]).context("no samples")?;
        report
            .rows
            .push(Row::new(BENCH, *accel, what, "MiB", summary));
    }
    Ok(())
}
