//! One packet there and back: a frontend of our own, the same for both backends.
//!
//! It has a split ring each way on every port, sends a frame on the first port, and looks at the
//! last one's receive ring all the time until the frame is there, as a guest that does not sleep.
//! Kicks are written where the backend asks for them, and counted.

use std::error::Error;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::mmap::MmapRegion;
use vm_memory::{AtomicAccess, Bytes, FileOffset, VolatileMemory};
use vmm_sys_util::eventfd::EventFd;

/// Version 1.
const FEATURES: u64 = 1 << 32;
/// Entries of a ring.
const SIZE: u16 = 64;
/// Guest-physical address of the memory, and its bytes.
const BASE: u64 = 1 << 30;
const MEMORY: u64 = 1 << 20;
/// Bytes of one queue's part of it, and where the rest of its ring is.
const QUEUE: u64 = MEMORY / 2;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const BUFFERS: u64 = 0x4000;
/// Bytes of a buffer, of the header in front, and of the frame.
const BUFFER: u64 = 2048;
const HEADER: u64 = 12;
const FRAME: u64 = 64;
/// No packet may take longer.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Descriptor flag, and the device's wish not to be kicked.
const WRITE: u16 = 2;
const NO_NOTIFY: u16 = 1;
/// The driver's wish not to be called.
const NO_INTERRUPT: u16 = 1;

/// What the packets took, in microseconds.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Latency {
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    /// Kicks for each packet.
    pub(crate) kicks: f64,
}

/// How many packets, and the pause before each.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) packets: usize,
    pub(crate) pause: Duration,
}

/// Sends one packet after the other from the first of these ports to the last, whose guest has
/// this address.
pub(crate) fn measure(
    sockets: &[&Path],
    to: [u8; 6],
    plan: Plan,
) -> Result<Latency, Box<dyn Error>> {
    let mut ports = sockets
        .iter()
        .map(|socket| Port::connect(socket))
        .collect::<Result<Vec<_>, _>>()?;
    // The backend starts its queues on its own time.
    std::thread::sleep(Duration::from_millis(500));
    let last = ports.len() - 1;
    let mut times = Vec::with_capacity(plan.packets);
    let mut kicks = 0;
    for _ in 0..plan.packets {
        std::thread::sleep(plan.pause);
        let start = Instant::now();
        let sender = ports.first_mut().ok_or("no port")?;
        kicks += usize::from(sender.send(to)?);
        let receiver = ports.get_mut(last).ok_or("no port")?;
        while !receiver.receive()? {
            if start.elapsed() > TIMEOUT {
                return Err("a packet does not come back".into());
            }
            std::hint::spin_loop();
        }
        times.push(start.elapsed().as_secs_f64() * 1e6);
    }
    times.sort_by(f64::total_cmp);
    let at = |part: usize| times.get(times.len() * part / 100).copied();
    Ok(Latency {
        p50: at(50).ok_or("no packets")?,
        p99: at(99).ok_or("no packets")?,
        kicks: kicks as f64 / plan.packets as f64,
    })
}

/// A port with two rings, in memory of their own.
struct Port {
    map: MmapRegion,
    /// Receive, transmit.
    kicks: [EventFd; 2],
    avail: [u16; 2],
    used: [u16; 2],
    _calls: [EventFd; 2],
    _messages: Frontend,
}

impl Port {
    fn connect(socket: &Path) -> Result<Port, Box<dyn Error>> {
        let file = tempfile::tempfile_in("/dev/shm")?;
        file.set_len(MEMORY)?;
        let memory = VhostUserMemoryRegionInfo {
            guest_phys_addr: BASE,
            memory_size: MEMORY,
            userspace_addr: BASE,
            mmap_offset: 0,
            mmap_handle: file.as_raw_fd(),
        };
        let event = || EventFd::new(libc::EFD_NONBLOCK);
        let (kicks, calls) = ([event()?, event()?], [event()?, event()?]);
        let map = MmapRegion::from_file(FileOffset::new(file, 0), MEMORY as usize)?;
        let mut messages = Frontend::connect(socket, 2)?;
        messages.set_owner()?;
        let own = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let offered = messages.get_features()?;
        if offered & (FEATURES | own) != FEATURES | own {
            return Err(format!("the backend offers only {offered:#x}").into());
        }
        let protocol = messages.get_protocol_features()?;
        messages.set_protocol_features(protocol & VhostUserProtocolFeatures::MQ)?;
        messages.set_features(FEATURES | own)?;
        messages.set_mem_table(&[memory])?;
        let mut port = Port {
            map,
            kicks,
            avail: [0; 2],
            used: [0; 2],
            _calls: calls,
            _messages: messages,
        };
        port.prepare();
        for (index, start) in [(0, 0), (1, QUEUE)] {
            let messages = &mut port._messages;
            let config = VringConfigData {
                queue_max_size: SIZE,
                queue_size: SIZE,
                flags: 0,
                desc_table_addr: BASE + start,
                used_ring_addr: BASE + start + USED,
                avail_ring_addr: BASE + start + AVAIL,
                log_addr: None,
            };
            messages.set_vring_num(index, SIZE)?;
            messages.set_vring_base(index, 0)?;
            messages.set_vring_addr(index, &config)?;
            let (Some(call), Some(kick)) = (port._calls.get(index), port.kicks.get(index)) else {
                return Err("a port has two queues".into());
            };
            messages.set_vring_call(index, call)?;
            messages.set_vring_kick(index, kick)?;
            messages.set_vring_enable(index, true)?;
        }
        Ok(port)
    }

