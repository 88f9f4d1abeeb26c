//! Any disk that has blocking calls, behind a few threads for each queue.
//!
//! This is the simple way to bring a disk of one's own: implement [`BlockingDisk`]. The guest's
//! bytes are copied, so that what is called sees ordinary slices that nobody else changes.

use super::sleep::Sleeper;
use super::transfer::chain_error;
use super::{Engine, Finished, Geometry, Operation, Store, Token, Wake, WakeSources, started};
use crate::limits::{MAX_IN_FLIGHT, MAX_POOL_BYTES, POOL_THREADS};
use crate::readiness::Event;
use crate::ring::OwnedChain;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EventSet;

/// A disk with calls that return when they are done. Several threads call at a time.
///
/// Ranges lie within the disk's length when they were asked for. What was written before a flush
/// began is safe when it returns. What is over without one must survive this process, if anything of
/// the disk does: its guest may go on without noticing that another took its place.
pub trait BlockingDisk: Send + Sync + std::fmt::Debug + 'static {
    /// Its size and shape now.
    fn geometry(&self) -> Geometry;

    /// Whether it must not be written.
    fn read_only(&self) -> bool {
        false
    }

    /// Fills `buf` from `offset` on.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;

    /// Writes all of `buf` from `offset` on.
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;

    /// Makes what was written safe.
    fn flush(&self) -> io::Result<()>;

    /// The range's content is no longer of interest.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;

    /// The range reads as zeroes; with `unmap` its space may be given back.
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()>;

    /// Nobody can read the range's content after this. Only called if the geometry offers it.
    fn secure_erase(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// A [`BlockingDisk`] as a [`Store`].
#[derive(Debug)]
pub struct BlockingStore<D> {
    disk: Arc<D>,
}

impl<D: BlockingDisk> BlockingStore<D> {
    /// Serves `disk`.
    pub fn new(disk: D) -> BlockingStore<D> {
        BlockingStore {
            disk: Arc::new(disk),
        }
    }

    /// The disk.
    pub fn disk(&self) -> &Arc<D> {
        &self.disk
    }
}

impl<D: BlockingDisk> Store for BlockingStore<D> {
    fn geometry(&self) -> Geometry {
        self.disk.geometry()
    }

    fn read_only(&self) -> bool {
        self.disk.read_only()
    }

    fn open_engine(
        self: Arc<Self>,
        memory: Arc<GuestMemoryMmap>,
        wake: WakeSources<'_>,
    ) -> io::Result<Box<dyn Engine>> {
        let disk: Arc<dyn BlockingDisk> = self.disk.clone();
        Ok(Box::new(PoolEngine::new(disk, memory, wake)?))
    }
}

/// One call for a thread to make.
#[derive(Debug)]
enum Work {
    Read(usize, u64),
    Write(Vec<u8>, u64),
    Flush,
    Discard(u64, u64),
    WriteZeroes(u64, u64, bool),
    SecureErase(u64, u64),
}

#[derive(Debug)]
struct Done {
    token: Token,
    /// What was read, for a read.
    result: io::Result<Option<Vec<u8>>>,
}

/// What the threads and the engine share.
#[derive(Debug)]
struct Shared {
    disk: Arc<dyn BlockingDisk>,
    done: Mutex<Vec<Done>>,
    any: AtomicBool,
    event: Event,
}

#[derive(Debug)]
struct PoolEngine {
    memory: Arc<GuestMemoryMmap>,
    shared: Arc<Shared>,
    sleeper: Sleeper,
    /// `None` once the threads are to end.
    work: Option<Sender<(Token, Work)>>,
    threads: Vec<JoinHandle<()>>,
    slots: Vec<Option<Slot>>,
    in_flight: usize,
    /// Bytes of all that is in flight.
    bytes: u64,
}

/// A request in flight.
#[derive(Debug)]
struct Slot {
    /// Where a read goes.
    chain: Option<OwnedChain>,
    bytes: u64,
}

impl PoolEngine {
    fn new(
        disk: Arc<dyn BlockingDisk>,
        memory: Arc<GuestMemoryMmap>,
        wake: WakeSources<'_>,
    ) -> io::Result<PoolEngine> {
        let shared = Arc::new(Shared {
            disk,
            done: Mutex::new(Vec::with_capacity(MAX_IN_FLIGHT)),
            any: AtomicBool::new(false),
            event: Event::new()?,
        });
        let sleeper = Sleeper::new(wake)?;
        // Edge-triggered: it is never read.
        sleeper.watch(
            shared.event.as_fd(),
            EventSet::IN | EventSet::EDGE_TRIGGERED,
        )?;
        let (work, jobs) = channel();
        let jobs = Arc::new(Mutex::new(jobs));
        let mut engine = PoolEngine {
            memory,
            shared,
            sleeper,
            work: Some(work),
            threads: Vec::with_capacity(POOL_THREADS),
            slots: (0..MAX_IN_FLIGHT).map(|_| None).collect(),
            in_flight: 0,
            bytes: 0,
        };
        for index in 0..POOL_THREADS {
            let (shared, jobs) = (Arc::clone(&engine.shared), Arc::clone(&jobs));
            let thread = std::thread::Builder::new()
                .name(format!("blk-pool-{index}"))
                .spawn(move || run(&shared, &jobs))?;
            engine.threads.push(thread);
        }
        Ok(engine)
    }

    fn start_inner(&mut self, token: Token, operation: Operation<'_>) -> io::Result<bool> {
        let invalid = io::ErrorKind::InvalidInput;
        let size = |len: u64| usize::try_from(len).map_err(|_| invalid);
        let slot = self
            .slots
            .get_mut(usize::from(token))
            .filter(|slot| slot.is_none())
            .ok_or(invalid)?;
        let (work, target, bytes) = match operation {
            Operation::Read { chain, offset, len } => {
                (Work::Read(size(len)?, offset), Some(chain), len)
            }
            Operation::Write {
                chain,
                from,
                offset,
                len,
            } => {
                let mut bytes = vec![0; size(len)?];
                chain
                    .read_at(&self.memory, from, &mut bytes)
                    .map_err(chain_error)?;
                (Work::Write(bytes, offset), None, len)
            }
            Operation::Flush => (Work::Flush, None, 0),
            Operation::Discard { offset, len } => (Work::Discard(offset, len), None, 0),
            Operation::WriteZeroes { offset, len, unmap } => {
                (Work::WriteZeroes(offset, len, unmap), None, 0)
            }
            Operation::SecureErase { offset, len } => (Work::SecureErase(offset, len), None, 0),
        };
        if self.bytes + bytes > MAX_POOL_BYTES && self.in_flight > 0 {
            // No more copies: the queue waits for this one.
            let data = perform(&*self.shared.disk, work)?;
            return match (data, target) {
                (Some(data), Some(chain)) => {
                    chain.write_at(&self.memory, 0, &data).map_err(chain_error)
                }
                _ => Ok(()),
            }
            .map(|()| true);
        }
        let sent = self
            .work
            .as_ref()
            .map(|work_to| work_to.send((token, work)));
        if !matches!(sent, Some(Ok(()))) {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        *slot = Some(Slot {
            chain: target.cloned(),
            bytes,
        });
        self.in_flight += 1;
        self.bytes += bytes;
        Ok(false)
    }

    fn collect(&mut self, finished: &mut Vec<Finished>) {
        // Ordering: Acquire pairs with the release in `run`; the mutex orders the rest.
        if !self.shared.any.swap(false, Ordering::Acquire) {
            return;
        }
        let mut done = self
            .shared
            .done
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        for Done { token, result } in done.drain(..) {
            let slot = self.slots.get_mut(usize::from(token));
            let Some(Slot { chain, bytes }) = slot.and_then(Option::take) else {
                continue;
            };
            self.in_flight -= 1;
            self.bytes -= bytes;
            let result = result.and_then(|data| match (data, chain) {
                (Some(data), Some(chain)) => {
                    chain.write_at(&self.memory, 0, &data).map_err(chain_error)
                }
                _ => Ok(()),
            });
            finished.push(Finished { token, result });
        }
    }
}

/// Ends a request whose thread panicked, so that nobody waits for it for ever.
struct Answer<'s> {
    shared: &'s Shared,
    token: Token,
    result: Option<io::Result<Option<Vec<u8>>>>,
}

impl Drop for Answer<'_> {
    fn drop(&mut self) {
        let result = self
            .result
            .take()
            .unwrap_or_else(|| Err(io::Error::other("the disk's code panicked")));
        let done = Done {
            token: self.token,
            result,
        };
        self.shared
            .done
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(done);
        // Ordering: Release, so that who sees it finds the entry.
        self.shared.any.store(true, Ordering::Release);
        self.shared.event.set();
    }
}

