//! The guest's run: a VM with one disk, served by another process, or by a thread of this one.

use crate::accel::Wanted;
use crate::cli::Backend;
use crate::interrupt;
use crate::report::say;
use anyhow::{Context, Result, bail};
use quickstart_fs::manifest::{REPORT_CALL, Report as GuestReport, STARTED_CALL};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use vhost_backends::block::{BlockDevice, BlockOptions};
use vhost_backends::engine::{FileOptions, RawFile};
use vhost_backends::session;
use vmm_core::{BlockConfig, ExitReason, Image, LogLevel, VmBuilder, VmHandle};

/// The name under which this program, started again, is the block backend.
pub const BACKEND: &str = "pv-blkd";

/// How long the guest may take to its first call.
const BOOT_DEADLINE: Duration = Duration::from_secs(10);

/// How long Ctrl-C may go unheard: less than anybody notices, and no load.
const INTERRUPT_CHECK: Duration = Duration::from_millis(50);

/// What to run.
#[derive(Clone, Copy, Debug)]
pub struct GuestRun<'a> {
    /// The guest.
    pub image: &'a Image,
    /// Its disk.
    pub disk: &'a Path,
    /// What runs it.
    pub accel: Wanted,
    /// Where its disk's backend runs.
    pub backend: Backend,
    /// Its virtual CPUs.
    pub vcpus: u32,
    /// Bytes of its memory.
    pub memory: u64,
    /// How long it may take.
    pub timeout: Duration,
}

/// How it went.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// What ran it.
    pub accel: String,
    /// From building the VM to the guest's first call.
    pub boot: Duration,
    /// What the guest reported.
    pub report: GuestReport,
    /// Exits to the VMM in user space.
    pub exits: u64,
    /// Doorbells rung.
    pub kicks: u64,
}

/// What the guest has said so far.
#[derive(Debug, Default)]
struct Heard {
    started: Option<Instant>,
    report: Option<GuestReport>,
    complaint: Option<String>,
}

type Shared = Arc<Mutex<Heard>>;

/// Runs the guest to its end.
///
/// # Errors
///
/// When the VM cannot be built, and when the guest ends in any way but well.
pub fn run_guest(run: &GuestRun<'_>) -> Result<Outcome> {
    let heard = Shared::default();
    let start = Instant::now();
    let vm = builder(run, &heard)?
        .build()
        .context("cannot build the VM")?;
    let accel = vm.accel();
    let handle = vm.run().context("cannot start the VM")?;
    wait(&handle, run.timeout, &heard)?;
    let stats = handle.stats();
    drop(handle);
    let heard = heard.lock().unwrap_or_else(PoisonError::into_inner);
    let (Some(started), Some(report)) = (heard.started, heard.report) else {
        bail!("the guest ended without a report: is it a quickstart guest?");
    };
    Ok(Outcome {
        accel: run.accel.describe(accel),
        boot: started.duration_since(start),
        report,
        exits: stats.exits.total(),
        kicks: stats.kicks,
    })
}

fn builder(run: &GuestRun<'_>, heard: &Shared) -> Result<VmBuilder> {
    let backend = match run.backend {
        Backend::Process => backend_process(run.disk)?,
        Backend::InProcess => backend_thread(run.disk)?,
    };
    let (started, reported, logged) = (heard.clone(), heard.clone(), heard.clone());
    let builder = VmBuilder::new(run.image.clone())
        .vcpus(run.vcpus)
        .memory(run.memory)
        .block(backend.name("disk"))
        .boot_deadline(BOOT_DEADLINE)
        .call(STARTED_CALL, move |call| {
            lock(&started).started.get_or_insert_with(Instant::now);
            call.finish(Ok(0));
        })
        .call(REPORT_CALL, move |call| {
            lock(&reported).report = Some(GuestReport::from_args(call.args()));
            call.finish(Ok(0));
        })
        .log(move |level, line| {
            // The guest may be anybody's: nothing it says reaches the terminal unescaped.
            let line = line.trim_end().escape_debug().to_string();
            say(format_args!("guest: {line}"));
            if level == LogLevel::Error {
                lock(&logged).complaint = Some(line);
            }
        });
    Ok(run.accel.set(builder))
}

fn backend_process(disk: &Path) -> Result<BlockConfig> {
    // The backend is started by path from wherever the VMM likes. Links stay as they are: one in
    // /proc leads to a file that has no other path.
    let disk =
        std::path::absolute(disk).with_context(|| format!("cannot find {}", disk.display()))?;
    Ok(BlockConfig::spawn(move || {
        let mut command = Command::new("/proc/self/exe");
        command.arg0(BACKEND).arg("--blk-file").arg(&disk);
        command
    }))
}

fn backend_thread(disk: &Path) -> Result<BlockConfig> {
    let file = RawFile::open(disk, FileOptions::default())
        .with_context(|| format!("cannot open {}", disk.display()))?;
    let device = BlockDevice::new(file, BlockOptions::with_queues(1));
    Ok(BlockConfig::in_process(move |stream| {
        session::serve(&device, stream)
    }))
}

fn lock(heard: &Shared) -> std::sync::MutexGuard<'_, Heard> {
    heard.lock().unwrap_or_else(PoisonError::into_inner)
}

fn wait(handle: &VmHandle, timeout: Duration, heard: &Shared) -> Result<()> {
    let start = Instant::now();
    let reason = loop {
        let left = timeout.saturating_sub(start.elapsed());
        if let Some(reason) = handle.wait_timeout(left.min(INTERRUPT_CHECK)) {
            break reason;
        }
        if let Err(interrupted) = interrupt::check() {
            handle.stop();
            return Err(interrupted.into());
        }
        if start.elapsed() >= timeout {
            handle.stop();
            bail!(
                "the guest was stopped after {} s: give it more with --timeout",
                timeout.as_secs()
            );
        }
    };
    match reason {
        ExitReason::Exited(0) => Ok(()),
        reason => match lock(heard).complaint.take() {
            Some(complaint) => bail!("the guest {reason}: {complaint}"),
            None => bail!("the guest did not end well: {reason}"),
        },
    }
}
