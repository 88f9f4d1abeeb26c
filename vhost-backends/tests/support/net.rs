//! A network frontend with rings of its own: split and packed, chains as the test wants them.
#![allow(dead_code)]

use super::raw::{Client, PACKED, PROTOCOL, Shared, event, pair, words};
use std::fs::File;
use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};
use vhost_backends::session::Device;

pub(crate) const TIMEOUT: Duration = Duration::from_secs(20);
const GUEST: u64 = 0x4000_0000;
const USER: u64 = 0x7f00_0000_0000;
const MEMORY: u64 = 16 << 20;
/// Bytes of one queue's rings.
const RINGS: u64 = 0x1_0000;
const AVAIL: u64 = 0x4000;
const USED: u64 = 0x8000;
/// Where buffers begin.
pub(crate) const DATA: u64 = 0x10_0000;
/// Entries of each queue.
pub(crate) const SIZE: u16 = 256;
/// Descriptors of a chain at most.
const PER: u16 = 8;

pub(crate) const VERSION_1: u64 = 1 << 32;
pub(crate) const EVENT_IDX: u64 = 1 << 29;
pub(crate) const MRG: u64 = 1 << 15;
pub(crate) const MTU: u64 = 1 << 3;
pub(crate) const CTRL: u64 = 1 << 17 | 1 << 18 | 1 << 19 | 1 << 20 | 1 << 21 | 1 << 23 | 1 << 2;
pub(crate) const MQ: u64 = 1 << 22;
pub(crate) const HASH_REPORT: u64 = 1 << 57;
pub(crate) const RSS: u64 = 1 << 60;
pub(crate) const CSUM: u64 = 1;
pub(crate) const GUEST_CSUM: u64 = 1 << 1;
pub(crate) const HOST_LARGE: u64 = 1 << 11 | 1 << 12 | 1 << 56;
pub(crate) const GUEST_LARGE: u64 = 1 << 7 | 1 << 8 | 1 << 54 | 1 << 55;

#[derive(Clone, Copy, Debug)]
pub(crate) struct Buffer {
    pub(crate) at: u64,
    pub(crate) len: u32,
    pub(crate) writable: bool,
}

struct Queue {
    index: u16,
    avail: u16,
    avail_wrap: bool,
    used: u16,
    used_wrap: bool,
    /// By id: the chain, while the device has it.
    chains: Vec<Option<Vec<Buffer>>>,
    kick: File,
    call: File,
}

/// A driver of one network device.
pub(crate) struct NetFront {
    pub(crate) memory: Shared,
    pub(crate) client: Client,
    packed: bool,
    pub(crate) features: u64,
    queues: Vec<Queue>,
    /// Where the next buffer goes.
    next: u64,
}

impl NetFront {
    /// Connects, and starts so many queues.
    pub(crate) fn start(device: Arc<dyn Device>, features: u64, queues: u16) -> NetFront {
        let client = Client::connect(device);
        NetFront::on(client, features, queues)
    }

    pub(crate) fn on(client: Client, features: u64, queues: u16) -> NetFront {
        let mut front = NetFront {
            memory: Shared::new(MEMORY),
            client,
            packed: features & PACKED != 0,
            features,
            queues: Vec::new(),
            next: DATA,
        };
        let client = &mut front.client;
        client.send(3, 1, &[], &[]);
        let offered = client.query_u64(1);
        assert_eq!(features & !offered, 0, "features that are not offered");
        client.send(2, 1, &(features | PROTOCOL).to_ne_bytes(), &[]);
        let protocol = client.query_u64(15);
        client.send(16, 1, &protocol.to_ne_bytes(), &[]);
        assert!(client.set(2, &(features | PROTOCOL).to_ne_bytes(), &[]));
        let mut table = pair(1, 0);
        table.extend(words(&[GUEST, MEMORY, USER, 0]));
        assert!(front.client.set(5, &table, &[&front.memory.file]));
        for index in 0..queues {
            front.open(index);
        }
        front
    }

    pub(crate) fn open(&mut self, index: u16) {
        assert!(self.try_open(index), "queue {index}");
    }

