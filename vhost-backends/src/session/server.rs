//! Connection after connection, on one device.

use crate::limits::ACCEPT_RETRY_MILLIS;
use crate::readiness::{Event, Interest, wait};
use crate::session::Session;
use crate::session::device::Device;
use crate::session::handover::{Connection, Gate, PausePoint, concerns_one_session};
use crate::session::quota::PEER_LINES;
use crate::session::request::Refusal;
use crate::session::socket::{Channel, ChannelEnd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

/// How a session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SessionEnd {
    /// The frontend hung up.
    HangUp,
    /// The stop event was set.
    Stopped,
    /// The frontend sent what is not a message, or the socket failed.
    Broken,
    /// Another process serves the frontend on the same connection.
    HandedOver,
}

/// What a server tells about its connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectionEvent {
    /// A frontend is there.
    Connected,
    /// Its connection is over, and everything is drained.
    Ended(SessionEnd),
}

/// Serves one connection of `device` on the calling thread, until the frontend hangs up. All I/O is
/// drained then. For a VMM that serves a device in its own process.
///
/// # Errors
/// When the connection ended in another way.
pub fn serve(device: &dyn Device, stream: UnixStream) -> io::Result<()> {
    // Nobody sets it: hanging up is what ends this.
    let never = Event::new()?;
    match serve_until(device, stream, never.as_fd(), None) {
        SessionEnd::HangUp | SessionEnd::Stopped | SessionEnd::HandedOver => Ok(()),
        SessionEnd::Broken => Err(io::Error::other("the connection broke")),
    }
}

type Watch = dyn Fn(ConnectionEvent) + Send + Sync;

/// Serves one device to one frontend after the other.
#[derive(Clone)]
pub struct Server {
    device: Arc<dyn Device>,
    stop: Arc<OwnedFd>,
    watch: Option<Arc<Watch>>,
    point: Option<Arc<PausePoint>>,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").finish_non_exhaustive()
    }
}

impl Server {
    /// A server of `device` that ends when `stop` becomes readable.
    pub fn new(device: Arc<dyn Device>, stop: OwnedFd) -> Server {
        let stop = Arc::new(stop);
        Server {
            device,
            stop,
            watch: None,
            point: None,
        }
    }

    /// Calls `watch` at the start and the end of each connection, from the thread that serves.
    pub fn watched(mut self, watch: impl Fn(ConnectionEvent) + Send + Sync + 'static) -> Server {
        self.watch = Some(Arc::new(watch));
        self
    }

    /// Stops at `point` when that is asked for, and may leave what it serves there to another
    /// process.
    pub(crate) fn pausing(mut self, point: Arc<PausePoint>) -> Server {
        self.point = Some(point);
        self
    }

    /// Takes up what another process served, and serves it once the gate opens. `None`: it did
    /// not, and nothing was done. A session that cannot be taken up for a reason of its own does
    /// not hold the gate up: it is over when that opens.
    pub(crate) fn take_up(&self, connection: Connection, gate: &Gate) -> Option<SessionEnd> {
        let Connection {
            stream,
            messages,
            config,
            begun,
        } = connection;
        let point = self.point.as_deref();
        let channel = Channel::new(stream, self.stop.as_fd()).pausing(point);
        let mut channel = channel.beginning(begun);
        let mut session = Session::new(&*self.device, channel.hang_up());
        let restored = session.restore(messages);
        let ready = match &restored {
            Err(refusal) if !concerns_one_session(refusal) => {
                Err(format!("its state cannot be taken up: {refusal}"))
            }
            _ if !self.device.resume_config(&config) => {
                Err("the device is not the one that the frontend knows".into())
            }
            _ => Ok(()),
        };
        if !gate.pass(ready) {
            return None;
        }
        let started = match restored {
            Ok(()) => session.release(),
            Err(refusal) => {
                session.end();
                Err(refusal)
            }
        };
        gate.serves();
        self.tell(ConnectionEvent::Connected);
        let end = match started {
            Ok(()) => go_on(session, &mut channel, point),
            Err(refusal) => not_taken_up(&refusal),
        };
        self.tell(ConnectionEvent::Ended(end));
        Some(end)
    }

    /// Serves one connection. When this returns, all I/O is drained and every descriptor that
    /// came over the connection is closed.
    pub fn serve(&self, stream: UnixStream) -> SessionEnd {
        self.tell(ConnectionEvent::Connected);
        let end = serve_until(
            &*self.device,
            stream,
            self.stop.as_fd(),
            self.point.as_deref(),
        );
        self.tell(ConnectionEvent::Ended(end));
        end
    }

