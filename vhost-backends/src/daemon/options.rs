//! The part of the command line that all daemons share.

use crate::sandbox::{Sandbox, SandboxMode, SeccompMode};
use clap::Args;
use std::os::fd::RawFd;
use std::path::PathBuf;

/// How a device is reached.
#[derive(Args, Clone, Debug)]
#[group(multiple = false)]
pub(crate) struct SocketArgs {
    /// Make and listen on this socket.
    #[arg(long, value_name = "PATH")]
    pub(crate) socket_path: Option<PathBuf>,
    /// Use this inherited socket, listening or connected.
    #[arg(long, value_name = "FD", value_parser = clap::value_parser!(i32).range(0..))]
    pub(crate) fd: Option<RawFd>,
}

impl SocketArgs {
    pub(crate) fn is_given(&self) -> bool {
        self.fd.is_some() || self.socket_path.is_some()
    }
}

/// How the daemon is run.
#[derive(Args, Debug)]
pub(crate) struct Operation {
    /// Answer GET /metrics (Prometheus) and GET /stats (JSON) here, over HTTP.
    #[arg(long, value_name = "PATH")]
    pub(crate) stats_socket: Option<PathBuf>,
    /// The same, and requests that change something, for this user alone.
    #[arg(long, value_name = "PATH")]
    pub(crate) control_socket: Option<PathBuf>,
    /// Take over what a running daemon serves, through its control socket, and end it.
    #[arg(long, value_name = "PATH")]
    pub(crate) take_over: Option<PathBuf>,
    /// Confinement once everything is open: namespaces, capabilities, no_new_privs, Landlock.
    #[arg(long, value_enum, value_name = "MODE", default_value_t)]
    sandbox: SandboxMode,
    /// System calls that serving does not need: end the process, or only log them.
    #[arg(long, value_enum, value_name = "MODE", default_value_t)]
    seccomp: SeccompMode,
    /// Try what the sandbox must refuse, print what happened, and exit.
    #[arg(long)]
    pub(crate) self_test: bool,
    /// Log what is in force and who connects, not only what goes wrong.
    #[arg(long, short)]
    pub(crate) verbose: bool,
    /// Print what this program can do, as JSON, and exit.
    #[arg(long, exclusive = true)]
    pub(crate) print_capabilities: bool,
}

impl Operation {
    pub(crate) fn sandbox(&self) -> Sandbox {
        Sandbox {
            mode: self.sandbox,
            seccomp: self.seccomp,
        }
    }
}
