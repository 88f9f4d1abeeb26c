//! A stream socket on which each frame has its length in front, 32 bits in network order: what
//! passt, gvproxy and QEMU's `-netdev stream` speak.
//!
//! The peer may go and come back. Frames carry no offloads; the device completes them. A peer that
//! does not read has a bounded backlog, and whatever goes beyond it is dropped.

use super::{Port, Received, vectors};
use crate::net::frame::Frame;
use crate::net::limits::{MAX_FRAME_LEN, MAX_STREAM_BACKLOG, MIN_FRAME_LEN, STREAM_RETRY_MILLIS};
use crate::net::offload::Offloads;
use crate::net::source::Reader;
use crate::net::stats::Drop;
use crate::readiness::{Interest, epoll_fd, timer_fd, wait};
use crate::session::quota::PEER_LINES;
use pv_abi::virtio::net::Header;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use vm_memory::{Bytes, VolatileSlice};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::timerfd::TimerFd;

/// Bytes read at once.
const READ: usize = 128 << 10;
/// Bytes of the length in front of each frame.
const LENGTH: usize = 4;

/// Makes connections to the peer.
type Dial = Box<dyn Fn() -> io::Result<UnixStream> + Send + Sync>;

/// How the peer is reached.
pub enum StreamAddress {
    /// By connecting, as often as it takes.
    Connect(Dial),
    /// By waiting for it.
    Listen(UnixListener),
    /// It is there; when it goes, nothing comes any more.
    Connected(UnixStream),
}

impl std::fmt::Debug for StreamAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            StreamAddress::Connect(_) => "Connect",
            StreamAddress::Listen(_) => "Listen",
            StreamAddress::Connected(_) => "Connected",
        })
    }
}

/// A peer behind a stream socket.
#[derive(Debug)]
pub struct Stream {
    address: StreamAddress,
    /// Readable when there is anything to do.
    events: Epoll,
    retry: Mutex<TimerFd>,
    socket: Mutex<Option<Arc<UnixStream>>>,
    /// What the peer has not read yet: the rest of a frame, and whole ones.
    backlog: Mutex<Vec<u8>>,
    input: Mutex<Input>,
}

