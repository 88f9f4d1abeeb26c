//! 4 KiB random reads from a guest through `pv-blkd`, a process of its own, against fio.
//!
//! Every block of the image begins with its own number, and the guest looks: a read that brought
//! something else fails the run.

use crate::Plan;
use crate::guest::{Guest, image};
use crate::protocol::{Command, Work};
use crate::report::{Bar, Report, Row};
use crate::sample::{Summary, ns_per_tick};
use anyhow::{Context, Result, bail, ensure};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command as Program, Stdio};
use vmm_core::{Accel, BlockConfig, VmBuilder};

/// The name under which this program, started again, is the block backend.
pub(crate) const BACKEND: &str = "pv-blkd";

const BENCH: &str = "4 KiB random reads through pv-blkd";
/// Bytes in a read.
const BLOCK: u64 = 4096;
/// Bytes in the image: fits the page cache, and no CPU cache.
const IMAGE: u64 = 512 << 20;
/// Bytes of the guest's memory.
const MEMORY: u64 = 64 << 20;
const DEPTHS: [u8; 2] = [1, 32];

pub(crate) fn run(plan: &Plan, report: &mut Report) -> Result<()> {
    let path = disk_image(&plan.dir)?;
    let fio = match Program::new("fio").arg("--version").output() {
        Ok(output) if output.status.success() => true,
        Ok(output) => {
            report.skip("fio", format!("fio --version: {}", output.status));
            false
        }
        Err(error) => {
            report.skip("fio", format!("it cannot be started: {error}"));
            false
        }
    };
    for direct in [false, true] {
        if direct && let Err(error) = open_direct(&path) {
            let why = format!("{}: {error}; name a real disk with --dir", path.display());
            report.skip("reads with O_DIRECT", why);
            continue;
        }
        let mut disks = Vec::new();
        for accel in &plan.accels {
            disks.push(Disk::start(*accel, &path, direct).with_context(|| accel.to_string())?);
        }
        for depth in DEPTHS {
            let name = if direct { "O_DIRECT" } else { "page cache" };
            eprintln!("reads, {name}, depth {depth} ...");
            compare(plan, &path, direct, depth, &mut disks, fio, report)?;
        }
    }
    Ok(())
}

/// Runs fio and every guest in turns, and reports each guest against fio.
fn compare(
    plan: &Plan,
    path: &Path,
    direct: bool,
    depth: u8,
    disks: &mut [Disk],
    fio: bool,
    report: &mut Report,
) -> Result<()> {
    let (rounds, ms) = if plan.quick { (2, 500) } else { (5, 1500) };
    let mut floor = Vec::new();
    let mut runs: Vec<Vec<Run>> = disks.iter().map(|_| Vec::new()).collect();
    for round in 0..=rounds {
        if !direct {
            fill_cache(path)?;
        }
        // Not counted: rings, buffers and the backend's polling settle.
        let ms = if round == 0 { 300 } else { ms };
        for (disk, runs) in disks.iter_mut().zip(&mut runs) {
            let run = disk.read(depth, ms, plan.spin)?;
            if round > 0 {
                runs.push(run);
            }
        }
        if fio && round > 0 {
            floor.push(run_fio(path, direct, depth, ms)?);
        }
    }
    let floor = Summary::of(&floor);
    let mode = if direct { "O_DIRECT" } else { "page cache" };
    for (disk, runs) in disks.iter().zip(&runs) {
        let of = |field: fn(&Run) -> f64| {
            let samples: Vec<f64> = runs.iter().map(field).collect();
            Summary::of(&samples).context("no samples")
        };
        let what = |what: &str| format!("{mode}, depth {depth}: {what}");
        let accel = disk.accel;
        let mut row = Row::new(BENCH, accel, what("reads"), "k/s", of(|r| r.kiops)?);
        if let Some(floor) = floor {
            row = row
                .floor("fio, io_uring, same file and depth", floor)
                .bar(Bar::RatioAtLeast(0.5));
        }
        report.rows.push(row);
        let exits = Row::new(BENCH, accel, what("exits"), "/req", of(|r| r.exits)?);
        report.rows.push(if depth >= 32 {
            exits.bar(Bar::AtMost(0.1))
        } else {
            exits
        });
        for (name, field) in [
            ("kicks", (|r| r.kicks) as fn(&Run) -> f64),
            ("idles", |r| r.idles),
            ("calls", |r| r.calls),
        ] {
            report
                .rows
                .push(Row::new(BENCH, accel, what(name), "/req", of(field)?));
        }
    }
    Ok(())
}

/// One run of a guest.
struct Run {
    kiops: f64,
    exits: f64,
    kicks: f64,
    idles: f64,
    calls: f64,
}

/// A guest with a disk.
struct Disk {
    accel: Accel,
    guest: Guest,
}

