//! The queue against a device that keeps the rules, and a model that knows what must come out.

use super::{DriverQueue, Refused, RingMemory, Segment};
use crate::fake::{ARENA_GPA, Fake, ModelQueue};
use alloc::collections::{BTreeMap, VecDeque};
use alloc::vec::Vec;
use proptest::prelude::*;

pub(super) fn pair(size: u16, event_idx: bool, indirect: bool) -> (DriverQueue<u64>, ModelQueue) {
    let fake = Fake::new(1, 1, 1, true);
    let memory = RingMemory::new(fake.the_arena(), size, 3).expect("room for a ring");
    let mut device = fake.model_queue(memory.addresses(), size);
    device.event_idx = event_idx;
    (DriverQueue::new(memory, event_idx, indirect), device)
}

pub(super) fn segments(count: usize, len: u32) -> Vec<Segment> {
    (0..count)
        .map(|index| Segment {
            gpa: ARENA_GPA + (1 << 20) + 64 * index as u64,
            len,
            writable: index > 0,
        })
        .collect()
}

#[derive(Clone, Debug)]
enum Action {
    Add(usize),
    Publish,
    /// The device takes all, and completes so many in this order.
    Serve(Vec<u16>),
    Pop,
    Arm(u16),
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        4 => (1usize..=3).prop_map(Action::Add),
        2 => Just(Action::Publish),
        3 => proptest::collection::vec(any::<u16>(), 0..6).prop_map(Action::Serve),
        4 => Just(Action::Pop),
        1 => (1u16..5).prop_map(Action::Arm),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever happens in whatever order: what was added comes out once, in the order in which the
    /// device completed it, with the length that it wrote; a full queue says so exactly when it is.
    #[test]
    fn everything_comes_out_once(
        event_idx: bool,
        indirect: bool,
        bits in 1u32..6,
        actions in proptest::collection::vec(action(), 1..300),
    ) {
        let size = 1 << bits;
        let (mut queue, mut device) = pair(size, event_idx, indirect);
        let mut next = 0u64;
        let (mut added, mut published) = (VecDeque::new(), VecDeque::new());
        let mut held: Vec<(u16, u64)> = Vec::new();
        let mut done: VecDeque<(u64, u32)> = VecDeque::new();
        let mut by_head = BTreeMap::new();
        for action in actions {
            match action {
                Action::Add(count) => {
                    let before = queue.in_flight();
                    match queue.add(&segments(count, 8), next) {
                        Ok(head) => {
                            prop_assert!(by_head.insert(head, next).is_none(), "head reused");
                            added.push_back(next);
                            next += 1;
                        }
                        Err(refused) => {
                            prop_assert_eq!(refused.data, next);
                            let too_long = count > usize::from(size);
                            let reason = if too_long { Refused::BadChain } else { Refused::Full };
                            prop_assert_eq!(refused.reason, reason);
                            prop_assert_eq!(queue.in_flight(), before);
                            prop_assert!(too_long || before > 0);
                        }
                    }
                }
                Action::Publish => {
                    let had = !added.is_empty();
                    let kick = queue.publish();
                    prop_assert!(had || !kick);
                    published.append(&mut added);
                }
                Action::Serve(picks) => {
                    while let Some(chain) = device.pop() {
                        let token = published.pop_front().expect("published");
                        prop_assert_eq!(by_head.get(&chain.head), Some(&token));
                        held.push((chain.head, token));
                    }
                    for pick in picks {
                        if held.is_empty() { break; }
                        let (head, token) = held.remove(usize::from(pick) % held.len());
                        device.complete(head, 0);
                        done.push_back((token, 0));
                    }
                    device.arm();
                }
                Action::Pop => {
                    let used = queue.pop().expect("a device that keeps the rules");
                    match (used, done.pop_front()) {
                        (Some(used), Some((token, len))) => {
                            prop_assert_eq!((used.data, used.written), (token, len));
                            by_head.retain(|_, &mut held| held != token);
                        }
                        (None, None) => {}
                        (used, expected) => prop_assert!(false, "{:?} {:?}", used, expected),
                    }
                }
                Action::Arm(after) => {
                    let has = held.len() + done.len() + published.len();
                    let want = usize::from(after).min(has).max(1);
                    prop_assert_eq!(queue.arm(after), done.len() < want);
                }
            }
        }
        let order = queue.reset(event_idx, indirect);
        let mut expected: Vec<u64> = by_head.into_values().collect();
        expected.sort_unstable();
        prop_assert_eq!(order, expected);
    }
}

/// Three times around the 16-bit index, at every queue depth, with the device always asleep before a
/// publish and the driver always asleep before a completion: no kick and no signal is lost.
#[test]
fn indices_wrap_without_losing_a_kick_or_a_signal() {
    for (event_idx, depth) in [(true, 1u16), (true, 3), (true, 8), (false, 3)] {
        let (mut queue, mut device) = pair(8, event_idx, true);
        let mut token = 0;
        for _ in 0..(3 * 65_536 / u32::from(depth)) {
            for _ in 0..depth {
                queue
                    .add(&segments(1, 8), token)
                    .expect("the queue was empty");
                token += 1;
            }
            assert!(!device.arm(), "nothing was published yet");
            assert!(queue.publish(), "a sleeping device must be kicked");
            assert!(queue.arm(depth), "nothing was completed yet");
            for left in (0..depth).rev() {
                let chain = device.pop().expect("published");
                let signal = device.complete(chain.head, 0);
                if event_idx {
                    assert_eq!(signal, left == 0, "one signal, after the last of a batch");
                } else {
                    assert!(signal);
                }
            }
            for back in (1..=u64::from(depth)).rev() {
                let used = queue.pop().expect("rules kept").expect("completed");
                assert_eq!(used.data, token - back);
            }
            queue.disarm();
            assert!(queue.pop().expect("rules kept").is_none());
        }
    }
}

#[test]
fn a_batch_is_one_kick_and_a_busy_device_needs_none() {
    let (mut queue, mut device) = pair(16, true, false);
    device.arm();
    for token in 0..4 {
        queue.add(&segments(3, 8), token).expect("room");
    }
    assert!(queue.publish());
    assert!(!queue.publish(), "nothing new");
    // The device is awake and has not asked for another kick.
    while device.pop().is_some() {}
    queue.add(&segments(3, 8), 4).expect("room");
    assert!(!queue.publish());
}

#[test]
fn depth_is_the_ring_with_indirect_tables_and_a_third_without() {
    for (indirect, depth) in [(true, 12..=16), (false, 5..=5)] {
        let (mut queue, _device) = pair(16, true, indirect);
        let mut added = 0u64;
        while queue.add(&segments(3, 8), added).is_ok() {
            added += 1;
        }
        assert!(depth.contains(&added), "{added} with indirect {indirect}");
    }
}

#[test]
fn chains_that_cannot_be_are_refused() {
    let (mut queue, _device) = pair(4, true, true);
    for bad in [
        Vec::new(),
        segments(5, 8),
        alloc::vec![
            Segment {
                gpa: ARENA_GPA,
                len: u32::MAX,
                writable: true
            },
            Segment {
                gpa: ARENA_GPA,
                len: 1,
                writable: true
            },
        ],
    ] {
        let refused = queue.add(&bad, 7).expect_err("not a chain");
        assert_eq!((refused.data, refused.reason), (7, Refused::BadChain));
    }
    assert_eq!(queue.in_flight(), 0);
}