#[derive(Debug, Default)]
struct Input {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

/// What became of the bytes that were read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Parsed {
    /// Every whole frame was delivered.
    NeedsMore,
    /// The guest has no buffer for the next one, which is kept.
    NoBuffer,
    /// They are not frames.
    Nonsense,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Stream {
    /// A port with this peer.
    pub fn new(address: StreamAddress) -> io::Result<Stream> {
        let (events, retry) = (Epoll::new()?, TimerFd::new().map_err(io::Error::from)?);
        watch(&events, &retry, EventSet::IN)?;
        let mut first = None;
        match &address {
            StreamAddress::Listen(listener) => {
                listener.set_nonblocking(true)?;
                watch(&events, listener, EventSet::IN)?;
            }
            StreamAddress::Connect(dial) => first = dial().ok(),
            StreamAddress::Connected(stream) => first = Some(stream.try_clone()?),
        }
        let stream = Stream {
            address,
            events,
            retry: Mutex::new(retry),
            socket: Mutex::default(),
            backlog: Mutex::default(),
            input: Mutex::default(),
        };
        match first {
            Some(socket) => stream.connected(socket)?,
            None => stream.try_later(),
        }
        Ok(stream)
    }

    fn connected(&self, socket: UnixStream) -> io::Result<()> {
        socket.set_nonblocking(true)?;
        watch(&self.events, &socket, EventSet::IN)?;
        *lock(&self.input) = Input::default();
        // Senders take the socket while they have the backlog: what is in it is for that socket.
        let mut backlog = lock(&self.backlog);
        backlog.clear();
        *lock(&self.socket) = Some(Arc::new(socket));
        Ok(())
    }

    /// The peer is gone, or speaks something else.
    fn disconnect(&self) {
        if let Some(socket) = lock(&self.socket).take() {
            let fd = socket.as_raw_fd();
            let event = EpollEvent::default();
            // Whoever still has it finds it at its end.
            let _ = self.events.ctl(ControlOperation::Delete, fd, event);
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
        self.try_later();
    }

    fn try_later(&self) {
        if matches!(self.address, StreamAddress::Connect(_)) {
            let after = Duration::from_millis(STREAM_RETRY_MILLIS);
            if let Err(error) = lock(&self.retry).reset(after, None) {
                tracing::error!(%error, "a stream's peer is not looked for any more");
            }
        }
    }

    /// Looks whether the peer came back.
    fn look_for_peer(&self) -> Received {
        let expired = {
            let mut retry = lock(&self.retry);
            // Not to wait for it: it is read only if it is over.
            let over = wait([(timer_fd(&retry), Interest::Read)], Some(Duration::ZERO));
            over.is_ok_and(|[over]| over) && retry.wait().is_ok()
        };
        let socket = match &self.address {
            StreamAddress::Connect(dial) if expired => dial().ok(),
            StreamAddress::Listen(listener) => match accept(listener) {
                Ok(socket) => socket,
                Err(_) => return Received::Away,
            },
            _ => return Received::Drained,
        };
        match socket.map(|socket| self.connected(socket)) {
            Some(Ok(())) => {}
            _ => self.try_later(),
        }
        Received::Drained
    }

    fn want_writable(&self, socket: &UnixStream, wanted: bool) {
        let events = if wanted {
            EventSet::IN | EventSet::OUT
        } else {
            EventSet::IN
        };
        let event = EpollEvent::new(events, 0);
        // Gone meanwhile: then there is nothing to write to either.
        let _ = self
            .events
            .ctl(ControlOperation::Modify, socket.as_raw_fd(), event);
    }

    /// Writes of the backlog what the peer takes. Whether nothing is left; `None`: it takes
    /// nothing any more.
    fn flush(&self, socket: &UnixStream, backlog: &mut Vec<u8>) -> Option<bool> {
        if backlog.is_empty() {
            return Some(true);
        }
        let sent = self.write(socket, backlog, &[]);
        let Some(sent) = sent else {
            backlog.clear();
            return None;
        };
        backlog.drain(..sent.min(backlog.len()));
        if backlog.is_empty() {
            self.want_writable(socket, false);
        }
        Some(backlog.is_empty())
    }

    /// Sends what the peer takes now. `None`: it takes nothing any more, and is given up, which the
    /// reading side sees.
    fn write(
        &self,
        socket: &UnixStream,
        head: &[u8],
        pieces: &[VolatileSlice<'_, ()>],
    ) -> Option<usize> {
        match vectors::send(socket.as_fd(), head, pieces) {
            Ok(n) => Some(n),
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Some(0),
                _ => {
                    // What is always writable must not be waited for.
                    self.want_writable(socket, false);
                    let _ = socket.shutdown(std::net::Shutdown::Both);
                    None
                }
            },
        }
    }

    /// Sends a frame, or keeps what the peer does not take now. `false`: there is no room.
    fn send_one(&self, socket: &UnixStream, backlog: &mut Vec<u8>, frame: &Frame<'_>) -> bool {
        // Shorter than 2^17.
        let length = (frame.len() as u32).to_be_bytes();
        let mut sent = 0;
        let Some(flushed) = self.flush(socket, backlog) else {
            return false;
        };
        if flushed {
            match self.write(socket, &length, frame.pieces()) {
                Some(n) if n == LENGTH + frame.len() => return true,
                Some(n) => sent = n,
                None => return false,
            }
            self.want_writable(socket, true);
        } else if backlog.len() + LENGTH + frame.len() > MAX_STREAM_BACKLOG {
            return false;
        }
        backlog.extend(length.get(sent.min(LENGTH)..).unwrap_or_default());
        let mut skip = sent.saturating_sub(LENGTH);
        for piece in frame.pieces() {
            let from = skip.min(piece.len());
            skip -= from;
            let start = backlog.len();
            backlog.resize(start + piece.len() - from, 0);
            if let Some(to) = backlog.get_mut(start..) {
                // The range is inside the piece.
                let _ = piece.read_slice(to, from);
            }
        }
        true
    }

    /// Gives the guest the frames that are there.
    fn parse(input: &mut Input, reader: &mut Reader<'_>) -> Parsed {
        loop {
            let there = input.bytes.get_mut(input.start..input.end);
            let there = there.unwrap_or_default();
            let Some((length, rest)) = there.split_first_chunk_mut::<LENGTH>() else {
                return Parsed::NeedsMore;
            };
            let len = u32::from_be_bytes(*length) as usize;
            if len > MAX_FRAME_LEN {
                return Parsed::Nonsense;
            }
            let Some(bytes) = rest.get_mut(..len) else {
                return Parsed::NeedsMore;
            };
            if len < MIN_FRAME_LEN {
                reader.drop(Drop::Length);
            } else if !reader.has_buffer() {
                // Kept until there is one.
                return Parsed::NoBuffer;
            } else {
                let pieces = [VolatileSlice::from(bytes)];
                reader.deliver(&Frame::new(Header::default(), &pieces, len));
            }
            input.start += LENGTH + len;
        }
    }
}

/// Who waits for a connection. An error: nobody can have one now, and they go on waiting.
fn accept(listener: &UnixListener) -> io::Result<Option<UnixStream>> {
    match listener.accept() {
        Ok((socket, _)) => Ok(Some(socket)),
        Err(error) => match error.kind() {
            io::ErrorKind::WouldBlock
            | io::ErrorKind::Interrupted
            | io::ErrorKind::ConnectionAborted => Ok(None),
            _ => Err(error),
        },
    }
}

fn watch(epoll: &Epoll, fd: &impl AsRawFd, events: EventSet) -> io::Result<()> {
    let event = EpollEvent::new(events, 0);
    epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), event)
}

