//! The statistics and control sockets: HTTP/1.0 in its smallest form.
//!
//! | request | on | answer |
//! |---|---|---|
//! | `GET /metrics` | both | Prometheus text |
//! | `GET /stats` | both | the same as JSON |
//! | `POST /take-over` | control | hands everything to the client ([`super::handover`]) |
//! | `GET /DEVICES/NAME/WHAT` | control | what the [`Fleet`] has without an end |
//! | `PUT /DEVICES/NAME/WHAT` | control | what the daemon's [`Fleet`] makes of it |
//!
//! In come bytes of anybody who may connect; nothing of them is kept beyond the answer. One thread
//! carries requests out, each as soon as all of it is there, so nobody waits for a client that is slow:
//! that one is left after [`ADMIN_TIMEOUT_SECS`], or where [`MAX_ADMIN_CLIENTS`] have come after it. One
//! that asks for much is refused at [`MAX_ADMIN_REQUEST`].

use super::handover::Giver;
use super::{Denied, Fleet, Follow};
use crate::limits::{
    ACCEPT_RETRY_MILLIS, ADMIN_TIMEOUT_SECS, MAX_ADMIN_CLIENTS, MAX_ADMIN_REQUEST,
};
use crate::readiness::{Event, Interest, wait, wait_any};
use std::collections::VecDeque;
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
    if socket.listener.set_nonblocking(true).is_err() {
        return;
    }
    // In the order in which they came, and so in that of their deadlines.
    let mut clients = VecDeque::<Client>::new();
    loop {
        let mut fds = vec![
            (stop.as_fd(), Interest::Read),
            (socket.listener.as_fd(), Interest::Read),
        ];
        fds.extend(clients.iter().map(|c| (c.stream.as_fd(), c.interest())));
        let first = clients.front().map(|client| client.deadline);
        let left = first.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let Ok(ready) = wait_any(&fds, left) else {
            return;
        };
        let mut ready = ready.into_iter();
        if ready.next() == Some(true) {
            return;
        }
        let new = ready.next() == Some(true);
        let now = Instant::now();
        clients.retain_mut(|client| match ready.next() {
            // A client that goes away has itself to blame.
            Some(true) => matches!(client.go_on(socket.access, giver), Ok(Progress::Waits)),
            _ => now < client.deadline,
        });
        if !new {
            continue;
        }
        if let Ok((stream, _)) = socket.listener.accept() {
            if clients.len() >= MAX_ADMIN_CLIENTS {
                clients.pop_front();
            }
            clients.extend(Client::new(stream));
        } else {
            // Out of descriptors, most likely: not as fast as the CPU allows.
            let pause = Duration::from_millis(ACCEPT_RETRY_MILLIS);
            let _ = wait([(stop.as_fd(), Interest::Read)], Some(pause));
        }
    }
}

/// One that asks, or takes its answer.
struct Client {
    stream: UnixStream,
    deadline: Instant,
    received: Vec<u8>,
    /// What is left of the answer, once there is one.
    answer: Option<VecDeque<u8>>,
}

/// How far a client is.
enum Progress {
    Waits,
    Over,
}

impl Client {
    fn new(stream: UnixStream) -> Option<Client> {
        stream.set_nonblocking(true).ok()?;
        Some(Client {
            stream,
            deadline: Instant::now() + Duration::from_secs(ADMIN_TIMEOUT_SECS),
            received: Vec::new(),
            answer: None,
        })
    }

    fn interest(&self) -> Interest {
        match self.answer {
            None => Interest::Read,
            Some(_) => Interest::Write,
        }
    }

    /// As far as it goes without waiting for the client.
    fn go_on<F: Fleet>(&mut self, access: Access, giver: &Giver<'_, F>) -> io::Result<Progress> {
        if self.answer.is_none() {
            let answer = match self.receive()? {
                Received::Part => return Ok(Progress::Waits),
                Received::TooLong => text("413 Content Too Large", "the request is too long"),
                Received::Request(request) => {
                    match respond(&request, &self.stream, access, giver)? {
                        Some(answer) => answer,
                        None => return Ok(Progress::Over),
                    }
                }
            };
            self.answer = Some(answer.bytes().into());
        }
        self.send()
    }

    fn receive(&mut self) -> io::Result<Received> {
        let bytes = &mut self.received;
        loop {
            if let Some(end) = end_of(bytes) {
                if end > MAX_ADMIN_REQUEST {
                    return Ok(Received::TooLong);
                }
                if let Some(request) = bytes.get(..end) {
                    let request = String::from_utf8_lossy(request).into_owned();
                    return Ok(Received::Request(request));
                }
            } else if bytes.len() >= MAX_ADMIN_REQUEST {
                return Ok(Received::TooLong);
            }
            let mut part = [0; 1024];
            match self.stream.read(&mut part) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => bytes.extend(part.get(..n).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Ok(Received::Part);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn send(&mut self) -> io::Result<Progress> {
        let rest = self.answer.get_or_insert_default();
        while !rest.is_empty() {
            match self.stream.write(rest.as_slices().0) {
                Ok(n) => drop(rest.drain(..n)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Ok(Progress::Waits);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Progress::Over)
    }
}

/// What has come of a request.
enum Received {
    Part,
    TooLong,
    /// Head and body.
    Request(String),
}

/// Carries a request out. `None`: it needs no answer any more.
fn respond<F: Fleet>(
    request: &str,
    stream: &UnixStream,
    access: Access,
    giver: &Giver<'_, F>,
) -> io::Result<Option<Answer>> {
    if !access.is_control() {
        return Ok(Some(answer(request, access, giver.fleet)));
    }
    if let Some(follow) = follow(request, giver.fleet) {
        (&mut &*stream).write_all(FOLLOWED)?;
        follow(stream.try_clone()?)?;
        return Ok(None);
    }
    if request.starts_with("POST /take-over ") {
        let body = request.split_once("\r\n\r\n").map_or("", |(_, body)| body);
        let refused = giver.give(stream, body).err();
        return Ok(refused.map(|(status, sentence)| text(status, &sentence)));
    }
    Ok(Some(answer(request, access, giver.fleet)))
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

impl Answer {
    fn bytes(&self) -> Vec<u8> {
        let Answer { status, kind, body } = self;
        let head = format!(
            "HTTP/1.0 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\
             Connection: close\r\n\r\n",
            body.len()
        );
        [head.as_bytes(), body.as_bytes()].concat()
    }
}
