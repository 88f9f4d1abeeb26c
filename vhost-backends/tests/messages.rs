//! The session as a total function: every message in every state, and the orders that real
//! frontends use. One process of its own, and one test at a time: descriptors are counted.

mod support {
    pub(crate) mod raw;
}

use std::fs::File;
use std::io::Write;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use support::raw::{
    Client, Counting, EVENT_IDX, LOG_ALL, NEED_REPLY, PACKED, PROTOCOL, STOPPED_AT, VERSION,
    VERSION_1, event, memory, pair, words,
};
use vhost_backends::session::SessionEnd;

const SIZE: u64 = 0x1_0000;
const USER: u64 = 0x7f00_0000_0000;
const GUEST: u64 = 0x4000_0000;

fn one_at_a_time() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(PoisonError::into_inner)
}

fn open_fds() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Mappings of shared memory files.
fn mapped_regions() -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let shared = maps.lines().filter(|line| line.contains("rw-s"));
    shared.count()
}

fn table(regions: &[(u64, u64, u64, u64)]) -> Vec<u8> {
    let mut bytes = pair(regions.len() as u32, 0);
    for r in regions {
        bytes.extend(words(&[r.0, r.1, r.2, r.3]));
    }
    bytes
}

fn ring_addr(index: u32, base: u64) -> Vec<u8> {
    let mut bytes = pair(index, 0);
    // desc, used, avail, log.
    bytes.extend(words(&[base, base + 0x2000, base + 0x1000, 0]));
    bytes
}

fn set_up_memory(client: &mut Client) {
    assert!(client.set(5, &table(&[(GUEST, SIZE, USER, 0)]), &[&memory(SIZE)]));
}

/// Everything but enable.
fn set_up_ring(client: &mut Client, index: u32, base: u32) {
    assert!(client.set(8, &pair(index, 256), &[]));
    assert!(client.set(10, &pair(index, base), &[]));
    assert!(client.set(9, &ring_addr(index, USER + 0x4000 * u64::from(index)), &[]));
    assert!(client.set(13, &words(&[index.into()]), &[&event()]));
    assert!(client.set(12, &words(&[index.into()]), &[&event()]));
}

fn bring_to(state: usize, client: &mut Client) {
    if state >= 1 {
        client.negotiate();
    }
    if state >= 2 {
        set_up_memory(client);
        set_up_ring(client, 0, 0);
    }
    if state >= 3 {
        assert!(client.set(18, &pair(0, 1), &[]));
    }
}

/// 4 states x 48 numbers x 12 sizes x 0..=8 descriptors x 3 fillings, with and without a wish for
/// an answer. The session stays up, answers what must be answered, and keeps no descriptor.
#[test]
fn every_message_in_every_state() {
    let _one = one_at_a_time();
    let device = Arc::new(Counting::default());
    let file = memory(4096);
    let fds = [&file; 8];
    let baseline = open_fds();
    let mut sent = 0u32;
    for state in 0..4 {
        for number in (0..47).chain([u32::MAX]) {
            let mut client = Client::connect(device.clone());
            bring_to(state, &mut client);
            for size in [0usize, 1, 4, 8, 9, 12, 20, 32, 40, 41, 264, 4096] {
                for count in 0..=8 {
                    for fill in [0u8, 1, 0xff] {
                        let flags = VERSION
                            | if (size + count) % 2 == 0 {
                                NEED_REPLY
                            } else {
                                0
                            };
                        client.send(number, flags, &vec![fill; size], &fds[..count]);
                        sent += 1;
                    }
                }
                // Whatever was answered, a question after it is answered as always.
                client.send(17, VERSION, &[], &[]);
                let mut replies = 0;
                loop {
                    let (reply, _, payload) = client.receive().expect("the session hung up");
                    if reply == 17 && number != 17 {
                        assert_eq!(payload, 2u64.to_ne_bytes());
                        break;
                    }
                    assert_eq!(reply, number);
                    replies += 1;
                    if number == 17 && replies == 9 * 3 + 1 {
                        break;
                    }
                }
                assert!(replies <= 9 * 3 + 1);
            }
            // Two queues with kick, call and error, and eight regions, at most.
            assert!(
                open_fds() <= baseline + 4 + 6 + 2 + 8,
                "{number}: {}",
                open_fds()
            );
            assert_eq!(client.close(), SessionEnd::HangUp);
            assert_eq!(open_fds(), baseline, "state {state} number {number}");
            assert_eq!(device.running(), 0);
        }
    }
    assert_eq!(sent, 4 * 48 * 12 * 9 * 3);
}

