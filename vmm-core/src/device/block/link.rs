//! Keeping a backend behind a device: spawn or connect, notice loss, start over.

use super::frontend::VhostBlock;
use super::spawn::BackendProcess;
use super::{BlockConfig, Source};
use crate::device::{Offer, Slot};
use crate::fault::PeerLost;
use crate::limits::{BACKEND_CONNECT_TIMEOUT, RECONNECT_PAUSE};
use crate::vm::VmEvent;
use crate::vm::events::signal;
use crate::vm::stats::Counters;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Marks the order to stop among the epoll's data.
const STOP: u64 = 1;

/// Where an embedder hears of losses and reconnects.
pub(crate) type EventSink = Arc<dyn Fn(VmEvent) + Send + Sync>;

/// The thread that keeps one backend.
pub(crate) struct Link {
    stop: EventFd,
    pid: Arc<AtomicU32>,
    thread: Option<JoinHandle<()>>,
}

struct Keeper {
    config: BlockConfig,
    slot: Arc<Slot>,
    counters: Arc<Counters>,
    events: EventSink,
    stop: EventFd,
    pid: Arc<AtomicU32>,
}

struct Connection {
    process: Option<BackendProcess>,
    stream: UnixStream,
}

impl Link {
    /// Starts the thread and waits for the first handshake.
    pub(crate) fn start(
        config: BlockConfig,
        slot: Arc<Slot>,
        counters: Arc<Counters>,
        events: EventSink,
    ) -> io::Result<Link> {
        let stop = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let pid = Arc::new(AtomicU32::new(0));
        let keeper = Keeper {
            config,
            slot,
            counters,
            events,
            stop: stop.try_clone()?,
            pid: pid.clone(),
        };
        let (sender, first) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("pv-backend".into())
            .spawn(move || keeper.run(&sender))?;
        let link = Link {
            stop,
            pid,
            thread: Some(thread),
        };
        first
            .recv()
            .unwrap_or_else(|_| Err(io::Error::other("the backend thread ended")))?;
        Ok(link)
    }

    /// Process ID of a supervised backend; 0 while there is none.
    pub(crate) fn pid(&self) -> u32 {
        self.pid.load(Ordering::Relaxed)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        let _ = signal(&self.stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Keeper {
    fn run(self, first: &mpsc::Sender<io::Result<()>>) {
        let device = self.slot.info.index;
        let _span = tracing::debug_span!("backend", device).entered();
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
                if self.wait_for_loss(&connection.stream) {
                    self.slot.shut_down();
                    drop(connection.stream);
                    if let Some(mut process) = connection.process {
                        process.finish();
                    }
                    return;
                }
                // A supervised one is known dead before the guest hears of it; another's resets wait
                // until it takes a new connection.
                let (why, drained) = match &mut connection.process {
                    Some(process) => (process.kill(), true),
                    None => ("it closed the connection".into(), false),
                };
                self.pid.store(0, Ordering::Relaxed);
                self.counters.backend_losses.add(1);
                let lost = PeerLost { device, why };
                tracing::warn!(device, %lost, "backend lost");
                if let Err(error) = self.slot.backend_lost(drained) {
                    tracing::error!(%error, "the device table cannot be written");
                }
                (self.events)(VmEvent::BackendLost(lost));
            }
            match self.connect() {
                Ok((connection, backend, offer)) => {
                    if let Err(error) = self.slot.backend_ready(Box::new(backend), offer) {
                        tracing::error!(%error, "the device table cannot be written");
                    }
                    self.counters.backend_reconnects.add(1);
                    (self.events)(VmEvent::BackendReconnected { device });
                    pause = RECONNECT_PAUSE.0;
                    connected = Some(connection);
                }
                Err(error) => {
                    tracing::debug!(device, %error, "backend not back yet");
                    if self.sleep(pause) {
                        return;
                    }
                    pause = (pause * 2).min(RECONNECT_PAUSE.1);
                }
            }
        }
    }

    /// A socket may not be listened on yet; a process that cannot be started will not be later.
    fn first_connection(&self) -> io::Result<(Connection, VhostBlock, Offer)> {
        let deadline = Instant::now() + BACKEND_CONNECT_TIMEOUT;
        loop {
            match self.connect() {
                Err(error) if matches!(self.config.source, Source::Socket(_)) => {
                    let not_yet = matches!(
                        error.kind(),
                        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                    );
                    if !not_yet || Instant::now() >= deadline || self.sleep(RECONNECT_PAUSE.0) {
                        return Err(error);
                    }
                }
                other => return other,
            }
        }
    }

    fn connect(&self) -> io::Result<(Connection, VhostBlock, Offer)> {
        let (process, stream) = match &self.config.source {
            Source::Spawn(command) => {
                let (process, stream) = BackendProcess::start(command())?;
                (Some(process), stream)
            }
            Source::Socket(path) => (None, UnixStream::connect(path)?),
        };
        let (backend, offer) = VhostBlock::handshake(stream.try_clone()?, self.config.queues)?;
        if let Some(process) = &process {
            self.pid.store(process.id(), Ordering::Relaxed);
        }
        Ok((Connection { process, stream }, backend, offer))
    }

    /// Waits until the peer hangs up. `true`: told to stop instead.
    fn wait_for_loss(&self, stream: &UnixStream) -> bool {
        // What the peer sends is the replies that the frontend waits for; only its end is news here.
        self.wait(Some((stream.as_raw_fd(), EventSet::READ_HANG_UP)), None)
    }

    /// Sleeps. `true`: told to stop.
    fn sleep(&self, pause: Duration) -> bool {
        self.wait(None, Some(pause))
    }

    /// Waits for another event, a time limit, or the order to stop, which is what `true` means.
    fn wait(&self, other: Option<(RawFd, EventSet)>, limit: Option<Duration>) -> bool {
        let waited = || -> io::Result<bool> {
            let epoll = Epoll::new()?;
            let stop = EpollEvent::new(EventSet::IN, STOP);
            epoll.ctl(ControlOperation::Add, self.stop.as_raw_fd(), stop)?;
            if let Some((fd, events)) = other {
                epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, 0))?;
            }
            let millis = limit.map_or(-1, |l| i32::try_from(l.as_millis()).unwrap_or(i32::MAX));
            loop {
                let mut ready = [EpollEvent::default(); 2];
                match epoll.wait(millis, &mut ready) {
                    Ok(count) => return Ok(ready.iter().take(count).any(|e| e.data() == STOP)),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
        };
        waited().unwrap_or_else(|error| {
            // Without a way to wait there is no way to supervise: give the backend up.
            tracing::error!(%error, "the backend can no longer be watched");
            true
        })
    }
}
