//! Devices that this process serves: one thread per VM, one event loop, bounded turns.
//!
//! Each active queue is a [`QueueServer`] in an `event-manager` loop, woken by the queue's kick
//! eventfd. It takes chains in batches, so one queue cannot keep the others from being served.

use super::{DeviceIo, QueueConfig, Setup};
use crate::limits::DEVICE_BATCH;
use crate::memory::keep_private;
use crate::own_thread;
use crate::owner::Owner;
use crate::vm::events::signal;
use event_manager::{
    EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberId, SubscriberOps,
};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use vhost_backends::ring::{Completion, DeviceRing, OwnedChain, RingConfig, SplitRing};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// What carries out the chains of one queue.
pub(crate) trait ChainServer: Send {
    /// Carries one chain out and returns the bytes written, or `None` to keep it for later.
    fn serve(&mut self, chain: &OwnedChain, memory: &GuestMemoryMmap) -> Option<u32>;
    /// An extra event source besides the kick; signalled when kept chains may go on.
    fn extra(&self) -> Option<&EventFd> {
        None
    }
}

type Boxed = Box<dyn MutEventSubscriber + Send>;

/// What others want of the loop; done on its thread, between two rounds.
type Wish = Box<dyn FnOnce(&mut EventManager<Boxed>) + Send>;

/// The thread that serves all in-process devices of a VM, and its periodic work.
pub(crate) struct LocalThread {
    owner: Owner,
    endpoint: LocalEndpoint,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// Periodic work of a VM, on the same thread: `every` apart.
pub(crate) type Periodic = (std::time::Duration, Box<dyn FnMut() + Send>);

/// Starts a [`LocalThread`]'s thread.
pub(crate) struct Starter(Box<dyn FnOnce() -> io::Result<JoinHandle<()>> + Send>);

impl LocalThread {
    /// The loop, and what starts it: at once where devices are in it, after the vCPUs where it has
    /// but the clock to look after.
    ///
    /// `panicked` is called if the embedder's own code (a console writer) panics on the thread.
    pub(crate) fn new(
        mut periodic: Periodic,
        panicked: impl FnOnce() + Send + 'static,
        span: tracing::Span,
    ) -> io::Result<(LocalThread, Starter)> {
        let mut manager = EventManager::<Boxed>::new().map_err(other)?;
        // The crate's own remote endpoint would be inherited by every program that the embedder runs:
        // its eventfd is not close-on-exec.
        let (wishes, wanted) = mpsc::channel::<Wish>();
        let stop = Arc::new(AtomicBool::new(false));
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        manager.add_subscriber(Box::new(Waker(Arc::clone(&wake))));
        let stopped = Arc::clone(&stop);
        let body = move || {
            let _vm = span.entered();
            let _guard = OnPanic(Some(panicked));
            let millis = i32::try_from(periodic.0.as_millis()).unwrap_or(i32::MAX);
            let mut next = std::time::Instant::now() + periodic.0;
            while !stopped.load(Ordering::Acquire) {
                if let Err(error) = manager.run_with_timeout(millis) {
                    tracing::error!(?error, "the device loop failed");
                    return;
                }
                for wish in wanted.try_iter() {
                    wish(&mut manager);
                }
                if std::time::Instant::now() >= next {
                    (periodic.1)();
                    next = std::time::Instant::now() + periodic.0;
                }
            }
        };
        let start = || own_thread::start("pv-devices", body);
        let local = LocalThread {
            owner: Owner::here(),
            endpoint: LocalEndpoint { wishes, wake },
            stop,
            thread: None,
        };
        Ok((local, Starter(Box::new(start))))
    }

    pub(crate) fn start(&mut self, starter: Starter) -> io::Result<()> {
        self.thread = Some((starter.0)()?);
        Ok(())
    }

    pub(crate) fn endpoint(&self) -> LocalEndpoint {
        self.endpoint.clone()
    }
}

impl Drop for LocalThread {
    fn drop(&mut self) {
        if !self.owner.is_here() {
            return std::mem::forget(self.thread.take());
        }
        self.stop.store(true, Ordering::Release);
        let _ = signal(&self.endpoint.wake);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Calls what it holds if its thread panics.
pub(crate) struct OnPanic<F: FnOnce()>(pub(crate) Option<F>);

impl<F: FnOnce()> Drop for OnPanic<F> {
    fn drop(&mut self) {
        if std::thread::panicking()
            && let Some(call) = self.0.take()
        {
            call();
        }
    }
}

struct Waker(Arc<EventFd>);

impl MutEventSubscriber for Waker {
    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        let _ = self.0.read();
    }
    fn init(&mut self, ops: &mut EventOps) {
        let _ = ops.add(Events::new(&*self.0, EventSet::IN));
    }
}

/// Adds queues to the loop, and takes them out again.
#[derive(Clone)]
pub(crate) struct LocalEndpoint {
    wishes: mpsc::Sender<Wish>,
    wake: Arc<EventFd>,
}

impl LocalEndpoint {
    /// Has something done with the loop, and waits for what comes of it.
    fn ask<T: Send + 'static>(
        &self,
        what: impl FnOnce(&mut EventManager<Boxed>) -> T + Send + 'static,
    ) -> io::Result<T> {
        let (answer, answered) = mpsc::channel();
        let wish: Wish = Box::new(move |manager| {
            let _ = answer.send(what(manager));
        });
        let over = || io::Error::other("the device loop has ended");
        self.wishes.send(wish).map_err(|_| over())?;
        signal(&self.wake)?;
        // A loop that ends drops the wish, and with it the sender.
        answered.recv().map_err(|_| over())
    }

