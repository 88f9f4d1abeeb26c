//! What the cross-crate tests share: which accels to run on, disks, and the suite's VM.
//!
//! `PV_ACCEL` chooses the accels: `kvm` or `process` forces one (and fails where it cannot be had),
//! `all` forces both, unset runs on every accel that works here and says which do not. `PV_BACKEND`
//! chooses where disks' backends run: `process`, `in-process`, or both if it is unset.

mod lan;
mod larger;

pub use lan::Lan;
pub use larger::Larger;

use anyhow::{Context, bail, ensure};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use vhost_backends::block::{BlockDevice, BlockOptions};
use vhost_backends::engine::{FileOptions, RawFile};
use vhost_backends::net::port::Loopback;
use vhost_backends::net::{Mac, NetDevice, NetOptions};
use vhost_backends::session;
use vmm_core::{Accel, BlockConfig, Image, NetConfig, VmBuilder};

/// Bytes of a test disk.
pub const DISK_LEN: u64 = 16 << 20;

/// The accels to run on.
///
/// # Errors
/// When `PV_ACCEL` forces one that does not work here, or names none.
pub fn accels() -> anyhow::Result<Vec<Accel>> {
    let forced = std::env::var("PV_ACCEL").unwrap_or_default();
    let wanted = match forced.as_str() {
        "" => {
            return Ok([Accel::Kvm, Accel::Process]
                .into_iter()
                .filter(|accel| match accel.check() {
                    Ok(()) => true,
                    Err(error) => {
                        let error = anyhow::Error::new(error);
                        skipped(&format!("everything on {accel}: {error:#}"));
                        false
                    }
                })
                .collect());
        }
        "all" => vec![Accel::Kvm, Accel::Process],
        name => vec![
            name.parse::<Accel>()
                .context("PV_ACCEL; the tests take all as well")?,
        ],
    };
    for accel in &wanted {
        accel
            .check()
            .with_context(|| format!("PV_ACCEL={forced} forces {accel}"))?;
    }
    Ok(wanted)
}

/// Says once that something was left out, and why, past a test runner that keeps what tests print.
pub fn skipped(what: &str) {
    static SAID: Mutex<Vec<String>> = Mutex::new(Vec::new());
    let mut said = SAID.lock().unwrap_or_else(PoisonError::into_inner);
    if !said.iter().any(|before| before == what) {
        said.push(what.to_owned());
        // On a line of its own, behind the name of the test that runs.
        let _ = writeln!(std::io::stderr(), "\nSKIPPED: {what}");
    }
}

/// Where the backend of a disk runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// In a `pv-blkd` that the VMM supervises.
    Process,
    /// On a thread of the VMM's own process.
    InProcess,
}

impl std::fmt::Display for Backend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Backend::Process => "process",
            Backend::InProcess => "in-process",
        })
    }
}

/// The places for backends to run in.
///
/// # Errors
/// When `PV_BACKEND` names none.
pub fn backends() -> anyhow::Result<Vec<Backend>> {
    match std::env::var("PV_BACKEND").unwrap_or_default().as_str() {
        "" | "all" => Ok(vec![Backend::Process, Backend::InProcess]),
        "process" => Ok(vec![Backend::Process]),
        "in-process" => Ok(vec![Backend::InProcess]),
        other => bail!("PV_BACKEND is {other:?}; it is process, in-process or all"),
    }
}

/// The block daemon's executable: `PV_BLKD`, or the one that was built beside the tests.
///
/// # Errors
/// When there is none.
pub fn pv_blkd() -> anyhow::Result<PathBuf> {
    if let Some(path) = std::env::var_os("PV_BLKD") {
        return Ok(path.into());
    }
    beside("pv-blkd-under-test")
}

/// An executable of this package, from inside one of its tests.
///
/// # Errors
/// When it has not been built.
pub fn beside(name: &str) -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe()?;
    let folders = own.ancestors().skip(1).take(2);
    for folder in folders {
        let path = folder.join(name);
        if path.is_file() {
            return Ok(path);
        }
    }
    bail!(
        "{name} is not beside {}; run the tests with cargo",
        own.display()
    );
}

/// A disk served by a spawned `pv-blkd` with these further arguments.
///
/// # Panics
/// When the daemon's executable has not been built.
pub fn disk(image: &Path, arguments: &[&str]) -> BlockConfig {
    let daemon = pv_blkd().expect("the block daemon");
    let image = image.to_owned();
    let arguments: Vec<String> = arguments.iter().map(|a| (*a).to_owned()).collect();
    BlockConfig::spawn(move || {
        let mut command = Command::new(&daemon);
        command
            .arg("--blk-file")
            .arg(&image)
            .args(["--num-queues", "2"])
            .args(&arguments);
        command
    })
    .queues(2)
}