impl Input {
    /// Makes room behind what is there.
    fn room(&mut self) -> &mut [u8] {
        if self.bytes.is_empty() {
            self.bytes = vec![0; READ];
        }
        if self.start > 0 {
            self.bytes.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        self.bytes.get_mut(self.end..).unwrap_or_default()
    }
}

impl Port for Stream {
    fn max_pairs(&self) -> u16 {
        1
    }

    fn offloads(&self) -> Offloads {
        Offloads::default()
    }

    fn send(&self, _pair: u16, frames: &[Frame<'_>]) -> usize {
        let mut backlog = lock(&self.backlog);
        let Some(socket) = lock(&self.socket).clone() else {
            return 0;
        };
        frames
            .iter()
            .take_while(|frame| self.send_one(&socket, &mut backlog, frame))
            .count()
    }

    fn source(&self, pair: u16) -> Option<BorrowedFd<'_>> {
        (pair == 0).then(|| epoll_fd(&self.events))
    }

    fn receive(&self, _pair: u16, reader: &mut Reader<'_>) -> io::Result<Received> {
        let Some(socket) = lock(&self.socket).clone() else {
            return Ok(self.look_for_peer());
        };
        self.flush(&socket, &mut lock(&self.backlog));
        let mut input = lock(&self.input);
        let mut again = false;
        let received = loop {
            match Stream::parse(&mut input, reader) {
                // What waits for the peer goes on all the same.
                Parsed::NoBuffer => return Ok(Received::Away),
                Parsed::NeedsMore if again => break Ok(Received::More),
                Parsed::NeedsMore => {}
                Parsed::Nonsense => break Err("it does not send frames"),
            }
            match (&*socket).read(input.room()) {
                Ok(0) => break Err("it hung up"),
                Ok(n) => input.end += n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    break Ok(Received::Drained);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => break Err("its connection broke"),
            }
            again = true;
        };
        drop(input);
        match received {
            Ok(received) => {
                if let StreamAddress::Listen(listener) = &self.address {
                    // One peer at a time; a second one is turned away.
                    if accept(listener).is_err() {
                        return Ok(Received::Away);
                    }
                }
                Ok(received)
            }
            Err(reason) => {
                if PEER_LINES.may_say() {
                    tracing::info!(reason, "a stream's peer is gone");
                }
                self.disconnect();
                Ok(self.look_for_peer())
            }
        }
    }
}