    fn add(&self, subscriber: Boxed) -> io::Result<SubscriberId> {
        self.ask(|manager| manager.add_subscriber(subscriber))
    }

    /// The subscriber is gone, and not being called, once this returns.
    fn remove(&self, id: SubscriberId) {
        match self.ask(move |manager| manager.remove_subscriber(id).map(drop)) {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(?error, "a queue was gone already"),
            Err(error) => tracing::debug!(%error, "a queue went with the loop"),
        }
    }
}

fn other(error: event_manager::Error) -> io::Error {
    match error {
        event_manager::Error::Epoll(errno) => io::Error::from_raw_os_error(errno.errno()),
        other => io::Error::other(format!("event loop: {other}")),
    }
}

/// The active queues of one in-process device.
pub(crate) struct LocalQueues {
    endpoint: LocalEndpoint,
    active: Vec<SubscriberId>,
}

impl LocalQueues {
    pub(crate) fn new(endpoint: LocalEndpoint) -> LocalQueues {
        LocalQueues {
            endpoint,
            active: Vec::new(),
        }
    }

    /// Serves each queue of the set-up with the server that `make` gives for its index.
    pub(crate) fn activate(
        &mut self,
        setup: &Setup,
        io: &DeviceIo,
        mut make: impl FnMut(usize) -> io::Result<Box<dyn ChainServer>>,
    ) -> io::Result<()> {
        let memory = Arc::new(arena_memory(io)?);
        for (index, queue) in setup.queues.iter().enumerate() {
            let event = io.event_base + u32::try_from(index).map_err(io::Error::other)?;
            let missing = || io::Error::other("a queue has no eventfd");
            let server = QueueServer {
                ring: ring(queue, setup.features, &memory)?,
                memory: Arc::clone(&memory),
                kick: io.events.doorbell(event).ok_or_else(missing)?.try_clone()?,
                call: io.events.call(event).ok_or_else(missing)?.try_clone()?,
                server: make(index)?,
                kept: None,
                retired: false,
            };
            self.active.push(self.endpoint.add(Box::new(server))?);
        }
        Ok(())
    }

    pub(crate) fn reset(&mut self) {
        for id in self.active.drain(..) {
            self.endpoint.remove(id);
        }
    }
}

impl Drop for LocalQueues {
    fn drop(&mut self) {
        self.reset();
    }
}

fn arena_memory(io: &DeviceIo) -> io::Result<GuestMemoryMmap> {
    let file = io
        .arena
        .region
        .file_arc()
        .ok_or_else(|| io::Error::other("arena has no file"))?;
    let len = usize::try_from(io.arena.region.len()).map_err(io::Error::other)?;
    let file = FileOffset::from_arc(file, 0);
    let ranges = [(GuestAddress(io.arena.gpa), len, Some(file))];
    let memory = GuestMemoryMmap::from_ranges_with_files(ranges).map_err(io::Error::other)?;
    keep_private(&memory)?;
    Ok(memory)
}

fn ring(q: &QueueConfig, features: u64, memory: &Arc<GuestMemoryMmap>) -> io::Result<SplitRing> {
    let config = RingConfig {
        size: q.size,
        desc: GuestAddress(q.desc),
        avail: GuestAddress(q.avail),
        used: GuestAddress(q.used),
        event_idx: features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0,
        indirect: features & (1 << VIRTIO_RING_F_INDIRECT_DESC) != 0,
        in_order: false,
    };
    SplitRing::new(config, Arc::clone(memory)).map_err(io::Error::other)
}

/// One active queue in the loop.
struct QueueServer {
    ring: SplitRing,
    memory: Arc<GuestMemoryMmap>,
    kick: EventFd,
    call: EventFd,
    server: Box<dyn ChainServer>,
    /// A chain that the server could not carry out yet.
    kept: Option<OwnedChain>,
    /// The ring broke a rule; it is not looked at again.
    retired: bool,
}

impl QueueServer {
    /// One bounded turn. `true`: there is more.
    fn turn(&mut self) -> bool {
        if self.retired {
            return false;
        }
        let mut done = Vec::new();
        let mut more = true;
        while done.len() < DEVICE_BATCH {
            let chain = match self.kept.take() {
                Some(chain) => chain,
                None => match self.ring.pop() {
                    Ok(Some(chain)) => chain,
                    Ok(None) if self.ring.arm() => continue,
                    Ok(None) => {
                        more = false;
                        break;
                    }
                    Err(reason) => {
                        tracing::debug!(%reason, "queue retired until reset");
                        self.retired = true;
                        more = false;
                        break;
                    }
                },
            };
            match self.server.serve(&chain, &self.memory) {
                Some(written) => done.push(Completion {
                    head: chain.head(),
                    written,
                }),
                None => {
                    self.kept = Some(chain);
                    more = false;
                    break;
                }
            }
        }
        if !done.is_empty() {
            self.ring.complete(&done);
            if self.ring.should_signal() {
                let _ = signal(&self.call);
            }
        }
        more
    }
}

impl MutEventSubscriber for QueueServer {
    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        let extra = self.server.extra().filter(|e| e.as_raw_fd() == events.fd());
        // WouldBlock: the turn below looks at the ring in any case.
        let _ = extra.unwrap_or(&self.kick).read();
        if self.turn() {
            // The batch is full: let the other queues have their turn first.
            let _ = signal(&self.kick);
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        for source in [Some(&self.kick), self.server.extra()]
            .into_iter()
            .flatten()
        {
            if let Err(error) = ops.add(Events::new(source, EventSet::IN)) {
                tracing::error!(?error, "a queue cannot be watched");
            }
        }
        // A kick from before the queue was watched may be missing.
        let _ = signal(&self.kick);
    }
}
