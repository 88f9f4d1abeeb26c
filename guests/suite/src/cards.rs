//! A card without a driver: rings as a case wants them, and what comes back through them.

use crate::devices::{RawSetup, SETUP_LEN};
use crate::{Outcome, ensure, text};
use alloc::string::String;
use alloc::vec::Vec;
use core::sync::atomic::{Ordering, fence};
use core::time::Duration;
use guest_sdk::flat::Boot;
use guest_sdk::platform::{DeviceInfo, DmaBuf, Platform};
use pv_abi::status::Status;
use pv_abi::virtio::desc_flag::{NEXT, WRITE};

/// Bytes of a receive buffer.
pub const BUFFER: u32 = 2000;

/// A card's queues, or those of any device whose first two receive and transmit.
pub struct RawCard {
    pub info: DeviceInfo,
    pub setups: Vec<RawSetup>,
    rings: Vec<DmaBuf>,
    /// Chains that were made available, and descriptors that were written, for each queue.
    offered: Vec<u16>,
    written: Vec<u16>,
    /// What frames and commands are made of.
    data: DmaBuf,
    /// One after the other.
    buffers: DmaBuf,
    pub arena_end: u64,
}

impl RawCard {
    /// So many queues of so many entries each, activated with these features.
    pub fn start(
        boot: &Boot,
        info: DeviceInfo,
        queues: usize,
        size: u16,
        features: u64,
    ) -> Result<RawCard, String> {
        let mut card = RawCard::new(boot, info, queues, size, 17)?;
        if let Some(first) = card.setups.first_mut() {
            first.features |= features;
        }
        card.activate(boot).map_err(text("activate"))?;
        Ok(card)
    }

    /// So many queues that are not active yet, and so many pages for what is sent and for what comes.
    pub fn new(
        boot: &Boot,
        info: DeviceInfo,
        queues: usize,
        size: u16,
        pages: usize,
    ) -> Result<RawCard, String> {
        let arena = boot.platform().arena(info.arena).ok_or("no arena")?;
        let zeroed = |pages: usize| -> Result<DmaBuf, String> {
            let buf = arena.alloc_aligned(pages * 4096, 4096);
            let buf = buf.map_err(text("alloc"))?;
            buf.zero();
            Ok(buf)
        };
        // 26 bytes for each entry, and a few more.
        let of_ring = (26 * usize::from(size) + 64).div_ceil(4096);
        let rings = (0..queues).map(|_| zeroed(of_ring));
        let rings = rings.collect::<Result<Vec<_>, _>>()?;
        let mut setups: Vec<RawSetup> = rings
            .iter()
            .map(|ring| RawSetup::at(ring.gpa(), size))
            .collect();
        if let Some(first) = setups.first_mut() {
            first.queue_count = queues as u32;
        }
        Ok(RawCard {
            info,
            setups,
            rings,
            offered: alloc::vec![0; queues],
            written: alloc::vec![0; queues],
            data: zeroed(pages)?,
            buffers: zeroed(pages)?,
            arena_end: arena.gpa() + arena.len(),
        })
    }

    /// Calls `DEVICE_ACTIVATE`.
    pub fn activate(&self, boot: &Boot) -> Result<u64, Status> {
        // What is the device's comes first, and then each queue.
        let of_queue = (SETUP_LEN - 32) as usize;
        let mut bytes = Vec::new();
        for setup in &self.setups {
            let from = if bytes.is_empty() { 0 } else { of_queue };
            bytes.extend(setup.bytes().get(from..).unwrap_or_default());
        }
        let gpa = boot.platform().fill_scratch(&bytes).unwrap_or(0);
        crate::devices::activate(boot, self.info.index.into(), gpa, bytes.len() as u64)
    }

    /// Where what [`write`](Self::write) writes is.
    pub fn data(&self) -> u64 {
        self.data.gpa()
    }

    /// Writes a frame with its header, or a command.
    pub fn write(&mut self, bytes: &[u8]) {
        self.data.write(0, bytes);
    }

    /// What the device has written there.
    pub fn written_at(&self, offset: usize) -> u8 {
        let mut byte = [0];
        self.data.read(offset, &mut byte);
        byte[0]
    }

    /// A receive buffer.
    pub fn buffer(&self) -> u64 {
        self.buffers.gpa()
    }

