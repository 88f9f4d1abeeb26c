//! The load: one queue of the crate `virtio-driver`, the same for every backend.
#![allow(unsafe_code)]
// UNSAFETY: the frontend takes raw buffers; poll is a system call.

use std::error::Error;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};
use virtio_driver::{
    EventFd, QueueNotifier, VhostUser, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkTransport,
    VirtioFeatureFlags,
};
use vm_memory::FileOffset;
use vm_memory::mmap::MmapRegion;

/// Entries of the ring, and so the most that is in flight.
pub(crate) const DEPTH_MAX: usize = 128;
/// No request may take longer.
const TIMEOUT_MS: i32 = 10_000;

/// What to send.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    pub(crate) depth: usize,
    /// Bytes of one request.
    pub(crate) block: usize,
    pub(crate) write: bool,
    /// One after the other, instead of anywhere.
    pub(crate) sequential: bool,
    /// Looks at the ring all the time, instead of sleeping until called.
    pub(crate) busy: bool,
    /// Requests in a second; as many as possible without.
    pub(crate) rate: Option<f64>,
    pub(crate) time: Duration,
}

/// What came of it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) requests: u64,
    pub(crate) seconds: f64,
    pub(crate) kicks: u64,
    pub(crate) sleeps: u64,
}

impl Outcome {
    pub(crate) fn iops(&self) -> f64 {
        self.requests as f64 / self.seconds
    }
}

/// A connection that is ready for load.
pub(crate) struct Frontend {
    queue: VirtioBlkQueue<'static, usize>,
    kick: Box<dyn QueueNotifier>,
    call: std::sync::Arc<EventFd>,
    buffers: MmapRegion,
    blocks_from: u64,
    seed: u64,
    // Last: the queue's memory is the transport's.
    _transport: Box<VirtioBlkTransport>,
}

impl Frontend {
    pub(crate) fn connect(socket: &Path, bytes: usize) -> Result<Frontend, Box<dyn Error>> {
        let features = VirtioFeatureFlags::VERSION_1.bits()
            | VirtioFeatureFlags::RING_EVENT_IDX.bits()
            | VirtioBlkFeatureFlags::FLUSH.bits();
        let socket = socket.to_str().ok_or("the socket's path is not text")?;
        let mut transport = Box::new(VhostUser::new(socket, features)?) as Box<VirtioBlkTransport>;
        let mut queues = VirtioBlkQueue::setup_queues(&mut *transport, 1, DEPTH_MAX as u16)?;
        let file = tempfile::tempfile_in("/dev/shm")?;
        file.set_len(bytes as u64)?;
        let fd = file.as_raw_fd();
        let buffers = MmapRegion::<()>::from_file(FileOffset::new(file, 0), bytes)?;
        transport.map_mem_region(buffers.as_ptr() as usize, bytes, fd, 0)?;
        Ok(Frontend {
            kick: transport.get_submission_notifier(0),
            call: transport.get_completion_fd(0),
            queue: queues.pop().ok_or("no queue")?,
            buffers,
            blocks_from: 0,
            seed: 0x9e37_79b9_7f4a_7c15,
            _transport: transport,
        })
    }

    /// Runs one load on a disk of this many bytes.
    pub(crate) fn run(&mut self, load: Load, disk: u64) -> Result<Outcome, Box<dyn Error>> {
        let mut outcome = Outcome::default();
        let mut ready: Vec<usize> = (0..load.depth.min(DEPTH_MAX)).collect();
        let depth = ready.len();
        let start = Instant::now();
        let mut due = start;
        loop {
            let now = Instant::now();
            let over = now - start >= load.time;
            if over && ready.len() == depth {
                break;
            }
            if !over && (load.rate.is_none() || (ready.len() == depth && now >= due)) {
                for slot in ready.drain(..) {
                    self.submit(load, disk, slot)?;
                }
                due += Duration::from_secs_f64(load.rate.map_or(0.0, |r| depth as f64 / r));
                if self.queue.avail_notif_needed() {
                    outcome.kicks += 1;
                    self.kick.notify()?;
                }
            }
            if load.rate.is_some() && ready.len() == depth {
                std::thread::sleep(due.saturating_duration_since(Instant::now()));
                continue;
            }
            self.collect(load.busy, &mut ready, &mut outcome)?;
        }
        outcome.seconds = start.elapsed().as_secs_f64();
        Ok(outcome)
    }

    fn submit(&mut self, load: Load, disk: u64, slot: usize) -> Result<(), Box<dyn Error>> {
        let blocks = disk / load.block as u64;
        let block = if load.sequential {
            self.blocks_from += 1;
            self.blocks_from % blocks
        } else {
            self.seed ^= self.seed << 13;
            self.seed ^= self.seed >> 7;
            self.seed ^= self.seed << 17;
            self.seed % blocks
        };
        let at = block * load.block as u64;
        let end = (slot + 1) * load.block;
        if end > self.buffers.size() {
            return Err("more depth than buffers".into());
        }
        let buffer = self.buffers.as_ptr().wrapping_add(slot * load.block);
        // SAFETY: a slot of the mapping, checked above, used by one request at a time.
        unsafe {
            if load.write {
                self.queue.write_raw(at, buffer, load.block, slot)?;
            } else {
                self.queue.read_raw(at, buffer, load.block, slot)?;
            }
        }
        Ok(())
    }

    /// Waits for at least one completion and takes all there are.
    fn collect(
        &mut self,
        busy: bool,
        ready: &mut Vec<usize>,
        outcome: &mut Outcome,
    ) -> Result<(), Box<dyn Error>> {
        let before = ready.len();
        let began = Instant::now();
        while ready.len() == before {
            if !busy {
                self.queue.set_used_notif_enabled(true);
                if !self.queue.completions().has_next() {
                    outcome.sleeps += 1;
                    self.sleep()?;
                }
            } else if began.elapsed() > Duration::from_millis(TIMEOUT_MS as u64) {
                return Err("no completion".into());
            }
            for done in self.queue.completions() {
                if done.ret != 0 {
                    return Err(format!("request failed: {}", done.ret).into());
                }
                ready.push(done.context);
            }
        }
        outcome.requests += (ready.len() - before) as u64;
        Ok(())
    }

    fn sleep(&self) -> std::io::Result<()> {
        // Some backends make the shared descriptor non-blocking.
        while let Err(error) = self.call.read() {
            if error.kind() != std::io::ErrorKind::WouldBlock {
                return Err(error);
            }
            let mut entry = libc::pollfd {
                fd: self.call.as_raw_fd(),
                events: libc::POLLIN,
                revents: 0,
            };
            // SAFETY: one valid entry.
            match unsafe { libc::poll(&mut entry, 1, TIMEOUT_MS) } {
                1 => {}
                0 => return Err(std::io::ErrorKind::TimedOut.into()),
                _ => return Err(std::io::Error::last_os_error()),
            }
        }
        Ok(())
    }
}
