//! A queue's thread: how it is started, woken and stopped.

use crate::readiness::Event;
use crate::ring::DeviceRing;
use crate::session::{QueueSetup, QueueStop, QueueWorker};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// Tells a worker to stop.
#[derive(Debug)]
pub(super) struct Stop {
    event: Event,
    set: AtomicBool,
}

impl Stop {
    /// Whether it was told.
    pub(super) fn is_set(&self) -> bool {
        // Ordering: Relaxed, nothing else hangs on it; whoever joins the thread synchronises.
        self.set.load(Ordering::Relaxed)
    }
}

/// Starts `body` in a thread of its own.
pub(super) fn spawn(
    name: String,
    setup: QueueSetup,
    wake_for: Option<BorrowedFd<'_>>,
    body: impl FnOnce(QueueSetup, Wake) -> QueueStop + Send + 'static,
) -> io::Result<Box<dyn QueueWorker>> {
    let stop = Arc::new(Stop {
        event: Event::new()?,
        set: AtomicBool::new(false),
    });
    let wake = Wake::new(Arc::clone(&stop), setup.kick.as_fd(), wake_for)?;
    let first = QueueStop {
        ring: setup.ring.save(),
        retired: setup.ring.retired(),
    };
    let thread = std::thread::Builder::new()
        .name(name)
        .spawn(move || setup.hang_up.clone().guard(|| body(setup, wake)))?;
    Ok(Box::new(Handle {
        stop,
        thread: Some(thread),
        first,
    }))
}

struct Handle {
    stop: Arc<Stop>,
    thread: Option<JoinHandle<QueueStop>>,
    /// Where the ring was at the start; for a thread that panicked.
    first: QueueStop,
}

impl Handle {
    fn join(&mut self) -> Option<QueueStop> {
        // Ordering: Relaxed, as in `Stop::is_set`; the event wakes a thread that sleeps.
        self.stop.set.store(true, Ordering::Relaxed);
        self.stop.event.set();
        self.thread.take()?.join().ok()
    }
}

impl QueueWorker for Handle {
    fn stop(mut self: Box<Self>) -> QueueStop {
        self.join().unwrap_or(self.first)
    }
}

impl std::ops::Drop for Handle {
    fn drop(&mut self) {
        self.join();
    }
}

/// What a worker sleeps on.
#[derive(Debug)]
pub(super) struct Wake {
    pub(super) stop: Arc<Stop>,
    /// Kick and stop.
    kick: Epoll,
    /// These and the port, if it has something to wait for.
    port: Epoll,
}

impl Wake {
    fn new(
        stop: Arc<Stop>,
        kick: BorrowedFd<'_>,
        port: Option<BorrowedFd<'_>>,
    ) -> io::Result<Wake> {
        let (short, long) = (Epoll::new()?, Epoll::new()?);
        let add = |epoll: &Epoll, fd: BorrowedFd<'_>, events| {
            epoll.ctl(
                ControlOperation::Add,
                fd.as_raw_fd(),
                EpollEvent::new(events, 0),
            )
        };
        // The kick is never read: a frontend could have taken the count, and the read would wait.
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        for epoll in [&short, &long] {
            add(epoll, kick, edge)?;
            add(epoll, stop.event.as_fd(), EventSet::IN)?;
        }
        if let Some(fd) = port {
            add(&long, fd, EventSet::IN)?;
        }
        Ok(Wake {
            stop,
            kick: short,
            port: long,
        })
    }

    /// Sleeps until a kick, the stop, or the time is over.
    pub(super) fn for_kick(&self, limit: Option<Duration>) -> io::Result<()> {
        wait(&self.kick, limit)
    }

    /// Sleeps until a kick, the stop, or the port has something.
    pub(super) fn for_port(&self, limit: Option<Duration>) -> io::Result<()> {
        wait(&self.port, limit)
    }
}

fn wait(epoll: &Epoll, limit: Option<Duration>) -> io::Result<()> {
    // Rounded up: a sleep of no time would be none.
    let millis = limit.map_or(-1, |limit| {
        i32::try_from(limit.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
    });
    match epoll.wait(millis, &mut [EpollEvent::default(); 3]) {
        Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
        _ => Ok(()),
    }
}
