//! Devices that break the rules. Each case: one typed error, for ever; no panic; nothing given back
//! that was not completed, and nothing twice.

use super::tests::{pair, segments};
use super::{Broken, Refused};
use crate::fake::ModelQueue;

/// Lets a device with three requests (ids 10, 11, 12, ten writable bytes each) do something, and
/// returns what came out before it broke the queue.
fn provoke(act: impl FnOnce(&mut ModelQueue, [u16; 3])) -> (usize, Broken) {
    let (mut queue, mut device) = pair(8, true, true);
    for token in 10..13 {
        queue.add(&segments(2, 10), token).expect("room");
    }
    let _kick = queue.publish();
    let heads = [(); 3].map(|()| device.pop().expect("published").head);
    act(&mut device, heads);
    let mut given = alloc::vec::Vec::new();
    let broken = loop {
        match queue.pop() {
            Ok(Some(used)) => {
                assert!(!given.contains(&used.data), "given back twice");
                given.push(used.data);
            }
            Ok(None) => panic!("not noticed"),
            Err(broken) => break broken,
        }
    };
    // It stays broken, whatever the device does next.
    device.write_used_index(device.next_used);
    assert_eq!(queue.pop().expect_err("still broken"), broken);
    assert_eq!(queue.broken(), Some(broken));
    assert!(!queue.publish());
    assert!(!queue.arm(1));
    let refused = queue.add(&segments(1, 1), 99).expect_err("broken");
    assert_eq!(refused.reason, Refused::Broken(broken));
    // Everything else is still held, once, and a reset gives it out in order and heals the queue.
    let held = queue.reset(true, true);
    assert_eq!(held.len() + given.len(), 3);
    assert!(held.is_sorted());
    assert!(held.iter().all(|token| !given.contains(token)));
    queue.add(&segments(1, 1), 99).expect("healed");
    (given.len(), broken)
}

#[test]
fn head_out_of_range() {
    for id in [8, 9, 0xffff, 0x1_0000, u32::MAX] {
        let (given, broken) = provoke(|device, _| {
            device.write_elem(0, id, 0);
            device.write_used_index(1);
        });
        assert_eq!((given, broken), (0, Broken::HeadOutOfRange { id }));
    }
}

#[test]
fn head_that_was_never_given() {
    let (given, broken) = provoke(|device, heads| {
        let free = (0..8).find(|id| !heads.contains(id)).expect("one is free");
        device.write_elem(0, free.into(), 0);
        device.write_used_index(1);
    });
    assert_eq!(given, 0);
    assert!(matches!(broken, Broken::HeadNotInFlight { .. }));
}

#[test]
fn head_twice() {
    let (given, broken) = provoke(|device, heads| {
        device.complete(heads[1], 0);
        device.complete(heads[1], 0);
    });
    assert_eq!(
        (given, broken),
        (1, Broken::HeadNotInFlight { id: heads_of(1) })
    );
}

/// The head of the second two-piece chain in a fresh ring of eight.
fn heads_of(index: u16) -> u16 {
    index * 2
}

#[test]
fn length_too_long() {
    for len in [11, 0x8000_0000, u32::MAX] {
        let (given, broken) = provoke(|device, heads| {
            device.complete(heads[0], 10);
            device.complete(heads[2], len);
        });
        assert_eq!(given, 1);
        assert!(matches!(broken, Broken::Length { len: l, room: 10, .. } if l == len));
    }
}

#[test]
fn used_index_jumps() {
    // Every index that three requests in flight cannot explain.
    for index in (4..=u16::MAX).step_by(1009).chain([4, u16::MAX]) {
        let (given, broken) = provoke(|device, _| device.write_used_index(index));
        let expected = Broken::UsedIndex {
            index,
            last: 0,
            in_flight: 3,
        };
        assert_eq!((given, broken), (0, expected));
    }
}

#[test]
fn used_index_goes_back() {
    let (mut queue, mut device) = pair(8, true, true);
    for token in 0..2 {
        queue.add(&segments(2, 10), token).expect("room");
    }
    let _kick = queue.publish();
    let head = device.pop().expect("published").head;
    device.complete(head, 0);
    assert_eq!(queue.pop().expect("fine").expect("one").data, 0);
    device.write_used_index(0);
    let broken = queue.pop().expect_err("went back");
    assert!(matches!(
        broken,
        Broken::UsedIndex {
            index: 0,
            last: 1,
            in_flight: 1
        }
    ));
    assert_eq!(queue.reset(true, true), [1]);
}

#[test]
fn completion_of_what_was_not_published() {
    let (mut queue, device) = pair(8, true, true);
    queue.add(&segments(1, 10), 0).expect("room");
    let _kick = queue.publish();
    let secret = queue.add(&segments(1, 10), 1).expect("room");
    device.write_elem(0, secret.into(), 0);
    device.write_used_index(1);
    let broken = queue.pop().expect_err("the device cannot know it");
    assert_eq!(broken, Broken::HeadNotInFlight { id: secret });
    assert_eq!(queue.reset(true, true), [0, 1]);
}

/// A device that scribbles over everything that it can reach changes nothing about what the driver
/// believes: chains are never read back.
#[test]
fn descriptors_are_not_read_back() {
    let (mut queue, mut device) = pair(8, true, false);
    let table = queue.memory().addresses().0;
    for round in 0..20u64 {
        queue.add(&segments(3, 10), round).expect("room");
        queue.add(&segments(2, 10), round + 100).expect("room");
        let _kick = queue.publish();
        let heads = [(); 2].map(|()| device.pop().expect("published").head);
        device.write(table, &[0xff; 16 * 8]);
        device.complete(heads[1], 10);
        device.complete(heads[0], 0);
        assert_eq!(queue.pop().expect("fine").expect("one").data, round + 100);
        assert_eq!(queue.pop().expect("fine").expect("one").data, round);
    }
}
