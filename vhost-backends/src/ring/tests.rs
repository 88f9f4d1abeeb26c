//! Tests of the ring: hostile cases with stable ids, limits, notification, a model.

use super::*;
use crate::limits::MAX_RING_SIZE;
use proptest::prelude::*;
use pv_abi::limits::MAX_CHAIN_LEN;
use pv_abi::virtio::desc_flag::{INDIRECT, NEXT, WRITE};
use std::collections::{HashMap, VecDeque};
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

/// Every case: an id that stays, how the driver breaks the rule, and what the ring says.
#[test]
fn hostile_rings_are_retired_with_their_reason() {
    type Case = (&'static str, fn(&mut Driver), Retire);
    let cases: [Case; 19] = [
        (
            "R01-avail-jump",
            |d| d.put(AVAIL + 2, 9u16),
            Retire::AvailJump { moved: 9, size: 8 },
        ),
        (
            "R02-avail-back",
            |d| d.put(AVAIL + 2, 0xffffu16),
            Retire::AvailJump {
                moved: 0xffff,
                size: 8,
            },
        ),
        (
            "R03-head-past-table",
            |d| d.offer(8),
            Retire::BadHead { head: 8 },
        ),
        (
            "R04-head-max",
            |d| d.offer(u16::MAX),
            Retire::BadHead { head: u16::MAX },
        ),
        (
            "R05-self-loop",
            |d| {
                d.desc(0, DATA, 16, NEXT, 0);
                d.offer(0);
            },
            Retire::Loop { head: 0 },
        ),
        (
            "R06-loop-of-all",
            |d| {
                for i in 0..8 {
                    d.desc(i, DATA, 16, NEXT, (i + 1) % 8);
                }
                d.offer(3);
            },
            Retire::Loop { head: 3 },
        ),
        (
            "R07-next-past-table",
            |d| {
                d.desc(0, DATA, 16, NEXT, 8);
                d.offer(0);
            },
            Retire::BadNext { next: 8 },
        ),
        (
            "R08-readable-after-writable",
            |d| {
                d.desc(0, DATA, 16, NEXT | WRITE, 1);
                d.desc(1, DATA, 16, 0, 0);
                d.offer(0);
            },
            Retire::ReadableAfterWritable { head: 0 },
        ),
        (
            "R09-outside",
            |d| {
                d.desc(0, 0x1000, 16, 0, 0);
                d.offer(0);
            },
            Retire::BadAddress {
                addr: 0x1000,
                len: 16,
            },
        ),
        (
            "R10-one-past-the-end",
            |d| {
                d.desc(0, DATA + DATA_LEN - 16, 17, WRITE, 0);
                d.offer(0);
            },
            Retire::BadAddress {
                addr: DATA + DATA_LEN - 16,
                len: 17,
            },
        ),
        (
            "R11-wraps",
            |d| {
                d.desc(0, u64::MAX - 3, 16, 0, 0);
                d.offer(0);
            },
            Retire::BadAddress {
                addr: u64::MAX - 3,
                len: 16,
            },
        ),
        (
            "R12-nested-indirect",
            |d| {
                d.desc(0, TABLE, 16, INDIRECT, 0);
                d.desc_in(TABLE, 0, TABLE, 16, INDIRECT, 0);
                d.offer(0);
            },
            Retire::NestedIndirect,
        ),
        (
            "R13-indirect-with-next",
            |d| {
                d.desc(0, TABLE, 16, INDIRECT | NEXT, 1);
                d.offer(0);
            },
            Retire::IndirectWithNext,
        ),
        (
            "R14-indirect-empty",
            |d| {
                d.desc(0, TABLE, 0, INDIRECT, 0);
                d.offer(0);
            },
            Retire::BadIndirectLen { len: 0 },
        ),
        (
            "R15-indirect-odd",
            |d| {
                d.desc(0, TABLE, 17, INDIRECT, 0);
                d.offer(0);
            },
            Retire::BadIndirectLen { len: 17 },
        ),
        (
            "R16-indirect-65535",
            |d| {
                d.desc(0, TABLE, 65535 * 16, INDIRECT, 0);
                d.offer(0);
            },
            Retire::BadIndirectLen { len: 65535 * 16 },
        ),
        (
            "R17-indirect-outside",
            |d| {
                d.desc(0, 0x1000, 16, INDIRECT, 0);
                d.offer(0);
            },
            Retire::BadAddress {
                addr: 0x1000,
                len: 16,
            },
        ),
        (
            "R18-indirect-loop",
            |d| {
                d.desc(0, TABLE, 32, INDIRECT, 0);
                d.desc_in(TABLE, 0, DATA, 16, NEXT, 1);
                d.desc_in(TABLE, 1, DATA, 16, NEXT, 0);
                d.offer(0);
            },
            Retire::Loop { head: 0 },
        ),
        (
            "R19-longest-buffer",
            |d| {
                d.desc(0, DATA, u32::MAX, 0, 0);
                d.offer(0);
            },
            Retire::BadAddress {
                addr: DATA,
                len: u32::MAX,
            },
        ),
    ];
    for (id, break_rule, reason) in cases {
        let mut driver = Driver::new(8);
        let mut ring = driver.ring(true);
        break_rule(&mut driver);
        assert_eq!(ring.pop(), Err(reason), "{id}");
        // Retired: nothing changes that, and nothing spins.
        driver.desc(1, DATA, 16, 0, 0);
        driver.offer(1);
        assert_eq!(ring.pop(), Err(reason), "{id}");
        assert!(!ring.arm(), "{id}");
        assert_eq!(ring.in_flight(), 0, "{id}");
        ring.restore(RingState::default());
        assert_eq!(ring.pop(), Err(reason), "{id}");
    }
}

#[test]
fn r20_same_head_twice_in_flight() {
    let mut driver = Driver::new(8);
    let mut ring = driver.ring(false);
    driver.desc(2, DATA, 16, 0, 0);
    driver.offer(2);
    driver.offer(2);
    assert_eq!(ring.pop().unwrap().unwrap().head(), 2);
    assert_eq!(ring.pop(), Err(Retire::HeadInFlight { head: 2 }));
    // What was taken before may still be given back.
    ring.complete(&[done(2, 0)]);
    assert_eq!(driver.used_index(), 1);
}

#[test]
fn r21_indirect_without_the_feature() {
    let mut driver = Driver::new(8);
    let config = RingConfig {
        indirect: false,
        ..driver.config(false)
    };
    let mut ring = SplitRing::new(config, driver.mem.clone()).unwrap();
    driver.desc(0, TABLE, 16, INDIRECT, 0);
    driver.offer(0);
    assert_eq!(ring.pop(), Err(Retire::IndirectNotNegotiated));
}

#[test]
fn r22_more_bytes_than_a_used_element_counts() {
    // A memory of 2 GiB and a bit, never touched.
    let size = (1usize << 31) + 0x10_0000;
    let mem = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size)]).unwrap());
    let mut driver = Driver::new(8);
    driver.mem = mem.clone();
    let mut ring = SplitRing::new(driver.config(false), mem).unwrap();
    driver.desc(0, 0, 1 << 31, NEXT, 1);
    driver.desc(1, 0, (1 << 31) - 1, 0, 0);
    driver.offer(0);
    assert_eq!(
        ring.pop().unwrap().unwrap().readable_len(),
        u64::from(u32::MAX)
    );
    driver.desc(2, 0, 1 << 31, NEXT, 3);
    driver.desc(3, 0, 1 << 31, 0, 0);
    driver.offer(2);
    assert_eq!(ring.pop(), Err(Retire::TooManyBytes { head: 2 }));
}

