//! Tests of the ring: registers, batches and notification here; hostile cases and a model apart.

mod hostile;
mod in_order;
mod model;

use super::*;
use crate::limits::MAX_RING_SIZE;
use pv_abi::limits::MAX_CHAIN_LEN;
use pv_abi::virtio::desc_flag::{INDIRECT, NEXT, WRITE};
use std::sync::Arc;
use vm_memory::{Bytes, GuestMemoryMmap};

const DESC: u64 = 0x1_0000;
const AVAIL: u64 = 0x2_0000;
const USED: u64 = 0x3_0000;
const TABLE: u64 = 0x4_0000;
const DATA: u64 = 0x10_0000;
const DATA_LEN: u64 = 0x10_0000;

/// The driver's half, with every field within reach.
struct Driver {
    mem: Arc<GuestMemoryMmap>,
    size: u16,
    avail: u16,
}

impl Driver {
    fn new(size: u16) -> Driver {
        // Two regions that touch: a buffer may cross from one into the other.
        let ranges = [
            (GuestAddress(0x1_0000), 0xf_0000),
            (GuestAddress(DATA), 0x8_0000),
            (GuestAddress(DATA + 0x8_0000), 0x8_0000),
        ];
        let mem = Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap());
        Driver {
            mem,
            size,
            avail: 0,
        }
    }

    fn config(&self, event_idx: bool) -> RingConfig {
        RingConfig {
            size: self.size,
            desc: GuestAddress(DESC),
            avail: GuestAddress(AVAIL),
            used: GuestAddress(USED),
            event_idx,
            indirect: true,
            in_order: false,
        }
    }

    fn ring(&self, event_idx: bool) -> SplitRing {
        SplitRing::new(self.config(event_idx), self.mem.clone()).unwrap()
    }

    fn put<T: vm_memory::ByteValued>(&self, addr: u64, value: T) {
        self.mem.write_obj(value, GuestAddress(addr)).unwrap();
    }

    fn get<T: vm_memory::ByteValued>(&self, addr: u64) -> T {
        self.mem.read_obj(GuestAddress(addr)).unwrap()
    }

    fn desc_in(&self, table: u64, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let at = table + 16 * u64::from(index);
        self.put(at, addr);
        self.put(at + 8, len);
        self.put(at + 12, flags);
        self.put(at + 14, next);
    }

    fn desc(&self, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        self.desc_in(DESC, index, addr, len, flags, next);
    }

    fn offer(&mut self, head: u16) {
        self.put(AVAIL + 4 + 2 * u64::from(self.avail % self.size), head);
        self.avail = self.avail.wrapping_add(1);
        self.put(AVAIL + 2, self.avail);
    }

    fn used_index(&self) -> u16 {
        self.get(USED + 2)
    }

    fn used(&self, index: u16) -> (u32, u32) {
        let at = USED + 4 + 8 * u64::from(index % self.size);
        (self.get(at), self.get(at + 4))
    }

    fn used_event(&self, value: u16) {
        self.put(AVAIL + 4 + 2 * u64::from(self.size), value);
    }

    fn avail_event(&self) -> u16 {
        self.get(USED + 4 + 8 * u64::from(self.size))
    }
}

fn done(head: u16, written: u32) -> Completion {
    Completion { head, written }
}

#[test]
fn registers_are_checked() {
    let driver = Driver::new(8);
    let good = driver.config(false);
    let make = |config| SplitRing::new(config, driver.mem.clone()).map(|_| ());
    for size in [0, 3, 6, MAX_RING_SIZE + 1, MAX_RING_SIZE * 2, u16::MAX] {
        assert_eq!(
            make(RingConfig { size, ..good }),
            Err(RingError::BadSize(size))
        );
    }
    for size in [1, 2, MAX_RING_SIZE] {
        assert_eq!(make(RingConfig { size, ..good }), Ok(()));
    }
    // A packed ring's size need not be a power of two.
    let make_packed = |size| PackedRing::new(RingConfig { size, ..good }, driver.mem.clone());
    for size in [0, MAX_RING_SIZE + 1, MAX_RING_SIZE * 2] {
        let refused = make_packed(size).map(|_| ());
        assert_eq!(refused, Err(RingError::BadSize(size)));
    }
    for size in [1, 3, MAX_RING_SIZE] {
        assert_eq!(make_packed(size).map(|_| ()), Ok(()));
    }
    let desc = GuestAddress(DESC + 8);
    assert!(matches!(
        make(RingConfig { desc, ..good }),
        Err(RingError::Misaligned {
            part: RingPart::DescriptorTable,
            ..
        })
    ));
    let avail = GuestAddress(AVAIL + 1);
    assert!(matches!(
        make(RingConfig { avail, ..good }),
        Err(RingError::Misaligned {
            part: RingPart::AvailableRing,
            ..
        })
    ));
    let used = GuestAddress(USED + 2);
    assert!(matches!(
        make(RingConfig { used, ..good }),
        Err(RingError::Misaligned {
            part: RingPart::UsedRing,
            ..
        })
    ));
    for addr in [0, u64::MAX - 15, DATA + DATA_LEN - 16] {
        let desc = GuestAddress(addr);
        assert!(
            matches!(
                make(RingConfig { desc, ..good }),
                Err(RingError::OutsideMemory {
                    part: RingPart::DescriptorTable,
                    ..
                })
            ),
            "{addr:#x}"
        );
    }
    // Exactly at the end of memory.
    let desc = GuestAddress(DATA + DATA_LEN - 8 * 16);
    assert_eq!(make(RingConfig { desc, ..good }), Ok(()));
}