    /// Whether there is such a queue.
    pub(crate) fn try_open(&mut self, index: u16) -> bool {
        let client = &mut self.client;
        let i = u32::from(index);
        let at = USER + RINGS * u64::from(index);
        assert!(client.set(8, &pair(i, SIZE.into()), &[]));
        assert!(client.set(10, &pair(i, if self.packed { 0x8000_8000 } else { 0 }), &[]));
        let mut addr = pair(i, 0);
        addr.extend(words(&[at, at + USED, at + AVAIL, 0]));
        assert!(client.set(9, &addr, &[]));
        let (kick, call) = (event(), event());
        assert!(client.set(13, &words(&[i.into()]), &[&call]));
        assert!(client.set(12, &words(&[i.into()]), &[&kick]));
        if !client.set(18, &pair(i, 1), &[]) {
            return false;
        }
        self.queues.push(Queue {
            index,
            avail: 0,
            avail_wrap: true,
            used: 0,
            used_wrap: true,
            chains: vec![None; usize::from(SIZE / PER)],
            kick,
            call,
        });
        true
    }

    // ---- memory

    /// A place for so many bytes; the oldest ones are used again at the end of memory.
    pub(crate) fn place(&mut self, len: usize) -> u64 {
        let len = (len as u64).next_multiple_of(64);
        if self.next + len > MEMORY {
            self.next = DATA;
        }
        let at = self.next;
        self.next += len;
        at
    }

    // ---- rings

    fn desc(&self, at: u64, (addr, len): (u64, u32), low: u16, high: u16) {
        self.memory.put(at, GUEST + addr);
        self.memory.put(at + 8, len);
        self.memory.put(at + 12, low);
        self.memory.put(at + 14, high);
    }

    /// Makes a chain available; its id. `None`: as many are in flight as there can be.
    pub(crate) fn offer(&mut self, queue: usize, chain: &[Buffer]) -> Option<u16> {
        assert!(!chain.is_empty() && chain.len() <= usize::from(PER));
        let q = &self.queues[queue];
        let id = q.chains.iter().position(Option::is_none)? as u16;
        let base = RINGS * u64::from(q.index);
        let (mut avail, mut wrap) = (q.avail, q.avail_wrap);
        let mut first = None;
        for (i, buffer) in (0u16..).zip(chain) {
            let more = usize::from(i) + 1 < chain.len();
            let flags = u16::from(more) | if buffer.writable { 2 } else { 0 };
            if self.packed {
                let at = base + 16 * u64::from(avail);
                let flags = flags | if wrap { 1 << 7 } else { 1 << 15 };
                self.memory.put(at, GUEST + buffer.at);
                self.memory.put(at + 8, buffer.len);
                self.memory.put(at + 12, id);
                match first {
                    None => first = Some((at + 14, flags)),
                    Some(_) => self.memory.put(at + 14, flags),
                }
                avail += 1;
                if avail == SIZE {
                    (avail, wrap) = (0, !wrap);
                }
            } else {
                let slot = id * PER + i;
                let at = base + 16 * u64::from(slot);
                self.desc(at, (buffer.at, buffer.len), flags, slot + 1);
            }
        }
        if let Some((at, flags)) = first {
            self.memory.put(at, flags);
        } else {
            let slot = base + AVAIL + 4 + 2 * u64::from(avail % SIZE);
            self.memory.put(slot, id * PER);
            avail = avail.wrapping_add(1);
            self.memory.put(base + AVAIL + 2, avail);
        }
        let q = &mut self.queues[queue];
        (q.avail, q.avail_wrap) = (avail, wrap);
        q.chains[usize::from(id)] = Some(chain.to_vec());
        Some(id)
    }

    pub(crate) fn kick(&self, queue: usize) {
        fence(Ordering::SeqCst);
        let mut kick = &self.queues[queue].kick;
        kick.write_all(&1u64.to_ne_bytes()).unwrap();
    }

    /// A chain that the device is done with, and how many bytes it wrote.
    pub(crate) fn used(&mut self, queue: usize) -> Option<(Vec<Buffer>, u32)> {
        let q = &self.queues[queue];
        let base = RINGS * u64::from(q.index);
        let (id, len) = if self.packed {
            let at = base + 16 * u64::from(q.used);
            let flags = self.memory.get::<u16>(at + 14);
            let (avail, used) = (flags & 1 << 7 != 0, flags & 1 << 15 != 0);
            if avail != q.used_wrap || used != q.used_wrap {
                return None;
            }
            (
                self.memory.get::<u16>(at + 12),
                self.memory.get::<u32>(at + 8),
            )
        } else {
            if self.memory.get::<u16>(base + USED + 2) == q.used {
                return None;
            }
            let at = base + USED + 4 + 8 * u64::from(q.used % SIZE);
            (
                self.memory.get::<u32>(at) as u16 / PER,
                self.memory.get::<u32>(at + 4),
            )
        };
        let q = &mut self.queues[queue];
        let chain = q.chains[usize::from(id)].take().expect("in flight");
        if self.packed {
            q.used += chain.len() as u16;
            if q.used >= SIZE {
                q.used -= SIZE;
                q.used_wrap = !q.used_wrap;
            }
        } else {
            q.used = q.used.wrapping_add(1);
        }
        Some((chain, len))
    }