    /// Writes both rings' descriptors; every receive buffer is there from the start.
    fn prepare(&mut self) {
        for (start, len, flags) in [(0, BUFFER, WRITE), (QUEUE, HEADER + FRAME, 0)] {
            for index in 0..u64::from(SIZE) {
                let desc = start + 16 * index;
                self.put(desc, BASE + start + BUFFERS + BUFFER * index);
                // Neither is long.
                self.put(desc + 8, len as u32);
                self.put(desc + 12, flags);
                self.put(start + AVAIL + 4 + 2 * index, index as u16);
            }
            self.put(start + AVAIL, NO_INTERRUPT);
        }
        self.put(AVAIL + 2, SIZE);
        self.avail = [SIZE, 0];
    }

    fn put<T: AtomicAccess>(&self, at: u64, value: T) {
        // Offsets are of the layout above. Ordering: Release, for the indices.
        let memory = self.map.as_volatile_slice();
        let _ = memory.store(value, at as usize, Ordering::Release);
    }

    fn get<T: AtomicAccess + Default>(&self, at: u64) -> T {
        let memory = self.map.as_volatile_slice();
        memory
            .load(at as usize, Ordering::Acquire)
            .unwrap_or_default()
    }

    /// Makes the next entry of a ring available. Whether the backend wanted a kick for it.
    fn offer(&mut self, queue: usize) -> Result<bool, Box<dyn Error>> {
        let start = QUEUE * queue as u64;
        let (Some(avail), Some(kick)) = (self.avail.get_mut(queue), self.kicks.get(queue)) else {
            return Err("a port has two queues".into());
        };
        *avail = avail.wrapping_add(1);
        let now = *avail;
        let memory = self.map.as_volatile_slice();
        memory.store(now, (start + AVAIL + 2) as usize, Ordering::Release)?;
        // Ordering: the index must be out before the wish is read.
        fence(Ordering::SeqCst);
        let wish: u16 = memory.load((start + USED) as usize, Ordering::Acquire)?;
        if wish & NO_NOTIFY != 0 {
            return Ok(false);
        }
        kick.write(1)?;
        Ok(true)
    }

    /// Sends a frame. Whether that took a kick.
    fn send(&mut self, to: [u8; 6]) -> Result<bool, Box<dyn Error>> {
        let [_, avail] = self.avail;
        // The packets before are long over: this one's buffer is free.
        let at = QUEUE + BUFFERS + BUFFER * u64::from(avail % SIZE);
        let mut frame = [0; (HEADER + FRAME) as usize];
        let addresses = [to, SENDER].concat();
        if let Some(start) = frame.get_mut(HEADER as usize..HEADER as usize + 12) {
            start.copy_from_slice(&addresses);
        }
        let memory = self.map.as_volatile_slice();
        memory.write_slice(&frame, at as usize)?;
        self.offer(1)
    }

    /// Takes a frame, if there is one, and gives the buffer back.
    fn receive(&mut self) -> Result<bool, Box<dyn Error>> {
        let [used, _] = self.used;
        if self.get::<u16>(USED + 2) == used {
            return Ok(false);
        }
        let id: u32 = self.get(USED + 4 + 8 * u64::from(used % SIZE));
        let [avail, _] = self.avail;
        // Below SIZE, as it was given.
        self.put(AVAIL + 4 + 2 * u64::from(avail % SIZE), id as u16);
        let [used, _] = &mut self.used;
        *used = used.wrapping_add(1);
        // A kick for a buffer is none for a packet.
        self.offer(0)?;
        Ok(true)
    }
}

/// The address that frames come from.
pub(crate) const SENDER: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];
/// The address of a second port's guest.
pub(crate) const RECEIVER: [u8; 6] = [0x52, 0x54, 0, 0, 0, 2];