#[test]
fn chain_length_at_the_limit_and_one_past_it() {
    for (count, fits) in [(MAX_CHAIN_LEN, true), (MAX_CHAIN_LEN + 1, false)] {
        // Direct.
        let mut driver = Driver::new(512);
        let mut ring = driver.ring(false);
        for i in 0..count as u16 {
            let last = usize::from(i) + 1 == count;
            driver.desc(i, DATA, 1, if last { 0 } else { NEXT }, i + 1);
        }
        driver.offer(0);
        let direct = ring.pop();
        // Indirect, on a small queue.
        let mut driver = Driver::new(8);
        let mut ring = driver.ring(false);
        driver.desc(0, TABLE, 16 * count as u32, INDIRECT, 0);
        for i in 0..count as u16 {
            let last = usize::from(i) + 1 == count;
            driver.desc_in(TABLE, i, DATA, 1, if last { 0 } else { NEXT }, i + 1);
        }
        driver.offer(0);
        let indirect = ring.pop();
        if fits {
            assert_eq!(direct.unwrap().unwrap().readable().len(), count);
            assert_eq!(indirect.unwrap().unwrap().readable().len(), count);
        } else {
            assert_eq!(direct, Err(Retire::TooLong { head: 0 }));
            let len = 16 * count as u32;
            assert_eq!(indirect, Err(Retire::BadIndirectLen { len }));
        }
    }
    // A chain may use every descriptor of its queue.
    let mut driver = Driver::new(8);
    let mut ring = driver.ring(false);
    for i in 0..8 {
        driver.desc(i, DATA, 1, if i == 7 { 0 } else { NEXT }, i + 1);
    }
    driver.offer(0);
    assert_eq!(ring.pop().unwrap().unwrap().readable_len(), 8);
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

#[derive(Clone, Debug)]
enum Step {
    /// Offer a chain with these buffer lengths: readable, then writable.
    Offer(Vec<u32>, Vec<u32>, bool),
    Pop,
    /// Complete the n-th of those in flight.
    Complete(usize, u32),
    Arm,
}

fn step() -> impl Strategy<Value = Step> {
    let lens = || prop::collection::vec(0..5000u32, 0..4);
    prop_oneof![
        4 => (lens(), lens(), any::<bool>()).prop_map(|(r, w, i)| Step::Offer(r, w, i)),
        4 => Just(Step::Pop),
        4 => (any::<usize>(), any::<u32>()).prop_map(|(n, w)| Step::Complete(n, w)),
        1 => Just(Step::Arm),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    /// A well-behaved driver against two queues and a map: chains come out as they went in, and
    /// go back exactly once.
    #[test]
    fn agrees_with_a_model(
        start in any::<u16>(),
        event_idx in any::<bool>(),
        steps in prop::collection::vec(step(), 1..120),
    ) {
        let mut driver = Driver::new(16);
        driver.avail = start;
        driver.put(AVAIL + 2, start);
        let mut ring = driver.ring(event_idx);
        ring.restore(RingState { next_avail: start, next_used: start });
        let mut free: Vec<u16> = (0..16).collect();
        let mut offered: VecDeque<(u16, Vec<u64>)> = VecDeque::new();
        let mut flying: Vec<u16> = Vec::new();
        let mut owns: HashMap<u16, Vec<u16>> = HashMap::new();
        let mut used = start;
        for step in steps {
            match step {
                Step::Offer(readable, writable, indirect) => {
                    let count = readable.len() + writable.len();
                    let needs = if indirect { 1 } else { count };
                    if count == 0 || free.len() < needs {
                        continue;
                    }
                    let mine: Vec<u16> = free.drain(free.len() - needs..).collect();
                    let lens = readable.iter().map(|l| (*l, 0))
                        .chain(writable.iter().map(|l| (*l, WRITE)));
                    let table = TABLE + 0x1000 * u64::from(mine[0]);
                    for (i, (len, flag)) in lens.enumerate() {
                        let next = if i + 1 < count { NEXT } else { 0 };
                        let addr = DATA + 8192 * i as u64;
                        if indirect {
                            driver.desc_in(table, i as u16, addr, len, flag | next, i as u16 + 1);
                        } else {
                            let after = mine.get(i + 1).copied().unwrap_or(0);
                            driver.desc(mine[i], addr, len, flag | next, after);
                        }
                    }
                    if indirect {
                        driver.desc(mine[0], table, 16 * count as u32, INDIRECT, 0);
                    }
                    driver.offer(mine[0]);
                    let sum = |l: &[u32]| l.iter().map(|n| u64::from(*n)).sum();
                    offered.push_back((mine[0], vec![sum(&readable), sum(&writable)]));
                    owns.insert(mine[0], mine);
                }
                Step::Pop => match (ring.pop().unwrap(), offered.pop_front()) {
                    (Some(chain), Some((head, lens))) => {
                        prop_assert_eq!(chain.head(), head);
                        prop_assert_eq!(vec![chain.readable_len(), chain.writable_len()], lens);
                        flying.push(head);
                    }
                    (None, None) => {}
                    other => prop_assert!(false, "{:?}", other),
                },
                Step::Complete(n, written) => {
                    if flying.is_empty() {
                        continue;
                    }
                    let head = flying.swap_remove(n % flying.len());
                    ring.complete(&[done(head, written)]);
                    prop_assert_eq!(driver.used(used), (u32::from(head), written));
                    used = used.wrapping_add(1);
                    prop_assert_eq!(driver.used_index(), used);
                    free.extend(owns.remove(&head).unwrap());
                }
                Step::Arm => prop_assert_eq!(ring.arm(), !offered.is_empty()),
            }
            prop_assert_eq!(ring.in_flight(), flying.len());
        }
    }

    /// Arbitrary bytes where the rings are: the ring ends or goes on, it never hangs or panics,
    /// and never takes more than the queue holds.
    #[test]
    fn arbitrary_rings_are_bounded(
        seed in prop::collection::vec(any::<u8>(), 128 + 32),
        avail in any::<u16>(),
        rare in 0..64u8,
    ) {
        let mut driver = Driver::new(8);
        // Mostly valid descriptors, broken here and there.
        for i in 0..8u16 {
            let b = &seed[usize::from(i) * 16..][..16];
            let flags = u16::from(b[0]) & 3;
            driver.desc(i, DATA + u64::from(b[1]) * 4096, u32::from(b[2]) * 64, flags, u16::from(b[3] % 8));
            if b[4] < rare {
                driver.mem.write_slice(&b[..usize::from(b[5] % 17).min(16)], GuestAddress(DESC + 16 * u64::from(i))).unwrap();
            }
        }
        for i in 0..8u64 {
            driver.put(AVAIL + 4 + 2 * i, u16::from(seed[128 + i as usize] % 9));
        }
        driver.avail = avail % 12;
        driver.put(AVAIL + 2, driver.avail);
        let mut ring = driver.ring(true);
        let mut taken = 0;
        while let Ok(Some(chain)) = ring.pop() {
            taken += 1;
            prop_assert!(taken <= 8);
            prop_assert!(chain.readable().len() + chain.writable().len() <= MAX_CHAIN_LEN);
        }
    }
}
