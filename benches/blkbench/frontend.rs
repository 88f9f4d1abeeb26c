//! The load: one queue, the same for every backend.
//!
//! The frontend is a thread of this process on a processor of its own. It resubmits what is over
//! as soon as it sees it, kicks where the backend asks for it, and either looks at the ring all
//! the time (`busy`, as a guest whose processor does not sleep) or arms the call and sleeps.

use crate::driver::{AVAIL, DESC, Driver, RING_SIZE, USED};
use std::error::Error;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend as Messages, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::FileOffset;
use vm_memory::mmap::MmapRegion;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

/// The most that is in flight.
pub(crate) const DEPTH_MAX: usize = RING_SIZE as usize;
/// No request may take longer.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Guest-physical address of the memory.
const BASE: u64 = 1 << 30;
/// Version 1, event index, indirect descriptors, flush.
const FEATURES: u64 = 1 << 32 | 1 << 29 | 1 << 28 | 1 << 9;
/// Turns between two looks at the clock, which costs as much as a request of the fastest backend.
const TURNS: u32 = 16;

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
    driver: Driver,
    kick: EventFd,
    call: EventFd,
    called: Epoll,
    next_block: u64,
    seed: u64,
    _messages: Messages,
}

impl Frontend {
    /// Connects, with memory for so many bytes in flight.
    pub(crate) fn connect(socket: &Path, bytes: usize) -> Result<Frontend, Box<dyn Error>> {
        let file = tempfile::tempfile_in("/dev/shm")?;
        let len = Driver::memory_len(bytes);
        file.set_len(len as u64)?;
        let memory = VhostUserMemoryRegionInfo {
            guest_phys_addr: BASE,
            memory_size: len as u64,
            userspace_addr: BASE,
            mmap_offset: 0,
            mmap_handle: file.as_raw_fd(),
        };
        let (kick, call) = (EventFd::new(0)?, EventFd::new(libc::EFD_NONBLOCK)?);
        let messages = handshake(socket, memory, &kick, &call)?;
        let called = Epoll::new()?;
        let event = EpollEvent::new(EventSet::IN, 0);
        called.ctl(ControlOperation::Add, call.as_raw_fd(), event)?;
        let map = MmapRegion::from_file(FileOffset::new(file, 0), len)?;
        Ok(Frontend {
            driver: Driver::new(map, BASE),
            kick,
            call,
            called,
            next_block: 0,
            seed: 0x9e37_79b9_7f4a_7c15,
            _messages: messages,
        })
    }

    /// Runs one load on a disk of this many bytes.
    pub(crate) fn run(&mut self, load: Load, disk: u64) -> Result<Outcome, Box<dyn Error>> {
        let depth = load.depth.clamp(1, DEPTH_MAX);
        if !self.driver.fits(depth, load.block) {
            return Err("more in flight than there are buffers".into());
        }
        self.driver
            .prepare(depth, u32::try_from(load.block)?, load.write);
        let mut outcome = Outcome::default();
        let mut ready: Vec<u16> = (0..u16::try_from(depth)?).collect();
        let start = Instant::now();
        let (mut due, mut now, mut turn) = (start, start, 0);
        loop {
            turn += 1;
            if load.rate.is_some() || turn % TURNS == 0 {
                now = Instant::now();
            }
            let over = now - start >= load.time;
            if over && ready.len() == depth {
                break;
            }
            if !over && (load.rate.is_none() || (ready.len() == depth && now >= due)) {
                for slot in ready.drain(..) {
                    let sector = self.next_sector(load, disk);
                    self.driver.submit(slot, sector);
                }
                due += Duration::from_secs_f64(load.rate.map_or(0.0, |r| depth as f64 / r));
                if self.driver.wants_kick() {
                    outcome.kicks += 1;
                    self.kick.write(1)?;
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

    fn next_sector(&mut self, load: Load, disk: u64) -> u64 {
        let blocks = disk / load.block as u64;
        let block = if load.sequential {
            self.next_block += 1;
            self.next_block % blocks
        } else {
            self.seed ^= self.seed << 13;
            self.seed ^= self.seed >> 7;
            self.seed ^= self.seed << 17;
            self.seed % blocks
        };
        block * (load.block as u64 / 512)
    }

    /// Waits for at least one completion and takes all there are.
    fn collect(
        &mut self,
        busy: bool,
        ready: &mut Vec<u16>,
        outcome: &mut Outcome,
    ) -> Result<(), Box<dyn Error>> {
        let before = ready.len();
        let mut looks = 0u32;
        let mut began = None;
        while !self.driver.has_completions() {
            if !busy {
                if self.driver.want_call() {
                    outcome.sleeps += 1;
                    self.sleep()?;
                }
                continue;
            }
            looks = looks.wrapping_add(1);
            if looks.is_multiple_of(1 << 16)
                && began.get_or_insert_with(Instant::now).elapsed() > TIMEOUT
            {
                return Err("no completion".into());
            }
            std::hint::spin_loop();
        }
        self.driver
            .reap(ready)
            .map_err(|status| format!("a request failed with status {status}"))?;
        outcome.requests += (ready.len() - before) as u64;
        Ok(())
    }

    fn sleep(&self) -> Result<(), Box<dyn Error>> {
        let timeout = i32::try_from(TIMEOUT.as_millis())?;
        let mut events = [EpollEvent::default()];
        match self.called.wait(timeout, &mut events) {
            Ok(0) => return Err("no call".into()),
            Err(error) if error.kind() != std::io::ErrorKind::Interrupted => {
                return Err(error.into());
            }
            _ => {}
        }
        // Empty after an interruption, which is as good: the ring is looked at again.
        let _ = self.call.read();
        Ok(())
    }
}

/// What every frontend says, in the order in which QEMU says it.
fn handshake(
    socket: &Path,
    memory: VhostUserMemoryRegionInfo,
    kick: &EventFd,
    call: &EventFd,
) -> Result<Messages, Box<dyn Error>> {
    let mut messages = Messages::connect(socket, 1)?;
    messages.set_owner()?;
    let offered = messages.get_features()?;
    let own = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
    if offered & (FEATURES | own) != FEATURES | own {
        return Err(format!("the backend offers only {offered:#x}").into());
    }
    let protocol = messages.get_protocol_features()?;
    messages.set_protocol_features(
        protocol & (VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::CONFIG),
    )?;
    messages.set_features(FEATURES | own)?;
    messages.set_mem_table(&[memory])?;
    messages.set_vring_num(0, RING_SIZE)?;
    messages.set_vring_base(0, 0)?;
    let config = VringConfigData {
        queue_max_size: RING_SIZE,
        queue_size: RING_SIZE,
        flags: 0,
        desc_table_addr: BASE + DESC,
        used_ring_addr: BASE + USED,
        avail_ring_addr: BASE + AVAIL,
        log_addr: None,
    };
    messages.set_vring_addr(0, &config)?;
    messages.set_vring_call(0, call)?;
    messages.set_vring_kick(0, kick)?;
    messages.set_vring_enable(0, true)?;
    Ok(messages)
}
