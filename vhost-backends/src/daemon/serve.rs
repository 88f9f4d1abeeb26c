//! A daemon's life: everything is opened, the sandbox is entered, the fleet is served.

use super::admin::{self, Access, AdminSocket};
use super::handover::{GiveUnit, Giver, Taken, Taking};
use super::listen::{Socket, SocketPath, Sockets};
use super::notify::Notify;
use super::options::Operation;
use super::remover::Remover;
use super::{Fleet, Handed, Member, descriptors, signals};
use crate::readiness::Event;
use crate::sandbox::Sandbox;
use crate::session::handover::{Connection, Gate, PausePoint};
use crate::session::quota::PEER_LINES;
use crate::session::{ConnectionEvent, Server, SessionEnd};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;

/// What is served on one socket, and from where on.
enum Start {
    Fresh(Socket),
    /// What another process served; neither, where its only connection is over.
    Taken(Option<UnixListener>, Option<Connection>),
}

/// One device, about to be served.
struct Unit {
    member: Member,
    start: Start,
    /// The file of its socket.
    socket: Option<(u64, u64)>,
    /// Its listening socket once more.
    listener: Option<Arc<UnixListener>>,
}

impl Unit {
    fn new(member: Member, start: Start, socket: Option<(u64, u64)>) -> Result<Unit, String> {
        let listener = match &start {
            Start::Fresh(Socket::Listening(listener, _)) => Some(listener),
            Start::Taken(listener, _) => listener.as_ref(),
            Start::Fresh(_) => None,
        };
        let listener = listener.map(UnixListener::try_clone).transpose();
        let listener =
            listener.map_err(|error| format!("no descriptor for {}: {error}", member.name))?;
        Ok(Unit {
            member,
            start,
            socket,
            listener: listener.map(Arc::new),
        })
    }
}

