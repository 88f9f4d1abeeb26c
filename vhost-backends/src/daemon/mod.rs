//! `pv-blkd`: a block device for any VMM, behind a socket
//! (vhost-user: backend program conventions).
//!
//! In comes a command line; out goes an exit code. Errors of the user are one sentence on
//! standard error.

mod listen;
mod remover;
mod signals;

use crate::block::{BlockDevice, BlockOptions};
use crate::engine::{FileOptions, RawFile};
use crate::limits::MAX_QUEUES;
use crate::sandbox::{Outcome, Sandbox, SandboxMode, SeccompMode, probe_all};
use crate::session::{Server, SessionEnd};
use clap::{Args, Parser};
use listen::Socket;
use remover::Remover;
use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

/// Serves a disk image as a vhost-user block device.
#[derive(Debug, Parser)]
#[command(
    name = "pv-blkd",
    version,
    after_help = "\
Listens on --socket-path and serves one VMM after the other until SIGTERM. With --fd, a listening \
socket is used the same way; a connected one is served until its peer hangs up."
)]
struct Cli {
    #[command(flatten)]
    socket: SocketArgs,
    /// The disk image: a raw file or a block device.
    #[arg(
        long,
        value_name = "PATH",
        required_unless_present_any = ["print_capabilities", "self_test"]
    )]
    blk_file: Option<PathBuf>,
    /// Refuse writes, and tell the guest so.
    #[arg(long)]
    read_only: bool,
    /// Past the host's page cache (O_DIRECT).
    #[arg(long)]
    direct: bool,
    /// Queues, each with a thread of its own.
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_QUEUES)))]
    num_queues: u16,
    /// Confinement once everything is open: namespaces, capabilities, no_new_privs, Landlock.
    #[arg(long, value_enum, value_name = "MODE", default_value_t)]
    sandbox: SandboxMode,
    /// System calls that serving does not need: end the process, or only log them.
    #[arg(long, value_enum, value_name = "MODE", default_value_t)]
    seccomp: SeccompMode,
    /// Try what the sandbox must refuse, print what happened, and exit.
    #[arg(long)]
    self_test: bool,
    /// Log what is in force and who connects, not only what goes wrong.
    #[arg(long, short)]
    verbose: bool,
    /// Print what this program can do, as JSON, and exit.
    #[arg(long, exclusive = true)]
    print_capabilities: bool,
}

#[derive(Args, Debug)]
#[group(multiple = false)]
struct SocketArgs {
    /// Make and listen on this socket.
    #[arg(long, value_name = "PATH")]
    socket_path: Option<PathBuf>,
    /// Use this inherited socket, listening or connected.
    #[arg(long, value_name = "FD", value_parser = clap::value_parser!(i32).range(0..))]
    fd: Option<RawFd>,
}

/// Runs `pv-blkd` with this command line, the program's name first. Takes the calling thread,
/// and the process's SIGTERM and SIGINT, until the end.
///
/// A program that embeds this calls it as early as possible, while it has one thread.
pub fn pv_blkd_main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are no errors, and go to standard output.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    if cli.print_capabilities {
        println!("{}", capabilities());
        return ExitCode::SUCCESS;
    }
    let level = if cli.verbose {
        tracing::Level::INFO
    } else {
        tracing::Level::WARN
    };
    // An embedding program may have a subscriber already; then that one is used.
    let _ = tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_max_level(level)
        .without_time()
        .try_init();
    // The default hook may read debug information, for which there are no paths in the sandbox.
    std::panic::set_hook(Box::new(|info| tracing::error!("bug: {info}")));
    let sandbox = Sandbox {
        mode: cli.sandbox,
        seccomp: cli.seccomp,
    };
    let outcome = if cli.self_test {
        self_test(sandbox)
    } else {
        run(cli, sandbox)
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(sentence) => {
            eprintln!("pv-blkd: {sentence}");
            ExitCode::FAILURE
        }
    }
}

fn capabilities() -> serde_json::Value {
    serde_json::json!({ "type": "block", "features": ["read-only", "blk-file"] })
}

fn self_test(sandbox: Sandbox) -> Result<(), String> {
    let outcomes =
        probe_all(sandbox).map_err(|error| format!("cannot start a process: {error}"))?;
    let mut open = 0;
    for (probe, outcome) in outcomes {
        println!("{:<12} {outcome}", probe.name);
        open += usize::from(matches!(outcome, Outcome::Allowed | Outcome::NotEntered));
    }
    match open {
        0 => Ok(()),
        _ => Err(format!("{open} of these calls were not refused")),
    }
}

fn run(cli: Cli, sandbox: Sandbox) -> Result<(), String> {
    let path = cli
        .blk_file
        .ok_or("--blk-file is needed: which disk image to serve")?;
    if cli.socket.socket_path.is_none() && cli.socket.fd.is_none() {
        return Err("either --socket-path or --fd is needed".into());
    }
    let options = FileOptions {
        read_only: cli.read_only,
        direct: cli.direct,
    };
    let file = RawFile::open(&path, options)
        .map_err(|error| format!("cannot open the disk image {}: {error}", path.display()))?;
    let device = Arc::new(BlockDevice::new(
        file,
        BlockOptions::with_queues(cli.num_queues),
    ));
    let stop = signals::stop_on_term()
        .map_err(|error| format!("cannot take over SIGTERM and SIGINT: {error}"))?;
    let server = Server::new(device, stop);
    let socket = listen::open(cli.socket.socket_path, cli.socket.fd)?;
    let made = match &socket {
        Socket::Listening(_, path) => path.clone(),
        Socket::Connected(_) => None,
    };
    // Removes the socket when this function returns.
    let _remover = Remover::start(made.as_slice())
        .map_err(|error| format!("cannot start a process: {error}"))?;
    confine(sandbox)?;
    match socket {
        Socket::Connected(stream) => match server.serve(stream) {
            SessionEnd::HangUp | SessionEnd::Stopped => Ok(()),
            SessionEnd::Broken => {
                Err("the connection broke: the peer does not speak vhost-user".into())
            }
        },
        Socket::Listening(listener, _) => server
            .run(&listener)
            .map_err(|error| format!("the socket failed: {error}")),
    }
}

fn confine(sandbox: Sandbox) -> Result<(), String> {
    let report = sandbox
        .enter()
        .map_err(|error| format!("cannot enter the sandbox: {error}"))?;
    for layer in report.missing() {
        if let Err(reason) = &layer.state {
            tracing::warn!("the sandbox lacks {}: {reason}", layer.name);
        }
    }
    tracing::info!("sandbox: {report}");
    Ok(())
}