#[test]
fn more_descriptors_than_any_message_has() {
    let _one = one_at_a_time();
    let device = Arc::new(Counting::default());
    let file = memory(4096);
    let baseline = open_fds();
    let mut client = Client::connect(device);
    client.negotiate();
    for count in [9usize, 16, 31, 32, 33, 64] {
        for number in (0..47).filter(|n| *n != 16).chain([99]) {
            let many = vec![&file; count];
            client.send(number, VERSION, &[0; 8], &many);
        }
    }
    // Some have an answer of their own.
    client.send(16, VERSION | NEED_REPLY, &words(&[1 << 63]), &[]);
    while client.receive().unwrap().0 != 16 {}
    assert_eq!(client.query_u64(17), 2);
    client.close();
    assert_eq!(open_fds(), baseline);
}

#[test]
fn what_is_not_a_message_ends_the_connection_only() {
    let _one = one_at_a_time();
    let device = Arc::new(Counting::default());
    // Too large to find its end.
    let client = Client::connect(device.clone());
    let head: Vec<u8> = [1u32, VERSION, 4097]
        .iter()
        .flat_map(|w| w.to_ne_bytes())
        .collect();
    (&client.stream).write_all(&head).unwrap();
    let mut client = client;
    assert!(client.receive().is_none());
    // Half a header, then a hang-up.
    let client = Client::connect(device.clone());
    (&client.stream).write_all(&[1, 0, 0]).unwrap();
    assert_eq!(client.close(), SessionEnd::Broken);
    // A wrong version, and a reply nobody asked for: refused, and the session goes on.
    let mut client = Client::connect(device);
    client.negotiate();
    for flags in [0, 2, 3, VERSION | 4, VERSION | 16, u32::MAX] {
        client.send(17, flags, &[], &[]);
        let (_, _, payload) = client.receive().unwrap();
        assert!(payload.is_empty(), "{flags:#x}");
    }
    assert_eq!(client.query_u64(17), 2);
    assert_eq!(client.close(), SessionEnd::HangUp);
}

#[test]
fn pieces_of_a_message_are_put_together() {
    let _one = one_at_a_time();
    let mut client = Client::connect(Arc::new(Counting::default()));
    for byte in [1u32, VERSION, 0].iter().flat_map(|w| w.to_ne_bytes()) {
        (&client.stream).write_all(&[byte]).unwrap();
        std::thread::sleep(Duration::from_millis(2));
    }
    let (number, _, payload) = client.receive().unwrap();
    let features = u64::from_ne_bytes(payload.try_into().unwrap());
    let offered = VERSION_1 | EVENT_IDX | PROTOCOL | PACKED | LOG_ALL;
    assert_eq!((number, features), (1, offered));
    client.close();
}

#[test]
fn order_of_qemu_net_enable_before_features() {
    let _one = one_at_a_time();
    let device = Arc::new(Counting::default());
    let mut client = Client::connect(device.clone());
    assert!(client.query_u64(1) & PROTOCOL != 0);
    let protocol = client.query_u64(15);
    client.send(16, VERSION, &protocol.to_ne_bytes(), &[]);
    assert_eq!(client.query_u64(17), 2);
    client.send(3, VERSION, &[], &[]);
    for _ in 0..4 {
        for index in 0..2 {
            client.send(18, VERSION, &pair(index, 1), &[]);
        }
    }
    for index in 0..2u32 {
        assert!(client.set(13, &words(&[index.into()]), &[&event()]));
    }
    assert!(client.set(2, &words(&[VERSION_1 | EVENT_IDX | PROTOCOL]), &[]));
    assert!(client.set(39, &words(&[0xf]), &[]));
    assert_eq!(client.query_u64(40), 0xf);
    set_up_memory(&mut client);
    set_up_ring(&mut client, 0, 5);
    assert_eq!(device.running(), 1);
    let (index, state, features) = device.last.lock().unwrap().unwrap();
    assert_eq!((index, state.next_avail), (0, 5));
    assert_eq!(features, VERSION_1 | EVENT_IDX | PROTOCOL);
    // Stop: the index is where the drained queue got to; a new kick starts it from there.
    assert_eq!(client.query(11, &pair(0, 0)), pair(0, STOPPED_AT.into()));
    assert_eq!(device.running(), 0);
    assert!(client.set(12, &words(&[0]), &[&event()]));
    assert_eq!(device.running(), 1);
    assert_eq!(
        device.last.lock().unwrap().unwrap().1.next_avail,
        STOPPED_AT
    );
    client.close();
    assert_eq!(device.running(), 0, "drained when the frontend hangs up");
}

