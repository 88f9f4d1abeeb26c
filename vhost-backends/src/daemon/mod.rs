//! `pv-blkd`: a block device for any VMM, behind a socket
//! (vhost-user: backend program conventions).
//!
//! In comes a command line; out goes an exit code. Errors of the user are one sentence on
//! standard error.

mod listen;
mod signals;

use crate::block::{BlockDevice, BlockOptions};
use crate::engine::{FileOptions, RawFile};
use crate::limits::MAX_QUEUES;
use crate::session::{Server, SessionEnd};
use clap::{Args, Parser};
use listen::Socket;
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
        required_unless_present = "print_capabilities"
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
    // An embedding program may have a subscriber already; then that one is used.
    let _ = tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_max_level(tracing::Level::WARN)
        .without_time()
        .try_init();
    match run(cli) {
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

fn run(cli: Cli) -> Result<(), String> {
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
    match listen::open(cli.socket.socket_path, cli.socket.fd)? {
        Socket::Connected(stream) => match server.serve(stream) {
            SessionEnd::HangUp | SessionEnd::Stopped => Ok(()),
            SessionEnd::Broken => {
                Err("the connection broke: the peer does not speak vhost-user".into())
            }
        },
        Socket::Listening(listener, _path) => server
            .run(&listener)
            .map_err(|error| format!("the socket failed: {error}")),
    }
}
