//! Drivers that break a rule: cases with stable ids, and the limits.

use super::*;

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