#[test]
fn without_protocol_features_rings_are_enabled() {
    let _one = one_at_a_time();
    let device = Arc::new(Counting::default());
    let mut client = Client::connect(device.clone());
    client.send(2, VERSION, &words(&[VERSION_1]), &[]);
    client.send(
        5,
        VERSION,
        &table(&[(GUEST, SIZE, USER, 0)]),
        &[&memory(SIZE)],
    );
    client.send(8, VERSION, &pair(1, 128), &[]);
    client.send(9, VERSION, &ring_addr(1, USER), &[]);
    client.send(12, VERSION, &words(&[1]), &[&event()]);
    assert_eq!(client.query_u64(17), 2);
    assert_eq!(device.running(), 1);
    // NEED_REPLY without REPLY_ACK is not answered.
    client.send(3, VERSION | NEED_REPLY, &[], &[]);
    assert_eq!(client.query_u64(17), 2);
    client.close();
}

#[test]
fn a_split_rings_base_has_sixteen_bits() {
    let _one = one_at_a_time();
    let mut client = Client::connect(Arc::new(Counting::default()));
    bring_to(1, &mut client);
    assert!(client.set(10, &pair(0, 0xffff), &[]));
    assert!(!client.set(10, &pair(0, 0x1_0000), &[]));
    assert!(!client.set(10, &pair(0, u32::MAX), &[]));
}

#[test]
fn a_running_ring_cannot_be_resized_but_moves_and_pauses() {
    let _one = one_at_a_time();
    let device = Arc::new(Counting::default());
    let mut client = Client::connect(device.clone());
    bring_to(3, &mut client);
    assert_eq!(device.running(), 1);
    assert!(!client.set(8, &pair(0, 64), &[]));
    assert!(!client.set(10, &pair(0, 9), &[]));
    // Elsewhere, drained in between.
    let opened = device.opened.load(Ordering::SeqCst);
    assert!(client.set(9, &ring_addr(0, USER + 0x8000), &[]));
    assert_eq!(device.opened.load(Ordering::SeqCst), opened + 1);
    // Outside memory: refused, and not running on the old place either.
    assert!(!client.set(9, &ring_addr(0, USER + SIZE), &[]));
    assert_eq!(device.running(), 0);
    assert!(client.set(9, &ring_addr(0, USER), &[]));
    assert_eq!(device.running(), 1);
    for (num, running) in [(0, 0), (0, 0), (1, 1), (1, 1)] {
        assert!(client.set(18, &pair(0, num), &[]));
        assert_eq!(device.running(), running);
    }
    assert!(!client.set(18, &pair(0, 2), &[]));
    assert!(!client.set(18, &pair(2, 1), &[]));
    // No kick: not served, and stopped.
    assert!(!client.set(12, &words(&[0x100]), &[]));
    assert_eq!(device.running(), 0);
    client.close();
}

#[test]
fn memory_changes_drain_and_go_on() {
    let _one = one_at_a_time();
    let device = Arc::new(Counting::default());
    let mut client = Client::connect(device.clone());
    bring_to(3, &mut client);
    assert_eq!(client.query_u64(36), 64);
    // A second slot; the running ring goes on.
    let slot = |guest, user| words(&[0, guest, SIZE, user, 0]);
    assert!(client.set(37, &slot(GUEST + SIZE, USER + SIZE), &[&memory(SIZE)]));
    assert_eq!(device.running(), 1);
    // Overlap, too short, not a file, no range: refused, nothing changes but a drained pause.
    assert!(!client.set(37, &slot(GUEST, 0), &[&memory(SIZE)]));
    assert!(!client.set(37, &slot(0x1000, 0), &[&memory(SIZE - 1)]));
    assert!(!client.set(37, &slot(0x1000, 0), &[&event()]));
    assert!(!client.set(37, &slot(u64::MAX - 10, 0), &[&memory(SIZE)]));
    assert!(!client.set(37, &words(&[0, 0x1000, 0, 0, 0]), &[&memory(SIZE)]));
    assert!(!client.set(
        37,
        &words(&[0, 0x1000, SIZE, 0, u64::MAX]),
        &[&memory(SIZE)]
    ));
    assert_eq!(device.running(), 1);
    // Removal, once, with the descriptor that older frontends attach.
    let other = slot(GUEST + SIZE, USER + SIZE);
    assert!(
        !client.set(38, &other, &[&event(), &event()]),
        "two of them"
    );
    assert!(client.set(38, &other, &[&event()]));
    assert!(!client.set(38, &other, &[]));
    // Under the ring: it stops.
    assert!(client.set(38, &slot(GUEST, USER), &[]));
    assert_eq!(device.running(), 0);
    assert!(client.set(37, &slot(GUEST, USER), &[&memory(SIZE)]));
    assert_eq!(device.running(), 1);
    // A table that cannot be used leaves none.
    let bad = table(&[(GUEST, SIZE, USER, 0), (GUEST, SIZE, USER, 0)]);
    assert!(!client.set(5, &bad, &[&memory(SIZE), &memory(SIZE)]));
    assert_eq!(device.running(), 0);
    // Eight regions fit, nine do not.
    for (count, fits) in [(8u64, true), (9, false)] {
        let files: Vec<File> = (0..count).map(|_| memory(SIZE)).collect();
        let regions: Vec<_> = (0..count)
            .map(|i| (GUEST + i * SIZE, SIZE, USER + i * SIZE, 0))
            .collect();
        let fds: Vec<&File> = files.iter().collect();
        assert_eq!(client.set(5, &table(&regions), &fds), fits);
    }
    client.close();
}

