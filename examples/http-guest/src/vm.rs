//! The VM, its backends, and what the guest says.

use crate::limits::INTERRUPT_CHECK;
use anyhow::{Context, Result, bail};
use http_serve::calls::{MEASURED_CALL, READY_CALL};
use quickstart::accel::Wanted;
use quickstart::interrupt;
use quickstart::report::say;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use vmm_core::{BlockConfig, ExitReason, Image, LogLevel, NetConfig, VmBuilder, VmHandle};

/// The names under which this program, started again, is a backend.
pub const DISK_BACKEND: &str = "pv-blkd";
/// See [`DISK_BACKEND`].
pub const NET_BACKEND: &str = "pv-netd";

/// Bytes of a guest's memory: its cache of files, and the buffers of its sockets.
const MEMORY: u64 = 128 << 20;
/// How long a guest may take to its first call.
const BOOT_DEADLINE: Duration = Duration::from_secs(10);

/// This program under another name.
pub(crate) fn backend(name: &str) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg0(name);
    command
}

/// What a guest has said so far.
#[derive(Debug, Default)]
struct Heard {
    ready: Option<(u64, u64)>,
    measured: Option<Measured>,
    complaint: Option<String>,
}

/// What a guest has measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measured {
    /// Bytes that went through.
    pub bytes: u64,
    /// How long they took.
    pub nanoseconds: u64,
}

/// A guest that is to be run.
#[derive(Debug)]
pub struct Guest {
    builder: VmBuilder,
    heard: Arc<Mutex<Heard>>,
    name: String,
}

/// A guest that runs. It is stopped when this is dropped.
#[derive(Debug)]
pub struct Running {
    handle: VmHandle,
    heard: Arc<Mutex<Heard>>,
    name: String,
    accel: String,
}

impl Guest {
    /// The web server: a disk, and a card whose frames go to the program at `network`.
    ///
    /// # Errors
    ///
    /// When the guest's image is refused.
    pub fn server(accel: Wanted, disk: &Path, network: &Path) -> Result<Guest> {
        let (disk, network) = (std::path::absolute(disk)?, network.to_path_buf());
        let disk = BlockConfig::spawn(move || {
            let mut command = backend(DISK_BACKEND);
            command.arg("--blk-file").arg(&disk).arg("--read-only");
            command
        });
        let card = NetConfig::spawn(move || {
            let mut command = backend(NET_BACKEND);
            command.arg("--stream").arg(&network);
            command
        });
        let command_line = format!(
            "role=serve ip={}/24 gateway={}",
            crate::forward::GUEST,
            crate::forward::HOST
        );
        let guest = Guest::new(accel, "guest", &command_line)?;
        let builder = guest.builder.block(disk.name("disk")).net(card.name("net"));
        Ok(Guest { builder, ..guest })
    }

    /// A guest of its own card, whose backend listens at `socket`.
    ///
    /// # Errors
    ///
    /// When the guest's image is refused.
    pub fn on_switch(
        accel: Wanted,
        name: &str,
        socket: &Path,
        command_line: &str,
    ) -> Result<Guest> {
        let guest = Guest::new(accel, name, command_line)?;
        let builder = guest.builder.net(NetConfig::socket(socket).name("net"));
        Ok(Guest { builder, ..guest })
    }

