//! The old daemon's side: stops, hands out, and ends, or goes on.

use super::{
    ADMIN, AdminHead, BEGUN, CONNECTION, ConnectionHead, END, End, GO, Hello, Identity, LISTENER,
    MEMBER, MemberHead, READY, REFUSED, SERVES, Serves, VERSION, in_words, parse, send,
};
use crate::daemon::admin::AdminSocket;
use crate::daemon::{Fleet, Handed};
use crate::limits::{HANDOVER_SECS, HANDOVER_STOP_SECS, MAX_PAYLOAD};
use crate::readiness::{Event, monotonic_nanos};
use crate::session::handover::PausePoint;
use crate::session::socket::Channel;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// One device that can be handed over.
#[derive(Debug)]
pub(in crate::daemon) struct GiveUnit {
    pub(in crate::daemon) name: String,
    pub(in crate::daemon) point: Arc<PausePoint>,
    pub(in crate::daemon) listener: Option<Arc<UnixListener>>,
    pub(in crate::daemon) socket: Option<Identity>,
}

/// Everything that a daemon can hand over.
#[derive(Debug)]
pub(in crate::daemon) struct Giver<'f, F> {
    pub(in crate::daemon) fleet: &'f F,
    pub(in crate::daemon) units: Vec<GiveUnit>,
    pub(in crate::daemon) admin: &'f [AdminSocket],
    /// Another daemon serves.
    pub(in crate::daemon) given: &'f AtomicBool,
}

/// Queues that stand still; they go on when this is dropped, unless it is said that they leave.
struct Paused<'u>(&'u [GiveUnit]);

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        self.0.iter().for_each(|unit| unit.point.resume());
    }
}

impl<F: Fleet> Giver<'_, F> {
    /// Hands everything to the client on this socket. `Err`: an HTTP status and a sentence; nothing
    /// was stopped. What fails later is logged, and everything goes on.
    pub(in crate::daemon) fn give(
        &self,
        stream: &UnixStream,
        body: &str,
    ) -> Result<(), (&'static str, String)> {
        let handed = self.check(body)?;
        let cannot = |error: std::io::Error| ("500 Internal Server Error", error.to_string());
        let never = Event::new().map_err(cannot)?;
        let deadline = Instant::now() + Duration::from_secs(HANDOVER_SECS);
        let stream = stream.try_clone().map_err(cannot)?;
        let mut channel = Channel::new(stream, never.as_fd()).until(deadline);
        match self.transfer(&mut channel, &handed) {
            Ok(()) => {}
            Err(reason) => {
                tracing::warn!("not handed over, serving on: {reason}");
                return Ok(());
            }
        }
        let patience = Instant::now() + Duration::from_secs(HANDOVER_SECS);
        let mut channel = channel.until(patience);
        // Ordering: Release, with the Acquire of who reads it after the threads have ended.
        self.given.store(true, Ordering::Release);
        match expect(&mut channel, SERVES).and_then(|payload| parse::<Serves>(&payload)) {
            Ok(Serves { paused_for_nanos }) => {
                let paused = Duration::from_nanos(paused_for_nanos);
                tracing::info!("handed over; the queues stood still for {paused:?}");
            }
            Err(reason) => tracing::error!("handed over, and then: {reason}"),
        }
        Ok(())
    }

    /// Whether this can be handed to whoever says this.
    fn check(&self, body: &str) -> Result<Vec<Handed>, (&'static str, String)> {
        let hello: Hello = parse(body.as_bytes()).map_err(|why| ("400 Bad Request", why))?;
        let refuse = |why: String| Err(("409 Conflict", why));
        if hello.version != VERSION {
            return refuse(format!(
                "this daemon hands over by version {VERSION}, and was asked for {}",
                hello.version
            ));
        }
        if !(self.units.iter().map(|unit| &unit.name)).eq(&hello.members) {
            let ours: Vec<&str> = self.units.iter().map(|unit| unit.name.as_str()).collect();
            return refuse(format!(
                "this daemon serves {}, in this order",
                ours.join(", ")
            ));
        }
        let handed: Result<Vec<Handed>, String> = (0..self.units.len())
            .map(|index| self.fleet.hand_over(index))
            .collect();
        handed.or_else(refuse)
    }

    /// Everything up to the message that cannot be taken back.
    fn transfer(&self, channel: &mut Channel<'_>, handed: &[Handed]) -> Result<(), String> {
        let head = b"HTTP/1.0 101 Switching Protocols\r\n\r\n";
        channel
            .stream()
            .write_all(head)
            .map_err(|error| error.to_string())?;
        let paused_at_nanos = monotonic_nanos();
        let paused = Paused(&self.units);
        paused.0.iter().for_each(|unit| unit.point.pause());
        // All of them stand still as long as the slowest takes to stop.
        let stopped_by = Instant::now() + Duration::from_secs(HANDOVER_STOP_SECS);
        for (unit, handed) in self.units.iter().zip(handed) {
            give_unit(channel, unit, handed, stopped_by)?;
        }
        for AdminSocket {
            access,
            listener,
            socket,
        } in self.admin
        {
            let head = AdminHead {
                control: access.is_control(),
                socket: *socket,
            };
            send(channel, ADMIN, &head, &[listener.as_fd()])?;
        }
        send(channel, END, &End { paused_at_nanos }, &[])?;
        expect(channel, READY)?;
        send(channel, GO, &(), &[])?;
        // From here on it serves, or nobody does.
        self.units.iter().for_each(|unit| unit.point.leave());
        Ok(())
    }
}

