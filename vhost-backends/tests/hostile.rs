//! A guest that breaks its ring, with a frontend that is honest: that queue ends with its error
//! event, the other one and the next connection do not notice.

mod support {
    pub(crate) mod raw;
}

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};
use support::raw::{Client, event, memory, pair, words};
use vhost_backends::block::{BlockDevice, BlockOptions};
use vhost_backends::engine::{FileOptions, RawFile};
use vm_memory::mmap::MmapRegion;
use vm_memory::{Bytes, FileOffset, VolatileMemory};

const SIZE: u64 = 0x1_0000;
const USER: u64 = 0x5000_0000;
const GUEST: u64 = 0x4000_0000;
const HEADER: u64 = 0xc000;
const DATA: u64 = 0xd000;
const STATUS: u64 = 0xe000;

/// An eventfd that is waited on with a limit.
struct Signal {
    theirs: File,
}

impl Signal {
    fn new() -> Signal {
        Signal { theirs: event() }
    }

    fn set(&self) {
        (&self.theirs).write_all(&1u64.to_ne_bytes()).unwrap();
    }

    fn wait(&self) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.is_quiet() {
            assert!(Instant::now() < deadline, "no signal");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Whether there is none; one that was there is gone.
    fn is_quiet(&self) -> bool {
        let read = (&self.theirs).read(&mut [0; 8]);
        read.is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
    }
}

struct Queue {
    base: u64,
    avail: u16,
    kick: Signal,
    call: Signal,
    err: Signal,
}

struct Guest {
    client: Client,
    ram: MmapRegion,
}

impl Guest {
    fn new(device: Arc<BlockDevice>) -> Guest {
        let file = memory(SIZE);
        let mut client = Client::connect(device);
        client.negotiate();
        let mut table = pair(1, 0);
        table.extend(words(&[GUEST, SIZE, USER, 0]));
        assert!(client.set(5, &table, &[&file]));
        let ram = MmapRegion::from_file(FileOffset::new(file, 0), SIZE as usize).unwrap();
        Guest { client, ram }
    }

    fn put<T: vm_memory::ByteValued>(&self, at: u64, value: T) {
        let ram = self.ram.as_volatile_slice();
        ram.write_obj(value, at as usize).unwrap();
    }

    fn queue(&mut self, index: u32) -> Queue {
        let base = 0x4000 * u64::from(index);
        let queue = Queue {
            base,
            avail: 0,
            kick: Signal::new(),
            call: Signal::new(),
            err: Signal::new(),
        };
        // Registers, and a ring as a driver leaves it after its own reset.
        let zeroes = [0u8; 0x4000];
        let ram = self.ram.as_volatile_slice();
        ram.write_slice(&zeroes, base as usize).unwrap();
        let at = USER + base;
        let mut addr = pair(index, 0);
        addr.extend(words(&[at, at + 0x2000, at + 0x1000, 0]));
        let number = words(&[index.into()]);
        let client = &mut self.client;
        assert!(client.set(8, &pair(index, 64), &[]));
        assert!(client.set(10, &pair(index, 0), &[]));
        assert!(client.set(9, &addr, &[]));
        assert!(client.set(14, &number, &[&queue.err.theirs]));
        assert!(client.set(13, &number, &[&queue.call.theirs]));
        assert!(client.set(12, &number, &[&queue.kick.theirs]));
        assert!(client.set(18, &pair(index, 1), &[]));
        queue
    }

    fn desc(&self, queue: &Queue, index: u64, addr: u64, len: u32, flags: u16, next: u16) {
        let at = queue.base + 16 * index;
        self.put(at, addr);
        self.put(at + 8, len);
        self.put(at + 12, flags);
        self.put(at + 14, next);
    }

    fn offer(&self, queue: &mut Queue, head: u16) {
        let slot = queue.base + 0x1000 + 4 + 2 * u64::from(queue.avail % 64);
        self.put(slot, head);
        queue.avail += 1;
        // `used_event` follows, so that each completion calls.
        self.put(queue.base + 0x1000 + 4 + 2 * 64, queue.avail - 1);
        self.put(queue.base + 0x1000 + 2, queue.avail);
        queue.kick.set();
    }

    fn read_works(&self, queue: &mut Queue) {
        self.put(HEADER, [0u64; 2]);
        self.put(STATUS, 0xffu8);
        self.desc(queue, 0, GUEST + HEADER, 16, 1, 1);
        self.desc(queue, 1, GUEST + DATA, 512, 3, 2);
        self.desc(queue, 2, GUEST + STATUS, 1, 2, 0);
        self.offer(queue, 0);
        queue.call.wait();
        let ram = self.ram.as_volatile_slice();
        assert_eq!(ram.read_obj::<u8>(STATUS as usize).unwrap(), 0);
    }
}

#[test]
fn a_broken_ring_ends_alone_and_comes_back_after_a_reset() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::write(&path, vec![7; 4096]).unwrap();
    let file = RawFile::open(&path, FileOptions::default()).unwrap();
    let device = Arc::new(BlockDevice::new(file, BlockOptions::with_queues(2)));
    type Break = fn(&Guest, &mut Queue);
    let cases: [(&str, Break); 5] = [
        ("loop", |g, q| {
            g.desc(q, 0, GUEST + DATA, 16, 1, 0);
            g.offer(q, 0);
        }),
        ("outside memory", |g, q| {
            g.desc(q, 0, GUEST + SIZE, 16, 0, 0);
            g.offer(q, 0);
        }),
        ("frontend's address instead of the guest's", |g, q| {
            g.desc(q, 0, USER + DATA, 16, 0, 0);
            g.offer(q, 0);
        }),
        ("head past the table", |g, q| g.offer(q, 64)),
        ("index jump", |g, q| {
            g.put(q.base + 0x1002, 66u16);
            q.kick.set();
        }),
    ];
    let mut guest = Guest::new(device.clone());
    let mut good = guest.queue(1);
    for (round, (name, break_it)) in cases.into_iter().enumerate() {
        let mut bad = guest.queue(0);
        guest.read_works(&mut bad);
        break_it(&guest, &mut bad);
        bad.err.wait();
        // More kicks do nothing more.
        bad.kick.set();
        guest.read_works(&mut good);
        assert!(bad.call.is_quiet() && bad.err.is_quiet(), "{name}");
        assert_eq!(device.stats().retired, round as u64 + 1, "{name}");
        // Enabled again without a reset, it stays retired.
        assert!(guest.client.set(18, &pair(0, 0), &[]));
        assert!(guest.client.set(18, &pair(0, 1), &[]));
        bad.kick.set();
        guest.read_works(&mut good);
        assert!(bad.call.is_quiet(), "{name}");
        // Stop, then registers anew: served again, in the next round.
        let stopped = guest.client.query(11, &pair(0, 0));
        assert_eq!(stopped, pair(0, 1), "{name}");
    }
    guest.client.close();
    let mut guest = Guest::new(device);
    let mut queue = guest.queue(0);
    guest.read_works(&mut queue);
    guest.client.close();
}