    fn new(accel: Wanted, name: &str, command_line: &str) -> Result<Guest> {
        let image = Image::from_bytes(guest_images::HTTP).context("the guest is refused")?;
        let heard = Arc::new(Mutex::new(Heard::default()));
        let (ready, measured, logged) = (heard.clone(), heard.clone(), heard.clone());
        let shown = name.to_owned();
        let builder = VmBuilder::new(image)
            .memory(MEMORY)
            .cmdline(command_line)
            .boot_deadline(BOOT_DEADLINE)
            .call(READY_CALL, move |call| {
                let [files, bytes, ..] = call.args();
                lock(&ready).ready = Some((files, bytes));
                call.finish(Ok(0));
            })
            .call(MEASURED_CALL, move |call| {
                let [bytes, nanoseconds, ..] = call.args();
                lock(&measured).measured = Some(Measured { bytes, nanoseconds });
                call.finish(Ok(0));
            })
            .log(move |level, line| {
                // The guest may be anybody's: nothing it says reaches the terminal unescaped.
                let line = line.trim_end().escape_debug().to_string();
                say(format_args!("{shown}: {line}"));
                if level == LogLevel::Error {
                    lock(&logged).complaint = Some(line);
                }
            });
        Ok(Guest {
            builder: accel.set(builder),
            heard,
            name: name.into(),
        })
    }

    /// Starts it.
    ///
    /// # Errors
    ///
    /// When the VM cannot be built.
    pub fn run(self) -> Result<Running> {
        let vm = self.builder.build().context("cannot build the VM")?;
        let accel = vm.accel().to_string();
        let handle = vm.run().context("cannot start the VM")?;
        Ok(Running {
            handle,
            heard: self.heard,
            name: self.name,
            accel,
        })
    }
}

impl Running {
    /// What runs it.
    pub fn accel(&self) -> &str {
        &self.accel
    }

    /// Waits until the guest says that it is ready: what it serves, in files and bytes.
    ///
    /// # Errors
    ///
    /// When it ends, takes too long, or Ctrl-C comes.
    pub fn wait_ready(&mut self, limit: Duration) -> Result<(u64, u64)> {
        self.wait_for(limit, |heard| heard.ready)
    }

    /// Waits until the guest has measured.
    ///
    /// # Errors
    ///
    /// As [`wait_ready`](Self::wait_ready).
    pub fn wait_measured(&mut self, limit: Duration) -> Result<Measured> {
        self.wait_for(limit, |heard| heard.measured)
    }

    fn wait_for<T>(&mut self, limit: Duration, said: impl Fn(&Heard) -> Option<T>) -> Result<T> {
        let start = Instant::now();
        loop {
            if let Some(value) = said(&lock(&self.heard)) {
                return Ok(value);
            }
            interrupt::check()?;
            if let Some(reason) = self.handle.wait_timeout(Duration::from_millis(2)) {
                // It may have said so with its last breath.
                return match said(&lock(&self.heard)) {
                    Some(value) => Ok(value),
                    None => Err(self.ended(&reason)),
                };
            }
            if start.elapsed() > limit {
                bail!("the {} took more than {} s", self.name, limit.as_secs());
            }
        }
    }

    /// Waits for Ctrl-C, or for the guest to end, which it should not.
    ///
    /// # Errors
    ///
    /// Always: interrupted, or what the guest ended with.
    pub fn wait_until_interrupted(&mut self) -> Result<()> {
        loop {
            if let Some(reason) = self.handle.wait_timeout(INTERRUPT_CHECK) {
                return Err(self.ended(&reason));
            }
            interrupt::check()?;
        }
    }

    /// Whether the guest still runs.
    ///
    /// # Errors
    ///
    /// What it ended with.
    pub fn check(&mut self) -> Result<()> {
        match self.handle.wait_timeout(Duration::ZERO) {
            Some(reason) => Err(self.ended(&reason)),
            None => Ok(()),
        }
    }

    /// Stops it.
    pub fn stop(&self) {
        self.handle.stop();
    }

    fn ended(&self, reason: &ExitReason) -> anyhow::Error {
        let name = &self.name;
        match lock(&self.heard).complaint.take() {
            Some(complaint) => anyhow::anyhow!("the {name} {reason}: {complaint}"),
            None => anyhow::anyhow!("the {name} ended before its time: {reason}"),
        }
    }
}

fn lock(heard: &Mutex<Heard>) -> MutexGuard<'_, Heard> {
    heard.lock().unwrap_or_else(PoisonError::into_inner)
}