    pub(crate) fn wait_used(&mut self, queue: usize) -> (Vec<Buffer>, u32) {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            if let Some(used) = self.used(queue) {
                return used;
            }
            assert!(
                Instant::now() < deadline,
                "nothing was used on queue {queue}"
            );
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    pub(crate) fn in_flight(&self, queue: usize) -> usize {
        self.queues[queue].chains.iter().flatten().count()
    }

    pub(crate) fn called(&self, queue: usize) -> bool {
        let mut call = &self.queues[queue].call;
        call.read_exact(&mut [0; 8]).is_ok()
    }

    // ---- frames

    pub(crate) fn header_len(&self) -> usize {
        if self.features & 1 << 57 != 0 { 20 } else { 12 }
    }

    /// Offers a receive buffer of so many bytes.
    pub(crate) fn offer_receive(&mut self, queue: usize, len: usize) -> bool {
        let at = self.place(len);
        let buffer = Buffer {
            at,
            len: len as u32,
            writable: true,
        };
        self.offer(queue, &[buffer]).is_some()
    }

    /// Sends a frame with this header in one buffer, and waits until the device is done with it.
    pub(crate) fn send(&mut self, queue: usize, header: &[u8], frame: &[u8]) {
        let bytes = [header, frame].concat();
        let at = self.place(bytes.len().max(1));
        self.memory.fill(at, &bytes);
        let buffer = Buffer {
            at,
            len: bytes.len() as u32,
            writable: false,
        };
        self.offer(queue, &[buffer]).expect("room");
        self.kick(queue);
        assert_eq!(
            self.wait_used(queue).1,
            0,
            "nothing is written to sent buffers"
        );
    }

    /// A frame that came: its header, its bytes and its buffers given back.
    pub(crate) fn try_receive(&mut self, queue: usize) -> Option<(Vec<u8>, Vec<u8>)> {
        let (chain, len) = self.used(queue)?;
        let head = self.header_len();
        let mut bytes = self.gather(&chain, len);
        assert!(bytes.len() >= head, "a header at least");
        let count = u16::from_le_bytes([bytes[10], bytes[11]]);
        for _ in 1..count {
            let (chain, len) = self.wait_used(queue);
            bytes.extend(self.gather(&chain, len));
        }
        let frame = bytes.split_off(head);
        Some((bytes, frame))
    }

    pub(crate) fn receive(&mut self, queue: usize) -> (Vec<u8>, Vec<u8>) {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            if let Some(received) = self.try_receive(queue) {
                return received;
            }
            assert!(Instant::now() < deadline, "no frame on queue {queue}");
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    fn gather(&self, chain: &[Buffer], len: u32) -> Vec<u8> {
        let mut bytes = Vec::new();
        for buffer in chain {
            let take = (len as usize - bytes.len()).min(buffer.len as usize);
            bytes.extend(self.memory.bytes(buffer.at, take));
        }
        assert_eq!(bytes.len(), len as usize, "more used than there is");
        bytes
    }

    /// Sends a control command; the answer. The parts go into buffers of their own.
    pub(crate) fn command(&mut self, queue: usize, parts: &[&[u8]]) -> u8 {
        let mut chain = Vec::new();
        for part in parts {
            let at = self.place(part.len().max(1));
            self.memory.fill(at, part);
            chain.push(Buffer {
                at,
                len: part.len() as u32,
                writable: false,
            });
        }
        let at = self.place(1);
        self.memory.fill(at, &[0x77]);
        chain.push(Buffer {
            at,
            len: 1,
            writable: true,
        });
        self.offer(queue, &chain).unwrap();
        self.kick(queue);
        assert_eq!(self.wait_used(queue).1, 1);
        self.memory.bytes(at, 1)[0]
    }
}
