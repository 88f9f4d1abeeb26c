//! The host of a case: its backends, the embedder's calls, and guests that do not end by themselves.
#![allow(unsafe_code)]
// UNSAFETY: a signal to a backend.

use anyhow::{Context, bail, ensure};
use paravane_tests::{Backend, Lan, Larger, block_device, net_device, patience};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};
use vhost_backends::net::NetDevice;
use vhost_backends::session::{Device, Server, SessionEnd};
use vmm_core::pv_abi::call::number;
use vmm_core::{
    Accel, BlockConfig, ExitReason, Image, LogLevel, NetConfig, Refusal, Violation, VmBuilder,
    VmHandle,
};

/// Times that `soak.kill` and `net.kill` end the backend.
pub(crate) const KILLS: u64 = 25;

/// What the guest said.
#[derive(Clone, Default)]
pub(crate) struct Transcript {
    log: Arc<Mutex<Vec<String>>>,
    console: Arc<Mutex<Vec<u8>>>,
}

impl Transcript {
    pub(crate) fn attach(&self, builder: VmBuilder) -> VmBuilder {
        let (log, console) = (Arc::clone(&self.log), Arc::clone(&self.console));
        builder
            .log(move |level, line| {
                if let Ok(mut log) = log.lock()
                    && (level <= LogLevel::Info || log.len() < 10)
                {
                    log.push(format!("{level:?}: {line}"));
                }
            })
            .console_callback(move |bytes| {
                if let Ok(mut console) = console.lock() {
                    console.extend_from_slice(bytes);
                }
            })
    }

    pub(crate) fn log(&self) -> String {
        self.log.lock().map(|l| l.join("; ")).unwrap_or_default()
    }

    pub(crate) fn console(&self) -> Vec<u8> {
        self.console.lock().map(|c| c.clone()).unwrap_or_default()
    }
}

/// What the embedder of a case has, and what the case has told it.
#[derive(Default)]
pub(crate) struct Host {
    pub(crate) vm: OnceLock<std::sync::Weak<VmHandle>>,
    pub(crate) kills: AtomicU64,
    /// What `life.counted` has counted itself.
    pub(crate) counted: OnceLock<(u64, u64)>,
    /// Writes or frames that the guest has found to be right, when it was last over an end.
    pub(crate) done: AtomicU64,
    /// The card, if its backend runs in this process.
    pub(crate) card: OnceLock<Arc<NetDevice>>,
    /// What the card floods.
    pub(crate) lan: Option<Lan>,
    /// Dropped, it ends the backend that runs in this process now.
    ending: Mutex<Option<UnixStream>>,
    /// What makes the disk larger.
    pub(crate) larger: OnceLock<Arc<Larger>>,
}

impl Host {
    /// A disk whose backend runs in this process.
    pub(crate) fn disk(self: &Arc<Host>, image: &Path) -> std::io::Result<BlockConfig> {
        let serve = self.serve(block_device(image, false)?);
        Ok(BlockConfig::in_process(serve).queues(2))
    }

    /// A disk that can be made larger.
    pub(crate) fn growing_disk(
        &self,
        backend: Backend,
        image: &Path,
    ) -> anyhow::Result<BlockConfig> {
        let (disk, larger) = Larger::disk(backend, image)?;
        let _ = self.larger.set(larger);
        Ok(disk)
    }

    /// A card whose backend runs in this process.
    pub(crate) fn card(self: &Arc<Host>) -> NetConfig {
        let device = Arc::clone(self.card.get_or_init(net_device));
        NetConfig::in_process(self.serve(device)).queue_pairs(2)
    }

    /// Serves a device until it is told to end: once with a panic.
    fn serve(
        self: &Arc<Host>,
        device: Arc<dyn Device>,
    ) -> impl Fn(UnixStream) -> std::io::Result<()> + Send + Sync + 'static {
        let host = Arc::clone(self);
        move |stream| {
            let (ending, stop) = UnixStream::pair()?;
            let server = Server::new(device.clone(), stop.into());
            if let Ok(mut slot) = host.ending.lock() {
                *slot = Some(ending);
            }
            if server.serve(stream) == SessionEnd::Stopped
                && host.kills.load(Ordering::Relaxed) == 2
            {
                // A panic that says nothing on standard error.
                std::panic::resume_unwind(Box::new("as the test wants"));
            }
            Ok(())
        }
    }

    /// Takes the card's link up or down, by the VM's switch or by the backend's; whether it can.
    fn set_link(&self, switch: u64, up: bool) -> Option<bool> {
        match switch {
            0 => self.vm.get()?.upgrade()?.set_link(0, up).ok()?,
            _ => match self.card.get() {
                Some(card) => card.set_link(up).ok()?,
                None => return Some(false),
            },
        }
        Some(true)
    }

    /// Ends the backend of the first device, unless the guest, which has found so much to be right,
    /// is not over the last end yet; whether it is over all of them.
    fn kill(&self, done: u64) -> Option<u64> {
        let vm = self.vm.get()?.upgrade()?;
        let kills = self.kills.load(Ordering::Relaxed);
        if vm.stats().backend_reconnects < kills || done <= self.done.load(Ordering::Relaxed) {
            return Some(0);
        }
        self.done.store(done, Ordering::Relaxed);
        if kills >= KILLS {
            return Some(1);
        }
        let pid = *vm.backend_pids().first()?;
        let ending = self.ending.lock().ok()?.take();
        if pid != 0 || ending.is_some() {
            self.kills.store(kills + 1, Ordering::Relaxed);
        }
        if pid != 0 {
            kill_9(pid);
        }
        Some(0)
    }
}

