//! Virtual machines: built, run, paused, stopped, waited for.
//!
//! [`VmBuilder`] collects what is wanted, [`Vm`] is built and has not run, [`VmHandle`] is running.
//! Each vCPU has a thread of the library's own ([`vcpu`]); calls are carried out on it
//! ([`dispatch`]).

mod builder;
mod built;
pub(crate) mod calls;
pub(crate) mod clock;
mod contents;
mod dispatch;
pub(crate) mod events;
mod handle;
mod shared;
pub(crate) mod stats;
mod threads;
mod turns;
mod vcpu;
mod wanted;

pub use builder::{BuildError, VmBuilder};
pub use built::Vm;
pub use calls::{Call, Refusal, RegistryError};
pub use handle::{VmError, VmHandle};
pub use stats::{ExitCounts, Stats};

use crate::fault::PeerLost;

/// What happened to a VM that its embedder may want to know at once.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum VmEvent {
    /// A device's backend is gone; it is being brought back.
    BackendLost(PeerLost),
    /// A device's backend is there again.
    BackendReconnected {
        /// Index of the device.
        device: u32,
    },
}

/// The level of a guest's log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs)]
pub enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

impl LogLevel {
    pub(crate) fn from_code(code: u64) -> Option<LogLevel> {
        [
            LogLevel::Error,
            LogLevel::Warn,
            LogLevel::Info,
            LogLevel::Debug,
            LogLevel::Trace,
        ]
        .get(usize::try_from(code).ok()?.checked_sub(1)?)
        .copied()
    }
}