fn give_unit(
    channel: &mut Channel<'_>,
    unit: &GiveUnit,
    handed: &Handed,
    stopped_by: Instant,
) -> Result<(), String> {
    let parked = unit.point.take(stopped_by);
    let parked = parked.ok_or_else(|| format!("{} did not stop in time", unit.name))?;
    let connection = parked.unwrap_or_else(|error| {
        let device = &unit.name;
        tracing::warn!(device, %error, "a session cannot be handed over; its frontend has to connect again");
        None
    });
    let head = MemberHead {
        name: unit.name.clone(),
        identity: handed.identity.clone(),
        socket: unit.socket,
    };
    let fds: Vec<BorrowedFd<'_>> = handed.fds.iter().map(AsFd::as_fd).collect();
    send(channel, MEMBER, &head, &fds)?;
    if let Some(listener) = &unit.listener {
        send(channel, LISTENER, &(), &[listener.as_fd()])?;
    }
    let Some(connection) = connection else {
        return Ok(());
    };
    let head = ConnectionHead {
        config: connection.config,
        fds_truncated: connection.begun.fds_truncated,
    };
    send(channel, CONNECTION, &head, &[connection.stream.as_fd()])?;
    for message in &connection.messages {
        let fds: Vec<BorrowedFd<'_>> = message.fds.iter().map(AsFd::as_fd).collect();
        let sent = channel.send(message.header.request, &message.payload, &fds);
        sent.map_err(|end| in_words(&end))?;
    }
    let mut fds: Vec<BorrowedFd<'_>> = connection.begun.fds.iter().map(AsFd::as_fd).collect();
    for part in connection.begun.bytes.chunks(MAX_PAYLOAD) {
        let sent = channel.send(BEGUN, part, &fds);
        sent.map_err(|end| in_words(&end))?;
        fds.clear();
    }
    Ok(())
}

/// The next frame must be this one.
fn expect(channel: &mut Channel<'_>, frame: u32) -> Result<Vec<u8>, String> {
    let message = channel.receive().map_err(|end| in_words(&end))?;
    match message.header.request {
        REFUSED => {
            let reason: String = parse(&message.payload)?;
            // Another program's text goes to a log.
            let plain: String = reason.chars().filter(|c| !c.is_control()).collect();
            Err(format!("the other daemon refuses: {plain}"))
        }
        request if request == frame => Ok(message.payload),
        _ => Err("the other daemon said something else".into()),
    }
}