/// The device of a disk with two queues, for a backend in this process.
///
/// # Errors
/// When the image cannot be opened.
pub fn block_device(image: &Path, read_only: bool) -> std::io::Result<Arc<BlockDevice>> {
    let options = FileOptions {
        read_only,
        direct: false,
    };
    let file = RawFile::open(image, options)?;
    Ok(Arc::new(BlockDevice::new(
        file,
        BlockOptions::with_queues(2),
    )))
}

/// A disk whose backend runs there.
///
/// # Panics
/// When the daemon's executable has not been built, or the image cannot be opened.
pub fn disk_in(backend: Backend, image: &Path, read_only: bool) -> BlockConfig {
    match backend {
        Backend::Process if read_only => disk(image, &["--read-only"]),
        Backend::Process => disk(image, &[]),
        Backend::InProcess => {
            let device = block_device(image, read_only).expect("the disk image");
            BlockConfig::in_process(move |stream| session::serve(&*device, stream)).queues(2)
        }
    }
}

/// The address of a test card.
pub const CARD_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// The device of a card with two pairs of queues that gives every frame back, for a backend in this
/// process.
pub fn net_device() -> Arc<NetDevice> {
    let options = NetOptions::with_mac(Mac(CARD_MAC)).pairs(2);
    Arc::new(NetDevice::new(Arc::new(Loopback::default()), options))
}

/// Such a card, whose backend is a supervised `pv-netd`.
///
/// # Panics
/// When the daemons' executable has not been built.
pub fn card() -> NetConfig {
    let daemon = pv_blkd().expect("the daemons");
    let spawn = move || {
        let mut command = Command::new(&daemon);
        command
            .arg0("pv-netd")
            .args(["--loopback", "--queue-pairs", "2"])
            .args(["--mac", "02:00:00:00:00:01"]);
        command
    };
    NetConfig::spawn(spawn).queue_pairs(2).mac(CARD_MAC)
}

/// A disk image of [`DISK_LEN`] zero bytes.
///
/// # Errors
/// When it cannot be made.
pub fn blank_image(path: &Path) -> std::io::Result<()> {
    File::create(path)?.set_len(DISK_LEN)
}

/// A VM for one case of the suite guest, without devices.
///
/// # Errors
/// When the guest's image is refused.
pub fn suite_vm(case: &str, accel: Accel) -> anyhow::Result<VmBuilder> {
    Ok(VmBuilder::new(Image::from_bytes(guest_images::SUITE)?)
        .accel(accel)
        .vcpus(3)
        .memory(64 << 20)
        // Where everything takes longer, long loops are thinned out.
        .cmdline(format!("case={case} thin={}", slowness())))
}

/// How long anything may take: generous, and more on emulated machines (`PV_PATIENCE` times).
pub fn patience(seconds: u64) -> Duration {
    Duration::from_secs(seconds * slowness())
}

fn slowness() -> u64 {
    let factor = std::env::var("PV_PATIENCE").ok();
    factor.and_then(|v| v.parse().ok()).unwrap_or(1)
}

/// Tests that look at what else their process has must be alone in it.
pub fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A `vmm-under-test` with that disk image and so many spare processes, whose guest ticks by now.
///
/// # Errors
/// When it cannot be started, or says something else than that its guest ticks.
pub fn ticking_vmm(accel: Accel, image: &Path, spares: u32) -> anyhow::Result<Child> {
    let mut vmm = Command::new(beside("vmm-under-test")?);
    vmm.arg(accel.name()).arg(image);
    if spares > 0 {
        vmm.arg(spares.to_string());
    }
    let mut vmm = vmm.stdout(Stdio::piped()).spawn()?;
    let mut line = String::new();
    let output = vmm.stdout.take().context("no standard output")?;
    BufReader::new(output).read_line(&mut line)?;
    ensure!(line == "ticking\n", "vmm-under-test said {line:?}");
    Ok(vmm)
}

/// The children of a process, by all of its threads.
pub fn children_of(pid: u32) -> Vec<u32> {
    let mut children = Vec::new();
    for task in fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .flatten()
    {
        let list = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        children.extend(
            list.split_ascii_whitespace()
                .filter_map(|p| p.parse::<u32>().ok()),
        );
    }
    children
}

/// Whether there is such a process, and it has not ended.
pub fn alive(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // A zombie that nobody has waited for yet is dead.
    let state = stat
        .rsplit_once(')')
        .and_then(|(_, rest)| rest.trim_start().chars().next());
    state.is_some_and(|s| s != 'Z' && s != 'X')
}

/// Waits for something that takes a moment.
///
/// # Panics
/// When it takes longer than anything may.
pub fn wait_until(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + patience(30);
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
