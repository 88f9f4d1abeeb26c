//! Accels: what carries a guest's instructions out.
//!
//! An accel turns the address map into something that runs, and each vCPU into a value whose
//! [`Vcpu::run`] returns when the guest wants something. Everything above this seam is the same on
//! all of them.

pub(crate) mod host;
pub(crate) mod kvm;
pub(crate) mod process;

pub use host::HostFeature;

use crate::fault::{GuestFault, Violation};
use crate::memory::GuestMemory;
use crate::memory::map::AddressMap;
use crate::vm::events::EventTable;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Instant;

/// Which accel runs a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Accel {
    /// `/dev/kvm`, hardware or pagetable-based.
    Kvm,
    /// A confined process; works without `/dev/kvm`.
    Process,
}

/// No accel of this kind can be used here.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AccelError {
    /// `/dev/kvm` is absent or may not be opened.
    #[error(
        "cannot use /dev/kvm: load the kvm module, join the kvm group, or use the process accel"
    )]
    NoKvm {
        /// Why.
        source: io::Error,
    },
    /// KVM lacks something this library needs.
    #[error("/dev/kvm lacks {what}; a kernel of 6.1 or later has it, or use the process accel")]
    KvmLacks {
        /// What.
        what: &'static str,
    },
    /// The host lacks something that this accel needs, or keeps this program from it.
    #[error("the {accel} accel cannot be used: this host lacks {feature}; {advice}")]
    HostLacks {
        /// Who needs it.
        accel: Accel,
        /// What.
        feature: HostFeature,
        /// What to do about it.
        advice: String,
        /// What the host said, where it says anything.
        source: Option<io::Error>,
    },
    /// A host call failed while the VM was made.
    #[error("cannot make the VM: {step}")]
    Host {
        /// What was being done.
        step: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The confined process could not be set up.
    #[error("cannot set up the sandboxed process: {0}")]
    Sandbox(String),
    /// Not the name of an accel.
    #[error("no accel is called {0:?}; there are kvm, process and auto")]
    UnknownName(String),
}

impl AccelError {
    pub(crate) fn host(step: &'static str) -> impl FnOnce(io::Error) -> AccelError {
        move |source| AccelError::Host { step, source }
    }
}

impl Accel {
    /// The best accel that works here: kvm where it [can be used](Accel::check), process otherwise.
    pub fn auto() -> Accel {
        if Accel::Kvm.check().is_ok() {
            Accel::Kvm
        } else {
            Accel::Process
        }
    }

    /// Whether this accel can be used here; [`VmBuilder::build`](crate::VmBuilder::build) asks too.
    ///
    /// # Errors
    /// The reason why not, with what to do about it.
    pub fn check(self) -> Result<(), AccelError> {
        if self == Accel::Kvm {
            kvm::check()?;
        }
        host::check(self)
    }

    /// `kvm`, `process`, or `auto` for [`Accel::auto`].
    ///
    /// # Errors
    /// [`AccelError::UnknownName`] for anything else.
    pub fn from_name(name: &str) -> Result<Accel, AccelError> {
        match name {
            "kvm" => Ok(Accel::Kvm),
            "process" => Ok(Accel::Process),
            "auto" => Ok(Accel::auto()),
            other => Err(AccelError::UnknownName(other.to_owned())),
        }
    }

    /// The name that [`Accel::from_name`] takes.
    pub fn name(self) -> &'static str {
        match self {
            Accel::Kvm => "kvm",
            Accel::Process => "process",
        }
    }

    /// The signal that makes a vCPU thread leave the guest, if that is how this accel does it.
    pub(crate) fn kick_signal(self) -> Option<libc::c_int> {
        match self {
            Accel::Kvm => Some(kvm::kick_signal()),
            Accel::Process => None,
        }
    }

    /// Most vCPUs that a VM can have here.
    pub(crate) fn max_vcpus(self) -> Result<u32, AccelError> {
        let most = pv_abi::limits::MAX_VCPUS;
        match self {
            Accel::Kvm => Ok(kvm::max_vcpus()?.min(most)),
            Accel::Process => Ok(most),
        }
    }

    /// The number in the boot block.
    pub(crate) fn abi_code(self) -> u32 {
        match self {
            Accel::Kvm => pv_abi::boot::accel::KVM,
            Accel::Process => pv_abi::boot::accel::PROCESS,
        }
    }
}

impl std::fmt::Display for Accel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Accel {
    type Err = AccelError;