#[test]
fn slots_at_the_limit_and_one_past_it() {
    let _one = one_at_a_time();
    let mut client = Client::connect(Arc::new(Counting::default()));
    client.negotiate();
    for i in 0..65u64 {
        let slot = words(&[0, GUEST + i * 4096, 4096, i, 0]);
        assert_eq!(client.set(37, &slot, &[&memory(4096)]), i < 64, "{i}");
    }
    client.close();
}

#[test]
fn configuration_is_read_at_both_bases() {
    let _one = one_at_a_time();
    let mut client = Client::connect(Arc::new(Counting::default()));
    client.negotiate();
    let config = |offset: u32, size: u32| {
        let mut bytes: Vec<u8> = [offset, size, 0]
            .iter()
            .flat_map(|w| w.to_ne_bytes())
            .collect();
        bytes.resize(12 + size as usize, 0);
        bytes
    };
    for base in [0, 0x100] {
        let reply = client.query(24, &config(base + 4, 70));
        assert_eq!(reply.len(), 12 + 70);
        assert_eq!(reply[..4], (base + 4).to_ne_bytes());
        let expected: Vec<u8> = (5..=60).chain([0; 14]).collect();
        assert_eq!(reply[12..], expected);
    }
    assert_eq!(client.query(24, &config(0, 256)).len(), 12 + 256);
    assert!(client.query(24, &config(0, 257)).is_empty());
    assert!(client.query(24, &config(255, 2)).is_empty());
    assert!(client.query(24, &config(u32::MAX, 8)).is_empty());
    assert!(!client.set(25, &config(0, 1), &[]));
    client.close();
}

#[test]
fn reset_drains_and_starts_over() {
    let _one = one_at_a_time();
    let device = Arc::new(Counting::default());
    for reset in [4, 34] {
        let mut client = Client::connect(device.clone());
        bring_to(3, &mut client);
        assert_eq!(device.running(), 1);
        assert!(client.set(reset, &[], &[]));
        assert_eq!(device.running(), 0);
        assert_eq!(client.query_u64(40), 0);
        assert_eq!(client.query(11, &pair(0, 0)), pair(0, 0));
        // The same frontend comes back on the same connection; memory is still there.
        let features = client.query_u64(1);
        assert!(client.set(2, &words(&[features]), &[]));
        set_up_ring(&mut client, 0, 0);
        assert_eq!(device.running(), 0);
        assert!(client.set(18, &pair(0, 1), &[]));
        assert_eq!(device.running(), 1);
        client.close();
    }
}

#[test]
fn features_that_were_not_offered_are_refused() {
    let _one = one_at_a_time();
    let mut client = Client::connect(Arc::new(Counting::default()));
    client.negotiate();
    assert!(!client.set(2, &words(&[VERSION_1 | 1]), &[]));
    assert!(!client.set(16, &words(&[1 << 14]), &[]));
    for unserved in [19, 20, 22, 27, 35] {
        assert!(!client.set(unserved, &words(&[0]), &[]), "{unserved}");
    }
    for unserved in [26, 41, 43, 44] {
        assert!(client.query(unserved, &[]).is_empty(), "{unserved}");
    }
    client.close();
}

