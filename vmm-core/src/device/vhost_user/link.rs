//! Keeping a backend behind a device: spawn or connect, notice loss, start over.

use super::frontend::VhostUser;
use super::notices::Notices;
use super::spawn::{BackendProcess, connect};
use super::thread::BackendThread;
use super::{Remote, Source};
use crate::device::local::OnPanic;
use crate::device::{Offer, Slot};
use crate::fault::{Fault, PeerLost, Policy};
use crate::limits::{
    BACKEND_CONNECT_TIMEOUT, HUNG_UP_END, RECONNECT_PAUSE, RECONNECT_PAUSE_IN_USE, REFRESH_PAUSE,
    STEADY_CONNECTION,
};
use crate::own_thread;
use crate::owner::Owner;
use crate::vm::VmEvent;
use crate::vm::events::signal;
use crate::vm::stats::Counters;
use std::io;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// What woke a link, as bits among the epoll's data: the order to stop, the peer's end, and what the
/// peer has to say.
const STOP: u64 = 1;
const PEER: u64 = 2;
const NOTICE: u64 = 4;

/// Where an embedder hears of losses and reconnects.
pub(crate) type EventSink = Arc<dyn Fn(VmEvent) + Send + Sync>;

/// Whom a link tells what.
pub(crate) struct Reports {
    pub(crate) counters: Arc<Counters>,
    pub(crate) events: EventSink,
    /// Called if the embedder's event sink panics.
    pub(crate) panicked: Box<dyn FnOnce() + Send>,
    /// The VM's.
    pub(crate) span: tracing::Span,
}

/// The thread that keeps one backend.
pub(crate) struct Link {
    owner: Owner,
    control: Arc<Control>,
    thread: Option<JoinHandle<()>>,
}

/// What others may do to a link while its thread is busy.
struct Control {
    stop: EventFd,
    stopping: AtomicBool,
    /// The connection that is there or being made.
    stream: Mutex<Option<UnixStream>>,
    pid: AtomicU32,
}

impl Control {
    /// The connection to hang up when the link is stopped.
    fn publish(&self, stream: &UnixStream) -> io::Result<()> {
        let stream = stream.try_clone()?;
        let mut slot = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        if self.stopping.load(Ordering::Acquire) {
            let _ = stream.shutdown(Shutdown::Both);
        }
        *slot = Some(stream);
        Ok(())
    }

