//! A running VM, as its embedder holds it.

use super::built::Vm;
use super::shared::Shared;
use super::stats::Stats;
use super::threads;
use super::turns::Turns;
use crate::accel::{Accel, AccelVm, Reporter, SandboxReport, StartState};
use crate::device::console::Input;
use crate::device::local::LocalThread;
use crate::device::vhost_user::Link;
use crate::fault::{ExitReason, Violation};
use crate::limits::{BOOT_LOOK, VCPU_KICK_TIMEOUT};
use crate::memory::MemoryReport;
use crate::own_thread;
use pv_abi::device::DeviceState;
use pv_abi::layout::BOOT_BLOCK_BASE;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// What can go wrong with a running VM's controls.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VmError {
    /// The VM has ended already.
    #[error("the VM has ended: {0}")]
    Ended(ExitReason),
    /// A vCPU did not leave the guest in time.
    #[error("a vCPU did not leave the guest within {0:?}")]
    Timeout(Duration),
    /// No such device.
    #[error("the VM has no {0}")]
    NoDevice(&'static str),
    /// The VM belongs to the process that this one was forked from.
    #[error("the VM is not this process's")]
    OtherProcess(#[source] io::Error),
    /// A host call failed.
    #[error("the host could not do it")]
    Host(#[from] io::Error),
}

/// A running VM. Dropping it stops the VM and waits until nothing of it is left.
///
/// In a process that the embedder has forked, dropping or stopping the copy does nothing; what can
/// fail fails with [`VmError::OtherProcess`], the end is a host error that says so, and reports are of
/// what is known without guest memory.
///
/// All methods may be called from any thread. [`AsFd`] gives a descriptor that polls readable once
/// the VM has ended.
pub struct VmHandle {
    shared: Arc<Shared>,
    accel: Accel,
    input: Option<Arc<Input>>,
    pausing: Mutex<()>,
    /// The thread that looks after the boot deadline.
    boot: Option<JoinHandle<()>>,
    // Dropped in this order: backends are drained while the in-process loop still runs.
    links: Vec<Link>,
    local: LocalThread,
}

impl std::fmt::Debug for VmHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VmHandle")
            .field("accel", &self.accel)
            .field("exit", &self.exit())
            .finish_non_exhaustive()
    }
}

impl VmHandle {
    pub(super) fn start(vm: Vm) -> Result<VmHandle, VmError> {
        own(&vm.shared)?;
        let Vm {
            mut guard,
            shared,
            vcpus,
            links,
            local,
            late,
            input,
            accel,
            entry,
            boot_deadline,
        } = vm;
        let mut handle = VmHandle {
            shared,
            accel,
            input,
            pausing: Mutex::default(),
            boot: None,
            links,
            local,
        };
        // The handle ends it from here on.
        guard.0 = None;
        let shared = &handle.shared;
        let stack = shared.map.stack_tops.first().copied().unwrap_or(0);
        let state = StartState {
            rip: entry,
            rsp: stack.wrapping_sub(8),
            rdi: BOOT_BLOCK_BASE,
            rsi: 0,
        };
        if let Some(accel) = shared.accel.get() {
            accel.start_first(&state)?;
        }
        shared.turns.start(0, state);
        threads::start_others(shared, vcpus)?;
        if let Some(deadline) = boot_deadline {
            handle.boot = Some(watch_boot(shared, deadline)?);
        }
        if let Some(starter) = late {
            handle.local.start(starter)?;
        }
        Ok(handle)
    }

    /// The accel it runs on.
    pub fn accel(&self) -> Accel {
        self.accel
    }

    /// Halts all vCPUs; when this returns, none of them executes or is being served.
    ///
    /// A call that the embedder has not answered yet stays unanswered until [`VmHandle::resume`].
    /// Pausing a paused VM does nothing.
    ///
    /// # Errors
    /// [`VmError::Ended`] if it has ended, [`VmError::Timeout`] if a vCPU does not react; it runs on
    /// then.
    pub fn pause(&self) -> Result<(), VmError> {
        let shared = &self.shared;
        own(shared)?;
        let _span = tracing::debug_span!(parent: &shared.span, "pause").entered();
        let _one = self.pausing.lock().unwrap_or_else(PoisonError::into_inner);
        let accel = shared.accel.get();
        shared.turns.want_pause();
        let frozen = accel.map_or(Ok(false), |a| a.freeze());
        let halted = match frozen {
            Ok(frozen) => shared.wait_halted(frozen, Instant::now() + VCPU_KICK_TIMEOUT),
            Err(_) => false,
        };
        if let Some(reason) = shared.reason() {
            return Err(VmError::Ended(reason));
        }
        if halted {
            return Ok(());
        }
        shared.turns.resume();
        accel.map_or(Ok(()), |a| a.thaw())?;
        frozen?;
        Err(VmError::Timeout(VCPU_KICK_TIMEOUT))
    }