    /// What came into receive buffers.
    pub fn received(&self, offset: usize, len: usize) -> Vec<u8> {
        let mut bytes = alloc::vec![0; len];
        self.buffers.read(offset, &mut bytes);
        bytes
    }

    /// Offers one receive buffer.
    pub fn receive_into(&mut self, address: u64) {
        self.offer(0, &[(address, BUFFER, WRITE)]);
    }

    /// Offers a chain of one piece that is `len` bytes of what was written.
    pub fn send(&mut self, len: usize) {
        let piece = (self.data.gpa(), len as u32, 0);
        self.offer(1, &[piece]);
    }

    /// Makes a chain of these pieces available: address, bytes, flags; with
    /// [`NEXT`] where another one follows.
    pub fn offer(&mut self, queue: usize, pieces: &[(u64, u32, u16)]) {
        let (ring, setup) = (&mut self.rings[queue], self.setups[queue]);
        let place = |n: u16| n % setup.size;
        let head = place(self.written[queue]);
        for (addr, len, flags) in pieces {
            let (n, next) = (self.written[queue], self.written[queue].wrapping_add(1));
            let at = usize::from(place(n)) * 16;
            ring.write(at, &addr.to_le_bytes());
            ring.write(at + 8, &len.to_le_bytes());
            ring.write(at + 12, &flags.to_le_bytes());
            ring.write(at + 14, &place(next).to_le_bytes());
            self.written[queue] = next;
        }
        let avail = (setup.avail - ring.gpa()) as usize;
        let entry = avail + 4 + 2 * usize::from(place(self.offered[queue]));
        ring.write(entry, &head.to_le_bytes());
        self.offered[queue] = self.offered[queue].wrapping_add(1);
        fence(Ordering::SeqCst);
        ring.write(avail + 2, &self.offered[queue].to_le_bytes());
        fence(Ordering::SeqCst);
    }

    /// As [`offer`](Self::offer), with each piece but the last marked as not the last.
    pub fn offer_chain(&mut self, queue: usize, pieces: &[(u64, u32, u16)]) {
        let last = pieces.len().saturating_sub(1);
        let marked: Vec<_> = pieces
            .iter()
            .enumerate()
            .map(|(i, (addr, len, flags))| {
                let more = if i < last { NEXT } else { 0 };
                (*addr, *len, flags | more)
            })
            .collect();
        self.offer(queue, &marked);
    }

    pub fn kick(&self, boot: &Boot, queue: u16) {
        boot.platform().notify(self.info.queue_event(queue));
    }

    /// Chains that came back, wrapping.
    pub fn used(&self, queue: usize) -> u16 {
        let (ring, setup) = (&self.rings[queue], &self.setups[queue]);
        let mut index = [0; 2];
        ring.read((setup.used - ring.gpa()) as usize + 2, &mut index);
        fence(Ordering::SeqCst);
        u16::from_le_bytes(index)
    }

    /// Bytes that the device wrote into the chain that came back as number `n`, from zero.
    pub fn used_len(&self, queue: usize, n: u16) -> u32 {
        let (ring, setup) = (&self.rings[queue], &self.setups[queue]);
        let at = (setup.used - ring.gpa()) as usize + 4 + 8 * usize::from(n % setup.size);
        let mut len = [0; 4];
        ring.read(at + 4, &mut len);
        u32::from_le_bytes(len)
    }

    /// Waits until all that was offered on a queue is back.
    pub fn wait_all(&self, boot: &Boot, queue: usize) -> Outcome {
        self.wait_used(boot, queue, self.offered[queue])
    }

    /// Waits until so many chains are back on a queue.
    pub fn wait_used(&self, boot: &Boot, queue: usize, count: u16) -> Outcome {
        let platform = boot.platform();
        let start = platform.now_ns();
        while self.used(queue) != count {
            let late = platform.now_ns() - start > 20_000_000_000;
            let used = self.used(queue);
            ensure!(!late, "{used} of {count} chains came back on queue {queue}");
            platform.idle(Some(Duration::from_millis(5)));
            platform.take_events(0, u64::MAX);
        }
        Ok(())
    }

    /// Sends what was written, so many bytes of it, and waits until it is back.
    pub fn send_and_wait(&mut self, boot: &Boot, len: usize) -> Outcome {
        self.send(len);
        self.kick(boot, 1);
        self.wait_all(boot, 1)
    }
}