    fn from_str(name: &str) -> Result<Accel, AccelError> {
        Accel::from_name(name)
    }
}

/// The layers that confine a guest, as they are in force.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SandboxReport {
    /// Layers in force, outermost first.
    pub layers: Vec<String>,
    /// Layers that this host does not have, with the reason.
    pub missing: Vec<String>,
    /// The guest's process was one of [`Spares`](crate::Spares): started and confined before the VM was
    /// built. It changes no layer.
    pub spare: bool,
    /// What the sum of it is worth, in one sentence.
    pub claim: &'static str,
}

/// Why a vCPU left the guest.
#[derive(Debug)]
pub(crate) enum VcpuExit {
    /// The `call` slot, with this frame index.
    Call(u32),
    /// The `idle` slot; the accel has waited already.
    Idle,
    /// A doorbell that no ioeventfd answered.
    Doorbell(u32),
    /// The `exit` slot.
    Exit(u32),
    /// A CPU fault.
    Fault(Box<GuestFault>),
    /// A rule was broken.
    Violation(Violation),
    /// Kicked: look at what the VM wants.
    Interrupted,
    /// The guest is gone; someone else has recorded why.
    Gone,
}

/// Registers at a vCPU's first instruction; all others are zero.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct StartState {
    pub(crate) rip: u64,
    pub(crate) rsp: u64,
    pub(crate) rdi: u64,
    pub(crate) rsi: u64,
}

/// One vCPU, driven by the thread that owns it.
pub(crate) trait Vcpu: Send {
    /// Sets the registers with which the first [`Vcpu::run`] enters the guest.
    fn start(&mut self, state: &StartState) -> io::Result<()>;
    /// Runs the guest until it wants something. The call before it has been answered in memory.
    fn run(&mut self) -> io::Result<VcpuExit>;
}

/// What an accel tells the VM about its guest from outside the vCPU threads.
pub(crate) trait Reporter: Send + Sync {
    fn fault(&self, fault: Box<GuestFault>);
    fn violation(&self, violation: Violation);
    fn host_error(&self, error: io::Error);
}

/// One VM on one accel.
pub(crate) trait AccelVm: Send + Sync {
    /// Lets the first vCPU go from the calling thread, where the accel can: the guest and the thread
    /// that serves it then wake up side by side. Its [`Vcpu::start`] comes after this, and knows.
    fn start_first(&self, _state: &StartState) -> io::Result<()> {
        Ok(())
    }
    /// Answers this doorbell without a VMM exit from now on. Not all accels need to.
    fn watch_doorbell(&self, doorbell: u32) -> io::Result<()>;
    /// Lets this vCPU's `idle` return on this event from now on, or no longer.
    fn wait_for(&self, vcpu: u32, event: u32, on: bool) -> io::Result<()>;
    /// Keeps the guest from executing, where the vCPU threads alone cannot. `true`: it has.
    fn freeze(&self) -> io::Result<bool>;
    /// Lets the guest execute again.
    fn thaw(&self) -> io::Result<()>;
    /// Waits until what the accel started is gone, after [`AccelVm::kill`]. `false`: not in time.
    fn wait_dead(&self, deadline: Option<Instant>) -> bool;
    /// Ends the guest's execution for good; vCPUs return `Gone` or `Interrupted`.
    fn kill(&self);
    /// Whether the guest's TSC is the host's, without an offset.
    fn shows_host_tsc(&self) -> bool;
    fn sandbox_report(&self) -> SandboxReport;
}

/// Makes the first vCPU, on the thread that is going to run it; `None` if that failed, which it has
/// told whoever sent it.
pub(crate) type MakeVcpu = Box<dyn FnOnce() -> Option<Box<dyn Vcpu>> + Send>;

/// Starts the first vCPU's thread. Which moment is the best for it is the accel's to know.
pub(crate) type StartFirst = Box<dyn FnOnce() -> io::Result<Sender<MakeVcpu>>>;

/// What an accel is made from.
pub(crate) struct AccelInput {
    pub(crate) vcpus: u32,
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) map: Arc<AddressMap>,
    pub(crate) events: Arc<EventTable>,
    /// Starts the first vCPU's thread, which then waits for what makes its vCPU.
    pub(crate) first: StartFirst,
}

/// A VM and its vCPUs but the first, in order of their indices.
pub(crate) type Parts = (Arc<dyn AccelVm>, Vec<Box<dyn Vcpu>>);
