//! Packed rings with `IN_ORDER` (virtio 1.3 §2.8.9): one used descriptor for many buffers.

use super::*;

const SIZE: u16 = 8;
/// Descriptor flags of the driver: available in the first lap, and in the second.
const LAPS: [u16; 2] = [1 << 7, 1 << 15];

fn ring(driver: &Driver, in_order: bool) -> PackedRing {
    let config = RingConfig {
        in_order,
        ..driver.config(false)
    };
    let mut ring = PackedRing::new(config, driver.mem.clone()).unwrap();
    ring.set_base(RingState::default()).unwrap();
    ring
}

/// A chain of one buffer, whose id is its place.
fn offer(driver: &Driver, index: u16, flags: u16, lap: usize) {
    let at = DESC + 16 * u64::from(index);
    driver.put(at, DATA + 0x100 * u64::from(index));
    driver.put(at + 8, 0x40u32);
    driver.put(at + 12, index);
    driver.put(at + 14, flags | LAPS[lap]);
}

/// Id and written bytes, if the device has used the descriptor here.
fn used(driver: &Driver, index: u16, lap: usize) -> Option<(u16, u32)> {
    let at = DESC + 16 * u64::from(index);
    let both = (1 << 7) | (1 << 15);
    let flags: u16 = driver.get(at + 14);
    let wanted = if lap == 0 { both } else { 0 };
    (flags & both == wanted).then(|| (driver.get(at + 12), driver.get(at + 8)))
}

fn pop(ring: &mut PackedRing, count: usize) -> Vec<u16> {
    (0..count)
        .map(|_| ring.pop().unwrap().unwrap().head())
        .collect()
}

#[test]
fn one_used_descriptor_stands_for_buffers_that_are_only_read() {
    let driver = Driver::new(SIZE);
    let mut ring = ring(&driver, true);
    (0..6).for_each(|index| offer(&driver, index, 0, 0));
    let heads = pop(&mut ring, 6);
    let batch: Vec<_> = heads.into_iter().map(|head| done(head, 0)).collect();
    ring.complete(&batch[..4]);
    assert_eq!(used(&driver, 0, 0), Some((3, 0)), "the last one's id");
    assert!((1..8).all(|index| used(&driver, index, 0).is_none()));
    // The next one goes where that batch ends.
    ring.complete(&batch[4..]);
    assert_eq!(used(&driver, 4, 0), Some((5, 0)));
    assert!((5..8).all(|index| used(&driver, index, 0).is_none()));
    assert!(ring.should_signal());
    // Over the end of the ring.
    for index in 6..12 {
        offer(&driver, index % SIZE, 0, usize::from(index >= SIZE));
    }
    let heads = pop(&mut ring, 6);
    assert_eq!(heads, [6, 7, 0, 1, 2, 3]);
    let batch: Vec<_> = heads.into_iter().map(|head| done(head, 0)).collect();
    ring.complete(&batch);
    assert_eq!(used(&driver, 6, 0), Some((3, 0)));
    assert_eq!(used(&driver, 7, 0), None);
    assert!((0..4).all(|index| used(&driver, index, 1).is_none()));
    assert_eq!(ring.in_flight(), 0);
}

#[test]
fn what_is_written_or_out_of_turn_has_one_of_its_own() {
    let driver = Driver::new(SIZE);
    // Buffers to write to say how much was written.
    let mut first = ring(&driver, true);
    (0..4).for_each(|index| offer(&driver, index, WRITE, 0));
    pop(&mut first, 4);
    first.complete(&[done(0, 5), done(1, 0), done(2, 0), done(3, 7)]);
    let found: Vec<_> = (0..4).map(|index| used(&driver, index, 0)).collect();
    let expected = [(0, 5), (1, 0), (2, 0), (3, 7)].map(Some);
    assert_eq!(found, expected);
    // Without the feature, or in another order.
    for (in_order, heads) in [(false, [0, 1, 2, 3]), (true, [3, 2, 1, 0])] {
        let driver = Driver::new(SIZE);
        let mut ring = ring(&driver, in_order);
        (0..4).for_each(|index| offer(&driver, index, 0, 0));
        pop(&mut ring, 4);
        ring.complete(&heads.map(|head| done(head, 0)));
        let found: Vec<_> = (0..4).map(|index| used(&driver, index, 0)).collect();
        assert_eq!(found, heads.map(|head| Some((head, 0))));
    }
}

#[test]
fn an_id_that_is_in_flight_is_refused_after_a_batch() {
    let driver = Driver::new(SIZE);
    let mut ring = ring(&driver, true);
    (0..4).for_each(|index| offer(&driver, index, 0, 0));
    let heads = pop(&mut ring, 4);
    ring.complete(&[done(heads[0], 0), done(heads[1], 0)]);
    // Behind them comes one with an id that was not given back.
    offer(&driver, 4, 0, 0);
    driver.put(DESC + 16 * 4 + 12, 2u16);
    assert_eq!(ring.pop(), Err(Retire::HeadInFlight { head: 2 }));
}
