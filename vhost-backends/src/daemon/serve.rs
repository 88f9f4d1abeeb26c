//! A daemon's life: everything is opened, the sandbox is entered, the fleet is served.

use super::admin::{self, Access};
use super::listen::{Socket, Sockets};
use super::notify::Notify;
use super::options::Operation;
use super::remover::Remover;
use super::{Fleet, Member, signals};
use crate::readiness::Event;
use crate::sandbox::Sandbox;
use crate::session::quota::PEER_LINES;
use crate::session::{ConnectionEvent, Server, SessionEnd};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::mpsc;
use std::thread;

/// Opens a fleet, confines the process for good, and serves until SIGTERM, SIGINT, or until every
/// device's only connection is over. `open` gives the fleet and opens one socket for each of its
/// members, in their order. The error is a sentence.
pub(crate) fn serve<F: Fleet>(
    operation: &Operation,
    open: impl FnOnce(&mut Sockets) -> Result<F, String>,
) -> Result<(), String> {
    let stop = signals::stop_on_term()
        .map_err(|error| format!("cannot take over SIGTERM and SIGINT: {error}"))?;
    let mut sockets = Sockets::from_environment()?;
    let opened = (|| {
        let fleet = open(&mut sockets)?;
        let mut admin = Vec::new();
        for (path, access) in [
            (&operation.stats_socket, Access::Statistics),
            (&operation.control_socket, Access::Control),
        ] {
            if let Some(path) = path {
                let listener = sockets.listen(path, access == Access::Control)?;
                admin.push((listener, access));
            }
        }
        Ok::<_, String>((fleet, admin, Notify::from_environment()?))
    })();
    let (fleet, admin, notify) = match opened {
        Ok(opened) => opened,
        Err(sentence) => {
            sockets.remove_made();
            return Err(sentence);
        }
    };
    // Removes the sockets when this function returns.
    let _remover = Remover::start(sockets.made())
        .map_err(|error| format!("cannot start a process: {error}"))?;
    confine(operation.sandbox())?;
    let outcome = serve_all(&fleet, sockets.into_opened(), &admin, &stop, &notify);
    notify.stopping();
    PEER_LINES.settle();
    outcome
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

/// Serves all devices until the last is over. The error is that of the first that failed.
fn serve_all<F: Fleet>(
    fleet: &F,
    sockets: Vec<Socket>,
    admin: &[(UnixListener, Access)],
    stop: &OwnedFd,
    notify: &Notify,
) -> Result<(), String> {
    let cannot = |error: std::io::Error| format!("cannot start a thread: {error}");
    let admin_stop = Event::new().map_err(cannot)?;
    let members = fleet.members();
    thread::scope(|scope| {
        // No thread serves before all of them are there: dropped, `go` lets them end at once.
        let mut go = Vec::new();
        let start = || {
            let mut devices = Vec::new();
            for (member, socket) in members.iter().zip(sockets) {
                let (sender, started) = mpsc::channel::<()>();
                let server = server(member, stop.try_clone()?);
                let thread = thread::Builder::new().name(member.name.clone());
                devices.push(thread.spawn_scoped(scope, move || match started.recv() {
                    Ok(()) => serve_one(&server, socket),
                    Err(_) => Ok(()),
                })?);
                go.push(sender);
            }
            for (listener, access) in admin {
                let stop = &admin_stop;
                thread::Builder::new()
                    .name("admin".into())
                    .spawn_scoped(scope, move || {
                        admin::serve(listener, *access, fleet, stop);
                    })?;
            }
            Ok(devices)
        };
        let devices = start().map_err(|error| {
            admin_stop.set();
            cannot(error)
        })?;
        for sender in go {
            // Its thread waits for this.
            let _ = sender.send(());
        }
        notify.ready(members.len(), F::DEVICES);
        let mut outcome = Ok(());
        for (thread, member) in devices.into_iter().zip(&members) {
            let end = match thread.join() {
                Ok(end) => end,
                Err(_) => Err("its thread ended by a bug".into()),
            };
            outcome = outcome.and(end.map_err(|sentence| match members.len() {
                1 => sentence,
                _ => format!("{}: {sentence}", member.name),
            }));
        }
        admin_stop.set();
        outcome
    })
}

fn server(member: &Member, stop: OwnedFd) -> Server {
    let (watch, name) = (member.watch.clone(), member.name.clone());
    let watch = move |event| {
        watch(event);
        if !PEER_LINES.may_say() {
            return;
        }
        match event {
            ConnectionEvent::Connected => tracing::info!(device = name, "a frontend connected"),
            ConnectionEvent::Ended(end) => {
                tracing::info!(device = name, ?end, "the connection ended");
            }
        }
    };
    Server::new(member.device.clone(), stop).watched(watch)
}

fn serve_one(server: &Server, socket: Socket) -> Result<(), String> {
    match socket {
        Socket::Connected(stream) => match server.serve(stream) {
            SessionEnd::HangUp | SessionEnd::Stopped => Ok(()),
            SessionEnd::Broken => {
                Err("the connection broke: the peer does not speak vhost-user".into())
            }
        },
        Socket::Listening(listener) => server
            .run(&listener)
            .map_err(|error| format!("the socket failed: {error}")),
    }
}
