//! Confinement of a backend's process, entered once everything it needs is open.
//!
//! In comes what the operator wants; out goes a report of what is in force. The process must have
//! one thread; those that it starts later inherit everything.
//!
//! | layer | takes away |
//! |---|---|
//! | namespaces (user, net, ipc, uts) | the host's network, IPC objects and name |
//! | capabilities, bounding set included | root's privileges, and getting any back by an exec |
//! | no_new_privs | setuid programs |
//! | Landlock | every path, every TCP port, abstract sockets and signals to others |
//! | seccomp | every system call that serving does not make |
//!
//! No path is left open: what is served was opened before. Descriptors keep the rights that they
//! were opened with. A layer that the host does not have is reported; `strict` makes it an error.

mod filter;
mod paths;
mod privileges;
mod probe;

pub(crate) use filter::{confine_connector, confine_remover};
pub(crate) use paths::allow_removal;
pub use probe::{Outcome, Probe, probe_all};

use std::fmt;
use std::io;

/// Which layers other than the system-call filter to enter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum SandboxMode {
    /// None of them.
    None,
    /// Every layer that the host has.
    #[default]
    Auto,
    /// Every layer, or do not start.
    Strict,
}

/// What the system-call filter does about a call that is not on its list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum SeccompMode {
    /// There is no filter.
    None,
    /// End the process.
    #[default]
    Kill,
    /// Let it pass and tell the kernel's log.
    Log,
}

/// What confinement is wanted. The default is all that the host has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sandbox {
    /// Namespaces, capabilities and paths.
    pub mode: SandboxMode,
    /// The system-call filter.
    pub seccomp: SeccompMode,
}

/// Why the sandbox was not entered. The process may have lost privileges already.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// More than one thread; the others would stay outside.
    #[error("the process has {0} threads; it must have one")]
    Threads(usize),
    /// A layer was refused although the host has it, or `strict` wants one that is missing.
    #[error("{layer}: {reason}")]
    Layer {
        /// Which layer.
        layer: &'static str,
        /// Why.
        reason: String,
    },
}

/// One layer, and whether it is in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    /// Its name.
    pub name: &'static str,
    /// What is in force, or why nothing is.
    pub state: Result<String, String>,
}

/// What is in force.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Layer by layer, in the order in which they were entered.
    pub layers: Vec<Layer>,
}

impl Report {
    /// Layers that were wanted and are not in force.
    pub fn missing(&self) -> impl Iterator<Item = &Layer> {
        self.layers.iter().filter(|layer| layer.state.is_err())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.layers.is_empty() {
            return f.write_str("nothing is in force");
        }
        for (n, layer) in self.layers.iter().enumerate() {
            let gap = if n == 0 { "" } else { "; " };
            match &layer.state {
                Ok(detail) => write!(f, "{gap}{}: {detail}", layer.name)?,
                Err(reason) => write!(f, "{gap}{}: MISSING ({reason})", layer.name)?,
            }
        }
        Ok(())
    }
}

impl Sandbox {
    /// No confinement at all.
    pub fn none() -> Sandbox {
        Sandbox {
            mode: SandboxMode::None,
            seccomp: SeccompMode::None,
        }
    }

    /// Confines this process for good. Call it once all files and sockets are open.
    pub fn enter(&self) -> Result<Report, SandboxError> {
        let mut report = Report::default();
        if *self == Sandbox::none() {
            return Ok(report);
        }
        let threads = threads().unwrap_or(1);
        if threads != 1 {
            return Err(SandboxError::Threads(threads));
        }
        // Before anything is refused: sets up what the C library would look up on the disk later.
        privileges::settle_allocator();
        if self.mode != SandboxMode::None {
            self.add(&mut report, "namespaces", privileges::unshare())?;
            self.add(&mut report, "capabilities", privileges::drop_all())?;
            let no_new_privs = privileges::no_new_privs().map_err(|error| error.to_string());
            self.add(&mut report, "no_new_privs", no_new_privs)?;
            self.add(&mut report, "landlock", paths::deny_all())?;
        }
        if self.seccomp != SeccompMode::None {
            // A host without it is not known; a failure is worth stopping for.
            let state = filter::install(self.seccomp).map_err(|reason| SandboxError::Layer {
                layer: "seccomp",
                reason,
            })?;
            self.add(&mut report, "seccomp", Ok(state))?;
        }
        Ok(report)
    }

    fn add(
        &self,
        report: &mut Report,
        name: &'static str,
        state: Result<String, String>,
    ) -> Result<(), SandboxError> {
        match state {
            Err(reason) if self.mode == SandboxMode::Strict => Err(SandboxError::Layer {
                layer: name,
                reason,
            }),
            state => {
                report.layers.push(Layer { name, state });
                Ok(())
            }
        }
    }
}

/// Threads of this process; an error where there is no `/proc`.
fn threads() -> io::Result<usize> {
    Ok(std::fs::read_dir("/proc/self/task")?.count())
}
