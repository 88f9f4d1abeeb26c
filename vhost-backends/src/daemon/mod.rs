//! `pv-blkd`: block devices for any VMM, behind sockets
//! (vhost-user: backend program conventions).
//!
//! In comes a command line; out goes an exit code. Errors of the user are one sentence on
//! standard error. Everything is opened first, then the sandbox is entered, then served.

mod admin;
mod cli;
mod disk;
mod listen;
mod notify;
mod remover;
mod signals;

use crate::block::{BlockDevice, BlockOptions};
use crate::readiness::Event;
use crate::sandbox::{Outcome, Sandbox, probe_all};
use crate::session::{ConnectionEvent, Server, SessionEnd};
use admin::Access;
use clap::Parser;
use cli::{Cli, OneDisk};
use listen::{Passed, Socket, SocketPath};
use notify::Notify;
use remover::Remover;
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::process::ExitCode;
use std::sync::{Arc, mpsc};
use std::thread;

/// A disk that is served.
struct Served {
    name: String,
    device: Arc<BlockDevice>,
}

/// Runs `pv-blkd` with this command line, the program's name first. Takes the calling thread, the
/// process's panic hook, SIGTERM and SIGINT, and confines the process for good.
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
    let outcome = if cli.self_test {
        self_test(cli.sandbox())
    } else {
        run(&cli)
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

fn run(cli: &Cli) -> Result<(), String> {
    let disks = cli.disks()?;
    let stop = signals::stop_on_term()
        .map_err(|error| format!("cannot take over SIGTERM and SIGINT: {error}"))?;
    let mut passed = Passed::from_environment()?;
    let mut served = Vec::new();
    let mut sockets = Vec::new();
    let mut made = Vec::new();
    let opened = (|| {
        for (name, disk) in disks {
            let device = Arc::new(open_disk(&name, &disk)?);
            let socket = listen::open(disk.socket.socket_path, disk.socket.fd, &mut passed, &name)?;
            if let Socket::Listening(_, Some(path)) = &socket {
                made.push(path.clone());
            }
            sockets.push(socket);
            served.push(Served { name, device });
        }
        let mut admin = Vec::new();
        for (path, access) in [
            (&cli.stats_socket, Access::Statistics),
            (&cli.control_socket, Access::Control),
        ] {
            if let Some(path) = path {
                let (listener, path) = listen::listen_on(path, access == Access::Control)?;
                made.push(path);
                admin.push((listener, access));
            }
        }
        Ok::<_, String>((admin, Notify::from_environment()?))
    })();
    let (admin, notify) = match opened {
        Ok(opened) => opened,
        Err(sentence) => {
            made.iter().for_each(SocketPath::remove);
            return Err(sentence);
        }
    };
    // Removes the sockets when this function returns.
    let _remover =
        Remover::start(&made).map_err(|error| format!("cannot start a process: {error}"))?;
    confine(cli.sandbox())?;
    let outcome = serve(&served, sockets, &admin, &stop, &notify);
    notify.stopping();
    outcome
}

fn open_disk(name: &str, disk: &OneDisk) -> Result<BlockDevice, String> {
    let limits = disk.limits()?;
    let store = disk.source.open(&disk.how, disk.num_queues)?;
    let mut block = BlockOptions::with_queues(disk.num_queues);
    if disk.id.is_some() {
        block.id.fill(0);
        for (to, from) in block.id.iter_mut().zip(name.bytes()) {
            *to = from;
        }
    }
    let device = BlockDevice::on(store, block);
    device.limiter().set(limits);
    Ok(device)
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

/// Serves all disks until the last is over. The error is that of the first disk that failed.
fn serve(
    served: &[Served],
    sockets: Vec<Socket>,
    admin: &[(std::os::unix::net::UnixListener, Access)],
    stop: &OwnedFd,
    notify: &Notify,
) -> Result<(), String> {
    let cannot = |error: std::io::Error| format!("cannot start a thread: {error}");
    let admin_stop = Event::new().map_err(cannot)?;
    thread::scope(|scope| {
        // No thread serves before all of them are there: dropped, `go` lets them end at once.
        let mut go = Vec::new();
        let start = || {
            let mut disks = Vec::new();
            for (disk, socket) in served.iter().zip(sockets) {
                let (sender, started) = mpsc::channel::<()>();
                let server = server(disk, stop.try_clone()?);
                let thread = thread::Builder::new().name(disk.name.clone());
                disks.push(thread.spawn_scoped(scope, move || match started.recv() {
                    Ok(()) => serve_disk(&server, socket),
                    Err(_) => Ok(()),
                })?);
                go.push(sender);
            }
            for (listener, access) in admin {
                let stop = &admin_stop;
                thread::Builder::new()
                    .name("admin".into())
                    .spawn_scoped(scope, move || {
                        admin::serve(listener, *access, served, stop);
                    })?;
            }
            Ok(disks)
        };
        let disks = start().map_err(|error| {
            admin_stop.set();
            cannot(error)
        })?;
        for sender in go {
            // Its thread waits for this.
            let _ = sender.send(());
        }
        notify.ready(served.len());
        let mut outcome = Ok(());
        for (thread, disk) in disks.into_iter().zip(served) {
            let end = match thread.join() {
                Ok(end) => end,
                Err(_) => Err("its thread ended by a bug".into()),
            };
            outcome = outcome.and(end.map_err(|sentence| match served.len() {
                1 => sentence,
                _ => format!("{}: {sentence}", disk.name),
            }));
        }
        admin_stop.set();
        outcome
    })
}

fn server(disk: &Served, stop: OwnedFd) -> Server {
    let (device, name) = (Arc::clone(&disk.device), disk.name.clone());
    let watch = move |event| match event {
        ConnectionEvent::Connected => {
            device.measurements().connected();
            tracing::info!(disk = name, "a frontend connected");
        }
        ConnectionEvent::Ended(end) => {
            let broken = end == SessionEnd::Broken;
            device.measurements().disconnected(broken);
            tracing::info!(disk = name, ?end, "the connection ended");
        }
    };
    Server::new(disk.device.clone(), stop).watched(watch)
}

fn serve_disk(server: &Server, socket: Socket) -> Result<(), String> {
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