#[test]
fn bytes_cross_segments_and_regions() {
    let mut driver = Driver::new(8);
    let mut ring = driver.ring(false);
    // The second readable buffer and the writable one cross from one region into the next.
    let border = DATA + 0x8_0000;
    driver.desc(0, DATA, 3, NEXT, 1);
    driver.desc(1, border - 2, 4, NEXT, 2);
    driver.desc(2, DATA, 0, NEXT, 3);
    driver.desc(3, border - 1, 2, WRITE | NEXT, 4);
    driver.desc(4, DATA + 100, 5, WRITE, 0);
    driver.mem.write_slice(b"abc", GuestAddress(DATA)).unwrap();
    driver
        .mem
        .write_slice(b"defg", GuestAddress(border - 2))
        .unwrap();
    driver.offer(0);
    let chain = ring.pop().unwrap().unwrap();
    assert_eq!((chain.readable_len(), chain.writable_len()), (7, 7));
    let mut all = [0; 7];
    chain.read_at(&driver.mem, 0, &mut all).unwrap();
    assert_eq!(&all, b"abcdefg");
    let mut some = [0; 3];
    chain.read_at(&driver.mem, 2, &mut some).unwrap();
    assert_eq!(&some, b"cde");
    chain.read_at(&driver.mem, 7, &mut []).unwrap();
    assert!(chain.read_at(&driver.mem, 5, &mut some).is_err());
    assert!(chain.read_at(&driver.mem, u64::MAX, &mut some).is_err());
    chain.write_at(&driver.mem, 1, b"XYZ").unwrap();
    assert!(chain.write_at(&driver.mem, 5, b"XYZ").is_err());
    assert_eq!(driver.get::<u8>(border), b'X');
    assert_eq!(driver.get::<[u8; 2]>(DATA + 100), *b"YZ");
    let mut lens = Vec::new();
    chain
        .readable_slices(&driver.mem, 2, 4, |slice| lens.push(slice.len()))
        .unwrap();
    assert_eq!(lens, [1, 2, 1]);
}

#[test]
fn a_batch_is_published_once_and_in_order() {
    let mut driver = Driver::new(8);
    let mut ring = driver.ring(true);
    for head in 0..4 {
        driver.desc(head, DATA, 16, WRITE, 0);
        driver.offer(head);
    }
    for _ in 0..4 {
        ring.pop().unwrap().unwrap();
    }
    assert_eq!(ring.pop().unwrap(), None);
    ring.complete(&[done(2, 7), done(0, 1)]);
    assert_eq!(driver.used_index(), 2);
    assert_eq!((driver.used(0), driver.used(1)), ((2, 7), (0, 1)));
    assert_eq!(ring.in_flight(), 2);
    assert_eq!(
        ring.save(),
        RingState {
            next_avail: 4,
            next_used: 2
        }
    );
    assert_eq!(ring.published_used(), 2);
}

#[test]
fn arm_looks_again() {
    for event_idx in [false, true] {
        let mut driver = Driver::new(8);
        let mut ring = driver.ring(event_idx);
        driver.desc(0, DATA, 16, 0, 0);
        driver.offer(0);
        assert!(ring.arm());
        ring.pop().unwrap().unwrap();
        if !event_idx {
            assert_eq!(
                driver.get::<u16>(USED),
                1,
                "kicks are off while it is looking"
            );
        }
        assert!(!ring.arm());
        if event_idx {
            assert_eq!(driver.avail_event(), 1);
        } else {
            assert_eq!(driver.get::<u16>(USED), 0);
        }
    }
}

#[test]
fn flags_suppress_signals_without_event_idx() {
    let mut driver = Driver::new(8);
    let mut ring = driver.ring(false);
    for head in 0..2 {
        driver.desc(head, DATA, 16, 0, 0);
        driver.offer(head);
        ring.pop().unwrap().unwrap();
    }
    driver.put(AVAIL, 1u16);
    ring.complete(&[done(0, 0)]);
    assert!(!ring.should_signal());
    driver.put(AVAIL, 0u16);
    ring.complete(&[done(1, 0)]);
    assert!(ring.should_signal());
    assert!(!ring.should_signal(), "nothing new");
}

/// Every start near the wrap, every batch size, every event near them: signal exactly when the
/// index passes the event.
#[test]
fn signals_are_exact_at_the_wrap() {
    for start in [0u16, 1, 0x7ffe, 0x8000, 0xfff8, 0xfffd, 0xffff] {
        for batch in 1..=8u16 {
            for event in (0..20u16).map(|o| start.wrapping_sub(6).wrapping_add(o)) {
                let mut driver = Driver::new(8);
                let mut ring = driver.ring(true);
                let state = RingState {
                    next_avail: start.wrapping_sub(1),
                    next_used: start.wrapping_sub(1),
                };
                ring.restore(state);
                driver.avail = state.next_avail;
                driver.desc(0, DATA, 16, 0, 0);
                driver.offer(0);
                ring.pop().unwrap().unwrap();
                ring.complete(&[done(0, 0)]);
                assert!(ring.should_signal(), "the first answer is always yes");
                for head in 0..batch {
                    driver.desc(head, DATA, 16, 0, 0);
                    driver.offer(head);
                    ring.pop().unwrap().unwrap();
                }
                let all: Vec<_> = (0..batch).map(|head| done(head, 0)).collect();
                driver.used_event(event);
                ring.complete(&all);
                let passed = (0..batch).any(|n| start.wrapping_add(n) == event);
                assert_eq!(ring.should_signal(), passed, "{start} {batch} {event}");
            }
        }
    }
}
