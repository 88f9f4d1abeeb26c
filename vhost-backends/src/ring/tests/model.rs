//! Drivers at random: a well-behaved one against a model, and bytes that were made by none.

use super::*;
use proptest::prelude::*;
use std::collections::{HashMap, VecDeque};

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
