//! A queue's thread: started with everything it takes, stopped by an event, and joined.

use super::Disk;
use super::execute::{Worker, WriteCache};
use crate::engine::WakeSources;
use crate::readiness::Event;
use crate::ring::DeviceRing;
use crate::session::{QueueSetup, QueueStop, QueueWorker};
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

/// Starts a worker and waits until it serves.
pub(super) fn spawn(disk: Arc<Disk>, setup: QueueSetup) -> io::Result<Box<dyn QueueWorker>> {
    let stop = Arc::new(Stop::new()?);
    let worker_stop = Arc::clone(&stop);
    let last = QueueStop {
        ring: setup.ring.save(),
        retired: setup.ring.retired(),
    };
    let (started, outcome) = mpsc::sync_channel(1);
    let thread = std::thread::Builder::new()
        .name(format!("blk-queue-{}", setup.index))
        .spawn(move || {
            setup.hang_up.clone().guard(move || {
                let memory = Arc::clone(setup.ring.memory());
                let wake = WakeSources {
                    kick: setup.kick.as_fd(),
                    stop: worker_stop.event.as_fd(),
                };
                let store = Arc::clone(&disk.store);
                let engine = match store.open_engine(Arc::clone(&memory), wake) {
                    Ok(engine) => engine,
                    Err(error) => {
                        let _ = started.send(Err(error));
                        return QueueStop {
                            ring: setup.ring.save(),
                            retired: None,
                        };
                    }
                };
                // The caller waits for this.
                let _ = started.send(Ok(()));
                Worker::new(
                    disk,
                    setup.index,
                    setup.ring,
                    engine,
                    memory,
                    setup.call,
                    setup.err,
                    WriteCache::of(setup.features),
                )
                .run(wake, &worker_stop)
            })
        })?;
    outcome
        .recv()
        .map_err(|_| io::Error::other("the queue's thread ended at once"))??;
    Ok(Box::new(Handle {
        stop,
        thread: Some(thread),
        last,
    }))
}

/// Asks a worker to stop.
pub(super) struct Stop {
    /// For one that sleeps.
    event: Event,
    /// For one that works: a look costs nothing, so it looks before each request.
    asked: AtomicBool,
    /// What waits may stay in the ring's log.
    leaving: AtomicBool,
}

impl Stop {
    fn new() -> io::Result<Stop> {
        Ok(Stop {
            event: Event::new()?,
            asked: AtomicBool::new(false),
            leaving: AtomicBool::new(false),
        })
    }

    fn ask(&self) {
        // Ordering: Release, so that who finds it set knows whether it may leave.
        self.asked.store(true, Ordering::Release);
        self.event.set();
    }

    /// Whether the worker is to take nothing more.
    pub(super) fn is_asked(&self) -> bool {
        // Ordering: Acquire, as in `ask`.
        self.asked.load(Ordering::Acquire)
    }

    /// Whether what waits may stay in the ring's log; for who was asked to stop.
    pub(super) fn may_leave(&self) -> bool {
        // Ordering: Relaxed, it was set before the worker was asked.
        self.leaving.load(Ordering::Relaxed)
    }
}

struct Handle {
    stop: Arc<Stop>,
    thread: Option<JoinHandle<QueueStop>>,
    /// Where the ring was at the start; for a thread that panicked.
    last: QueueStop,
}

impl QueueWorker for Handle {
    fn stop(mut self: Box<Self>) -> QueueStop {
        self.join().unwrap_or(self.last)
    }

    fn leave(self: Box<Self>) -> QueueStop {
        // Ordering: Relaxed, `ask` orders it.
        self.stop.leaving.store(true, Ordering::Relaxed);
        self.stop()
    }
}

