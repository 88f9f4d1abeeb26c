//! Figures, each beside the least that the same host could do, taken in the same run.
//!
//! | module | what it measures |
//! |---|---|
//! | `calls` | control calls, `notify` and `idle`, against bare exits, hand-offs and system calls |
//! | `boot` | from the builder to the guest's first call, against bare ioctls and a bare process |
//! | `block` | random reads through `pv-blkd`, against fio |
//! | `idle` | memory of a hundred idle VMs, against bare ones |
//!
//! Nothing here fails because it is slow: each bar is printed as met or not met, and the exit code
//! says only whether everything ran.

mod block;
mod boot;
mod calls;
mod cgroup;
mod guest;
mod idle;
#[path = "../../guests/bench/src/protocol.rs"]
#[allow(dead_code, unreachable_pub, reason = "each side uses its part of it")]
mod protocol;
mod raw_kvm;
mod raw_process;
mod report;
mod sample;

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use report::Report;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use vmm_core::Accel;

/// What can be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Bench {
    /// Control calls, notify, idle.
    Calls,
    /// Build to the first guest call.
    Boot,
    /// 4 KiB random reads through pv-blkd.
    Block,
    /// Memory of a hundred idle VMs.
    Idle,
}

/// Measures Paravane beside what the host itself can do.
#[derive(Debug, Parser)]
#[command(name = "paravane-benches", version)]
struct Cli {
    /// What to measure; everything if none is named.
    benches: Vec<Bench>,
    /// Fewer samples: to see that everything runs, not to be quoted.
    #[arg(long)]
    quick: bool,
    /// Write the figures to this file as well, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// On this accel only.
    #[arg(long, value_name = "ACCEL")]
    accel: Option<Accel>,
    /// How long the guest looks for completions before it idles, in microseconds.
    #[arg(long, value_name = "US", default_value_t = 0)]
    spin: u8,
    /// Where the disk image is made; it must be on a real disk. The default is the target folder.
    #[arg(long, value_name = "FOLDER")]
    dir: Option<PathBuf>,
}

/// What every benchmark needs to know.
#[derive(Clone, Debug)]
struct Plan {
    quick: bool,
    spin: u8,
    accels: Vec<Accel>,
    dir: PathBuf,
}

fn main() -> ExitCode {
    // Started again under another name, this program is a backend, or idle VMs.
    let name = std::env::args_os().next().unwrap_or_default();
    let name = Path::new(&name).file_name();
    if name == Some(OsStr::new(block::BACKEND)) {
        return vhost_backends::pv_blkd_main(std::env::args_os());
    }
    if name == Some(OsStr::new(idle::CHILD)) {
        return idle::child_main();
    }
    match run(&Cli::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("paravane-benches: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether everything ran.
fn run(cli: &Cli) -> Result<bool> {
    let mut report = Report {
        host: host(),
        quick: cli.quick,
        ..Default::default()
    };
    let accels = [Accel::Kvm, Accel::Process].into_iter();
    let mut accels: Vec<Accel> = accels
        .filter(|accel| cli.accel.is_none_or(|only| only == *accel))
        .collect();
    if accels.contains(&Accel::Kvm)
        && let Err(error) = kvm_ioctls::Kvm::new()
    {
        report.skip("everything on kvm", format!("/dev/kvm: {error}"));
        accels.retain(|accel| *accel != Accel::Kvm);
    }
    let plan = Plan {
        quick: cli.quick,
        spin: cli.spin,
        accels,
        dir: match &cli.dir {
            Some(dir) => dir.clone(),
            None => default_dir()?,
        },
    };
    for bench in Bench::value_variants() {
        if !cli.benches.is_empty() && !cli.benches.contains(bench) {
            continue;
        }
        let outcome = match bench {
            Bench::Calls => calls::run(&plan, &mut report),
            Bench::Boot => boot::run(&plan, &mut report),
            Bench::Block => block::run(&plan, &mut report),
            Bench::Idle => idle::run(&plan, &mut report),
        };
        if let Err(error) = outcome {
            report.failed.push(report::Skip {
                bench: format!("{bench:?}").to_lowercase(),
                why: format!("{error:#}"),
            });
        }
    }
    print!("{}", report.table());
    if let Some(path) = &cli.json {
        let text = serde_json::to_string_pretty(&report)?;
        std::fs::write(path, text + "\n")
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(report.failed.is_empty())
}

/// The machine, in one line.
fn host() -> String {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let model = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .map_or("", |rest| rest.trim_start_matches([' ', '\t', ':']));
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let kernel = read("/proc/sys/kernel/osrelease");
    format!("{model}, {cpus} CPUs, Linux {}", kernel.trim())
}

/// The folder of build results that this program lies in.
fn default_dir() -> Result<PathBuf> {
    let exe = std::env::current_exe()?;
    let target = exe.parent().and_then(Path::parent);
    Ok(target
        .context("this program lies in no target folder: name one with --dir")?
        .to_owned())
}