    /// Lets the vCPUs go on.
    ///
    /// # Errors
    /// [`VmError::Ended`] if it has ended.
    pub fn resume(&self) -> Result<(), VmError> {
        own(&self.shared)?;
        let _one = self.pausing.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(reason) = self.shared.reason() {
            return Err(VmError::Ended(reason));
        }
        self.shared.turns.resume();
        self.shared.accel.get().map_or(Ok(()), |a| a.thaw())?;
        Ok(())
    }

    /// Ends the VM with [`ExitReason::Stopped`], unless it has ended already.
    ///
    /// Does not wait; backends are told to hang up, so that nothing waits for them either.
    pub fn stop(&self) {
        if !self.shared.owner.is_here() {
            return;
        }
        self.shared.finish(ExitReason::Stopped);
        for link in &self.links {
            link.stop();
        }
    }

    /// Waits until the VM has ended and nothing of the guest runs any more.
    ///
    /// Not to be called, and the handle not to be dropped, inside a handler of the VM's own: it
    /// would wait for itself.
    pub fn wait(&self) -> ExitReason {
        loop {
            if let Some(reason) = self.wait_until(None) {
                return reason;
            }
        }
    }

    /// Waits at most so long; `None` if the VM still runs then.
    pub fn wait_timeout(&self, limit: Duration) -> Option<ExitReason> {
        // A limit past the end of time is none.
        self.wait_until(Instant::now().checked_add(limit))
    }

    fn wait_until(&self, limit: Option<Instant>) -> Option<ExitReason> {
        if let Some(reason) = self.elsewhere() {
            return Some(reason);
        }
        let dead = |accel: &Arc<dyn AccelVm>| accel.wait_dead(limit);
        if !self.shared.wait_done(limit) || !self.shared.accel.get().is_none_or(dead) {
            return None;
        }
        if self.shared.reason().is_none() {
            // Every thread is done, so nothing else will ever say why.
            let error = io::Error::other("the vCPU threads ended");
            self.shared.host_error(error);
        }
        self.shared.reason()
    }

    /// Why it has ended; `None` while it runs.
    pub fn exit(&self) -> Option<ExitReason> {
        self.elsewhere().or_else(|| self.shared.reason())
    }

    /// What is said of the VM where it is not; whatever is locked there stays so for ever.
    fn elsewhere(&self) -> Option<ExitReason> {
        let owner = self.shared.owner;
        (!owner.is_here()).then(|| ExitReason::Host(Arc::new(owner.elsewhere())))
    }

    /// Exact counters.
    pub fn stats(&self) -> Stats {
        self.shared.stats()
    }

    /// What was asked for and achieved for private RAM.
    pub fn memory_report(&self) -> MemoryReport {
        self.shared.memory.report(self.shared.owner.is_here())
    }

    /// The layers that confine this guest.
    pub fn sandbox_report(&self) -> SandboxReport {
        self.shared
            .accel
            .get()
            .map_or_else(SandboxReport::default, |a| a.sandbox_report())
    }

    /// Input for the guest's console; returns how many bytes there was room for.
    ///
    /// # Errors
    /// [`VmError::NoDevice`] if the VM was built without a console.
    pub fn console_input(&self, bytes: &[u8]) -> Result<usize, VmError> {
        own(&self.shared)?;
        let input = self.input.as_ref().ok_or(VmError::NoDevice("console"))?;
        Ok(input.push(bytes)?)
    }

    /// State of the device with this index, as the guest sees it; `None` if there is none.
    pub fn device_state(&self, index: usize) -> Option<DeviceState> {
        own(&self.shared).ok()?;
        Some(self.shared.devices.get(index)?.state())
    }

