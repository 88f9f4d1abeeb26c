//! One queue of an adapted backend: a thread that turns kicks into `handle_event`.

use super::Inner;
use crate::readiness::Event;
use crate::ring::{DeviceRing, RingState};
use crate::session::{Notifier, QueueSetup, QueueStop, QueueWorker};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use vhost_user_backend::{VhostUserBackend, VringT};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

const KICK: u64 = 0;
const STOP: u64 = 1;
const CALL: u64 = 2;

pub(super) fn spawn<B>(inner: Arc<Inner<B>>, setup: QueueSetup) -> io::Result<Box<dyn QueueWorker>>
where
    B: VhostUserBackend<Bitmap = ()> + 'static,
    B::Vring: Clone + Send + Sync + 'static,
{
    let missing = || io::Error::from(io::ErrorKind::NotFound);
    let (thread, place) = inner.place(setup.index).ok_or_else(missing)?;
    let vring = inner
        .vrings
        .get(usize::from(setup.index))
        .ok_or_else(missing)?;
    let (config, state) = (setup.ring.config(), setup.ring.save());
    // Calls of the backend go to an event of ours, so that the frontend may exchange its own.
    let called = Event::new()?;
    vring.set_queue_size(config.size);
    vring
        .set_queue_info(config.desc.0, config.avail.0, config.used.0)
        .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    vring.set_queue_event_idx(config.event_idx);
    vring.set_queue_next_avail(state.next_avail);
    vring.set_queue_next_used(state.next_used);
    vring.set_call(Some(File::from(called.duplicate()?)));
    vring.set_kick(Some(File::from(setup.kick.try_clone()?)));
    vring.set_queue_ready(true);
    vring.set_enabled(true);

    let stop = Arc::new(Event::new()?);
    let epoll = Epoll::new()?;
    let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
    let add = |fd, set, data| epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(set, data));
    add(setup.kick.as_raw_fd(), edge, KICK)?;
    add(called.as_fd().as_raw_fd(), edge, CALL)?;
    add(stop.as_fd().as_raw_fd(), EventSet::IN, STOP)?;
    let queue = Queue {
        inner: Arc::clone(&inner),
        thread,
        place,
        epoll,
        call: setup.call,
        err: setup.err,
        failed: false,
    };
    let (kick, index) = (setup.kick, setup.index);
    let join = std::thread::Builder::new()
        .name(format!("vhost-queue-{index}"))
        .spawn(move || {
            queue.run();
            // Watched until here.
            drop((kick, called));
        })?;
    Ok(Box::new(Handle {
        inner,
        index,
        stop,
        next_used: state.next_used,
        join: Some(join),
    }))
}

struct Queue<B: VhostUserBackend<Bitmap = ()>> {
    inner: Arc<Inner<B>>,
    thread: usize,
    place: u16,
    epoll: Epoll,
    call: Arc<Notifier>,
    err: Arc<Notifier>,
    failed: bool,
}

impl<B: VhostUserBackend<Bitmap = ()>> Queue<B> {
    fn run(mut self) {
        // Kicks from before the start may be lost.
        self.handle();
        let mut events = [EpollEvent::default(); 3];
        loop {
            let count = match self.epoll.wait(-1, &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                Err(_) => return self.err.signal(),
            };
            let ready = |what| events.iter().take(count).any(|e| e.data() == what);
            let (kicked, stop) = (ready(KICK), ready(STOP));
            if ready(CALL) {
                self.call.signal();
            }
            if stop {
                return;
            }
            if kicked {
                self.handle();
            }
        }
    }

    fn handle(&mut self) {
        let Some(thread) = self.inner.threads.get(self.thread) else {
            return;
        };
        if self.failed {
            return;
        }
        let turn = thread.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let outcome =
            self.inner
                .backend
                .handle_event(self.place, EventSet::IN, &thread.vrings, self.thread);
        drop(turn);
        if let Err(error) = outcome {
            // Once per start of a queue: it is not tried again.
            tracing::warn!(%error, "backend gave a queue up");
            self.failed = true;
            self.err.signal();
        }
    }
}

struct Handle<B>
where
    B: VhostUserBackend<Bitmap = ()> + 'static,
{
    inner: Arc<Inner<B>>,
    index: u16,
    stop: Arc<Event>,
    next_used: u16,
    join: Option<JoinHandle<()>>,
}

impl<B> QueueWorker for Handle<B>
where
    B: VhostUserBackend<Bitmap = ()> + 'static,
    B::Vring: Send + Sync,
{
    fn stop(mut self: Box<Self>) -> QueueStop {
        self.halt();
        let vring = self.inner.vrings.get(usize::from(self.index));
        let ring = RingState {
            next_avail: vring.map_or(0, |v| v.queue_next_avail()),
            next_used: vring
                .and_then(|v| v.queue_used_idx().ok())
                .unwrap_or(self.next_used),
        };
        QueueStop {
            ring,
            retired: None,
        }
    }
}

impl<B> Handle<B>
where
    B: VhostUserBackend<Bitmap = ()> + 'static,
{
    fn halt(&mut self) {
        let Some(join) = self.join.take() else { return };
        let vring = self.inner.vrings.get(usize::from(self.index));
        if let Some(vring) = vring {
            vring.set_enabled(false);
        }
        // An asynchronous backend finishes here what it accepted, while its calls still go out.
        if let Err(error) = self.inner.backend.stop_vring(u32::from(self.index)) {
            tracing::warn!(%error, "backend did not stop a queue");
        }
        self.stop.set();
        // A panic of the backend ends its queue only.
        let _ = join.join();
        if let Some(vring) = vring {
            vring.set_queue_ready(false);
            vring.set_kick(None);
            vring.set_call(None);
        }
    }
}

impl<B> Drop for Handle<B>
where
    B: VhostUserBackend<Bitmap = ()> + 'static,
{
    fn drop(&mut self) {
        self.halt();
    }
}