fn kill_9(pid: u32) {
    // SAFETY: a signal to a process that this test's VM supervises.
    unsafe { libc::kill(pid as libc::pid_t, libc::SIGKILL) };
}

/// The embedder's calls that the cases make.
pub(crate) fn calls(builder: VmBuilder, image: &Path, host: &Arc<Host>) -> VmBuilder {
    let (image, host): (PathBuf, _) = (image.into(), Arc::clone(host));
    let (linked, flooded) = (Arc::clone(&host), Arc::clone(&host));
    let growing = Arc::clone(&host);
    let told = Arc::clone(&host);
    builder
        .call(0, |call| {
            let sum = call.args().iter().sum();
            call.finish(Ok(sum));
        })
        .call(1, |call| {
            let [gpa, len, ..] = call.args();
            let mut bytes = vec![0; usize::try_from(len).unwrap_or(0).min(4096)];
            let result = call.read(gpa, &mut bytes).and_then(|()| {
                bytes.reverse();
                call.write(gpa, &bytes)
            });
            call.finish(result.map(|()| len).map_err(Refusal::from));
        })
        .call(2, |call| {
            std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(30));
                let [value, ..] = call.args();
                call.finish(Ok(value * 2));
            });
        })
        .call(3, |call| {
            let [code, ..] = call.args();
            call.finish(Err(Refusal::code(code)));
        })
        .call(4, drop)
        .call(6, move |call| {
            let cut = std::fs::OpenOptions::new().write(true).open(&image);
            let cut = cut.and_then(|file| file.set_len(1 << 20));
            call.finish(cut.map(|()| 0).map_err(|_| Refusal::code(1)));
        })
        .call(7, move |call| {
            let [completed, ..] = call.args();
            let enough = host.kill(completed).unwrap_or(0);
            call.finish(Ok(enough));
        })
        .call(8, move |call| {
            let [switch, up, ..] = call.args();
            let done = linked.set_link(switch, up != 0);
            call.finish(done.map(u64::from).ok_or(Refusal::code(2)));
        })
        .call(20, move |call| {
            let [idles, rounds, ..] = call.args();
            let _ = told.counted.set((idles, rounds));
            call.finish(Ok(0));
        })
        .call(9, move |call| {
            let dropped = flooded.lan.as_ref().and_then(|lan| lan.flood_drops().ok());
            call.finish(dropped.ok_or(Refusal::code(3)));
        })
        .call(10, move |call| {
            let begun = growing.larger.get().map(|larger| larger.begin(24 << 20));
            call.finish(begun.map(|()| 0).ok_or(Refusal::code(4)));
        })
}

/// Pauses, resumes and stops a guest that never ends by itself.
pub(crate) fn endless(vm: &VmHandle) -> anyhow::Result<ExitReason> {
    let limit = Instant::now() + patience(30);
    while !vm.stats().calls.contains_key(&number::NEGOTIATE) {
        ensure!(Instant::now() < limit, "it did not negotiate");
        std::thread::sleep(Duration::from_millis(2));
    }
    for _ in 0..3 {
        vm.pause()?;
        std::thread::sleep(Duration::from_millis(5));
        vm.resume()?;
        std::thread::sleep(Duration::from_millis(5));
    }
    vm.pause()?;
    vm.stop();
    vm.wait_timeout(patience(30)).context("it did not stop")
}

/// A guest that does nothing at all ends at its deadline.
pub(crate) fn never_starts(accel: Accel) -> anyhow::Result<()> {
    let vm = VmBuilder::new(Image::from_bytes(guest_images::INERT)?)
        .accel(accel)
        .boot_deadline(Duration::from_millis(100))
        .build()?
        .run()?;
    let reason = vm
        .wait_timeout(patience(30))
        .context("the deadline passed unnoticed")?;
    let expected = Violation::NeverStarted { deadline_ms: 100 };
    match reason {
        ExitReason::Violation(violation) if violation == expected => Ok(()),
        other => bail!("{other:?}"),
    }
}