#[test]
fn a_thousand_connections() {
    let _one = one_at_a_time();
    let device = Arc::new(Counting::default());
    let baseline = open_fds();
    let start = Instant::now();
    let mut mappings = 0;
    for round in 0..1000 {
        let mut client = Client::connect(device.clone());
        bring_to(3, &mut client);
        // With an in-flight log, and half a message at the end.
        let mut shape = words(&[0, 0]);
        shape.extend(words(&[1 | 128 << 16]));
        assert_eq!(client.query(31, &shape).len(), 24);
        let _ = (&client.stream).write_all(&[1, 0, 0][..round % 4 % 3]);
        client.close();
        // Once everything that is kept for good is there.
        match round {
            99 => mappings = mapped_regions(),
            999 => assert!(mapped_regions() <= mappings + 2),
            _ => {}
        }
    }
    assert_eq!(open_fds(), baseline);
    assert_eq!(device.running(), 0);
    assert!(start.elapsed() < Duration::from_secs(60));
}

#[test]
fn a_reset_leaves_rings_as_enabled_as_they_were_at_first() {
    let _one = one_at_a_time();
    let device = Arc::new(Counting::default());
    let mut client = Client::connect(device.clone());
    for round in 0..3 {
        // Without protocol features: nobody ever enables a ring.
        client.send(2, VERSION, &words(&[VERSION_1]), &[]);
        let region = table(&[(GUEST, SIZE, USER, 0)]);
        client.send(5, VERSION, &region, &[&memory(SIZE)]);
        client.send(8, VERSION, &pair(0, 128), &[]);
        client.send(9, VERSION, &ring_addr(0, USER), &[]);
        client.send(12, VERSION, &words(&[0]), &[&event()]);
        assert_eq!(client.query_u64(17), 2);
        assert_eq!(device.running(), 1, "round {round}");
        client.send([4, 34][round % 2], VERSION, &[], &[]);
        assert_eq!(client.query_u64(17), 2);
        assert_eq!(device.running(), 0);
    }
    client.close();
}

#[test]
fn a_retired_ring_comes_back_with_a_base_and_not_with_addresses() {
    let _one = one_at_a_time();
    let device = Arc::new(Counting::default());
    let mut client = Client::connect(device.clone());
    bring_to(3, &mut client);
    assert_eq!(device.running(), 1);
    device.retire.store(true, Ordering::SeqCst);
    // Drained for the new addresses, it turns out to be retired.
    for _ in 0..2 {
        assert!(client.set(9, &ring_addr(0, USER), &[]));
        assert_eq!(device.running(), 0);
    }
    set_up_memory(&mut client);
    assert!(client.set(12, &words(&[0]), &[&event()]));
    assert_eq!(device.running(), 0);
    device.retire.store(false, Ordering::SeqCst);
    assert!(client.set(10, &pair(0, 0), &[]));
    assert!(client.set(12, &words(&[0]), &[&event()]));
    assert_eq!(device.running(), 1);
    client.close();
}

#[test]
fn messages_without_a_pause_do_not_keep_a_session_from_stopping() {
    let _one = one_at_a_time();
    let client = Client::connect(Arc::new(Counting::default()));
    let head: Vec<u8> = [3u32, VERSION, 0]
        .iter()
        .flat_map(|w| w.to_ne_bytes())
        .collect();
    let many = head.repeat(4096);
    let mut stream = client.stream.try_clone().unwrap();
    let flood = std::thread::spawn(move || {
        let mut sent = 0u64;
        // Whole messages, or the end.
        while stream.write_all(&many).is_ok() {
            sent += 1;
        }
        sent
    });
    std::thread::sleep(Duration::from_millis(100));
    let start = Instant::now();
    assert_eq!(client.stop(), SessionEnd::Stopped);
    assert!(start.elapsed() < Duration::from_secs(5));
    assert!(flood.join().unwrap() > 0);
}

#[test]
fn what_is_no_eventfd_is_not_called() {
    let _one = one_at_a_time();
    if io_uring::IoUring::new(1).is_err() {
        println!("SKIPPED: without io_uring any descriptor is taken");
        return;
    }
    let device = Arc::new(Counting::default());
    let mut client = Client::connect(device.clone());
    bring_to(3, &mut client);
    for request in [13, 14] {
        assert!(!client.set(request, &words(&[0]), &[&memory(SIZE)]));
        assert!(client.set(request, &words(&[0]), &[&event()]));
    }
    assert_eq!(device.running(), 1);
    client.close();
}