impl Handle {
    fn join(&mut self) -> Option<QueueStop> {
        self.stop.ask();
        self.thread.take()?.join().ok()
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.join();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::{BlockDevice, BlockOptions};
    use crate::engine::{Engine, Finished, Geometry, Operation, Store, Token, Wake};
    use crate::readiness::{Interest, wait};
    use crate::ring::{RingConfig, RingSetup};
    use crate::session::{Device, HangUp};
    use pv_abi::virtio::block::request;
    use pv_abi::virtio::desc_flag::{NEXT, WRITE};
    use std::os::fd::OwnedFd;
    use std::sync::atomic::AtomicUsize;
    use std::time::Duration;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    const LIMIT: Option<Duration> = Some(Duration::from_secs(20));

    /// Each of its operations lasts until the worker was asked to stop.
    #[derive(Debug)]
    struct Slow(Arc<AtomicUsize>);

    impl Store for Slow {
        fn geometry(&self) -> Geometry {
            Geometry::plain(1 << 20)
        }

        fn open_engine(
            self: Arc<Self>,
            _memory: Arc<GuestMemoryMmap>,
            wake: WakeSources<'_>,
        ) -> io::Result<Box<dyn Engine>> {
            let stop = wake.stop.try_clone_to_owned()?;
            Ok(Box::new(SlowEngine(Arc::clone(&self.0), stop)))
        }
    }

    struct SlowEngine(Arc<AtomicUsize>, OwnedFd);

    impl Engine for SlowEngine {
        fn start(&mut self, _: Token, _: Operation<'_>) -> Option<io::Result<()>> {
            self.0.fetch_add(1, Ordering::Relaxed);
            let stopped = wait([(self.1.as_fd(), Interest::Read)], LIMIT);
            Some(stopped.map(|_| ()))
        }

        fn submit(&mut self) -> io::Result<()> {
            Ok(())
        }

        fn reap(&mut self, _: &mut Vec<Finished>) -> io::Result<Wake> {
            // As one that looks once in a while.
            Ok(Wake::default())
        }

        fn wait(&mut self, _: &mut Vec<Finished>) -> io::Result<Wake> {
            let [stop] = wait([(self.1.as_fd(), Interest::Read)], LIMIT)?;
            Ok(Wake { stop })
        }

        fn has_finished(&mut self) -> bool {
            false
        }

        fn in_flight(&self) -> usize {
            0
        }
    }

    /// A ring of eight flushes.
    fn flushes() -> RingSetup {
        let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
        let (avail, used, data) = (0x1000u64, 0x2000, 0x3000);
        mem.write_obj(request::FLUSH, GuestAddress(data)).unwrap();
        for chain in 0..8u16 {
            let head = 2 * chain;
            for (index, addr, len, flags) in
                [(head, data, 16u32, NEXT), (head + 1, data + 16, 1, WRITE)]
            {
                let at = 16 * u64::from(index);
                mem.write_obj(addr, GuestAddress(at)).unwrap();
                mem.write_obj(len, GuestAddress(at + 8)).unwrap();
                mem.write_obj(flags, GuestAddress(at + 12)).unwrap();
                mem.write_obj(index + 1, GuestAddress(at + 14)).unwrap();
            }
            let entry = avail + 4 + 2 * u64::from(chain);
            mem.write_obj(head, GuestAddress(entry)).unwrap();
        }
        mem.write_obj(8u16, GuestAddress(avail + 2)).unwrap();
        let config = RingConfig {
            size: 16,
            desc: GuestAddress(0),
            avail: GuestAddress(avail),
            used: GuestAddress(used),
            event_idx: false,
            indirect: false,
            in_order: false,
        };
        RingSetup::new(config, false, Arc::new(mem))
    }

    #[test]
    fn a_worker_that_is_asked_to_stop_begins_nothing_more() {
        let begun = Arc::new(AtomicUsize::new(0));
        let store = Slow(Arc::clone(&begun));
        let device = BlockDevice::new(store, BlockOptions::with_queues(1));
        let kick = Event::new().unwrap();
        let worker = device.open_queue(QueueSetup {
            index: 0,
            ring: flushes().start().unwrap(),
            kick: kick.duplicate().unwrap(),
            call: Arc::default(),
            err: Arc::default(),
            features: 0,
            hang_up: HangUp::default(),
        });
        let worker = worker.unwrap();
        let deadline = std::time::Instant::now() + LIMIT.unwrap();
        while begun.load(Ordering::Relaxed) == 0 {
            assert!(std::time::Instant::now() < deadline, "nothing began");
            std::thread::yield_now();
        }
        let stopped = worker.stop();
        assert_eq!(begun.load(Ordering::Relaxed), 1);
        assert_eq!(stopped.ring.next_avail, 1);
    }
}
