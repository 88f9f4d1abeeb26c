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
    let stop = Arc::new(Event::new()?);
    let worker_stop = Arc::clone(&stop);
    let leaving = Arc::new(AtomicBool::new(false));
    let worker_leaving = Arc::clone(&leaving);
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
                    stop: worker_stop.as_fd(),
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
                .run(wake, &worker_leaving)
            })
        })?;
    outcome
        .recv()
        .map_err(|_| io::Error::other("the queue's thread ended at once"))??;
    Ok(Box::new(Handle {
        stop,
        leaving,
        thread: Some(thread),
        last,
    }))
}

struct Handle {
    stop: Arc<Event>,
    /// What waits may stay in the ring's log.
    leaving: Arc<AtomicBool>,
    thread: Option<JoinHandle<QueueStop>>,
    /// Where the ring was at the start; for a thread that panicked.
    last: QueueStop,
}

impl QueueWorker for Handle {
    fn stop(mut self: Box<Self>) -> QueueStop {
        self.join().unwrap_or(self.last)
    }

    fn leave(self: Box<Self>) -> QueueStop {
        // Ordering: Relaxed, the stop event orders it.
        self.leaving.store(true, Ordering::Relaxed);
        self.stop()
    }
}

impl Handle {
    fn join(&mut self) -> Option<QueueStop> {
        self.stop.set();
        self.thread.take()?.join().ok()
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.join();
    }
}
