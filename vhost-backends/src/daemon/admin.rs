//! The statistics and control sockets: HTTP/1.0 in its smallest form, one client after the other.
//!
//! | request | on | answer |
//! |---|---|---|
//! | `GET /metrics` | both | Prometheus text |
//! | `GET /stats` | both | the same as JSON |
//! | `POST /take-over` | control | hands everything to the client ([`super::handover`]) |
//! | `GET /DEVICES/NAME/WHAT` | control | what the [`Fleet`] has without an end |
//! | `PUT /DEVICES/NAME/WHAT` | control | what the daemon's [`Fleet`] makes of it |
//!
//! In come bytes of anybody who may connect; nothing of them is kept beyond the answer. A client
//! that is slow is left after [`ADMIN_TIMEOUT_SECS`], one that asks for much is refused at
//! [`MAX_ADMIN_REQUEST`].

use super::handover::Giver;
use super::{Denied, Fleet, Follow};
use crate::limits::{ADMIN_TIMEOUT_SECS, MAX_ADMIN_REQUEST};
use crate::readiness::{Event, Interest, wait};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

/// What a socket's clients may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// Look.
    Statistics,
    /// Look and change.
    Control,
}

impl Access {
    pub(super) fn is_control(self) -> bool {
        self == Access::Control
    }
}

/// One of these sockets.
#[derive(Debug)]
pub(super) struct AdminSocket {
    pub(super) access: Access,
    pub(super) listener: UnixListener,
    /// Its file's device and inode.
    pub(super) socket: (u64, u64),
}

struct Answer {
    status: &'static str,
    kind: &'static str,
    body: String,
}

/// Answers clients until `stop` is set.
pub(super) fn serve<F: Fleet>(socket: &AdminSocket, giver: &Giver<'_, F>, stop: &Event) {
    let AdminSocket {
        access, listener, ..
    } = socket;
    if listener.set_nonblocking(true).is_err() {
        return;
    }
    loop {
        let ready = wait(
            [
                (stop.as_fd(), Interest::Read),
                (listener.as_fd(), Interest::Read),
            ],
            None,
        );
        match ready {
            Ok([false, _]) => {}
            Ok([true, _]) | Err(_) => return,
        }
        if let Ok((stream, _)) = listener.accept() {
            // A client that goes away or stalls has itself to blame.
            let _ = converse(&stream, *access, giver, stop);
        } else {
            // Out of descriptors, most likely: not as fast as the CPU allows.
            let _ = wait(
                [(stop.as_fd(), Interest::Read)],
                Some(Duration::from_millis(50)),
            );
        }
    }
}

fn converse<F: Fleet>(
    stream: &UnixStream,
    access: Access,
    giver: &Giver<'_, F>,
    stop: &Event,
) -> io::Result<()> {
    stream.set_nonblocking(true)?;
    let deadline = Instant::now() + Duration::from_secs(ADMIN_TIMEOUT_SECS);
    let request = receive(stream, stop, deadline)?;
    if access.is_control()
        && let Some(follow) = request.as_deref().and_then(|r| follow(r, giver.fleet))
    {
        (&mut &*stream).write_all(FOLLOWED)?;
        return follow(stream.try_clone()?);
    }
    let answer = match request {
        Some(request) if access.is_control() && request.starts_with("POST /take-over ") => {
            let body = request.split_once("\r\n\r\n").map_or("", |(_, body)| body);
            match giver.give(stream, body) {
                Ok(()) => return Ok(()),
                Err((status, sentence)) => text(status, &sentence),
            }
        }
        Some(request) => answer(&request, access, giver.fleet),
        None => text("413 Content Too Large", "the request is too long"),
    };
    let Answer { status, kind, body } = answer;
    let head = format!(
        "HTTP/1.0 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n",
        body.len()
    );
    let bytes = [head.as_bytes(), body.as_bytes()].concat();
    let mut rest = bytes.as_slice();
    while !rest.is_empty() {
        match (&mut &*stream).write(rest) {
            Ok(n) => rest = rest.get(n..).unwrap_or_default(),
            Err(error) => pause(error, stream, stop, Interest::Write, deadline)?,
        }
    }
    Ok(())
}