/// A block device of this image, served by this program started again.
pub(crate) fn backend(path: &Path, direct: bool) -> BlockConfig {
    let path = path.to_owned();
    BlockConfig::spawn(move || {
        let mut command = Program::new("/proc/self/exe");
        command.arg0(BACKEND).arg("--blk-file").arg(&path);
        command.arg("--read-only");
        if direct {
            command.arg("--direct");
        }
        command
    })
}

impl Disk {
    fn start(accel: Accel, path: &Path, direct: bool) -> Result<Disk> {
        let builder = VmBuilder::new(image()?)
            .accel(accel)
            .memory(MEMORY)
            .block(backend(path, direct));
        let guest = Guest::start(builder)?;
        Ok(Disk { accel, guest })
    }

    fn read(&mut self, depth: u8, ms: u32, spin_us: u8) -> Result<Run> {
        let before = self.guest.handle.stats();
        let outcome = self.guest.command(Command {
            work: Work::Read,
            depth,
            // Half a queue at a time: the backend works on the other half meanwhile.
            batch: (depth / 2).max(1),
            spin_us,
            count: ms,
        })?;
        let after = self.guest.handle.stats();
        ensure!(outcome.done > 0, "the guest read nothing");
        ensure!(
            outcome.wrong == 0,
            "{} of {} reads brought wrong data",
            outcome.wrong,
            outcome.done
        );
        let per = |n: u64| n as f64 / outcome.done as f64;
        let calls = |stats: &vmm_core::Stats| stats.calls.values().sum::<u64>();
        let seconds = outcome.ticks as f64 * ns_per_tick() / 1e9;
        Ok(Run {
            kiops: outcome.done as f64 / seconds / 1000.0,
            exits: per(after.exits.total() - before.exits.total()),
            kicks: per(after.kicks.wrapping_sub(before.kicks)),
            idles: per(after.idles.wrapping_sub(before.idles)),
            calls: per(calls(&after) - calls(&before)),
        })
    }
}

/// Thousands of reads a second.
fn run_fio(path: &Path, direct: bool, depth: u8, ms: u32) -> Result<f64> {
    let output = Program::new("fio")
        .args(["--name=floor", "--rw=randread", "--bs=4k", "--readonly"])
        .args(["--ioengine=io_uring", "--norandommap", "--time_based"])
        // The page cache stays as it is.
        .args(["--invalidate=0", "--fadvise_hint=0"])
        .arg(format!("--filename={}", path.display()))
        .arg(format!("--direct={}", u8::from(direct)))
        .arg(format!("--iodepth={depth}"))
        .arg(format!("--runtime={ms}ms"))
        .arg("--output-format=json")
        .stderr(Stdio::inherit())
        .output()
        .context("fio")?;
    ensure!(output.status.success(), "fio: {}", output.status);
    let text = String::from_utf8_lossy(&output.stdout);
    // Notes may precede the JSON.
    let json = text.find('{').and_then(|at| text.get(at..)).unwrap_or("");
    let value: serde_json::Value = serde_json::from_str(json).context("fio's JSON")?;
    let iops = value.pointer("/jobs/0/read/iops");
    let iops = iops.and_then(serde_json::Value::as_f64);
    Ok(iops.context("fio reports no reads")? / 1000.0)
}

/// The image, made once and kept.
pub(crate) fn disk_image(dir: &Path) -> Result<PathBuf> {
    let path = dir.join("paravane-bench-disk.img");
    if path.metadata().is_ok_and(|m| m.len() == IMAGE) {
        return Ok(path);
    }
    eprintln!("making {} ...", path.display());
    let partial = dir.join("paravane-bench-disk.partial");
    let mut file = BufWriter::with_capacity(1 << 20, File::create(&partial)?);
    let mut block = vec![0u8; BLOCK as usize];
    let mut noise = 0x2545_f491_4f6c_dd1du64;
    for index in 0..IMAGE / BLOCK {
        for (place, word) in (0u64..).zip(block.chunks_exact_mut(8)) {
            noise = noise.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            let value = if place == 0 { index } else { noise };
            word.copy_from_slice(&value.to_le_bytes());
        }
        file.write_all(&block)?;
    }
    let file = file.into_inner().map_err(|error| error.into_error())?;
    file.sync_all()?;
    std::fs::rename(&partial, &path)?;
    Ok(path)
}

/// Reads all of it, so that the page cache has it.
fn fill_cache(path: &Path) -> Result<()> {
    let mut file = File::open(path)?;
    let read = std::io::copy(&mut file, &mut std::io::sink())?;
    if read != IMAGE {
        bail!("{} is {read} bytes long", path.display());
    }
    Ok(())
}

fn open_direct(path: &Path) -> std::io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = std::fs::OpenOptions::new();
    options.read(true).custom_flags(libc::O_DIRECT).open(path)
}
