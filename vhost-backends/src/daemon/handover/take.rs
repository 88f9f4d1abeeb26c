//! The new daemon's side: asks, checks what comes, and serves when it is told to.

use super::{
    ADMIN, AdminHead, BEGUN, CONNECTION, ConnectionHead, END, End, GO, Hello, Identity, LISTENER,
    MEMBER, MemberHead, READY, REFUSED, SERVES, Serves, VERSION, in_words, parse, send,
};
use crate::daemon::listen::{self, Kind};
use crate::dial;
use crate::limits::{HANDOVER_SECS, MAX_ADMIN_REQUEST, MAX_HANDOVER_FRAMES, MAX_MESSAGE_FDS};
use crate::readiness::{Event, monotonic_nanos};
use crate::session::handover::Connection;
use crate::session::socket::{Begun, Channel, Message};
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

/// A running daemon that is asked for what it serves.
#[derive(Debug)]
pub(in crate::daemon) struct Taking {
    stream: UnixStream,
    never: Event,
    deadline: Instant,
    paused_at_nanos: u64,
}

/// What it served.
#[derive(Debug, Default)]
pub(in crate::daemon) struct Taken {
    pub(in crate::daemon) units: Vec<TakenUnit>,
    pub(in crate::daemon) admin: Vec<TakenAdmin>,
}

/// One device of it.
#[derive(Debug)]
pub(in crate::daemon) struct TakenUnit {
    pub(in crate::daemon) name: String,
    pub(in crate::daemon) identity: String,
    pub(in crate::daemon) socket: Option<Identity>,
    /// The device's own.
    pub(in crate::daemon) fds: Vec<OwnedFd>,
    pub(in crate::daemon) listener: Option<UnixListener>,
    pub(in crate::daemon) connection: Option<Connection>,
}

/// One of its statistics and control sockets.
#[derive(Debug)]
pub(in crate::daemon) struct TakenAdmin {
    pub(in crate::daemon) control: bool,
    pub(in crate::daemon) socket: Identity,
    pub(in crate::daemon) listener: UnixListener,
}

impl Taking {
    /// Connects to a control socket. The error is a sentence.
    pub(in crate::daemon) fn connect(path: &Path) -> Result<Taking, String> {
        let cannot = |error| format!("cannot take over from {}: {error}", path.display());
        let stream = dial::connect(path).map_err(cannot)?;
        let limit = Duration::from_secs(HANDOVER_SECS);
        stream.set_read_timeout(Some(limit)).map_err(cannot)?;
        stream.set_write_timeout(Some(limit)).map_err(cannot)?;
        Ok(Taking {
            stream,
            never: Event::new().map_err(cannot)?,
            deadline: Instant::now() + limit,
            paused_at_nanos: 0,
        })
    }

    /// Asks for these devices, and takes the record. The queues stand still from here on.
    pub(in crate::daemon) fn receive(&mut self, members: Vec<String>) -> Result<Taken, String> {
        self.ask(members)?;
        self.deadline = Instant::now() + Duration::from_secs(HANDOVER_SECS);
        let taken = self.record();
        if let Err(reason) = &taken {
            self.refuse(reason);
        }
        taken
    }

    /// Tells the old daemon why not; it goes on.
    pub(in crate::daemon) fn refuse(&self, reason: &str) {
        if let Ok(mut channel) = self.channel() {
            // It also goes on when it hears nothing more.
            let _ = send(&mut channel, REFUSED, &reason, &[]);
        }
    }

    /// Says that everything is ready; the old daemon serves no more when this returns well.
    pub(in crate::daemon) fn ready(&self) -> Result<(), String> {
        let mut channel = self.channel()?;
        send(&mut channel, READY, &(), &[])?;
        let message = channel.receive().map_err(|end| in_words(&end))?;
        match message.header.request {
            GO => Ok(()),
            _ => Err("the other daemon said something else".into()),
        }
    }

    /// Says that the queues run again. How long they stood still.
    pub(in crate::daemon) fn serves(&self) -> Duration {
        let paused_for_nanos = monotonic_nanos().saturating_sub(self.paused_at_nanos);
        if let Ok(mut channel) = self.channel() {
            // Who does not hear it has ended, which is as well.
            let _ = send(&mut channel, SERVES, &Serves { paused_for_nanos }, &[]);
        }
        Duration::from_nanos(paused_for_nanos)
    }