fn run(shared: &Shared, jobs: &Mutex<Receiver<(Token, Work)>>) {
    loop {
        let next = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok((token, work)) = next else { return };
        let mut answer = Answer {
            shared,
            token,
            result: None,
        };
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            perform(&*shared.disk, work)
        }));
        answer.result = result.ok();
    }
}

fn perform(disk: &dyn BlockingDisk, work: Work) -> io::Result<Option<Vec<u8>>> {
    let done = match work {
        Work::Read(len, offset) => {
            let mut bytes = vec![0; len];
            disk.read_at(&mut bytes, offset)?;
            return Ok(Some(bytes));
        }
        Work::Write(bytes, offset) => disk.write_at(&bytes, offset),
        Work::Flush => disk.flush(),
        Work::Discard(offset, len) => disk.discard(offset, len),
        Work::WriteZeroes(offset, len, unmap) => disk.write_zeroes(offset, len, unmap),
        Work::SecureErase(offset, len) => disk.secure_erase(offset, len),
    };
    done.map(|()| None)
}

impl Engine for PoolEngine {
    fn start(&mut self, token: Token, operation: Operation<'_>) -> Option<io::Result<()>> {
        started(self.start_inner(token, operation))
    }

    fn submit(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn reap(&mut self, finished: &mut Vec<Finished>) -> io::Result<Wake> {
        self.collect(finished);
        self.sleeper.glance()
    }

    fn wait(&mut self, finished: &mut Vec<Finished>) -> io::Result<Wake> {
        let wake = if self.has_finished() {
            self.sleeper.look()?
        } else {
            self.sleeper.sleep()?
        };
        self.collect(finished);
        Ok(wake)
    }

    fn wait_for(&mut self, finished: &mut Vec<Finished>, limit: Duration) -> io::Result<Wake> {
        let wake = if self.has_finished() {
            self.sleeper.look()?
        } else {
            self.sleeper.sleep_for(limit)?
        };
        self.collect(finished);
        Ok(wake)
    }

    fn has_finished(&mut self) -> bool {
        // Ordering: Relaxed, `collect` acquires.
        self.shared.any.load(Ordering::Relaxed)
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }
}

impl Drop for PoolEngine {
    fn drop(&mut self) {
        // What is in flight is finished, and copied to nobody.
        self.work = None;
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
