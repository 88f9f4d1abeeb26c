//! A VM between `build` and `run`.

use super::handle::{VmError, VmHandle};
use super::shared::Shared;
use super::threads;
use crate::accel::{Accel, Vcpu};
use crate::device::console::Input;
use crate::device::local::{LocalThread, Starter};
use crate::device::vhost_user::Link;
use crate::fault::ExitReason;
use std::sync::Arc;
use std::time::Duration;

/// Ends a VM that nobody has run.
pub(super) struct EndUnlessRun(pub(super) Option<Arc<Shared>>);

impl Drop for EndUnlessRun {
    fn drop(&mut self) {
        if let Some(shared) = self.0.take() {
            if !shared.owner.is_here() {
                // Nor is anything of it let go of: it would be unmapped, and it is not mapped.
                return std::mem::forget(shared);
            }
            shared.finish(ExitReason::Stopped);
            threads::join(&shared);
            for slot in &shared.devices {
                slot.shut_down();
            }
        }
    }
}

/// A VM that has been built and has not run.
pub struct Vm {
    pub(super) guard: EndUnlessRun,
    pub(super) shared: Arc<Shared>,
    pub(super) vcpus: Vec<Box<dyn Vcpu>>,
    pub(super) links: Vec<Link>,
    pub(super) local: LocalThread,
    /// Starts `local` where that can wait until the vCPUs run.
    pub(super) late: Option<Starter>,
    pub(super) input: Option<Arc<Input>>,
    pub(super) accel: Accel,
    pub(super) entry: u64,
    pub(super) boot_deadline: Option<Duration>,
}

impl std::fmt::Debug for Vm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vm")
            .field("accel", &self.accel)
            .finish_non_exhaustive()
    }
}

impl Vm {
    /// The accel it will run on.
    pub fn accel(&self) -> Accel {
        self.accel
    }

    /// Starts the first vCPU.
    ///
    /// # Errors
    /// [`VmError::Host`] when a thread cannot be started, [`VmError::OtherProcess`] in a process that
    /// the one with the VM has forked.
    pub fn run(self) -> Result<VmHandle, VmError> {
        VmHandle::start(self)
    }
}