    fn channel(&self) -> Result<Channel<'_>, String> {
        let stream = self.stream.try_clone().map_err(|error| error.to_string())?;
        Ok(Channel::new(stream, self.never.as_fd()).until(self.deadline))
    }

    fn ask(&self, members: Vec<String>) -> Result<(), String> {
        let version = VERSION;
        let hello = Hello { version, members };
        let body = serde_json::to_string(&hello).map_err(|error| error.to_string())?;
        let length = body.len();
        let request = format!("POST /take-over HTTP/1.0\r\nContent-Length: {length}\r\n\r\n{body}");
        let lost = |error| {
            let why = dial::in_words(error);
            format!("the running daemon cannot be asked: {why}")
        };
        let mut stream = &self.stream;
        stream.write_all(request.as_bytes()).map_err(lost)?;
        // Byte by byte: what follows the head is not text, and has descriptors.
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            if head.len() >= MAX_ADMIN_REQUEST {
                return Err("the running daemon answers something else".into());
            }
            let mut byte = [0];
            stream.read_exact(&mut byte).map_err(lost)?;
            head.extend(byte);
        }
        if head.starts_with(b"HTTP/1.0 101 ") {
            return Ok(());
        }
        let mut said = String::new();
        // What there is of it will do.
        let _ = stream
            .take(MAX_ADMIN_REQUEST as u64)
            .read_to_string(&mut said);
        Err(format!("the running daemon refuses: {}", said.trim()))
    }

    fn record(&mut self) -> Result<Taken, String> {
        let mut taken = Taken::default();
        let mut end = None;
        let mut channel = self.channel()?;
        for _ in 0..MAX_HANDOVER_FRAMES {
            let message = channel.receive().map_err(|end| in_words(&end))?;
            if message.fds_truncated {
                return Err("a record with too many descriptors".into());
            }
            if message.header.request == END {
                end = Some(parse::<End>(&message.payload)?);
                break;
            }
            take(&mut taken, message)?;
        }
        let End { paused_at_nanos } = end.ok_or("a record without an end")?;
        self.paused_at_nanos = paused_at_nanos;
        Ok(taken)
    }
}

/// Takes one frame. Descriptors that it does not need are closed.
fn take(taken: &mut Taken, message: Message) -> Result<(), String> {
    let Message {
        header,
        payload,
        fds,
        ..
    } = message;
    match header.request {
        MEMBER => {
            let MemberHead {
                name,
                identity,
                socket,
            } = parse(&payload)?;
            if fds.len() > MAX_MESSAGE_FDS {
                return Err("a record with too many descriptors".into());
            }
            taken.units.push(TakenUnit {
                name,
                identity,
                socket,
                fds,
                listener: None,
                connection: None,
            });
        }
        LISTENER => {
            let unit = last(taken)?;
            if unit.listener.is_some() || unit.connection.is_some() {
                return Err("a record in the wrong order".into());
            }
            unit.listener = Some(UnixListener::from(socket(fds, Kind::Listening)?));
        }
        CONNECTION => {
            let ConnectionHead {
                config,
                fds_truncated,
            } = parse(&payload)?;
            let unit = last(taken)?;
            if unit.connection.is_some() {
                return Err("a record in the wrong order".into());
            }
            unit.connection = Some(Connection {
                stream: UnixStream::from(socket(fds, Kind::Connected)?),
                messages: Vec::new(),
                config,
                begun: Begun {
                    fds_truncated,
                    ..Begun::default()
                },
            });
        }
        BEGUN => {
            let connection = last(taken)?.connection.as_mut();
            let begun = &mut connection.ok_or("a record in the wrong order")?.begun;
            begun.bytes.extend(payload);
            begun.fds.extend(fds);
        }
        ADMIN => {
            let AdminHead {
                control,
                socket: identity,
            } = parse(&payload)?;
            taken.admin.push(TakenAdmin {
                control,
                socket: identity,
                listener: UnixListener::from(socket(fds, Kind::Listening)?),
            });
        }
        // A message of the session's, which that checks.
        _ => {
            let connection = last(taken)?.connection.as_mut();
            let connection = connection.ok_or("a record in the wrong order")?;
            connection.messages.push(Message {
                header,
                payload,
                fds,
                fds_truncated: false,
            });
        }
    }
    Ok(())
}

fn last(taken: &mut Taken) -> Result<&mut TakenUnit, String> {
    Ok(taken
        .units
        .last_mut()
        .ok_or("a record in the wrong order")?)
}

fn socket(fds: Vec<OwnedFd>, kind: Kind) -> Result<OwnedFd, String> {
    let [fd] = <[OwnedFd; 1]>::try_from(fds).map_err(|_| "a socket without a descriptor")?;
    if !listen::kind_of(fd.as_fd()).is_ok_and(|found| found == Some(kind)) {
        return Err("a descriptor that is not the socket that it should be".into());
    }
    Ok(fd)
}