    /// Takes the link of the network card at this index of the device table up or down.
    ///
    /// The guest is told, as by a cable that is pulled. What a guest that does not care sends goes
    /// on to the backend all the same; to cut it off, have the backend's link taken down. The link
    /// is up where both say so.
    ///
    /// # Errors
    /// [`VmError::NoDevice`] if there is no network card at this index.
    pub fn set_link(&self, index: usize, up: bool) -> Result<(), VmError> {
        own(&self.shared)?;
        match self.shared.devices.get(index).map(|d| d.set_link(up)) {
            Some(Ok(true)) => Ok(()),
            Some(Err(error)) => Err(error.into()),
            Some(Ok(false)) | None => Err(VmError::NoDevice("network card there")),
        }
    }

    /// Process IDs of the supervised backends, in the order of the devices that have a vhost-user
    /// backend; 0 for one that is no process of the VMM's, or not there now.
    pub fn backend_pids(&self) -> Vec<u32> {
        self.links.iter().map(Link::pid).collect()
    }

    /// Device and inode of each arena's file, in the order of the arenas.
    pub fn arena_files(&self) -> Vec<(u64, u64)> {
        use std::os::unix::fs::MetadataExt;
        let arenas = self.shared.memory.arenas.iter();
        arenas
            .filter_map(|a| a.region.file()?.metadata().ok())
            .map(|m| (m.dev(), m.ino()))
            .collect()
    }

    /// Copies bytes out of private RAM; for debuggers and tests. The guest may be changing them.
    ///
    /// # Errors
    /// [`VmError::Host`] if the range is not private RAM.
    pub fn read_private(&self, gpa: u64, buffer: &mut [u8]) -> Result<(), VmError> {
        own(&self.shared)?;
        let outside = || io::Error::other("not in private RAM");
        let found = self.shared.memory.private(gpa, buffer.len() as u64);
        let (region, offset) = found.ok_or_else(outside)?;
        Ok(region.read_bytes(offset, buffer)?)
    }
}

impl AsFd for VmHandle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        use std::os::fd::AsRawFd;
        // The eventfd lives as long as the handle does.
        borrowed(self.shared.exited.as_raw_fd(), self)
    }
}

impl Drop for VmHandle {
    fn drop(&mut self) {
        if !self.shared.owner.is_here() {
            std::mem::forget((Arc::clone(&self.shared), self.boot.take()));
            return;
        }
        self.stop();
        self.wait_until(None);
        threads::join(&self.shared);
        if let Some(boot) = self.boot.take() {
            let _ = boot.join();
        }
        for slot in &self.shared.devices {
            slot.shut_down();
        }
    }
}

/// An error in a process that does not have the VM.
fn own(shared: &Shared) -> Result<(), VmError> {
    let owner = shared.owner;
    let elsewhere = || VmError::OtherProcess(owner.elsewhere());
    owner.is_here().then_some(()).ok_or_else(elsewhere)
}

/// Ends the VM if nothing has been negotiated by the deadline, which does not go on while it is paused.
///
/// The thread ends with the VM, if not before.
fn watch_boot(shared: &Arc<Shared>, deadline: Duration) -> io::Result<JoinHandle<()>> {
    let shared = Arc::clone(shared);
    let watch = move || {
        let _vm = shared.span.enter();
        let mut left = deadline;
        loop {
            let (since, paused) = (Instant::now(), shared.turns.pause_wanted());
            let news = |turns: &Turns| turns.stopped() || turns.pause_wanted() != paused;
            shared.turns.wait_for(news, Some(left.min(BOOT_LOOK)));
            if shared.negotiated.load(Ordering::Acquire) || shared.turns.stopped() {
                return;
            }
            if !paused {
                left = left.saturating_sub(since.elapsed());
            }
            if left.is_zero() {
                let deadline_ms = u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX);
                let violation = Violation::NeverStarted { deadline_ms };
                return shared.finish(ExitReason::Violation(violation));
            }
        }
    };
    own_thread::start("pv-boot", watch)
}

/// A descriptor borrowed for as long as its owner is.
#[allow(unsafe_code)]
fn borrowed<T>(fd: std::os::fd::RawFd, _owner: &T) -> BorrowedFd<'_> {
    // SAFETY: the owner holds the eventfd open for the lifetime of the borrow.
    unsafe { BorrowedFd::borrow_raw(fd) }
}