    fn tell(&self, event: ConnectionEvent) {
        if let Some(watch) = &self.watch {
            watch(event);
        }
    }

    /// Serves connection after connection until the stop event.
    pub fn run(&self, listener: &UnixListener) -> io::Result<()> {
        listener.set_nonblocking(true)?;
        loop {
            let stop = self.stop.as_fd();
            let pause = self.point.as_ref().map_or(stop, |point| point.as_fd());
            let fds = [stop, pause, listener.as_fd()];
            match (wait(fds.map(|fd| (fd, Interest::Read)), None)?, &self.point) {
                ([true, ..], _) => return Ok(()),
                ([_, true, _], Some(point)) => {
                    if point.park(Ok(None)) {
                        continue;
                    }
                    return Ok(());
                }
                _ => {}
            }
            let stream = match listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if is_transient(&error) => continue,
                Err(error) if is_shortage(&error) => {
                    if PEER_LINES.may_say() {
                        tracing::warn!(%error, "cannot take a connection yet");
                    }
                    let pause = Duration::from_millis(ACCEPT_RETRY_MILLIS);
                    wait([(self.stop.as_fd(), Interest::Read)], Some(pause))?;
                    continue;
                }
                Err(error) => return Err(error),
            };
            if matches!(
                self.serve(stream),
                SessionEnd::Stopped | SessionEnd::HandedOver
            ) {
                return Ok(());
            }
        }
    }

    /// Runs a server in a thread of its own.
    pub fn spawn(device: Arc<dyn Device>, listener: UnixListener) -> io::Result<ServerHandle> {
        let stop = Event::new()?;
        let server = Server::new(device, stop.duplicate()?);
        let thread = std::thread::Builder::new()
            .name("vhost-user".into())
            .spawn(move || server.run(&listener))?;
        Ok(ServerHandle {
            stop,
            thread: Some(thread),
        })
    }
}

fn serve_until(
    device: &dyn Device,
    stream: UnixStream,
    stop: BorrowedFd<'_>,
    point: Option<&PausePoint>,
) -> SessionEnd {
    let mut channel = Channel::new(stream, stop).pausing(point);
    let session = Session::new(device, channel.hang_up());
    go_on(session, &mut channel, point)
}

fn go_on(
    mut session: Session<'_>,
    channel: &mut Channel<'_>,
    point: Option<&PausePoint>,
) -> SessionEnd {
    loop {
        let end = session.serve(channel);
        match (end, point) {
            (ChannelEnd::HangUp, _) if !session.hang_up.was_used() => return SessionEnd::HangUp,
            (ChannelEnd::Stopped, _) => return SessionEnd::Stopped,
            (ChannelEnd::Paused, Some(point)) => {
                if !point.park(session.leave_on(channel).map(Some)) {
                    return SessionEnd::HandedOver;
                }
                if let Err(refusal) = session.release() {
                    return not_taken_up(&refusal);
                }
            }
            (other, _) => {
                if PEER_LINES.may_say() {
                    tracing::warn!(reason = %other, "connection ended");
                }
                return SessionEnd::Broken;
            }
        }
    }
}

/// A session cannot go on where it stopped.
fn not_taken_up(refusal: &Refusal) -> SessionEnd {
    if PEER_LINES.may_say() {
        tracing::warn!(%refusal, "a session could not go on; its frontend has to connect again");
    }
    SessionEnd::Broken
}

/// A peer that is gone again, or a signal, is no reason to end.
fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted
    )
}

/// The process or the host has no room for a connection now. The peer waits in the queue.
fn is_shortage(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM)
    )
}

/// A server in a thread; stopped and joined on drop.
#[derive(Debug)]
pub struct ServerHandle {
    stop: Event,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl ServerHandle {
    /// Drains and stops the server.
    pub fn stop(mut self) -> io::Result<()> {
        self.join()
    }

    fn join(&mut self) -> io::Result<()> {
        self.stop.set();
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            Some(Err(_)) => Err(io::Error::other("the server thread panicked")),
            None => Ok(()),
        }
    }
}

impl Drop for ServerHandle {
    fn drop(&mut self) {
        // The outcome was of interest to `stop`'s caller only.
        let _ = self.join();
    }
}