/// Head and body; `None`: too long.
fn receive(stream: &UnixStream, stop: &Event, deadline: Instant) -> io::Result<Option<String>> {
    let mut bytes = Vec::new();
    loop {
        if let Some(end) = end_of(&bytes) {
            if end > MAX_ADMIN_REQUEST {
                return Ok(None);
            }
            if bytes.len() >= end {
                bytes.truncate(end);
                return Ok(Some(String::from_utf8_lossy(&bytes).into_owned()));
            }
        } else if bytes.len() >= MAX_ADMIN_REQUEST {
            return Ok(None);
        }
        let mut part = [0; 1024];
        match (&mut &*stream).read(&mut part) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => bytes.extend(part.get(..n).unwrap_or_default()),
            Err(error) => pause(error, stream, stop, Interest::Read, deadline)?,
        }
    }
}

/// Where the request ends, once its head is there.
fn end_of(bytes: &[u8]) -> Option<usize> {
    let head = bytes.windows(4).position(|four| four == b"\r\n\r\n")? + 4;
    let text = String::from_utf8_lossy(bytes.get(..head)?);
    let body: usize = text
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        // A number that is none is too long.
        .map_or(0, |(_, value)| value.trim().parse().unwrap_or(usize::MAX));
    Some(head.saturating_add(body))
}

fn pause(
    error: io::Error,
    stream: &UnixStream,
    stop: &Event,
    interest: Interest,
    deadline: Instant,
) -> io::Result<()> {
    match error.kind() {
        io::ErrorKind::Interrupted => return Ok(()),
        io::ErrorKind::WouldBlock => {}
        _ => return Err(error),
    }
    let left = deadline.saturating_duration_since(Instant::now());
    match wait(
        [(stop.as_fd(), Interest::Read), (stream.as_fd(), interest)],
        Some(left),
    )? {
        [false, true] => Ok(()),
        _ => Err(io::ErrorKind::TimedOut.into()),
    }
}

/// The head of an answer without an end; short enough for any socket to take at once.
const FOLLOWED: &[u8] =
    b"HTTP/1.0 200 OK\r\nContent-Type: application/octet-stream\r\nConnection: close\r\n\r\n";

fn follow<'f, F: Fleet>(request: &str, fleet: &'f F) -> Option<Follow<'f>> {
    let (method, rest) = request.lines().next()?.split_once(' ')?;
    let path: Vec<&str> = rest.split(' ').next()?.split('/').skip(1).collect();
    match (method, path.as_slice()) {
        ("GET", [devices, name, what]) if *devices == F::DEVICES => fleet.follow(name, what),
        _ => None,
    }
}

fn answer<F: Fleet>(request: &str, access: Access, fleet: &F) -> Answer {
    let (head, body) = request.split_once("\r\n\r\n").unwrap_or((request, ""));
    let mut words = head.lines().next().unwrap_or_default().split(' ');
    let (method, target) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
    let path: Vec<&str> = target.split('/').skip(1).collect();
    match (method, path.as_slice()) {
        ("GET", ["metrics"]) => Answer {
            status: "200 OK",
            kind: "text/plain; version=0.0.4",
            body: fleet.prometheus(),
        },
        ("GET", ["stats"]) => Answer {
            status: "200 OK",
            kind: "application/json",
            body: fleet.json(),
        },
        ("PUT", [devices, name, what]) if *devices == F::DEVICES => {
            if !access.is_control() {
                return text(
                    "403 Forbidden",
                    "this socket changes nothing; use --control-socket",
                );
            }
            match fleet.put(name, what, body) {
                Ok(sentence) => text("200 OK", &sentence),
                Err(Denied::NotFound(reason)) => text("404 Not Found", reason),
                Err(Denied::Bad(reason)) => text("400 Bad Request", &reason),
                Err(Denied::Refused(reason)) => text("409 Conflict", &reason),
            }
        }
        _ => text("404 Not Found", fleet.requests()),
    }
}

fn text(status: &'static str, body: &str) -> Answer {
    Answer {
        status,
        kind: "text/plain",
        body: format!("{body}\n"),
    }
}