    fn stop(&self) {
        let slot = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        self.stopping.store(true, Ordering::Release);
        let _ = signal(&self.stop);
        if let Some(stream) = slot.as_ref() {
            // Whoever waits for an answer gets an end instead; the backend drains by itself.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

struct Keeper {
    config: Remote,
    slot: Arc<Slot>,
    counters: Arc<Counters>,
    events: EventSink,
    control: Arc<Control>,
    epoll: Epoll,
}

/// Who is at the other end of a connection.
enum Peer {
    Process(BackendProcess),
    Thread(BackendThread),
    /// Somebody else's.
    Foreign,
}

impl Peer {
    /// It has not shaken hands; why, as far as it is known. Nothing has been shared with it yet, so it
    /// is not waited for longer than the moment in which most are seen to end.
    fn not_ready(&mut self, error: io::Error) -> io::Error {
        let hung_up = error.kind() == io::ErrorKind::UnexpectedEof;
        let how = match self {
            Peer::Process(process) if hung_up => process.has_ended(HUNG_UP_END),
            Peer::Thread(thread) => thread.leave(),
            Peer::Process(_) | Peer::Foreign => None,
        };
        if !hung_up {
            return error;
        }
        let how = how.map_or_else(String::new, |how| format!(": {how}"));
        let text = format!("the backend hung up before it was ready{how}");
        io::Error::new(error.kind(), text)
    }
}

struct Connection {
    peer: Peer,
    stream: UnixStream,
    /// What it says unasked.
    notices: Option<Notices>,
    since: Instant,
}

/// When the configuration is read again: at once, and not more often than every [`REFRESH_PAUSE`].
#[derive(Debug, Default)]
struct Refresh {
    due: Option<Instant>,
    earliest: Option<Instant>,
}

impl Refresh {
    /// It has changed.
    fn want(&mut self, now: Instant) {
        let earliest = self.earliest.filter(|earliest| *earliest > now);
        self.due.get_or_insert(earliest.unwrap_or(now));
    }

    /// How long it is until then, if it is to be read.
    fn due_in(&self, now: Instant) -> Option<Duration> {
        self.due.map(|due| due.saturating_duration_since(now))
    }

    /// Whether to read it now.
    fn take(&mut self, now: Instant) -> bool {
        self.due.take_if(|due| *due <= now).is_some()
    }

    /// It has been read.
    fn done(&mut self, now: Instant) {
        self.earliest = Some(now + REFRESH_PAUSE);
    }
}

impl Link {
    /// Starts the thread and waits for the first handshake.
    pub(crate) fn start(config: Remote, slot: Arc<Slot>, reports: Reports) -> io::Result<Link> {
        let control = Arc::new(Control {
            stop: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            stopping: AtomicBool::new(false),
            stream: Mutex::new(None),
            pid: AtomicU32::new(0),
        });
        let epoll = Epoll::new()?;
        let stop = EpollEvent::new(EventSet::IN, STOP);
        epoll.ctl(ControlOperation::Add, control.stop.as_raw_fd(), stop)?;
        let Reports {
            counters,
            events,
            panicked,
            span,
        } = reports;
        let keeper = Keeper {
            config,
            slot,
            counters,
            events,
            control: Arc::clone(&control),
            epoll,
        };
        let (sender, first) = mpsc::channel();
        let thread = own_thread::start("pv-backend", move || {
            let _vm = span.entered();
            let _guard = OnPanic(Some(panicked));
            keeper.run(&sender);
        })?;
        let link = Link {
            owner: Owner::here(),
            control,
            thread: Some(thread),
        };
        first
            .recv()
            .unwrap_or_else(|_| Err(io::Error::other("the backend thread ended")))?;
        Ok(link)
    }

    /// Process ID of a supervised backend; 0 while there is none.
    pub(crate) fn pid(&self) -> u32 {
        self.control.pid.load(Ordering::Relaxed)
    }

    /// Hangs up for good; whoever waits for the backend stops waiting. Does not wait itself.
    pub(crate) fn stop(&self) {
        self.control.stop();
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if !self.owner.is_here() {
            return std::mem::forget(self.thread.take());
        }
        self.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Keeper {
    fn run(self, first: &mpsc::Sender<io::Result<()>>) {
        let _span = tracing::debug_span!("backend", device = self.slot.info.index).entered();
        let mut connected = match self.first_connection() {
            Ok((connection, backend, offer)) => {
                let ready = self.slot.backend_ready(Box::new(backend), offer);
                let failed = ready.is_err();
                if first.send(ready).is_err() || failed {
                    return;
                }
                Some(connection)
            }
            Err(error) => {
                let _ = first.send(Err(error));
                return;
            }
        };
        let mut pause = RECONNECT_PAUSE.0;
        loop {
            if let Some(mut connection) = connected.take() {
                let since = connection.since;
                if self.wait_for_loss(&mut connection) {
                    return self.end(connection);
                }
                let Some(in_use) = self.lose(connection) else {
                    return;
                };
                if since.elapsed() >= STEADY_CONNECTION {
                    pause = RECONNECT_PAUSE.0;
                }
                let most = if in_use {
                    RECONNECT_PAUSE_IN_USE
                } else {
                    RECONNECT_PAUSE.1
                };
                pause = pause.min(most);
            }
            if self.sleep(pause) {
                return;
            }
            pause = (pause * 2).min(RECONNECT_PAUSE.1);
            match self.connect() {
                Ok((connection, backend, offer)) => {
                    if let Err(error) = self.slot.backend_ready(Box::new(backend), offer) {
                        tracing::error!(%error, "the device table cannot be written");
                    }
                    self.counters.backend_reconnects.add(1);
                    let device = self.slot.info.index;
                    (self.events)(VmEvent::BackendReconnected { device });
                    connected = Some(connection);
                }
                Err(error) => tracing::debug!(%error, "backend not back yet"),
            }
        }
    }

    /// The VM is over: the device stops, and then the backend.
    fn end(&self, connection: Connection) {
        self.slot.shut_down();
        drop(connection.stream);
        self.control
            .stream
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        match connection.peer {
            Peer::Process(mut process) => process.finish(),
            // Dropped, a thread is hung up on and waited for.
            Peer::Thread(_) | Peer::Foreign => {}
        }
    }

    /// The backend is gone: says so. Whether the device was in use, or `None` to stop.
    ///
    /// A backend of the VMM's own is known dead before the guest hears of it; another's resets wait
    /// until it takes a new connection.
    fn lose(&self, mut connection: Connection) -> Option<bool> {
        let device = self.slot.info.index;
        let (why, drained) = loop {
            let ended = match &mut connection.peer {
                Peer::Process(process) => process.kill(),
                Peer::Thread(thread) => thread.end(),
                Peer::Foreign => break ("it closed the connection".into(), false),
            };
            if let Some(why) = ended {
                break (why, true);
            }
            if self.sleep(RECONNECT_PAUSE.1) {
                return None;
            }
        };
        self.control.pid.store(0, Ordering::Relaxed);
        self.counters.backend_losses.add(1);
        let lost = PeerLost { device, why };
        tracing::warn!(%lost, "backend lost");
        let in_use = self.slot.backend_lost(drained).unwrap_or_else(|error| {
            tracing::error!(%error, "the device table cannot be written");
            false
        });
        (self.events)(VmEvent::BackendLost(lost.clone()));
        (Fault::Backend(lost).policy() == Policy::Reconnect).then_some(in_use)
    }

    /// A socket may not be listened on yet; a process that cannot be started will not be later.
    fn first_connection(&self) -> io::Result<(Connection, VhostUser, Offer)> {
        let deadline = Instant::now() + BACKEND_CONNECT_TIMEOUT;
        loop {
            match self.connect() {
                Err(error) if matches!(self.config.source, Source::Socket(_)) => {
                    let not_yet = matches!(
                        error.kind(),
                        io::ErrorKind::NotFound
                            | io::ErrorKind::ConnectionRefused
                            | io::ErrorKind::WouldBlock
                    );
                    if !not_yet || Instant::now() >= deadline || self.sleep(RECONNECT_PAUSE.0) {
                        return Err(error);
                    }
                }
                other => return other,
            }
        }
    }

    fn connect(&self) -> io::Result<(Connection, VhostUser, Offer)> {
        let (mut peer, stream) = match &self.config.source {
            Source::Spawn(command) => {
                let (process, stream) = BackendProcess::start(command())?;
                (Peer::Process(process), stream)
            }
            Source::InProcess(serve) => {
                let (thread, stream) = BackendThread::start(serve)?;
                (Peer::Thread(thread), stream)
            }
            Source::Socket(path) => (Peer::Foreign, connect(path)?),
        };
        self.control.publish(&stream)?;
        let model = Arc::clone(&self.config.model);
        let shaken = VhostUser::handshake(stream.try_clone()?, model);
        let (backend, offer, notices) = shaken.map_err(|error| peer.not_ready(error))?;
        if let Peer::Process(process) = &peer {
            self.control.pid.store(process.id(), Ordering::Relaxed);
        }
        Ok((
            Connection {
                peer,
                stream,
                notices,
                since: Instant::now(),
            },
            backend,
            offer,
        ))
    }

    /// Waits until the peer hangs up. `true`: told to stop instead.
    fn wait_for_loss(&self, connection: &mut Connection) -> bool {
        // On the connection itself, what the peer sends is the replies that the frontend waits for;
        // only its end is news here.
        let peer = self.watch(&connection.stream, EventSet::READ_HANG_UP, PEER);
        let notices = connection.notices.as_ref();
        let watched = peer.and_then(|()| {
            notices.map_or(Ok(()), |notices| self.watch(notices, EventSet::IN, NOTICE))
        });
        if let Err(error) = watched {
            tracing::error!(%error, "the backend cannot be watched; starting it anew");
            return false;
        }
        let mut refresh = Refresh::default();
        let stop = loop {
            let woken = self.wait(refresh.due_in(Instant::now()));
            if woken & (STOP | PEER) != 0 {
                break woken & STOP != 0;
            }
            if woken & NOTICE != 0 && self.hear(&mut connection.notices) {
                refresh.want(Instant::now());
            }
            if refresh.take(Instant::now()) {
                let read = self.slot.refresh();
                refresh.done(Instant::now());
                match read {
                    Ok(true) => {}
                    Ok(false) => refresh.want(Instant::now()),
                    Err(error) => tracing::debug!(%error, "the configuration cannot be read again"),
                }
            }
        };
        self.forget(&connection.stream);
        connection.notices = None;
        stop
    }

    /// Takes what the backend has said unasked; whether its configuration has changed. A channel that
    /// is of no more use is closed.
    fn hear(&self, notices: &mut Option<Notices>) -> bool {
        let Some(channel) = notices else {
            return false;
        };
        match channel.take() {
            Ok(changed) => changed,
            Err(error) => {
                tracing::debug!(%error, "the backend's own channel is closed");
                self.forget(channel);
                *notices = None;
                false
            }
        }
    }

    fn watch(&self, fd: &impl AsRawFd, events: EventSet, data: u64) -> io::Result<()> {
        let event = EpollEvent::new(events, data);
        self.epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), event)
    }

    fn forget(&self, fd: &impl AsRawFd) {
        let gone = EpollEvent::default();
        let _ = self
            .epoll
            .ctl(ControlOperation::Delete, fd.as_raw_fd(), gone);
    }

    /// Sleeps. `true`: told to stop.
    fn sleep(&self, pause: Duration) -> bool {
        self.wait(Some(pause)) & STOP != 0
    }

    /// Waits for one of [`STOP`], [`PEER`] and [`NOTICE`], or until a time limit; which they were.
    fn wait(&self, limit: Option<Duration>) -> u64 {
        // Rounded up: a limit that is nearly there is not waited for in circles.
        let millis = limit.map(|l| l.as_micros().div_ceil(1000));
        let millis = millis.map_or(-1, |m| i32::try_from(m).unwrap_or(i32::MAX));
        let mut ready = [EpollEvent::default(); 3];
        loop {
            match self.epoll.wait(millis, &mut ready) {
                Ok(count) => return ready.iter().take(count).fold(0, |all, e| all | e.data()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    tracing::error!(%error, "epoll");
                    let stopping = self.control.stopping.load(Ordering::Acquire);
                    return if stopping { STOP } else { PEER };
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_read_at_once_and_a_flood_of_them_now_and_then() {
        let start = Instant::now();
        let mut refresh = Refresh::default();
        assert!(!refresh.take(start) && refresh.due_in(start).is_none());
        let mut reads = 0;
        // A change in each millisecond of a second.
        for millis in 0..1000 {
            let now = start + Duration::from_millis(millis);
            refresh.want(now);
            assert!(
                refresh
                    .due_in(now)
                    .is_some_and(|left| left <= REFRESH_PAUSE)
            );
            if refresh.take(now) {
                assert_eq!(now, start + REFRESH_PAUSE * reads);
                refresh.done(now);
                reads += 1;
            }
        }
        assert_eq!(reads, 10);
        // The last one is not forgotten.
        let end = start + Duration::from_secs(1);
        assert_eq!(refresh.due_in(end), Some(Duration::ZERO));
        assert!(refresh.take(end) && !refresh.take(end));
    }
}