/// Opens a fleet, confines the process for good, and serves until a signal asks for the end, or until every
/// device's only connection is over. `open` gives the fleet and opens one socket for each of its
/// members, in their order. The error is a sentence.
pub(crate) fn serve<F: Fleet>(
    operation: &Operation,
    open: impl FnOnce(&mut Sockets) -> Result<F, String>,
) -> Result<(), String> {
    let stop = signals::stop_on_term()
        .map_err(|error| format!("cannot take over the signals that end a daemon: {error}"))?;
    let limit = descriptors::raise()
        .map_err(|error| format!("cannot see how many descriptors there may be: {error}"))?;
    let mut sockets = Sockets::from_environment(operation.take_over.is_some())?;
    let opened = (|| {
        let fleet = open(&mut sockets)?;
        let queues = fleet.members().into_iter().map(|m| m.device.queue_count());
        descriptors::check(limit, queues)?;
        let mut admin = Vec::new();
        for (path, access) in [
            (&operation.stats_socket, Access::Statistics),
            (&operation.control_socket, Access::Control),
        ] {
            if let Some(path) = path {
                admin.push((access, sockets.admin(path, access == Access::Control)?));
            }
        }
        let taking = operation.take_over.as_deref().map(Taking::connect);
        Ok::<_, String>((
            fleet,
            admin,
            taking.transpose()?,
            Notify::from_environment()?,
        ))
    })();
    let (fleet, admin, mut taking, notify) = match opened {
        Ok(opened) => opened,
        Err(sentence) => {
            sockets.remove_made();
            return Err(sentence);
        }
    };
    // Removes the sockets when this function returns, unless they are another daemon's.
    let mut remover = Remover::start(sockets.made(), taking.is_none()).map_err(|error| {
        sockets.remove_made();
        format!("cannot start a process: {error}")
    })?;
    confine(operation.sandbox())?;
    let (units, admin) = match &mut taking {
        None => fresh(&fleet, sockets, admin)?,
        Some(taking) => {
            let taken = taking.receive(fleet.members().into_iter().map(|m| m.name).collect())?;
            match take(&fleet, sockets, admin, taken) {
                Ok(all) => all,
                Err(reason) => {
                    taking.refuse(&reason);
                    return Err(reason);
                }
            }
        }
    };
    // Until the files are gone: whoever comes meanwhile does not take them for stale ones.
    let listening: Vec<_> = units.iter().map(|unit| unit.listener.clone()).collect();
    let mut arm = |armed| {
        if let Some(remover) = &mut remover {
            remover.arm(armed);
        }
    };
    let given = AtomicBool::new(false);
    let mut served = false;
    let commit = || {
        if let Some(taking) = &taking {
            taking.ready()?;
        }
        served = true;
        arm(true);
        Ok(taking)
    };
    let serving = |taking: Option<Taking>| {
        if let Some(taking) = taking {
            let paused = taking.serves();
            notify.taken_over();
            let _ = writeln!(
                std::io::stderr(),
                "took over a running daemon's {}, whose queues stood still for {paused:?}",
                F::DEVICES
            );
        }
    };
    let outcome = serve_all(
        &fleet, units, &admin, &stop, &notify, &given, commit, serving,
    );
    // Ordering: Acquire, with the Release of who set it.
    if given.load(Ordering::Acquire) {
        arm(false);
    } else {
        notify.stopping();
        if served {
            fleet.over();
        }
    }
    PEER_LINES.settle();
    drop(remover);
    drop((listening, admin));
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

type Prepared = (Vec<Unit>, Vec<AdminSocket>);

/// Everything on sockets of this process.
fn fresh<F: Fleet>(
    fleet: &F,
    sockets: Sockets,
    admin: Vec<(Access, Socket)>,
) -> Result<Prepared, String> {
    let units = fleet.members().into_iter().zip(sockets.into_opened());
    let units = units.map(|(member, socket)| {
        let file = match &socket {
            Socket::Listening(_, path) => path.as_ref().map(SocketPath::identity),
            _ => None,
        };
        Unit::new(member, Start::Fresh(socket), file)
    });
    let admin = admin.into_iter().map(|(access, socket)| match socket {
        Socket::Listening(listener, Some(path)) => Ok(AdminSocket {
            access,
            listener,
            socket: path.identity(),
        }),
        _ => Err("a statistics or control socket was not made".to_owned()),
    });
    Ok((
        units.collect::<Result<_, _>>()?,
        admin.collect::<Result<_, _>>()?,
    ))
}

/// Everything as another process served it, if it is what this one was told to serve.
fn take<F: Fleet>(
    fleet: &F,
    sockets: Sockets,
    admin: Vec<(Access, Socket)>,
    taken: Taken,
) -> Result<Prepared, String> {
    let awaited = |socket: &Socket| match socket {
        Socket::Awaited(path) => path.as_ref().map(SocketPath::identity),
        _ => None,
    };
    let members = fleet.members();
    let wanted = sockets.into_opened();
    if taken.units.len() != members.len() || taken.admin.len() != admin.len() {
        return Err("the running daemon serves something else, or on other sockets".into());
    }
    let mut units = Vec::new();
    for (index, (member, unit)) in members.into_iter().zip(taken.units).enumerate() {
        let name = &member.name;
        if unit.name != *name {
            return Err(format!(
                "the running daemon serves {}, not {name}",
                unit.name
            ));
        }
        let path = wanted.get(index).and_then(awaited);
        if path.is_some() && path != unit.socket {
            return Err(format!(
                "the running daemon serves {name} on another socket"
            ));
        }
        let identity = unit.identity;
        let fds = unit.fds;
        fleet.take_over(index, Handed { identity, fds })?;
        let start = Start::Taken(unit.listener, unit.connection);
        units.push(Unit::new(member, start, unit.socket)?);
    }
    let mut sockets = Vec::new();
    for ((access, socket), taken) in admin.into_iter().zip(taken.admin) {
        if taken.control != access.is_control() || awaited(&socket) != Some(taken.socket) {
            return Err("the running daemon has other statistics or control sockets".into());
        }
        sockets.push(AdminSocket {
            access,
            listener: taken.listener,
            socket: taken.socket,
        });
    }
    Ok((units, sockets))
}

/// Serves all devices until the last is over, from when `commit` has gone well; once they are
/// served, calls `serving` with what that gave. The error is that of the first that failed.
fn serve_all<F: Fleet, T>(
    fleet: &F,
    units: Vec<Unit>,
    admin: &[AdminSocket],
    stop: &OwnedFd,
    notify: &Notify,
    given: &AtomicBool,
    commit: impl FnOnce() -> Result<T, String>,
    serving: impl FnOnce(T),
) -> Result<(), String> {
    let cannot = |error: std::io::Error| format!("cannot start a thread: {error}");
    let admin_stop = Event::new().map_err(cannot)?;
    let mut giver = Giver {
        fleet,
        units: Vec::new(),
        admin,
        given,
    };
    let (said, heard) = mpsc::channel();
    let mut ready = Vec::new();
    for unit in units {
        let point = Arc::new(PausePoint::new().map_err(cannot)?);
        giver.units.push(GiveUnit {
            name: unit.member.name.clone(),
            point: Arc::clone(&point),
            listener: unit.listener.clone(),
            socket: unit.socket,
        });
        let server = server(&unit.member, stop.try_clone().map_err(cannot)?);
        ready.push((unit, server.pausing(Arc::clone(&point)), point));
    }
    let giver = &giver;
    thread::scope(|scope| {
        // Dropped, these let the threads end at once, with nothing done.
        let mut go = Vec::new();
        let mut devices = Vec::new();
        for (unit, server, point) in ready {
            let (sender, receiver) = mpsc::channel::<()>();
            let gate = Gate {
                said: said.clone(),
                go: receiver,
            };
            go.push(sender);
            let name = unit.member.name;
            let thread = thread::Builder::new().name(name.clone());
            let thread = thread.spawn_scoped(scope, move || {
                let outcome = serve_one(&server, unit.start, &gate);
                point.over();
                outcome
            });
            devices.push((name, thread.map_err(cannot)?));
        }
        drop(said);
        let all = || {
            for _ in &giver.units {
                heard.recv().map_err(|_| "a thread ended by a bug")??;
            }
            Ok::<(), String>(())
        };
        all()?;
        let committed = commit()?;
        for sender in &go {
            // Its thread waits for this.
            let _ = sender.send(());
        }
        all()?;
        serving(committed);
        for socket in admin {
            let stop = &admin_stop;
            let thread = thread::Builder::new().name("admin".into());
            let thread = thread.spawn_scoped(scope, move || admin::serve(socket, giver, stop));
            if let Err(error) = thread {
                // The devices are served; they are what counts.
                tracing::error!(%error, "no statistics or control");
            }
        }
        notify.ready(giver.units.len(), F::DEVICES);
        let mut outcome = Ok(());
        for (name, thread) in devices {
            let end = match thread.join() {
                Ok(end) => end,
                Err(_) => Err("its thread ended by a bug".into()),
            };
            outcome = outcome.and(end.map_err(|sentence| match giver.units.len() {
                1 => sentence,
                _ => format!("{name}: {sentence}"),
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

fn serve_one(server: &Server, start: Start, gate: &Gate) -> Result<(), String> {
    let (listener, end) = match start {
        Start::Taken(listener, Some(connection)) => match server.take_up(connection, gate) {
            None => return Ok(()),
            Some(end) => (listener, end),
        },
        _ if !gate.pass(Ok(())) => return Ok(()),
        start => {
            gate.serves();
            match start {
                Start::Fresh(Socket::Connected(stream)) => (None, server.serve(stream)),
                Start::Fresh(Socket::Listening(listener, _)) => {
                    (Some(listener), SessionEnd::HangUp)
                }
                Start::Taken(listener, _) => (listener, SessionEnd::HangUp),
                Start::Fresh(Socket::Awaited(_)) => (None, SessionEnd::HangUp),
            }
        }
    };
    match (end, listener) {
        (SessionEnd::Stopped | SessionEnd::HandedOver, _) => Ok(()),
        (_, Some(listener)) => server
            .run(&listener)
            .map_err(|error| format!("the socket failed: {error}")),
        (SessionEnd::HangUp, None) => Ok(()),
        (SessionEnd::Broken, None) => {
            Err("the connection broke: the peer does not speak vhost-user".into())
        }
    }
}
