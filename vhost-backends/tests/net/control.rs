//! The control queue, and several pairs.

use super::support::net::{
    Buffer, CTRL, GUEST_CSUM, HASH_REPORT, MQ, NetFront, RSS, TIMEOUT, VERSION_1,
};
use super::support::raw;
use super::{BASE, FORMATS, MAC, PLAIN, device, frame};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use vhost_backends::net::port::{Loopback, Port};
use vhost_backends::net::{Frame, Mac, NetDevice, NetOptions, Offloads};

#[test]
fn control_commands() {
    for format in FORMATS {
        let device = device(Loopback::default());
        let mut front = NetFront::start(device.clone(), BASE | CTRL | format, 3);
        let other = Mac([0x52, 0x54, 0, 0, 0, 2]);
        let group = Mac([0x33, 0x33, 0, 0, 0, 1]);
        let wants = |front: &mut NetFront, bytes: &[u8]| {
            assert!(front.offer_receive(0, 2048));
            let before = device.stats().snapshot().received_frames;
            front.send(1, &PLAIN, bytes);
            let came = device.stats().snapshot().received_frames > before;
            if came {
                assert_eq!(front.receive(0).1, bytes);
            }
            came
        };
        let to = |mac| frame(mac, MAC, 60);
        assert!(wants(&mut front, &to(other)), "promiscuous at first");
        let ok = |front: &mut NetFront, parts: &[&[u8]]| front.command(2, parts) == 0;
        assert!(ok(&mut front, &[&[0, 0], &[0]]), "promiscuous mode off");
        assert!(!wants(&mut front, &to(other)) && wants(&mut front, &to(MAC)));
        assert!(!wants(&mut front, &to(group)) && wants(&mut front, &to(Mac([0xff; 6]))));
        // In one piece, and cut in odd places.
        let table = [
            &1u32.to_le_bytes()[..],
            &other.0,
            &1u32.to_le_bytes(),
            &group.0,
        ]
        .concat();
        assert!(ok(&mut front, &[&[1, 0], &table]));
        assert!(wants(&mut front, &to(other)) && wants(&mut front, &to(group)));
        assert!(ok(&mut front, &[&[1], &[0, 0, 0], &[0; 6]]), "both empty");
        assert!(!wants(&mut front, &to(other)) && !wants(&mut front, &to(group)));
        assert!(ok(&mut front, &[&[0, 1], &[1]]), "all multicast");
        assert!(wants(&mut front, &to(group)));
        assert!(ok(&mut front, &[&[0, 5], &[1]]), "no broadcast");
        assert!(!wants(&mut front, &to(Mac([0xff; 6]))));
        assert!(ok(&mut front, &[&[1, 1], &other.0]), "a new address");
        assert!(wants(&mut front, &to(other)) && !wants(&mut front, &to(MAC)));
        // VLANs.
        let mut tagged = to(other);
        tagged[12..16].copy_from_slice(&[0x81, 0, 0xe0, 5]);
        assert!(!wants(&mut front, &tagged));
        assert!(ok(&mut front, &[&[2, 0], &5u16.to_le_bytes()]));
        assert!(wants(&mut front, &tagged));
        assert!(ok(&mut front, &[&[2, 1], &5u16.to_le_bytes()]));
        assert!(!wants(&mut front, &tagged));
        // A table that is too long lets all of its kind through.
        let many = [&65u32.to_le_bytes()[..], &MAC.0.repeat(65), &[0; 4]].concat();
        assert!(ok(&mut front, &[&[1, 0], &many]));
        assert!(wants(&mut front, &to(Mac([2, 2, 2, 2, 2, 2]))));

        let refused: [&[&[u8]]; 20] = [
            &[&[0]],
            &[&[0, 0]],
            &[&[0, 0], &[2]],
            &[&[0, 0], &[0, 0]],
            &[&[0, 6], &[0]],
            &[&[1, 0], &[0, 0, 0]],
            &[&[1, 0], &[1, 0, 0, 0, 1, 2, 3, 4, 5]],
            &[&[1, 0], &[0xff, 0xff, 0xff, 0xff, 1, 2, 3, 4, 5, 6]],
            &[&[1, 0], &[0; 8], &[0]],
            &[&[1, 1], &[2, 0, 0, 0, 0]],
            &[&[1, 1], &[1, 0, 0, 0, 0, 0]],
            &[&[2, 0], &[0]],
            &[&[2, 0], &4096u16.to_le_bytes()],
            &[&[2, 2], &5u16.to_le_bytes()],
            &[&[3, 1]],
            // More pairs than negotiated, and offloads that were not.
            &[&[4, 0], &1u16.to_le_bytes()],
            &[&[5, 0], &0xffu64.to_le_bytes()],
            &[&[99, 0], &[0]],
            &[&[255, 255], &[0; 64]],
            &[&[1, 0], &[0; 2500], &[0; 2500]],
        ];
        let before = device.stats().snapshot();
        for parts in refused {
            assert_eq!(front.command(2, parts), 1, "{parts:?}");
        }
        let after = device.stats().snapshot();
        assert_eq!(
            after.refused_commands - before.refused_commands,
            refused.len() as u64
        );
        // Nowhere to answer: given back all the same.
        let at = front.place(2);
        front.memory.fill(at, &[0, 0]);
        front
            .offer(
                2,
                &[Buffer {
                    at,
                    len: 2,
                    writable: false,
                }],
            )
            .unwrap();
        front.kick(2);
        assert_eq!(front.wait_used(2).1, 0);
        assert!(ok(&mut front, &[&[0, 0], &[1]]), "it still serves");
        assert!(wants(&mut front, &to(MAC)));
    }
}

/// Coalescing of all queues of a kind, and of each.
const COALESCE: u64 = 1 << 53 | 1 << 52;

#[test]
fn calls_are_put_together_where_the_driver_wants_it() {
    for format in FORMATS {
        let device = device(Loopback::default());
        // Without the event index every batch is one to call for.
        let features = VERSION_1 | CTRL | COALESCE | format;
        let mut front = NetFront::start(device.clone(), features, 3);
        let run = |front: &mut NetFront| {
            let before = device.stats().snapshot().calls;
            for _ in 0..60 {
                assert!(front.offer_receive(0, 2048));
                front.send(1, &PLAIN, &frame(MAC, MAC, 60));
                front.receive(0);
            }
            device.stats().snapshot().calls - before
        };
        let arrives = |front: &mut NetFront, queue| {
            let deadline = Instant::now() + TIMEOUT;
            while !front.called(queue) {
                assert!(Instant::now() < deadline, "no call on queue {queue}");
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        // The last ones may be counted a moment after their frames.
        let both = 2 * 60 - 2..=2 * 60 + 2;
        assert!(both.contains(&run(&mut front)));
        let wish =
            |packets: u32, micros: u32| [packets.to_le_bytes(), micros.to_le_bytes()].concat();
        let ok = |front: &mut NetFront, parts: &[&[u8]]| front.command(2, parts) == 0;
        assert!(ok(&mut front, &[&[6, 0], &wish(0, u32::MAX)]), "sent ones");
        assert!(
            ok(&mut front, &[&[6, 1], &wish(30, u32::MAX)]),
            "received ones"
        );
        assert!(run(&mut front) < *both.start());
        // The last is called for as well, if it takes its time.
        for queue in [0, 1] {
            while front.called(queue) {}
        }
        assert!(front.offer_receive(0, 2048));
        front.send(1, &PLAIN, &frame(MAC, MAC, 60));
        arrives(&mut front, 0);
        arrives(&mut front, 1);
        // What is in force can be asked for: behind the answer, with the bound on time.
        let ask = |front: &mut NetFront, queue: u8, room: u32| {
            let at = front.place(16);
            front.memory.fill(at, &[6, 3, queue, 0, 0, 0]);
            let piece = |from: u64, len, writable| Buffer {
                at: at + from,
                len,
                writable,
            };
            let chain = [piece(0, 6, false), piece(6, 1, true), piece(7, room, true)];
            front.offer(2, &chain).unwrap();
            front.kick(2);
            let written = front.wait_used(2).1;
            (written, front.memory.bytes(at + 6, 9))
        };
        let expected = [&[0][..], &wish(30, 10_000)].concat();
        assert_eq!(ask(&mut front, 0, 8), (9, expected));
        assert_eq!(ask(&mut front, 0, 7).1[0], 1, "no room for it");
        assert_eq!(ask(&mut front, 2, 8).1[0], 1, "no such queue");
        for queue in [0, 1] {
            assert!(ok(&mut front, &[&[6, 2, queue, 0, 0, 0], &wish(1, 5)]));
        }
        assert!(both.contains(&run(&mut front)));
        let refused: [&[u8]; 8] = [
            &[6, 0],
            &[6, 0, 1, 0, 0, 0, 1, 0, 0],
            &[6, 1, 1, 0, 0, 0, 1, 0, 0, 0, 0],
            &[6, 2, 0, 0, 0, 0],
            &[6, 2, 2, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0],
            &[6, 3],
            &[6, 3, 0, 1, 0, 0],
            &[6, 4, 0, 0, 0, 0, 0, 0, 0, 0],
        ];
        for bytes in refused {
            assert_eq!(front.command(2, &[bytes]), 1, "{bytes:?}");
        }
        // A reset forgets it; without the features there are no such commands.
        assert!(ok(&mut front, &[&[6, 0], &wish(0, 10_000)]));
        drop(front);
        let mut front = NetFront::start(device.clone(), VERSION_1 | CTRL | format, 3);
        assert!(both.contains(&run(&mut front)));
        for command in 0..4 {
            assert_eq!(front.command(2, &[&[6, command], &[1; 12]]), 1);
        }
    }
}

/// A TCP packet on IPv4, from this port.
fn tcp(port: u16) -> Vec<u8> {
    let mut bytes = frame(MAC, MAC, 12);
    bytes.extend([0x08, 0, 0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 6, 0, 0]);
    bytes.extend([66, 9, 149, 187, 161, 142, 100, 80]);
    bytes.extend(port.to_be_bytes());
    bytes.extend(1766u16.to_be_bytes());
    bytes.resize(60, 0);
    bytes
}

const KEY: [u8; 40] = [
    0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f, 0xb0,
    0xd0, 0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30, 0xf2, 0x0c,
    0x6a, 0x42, 0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
];

#[test]
fn several_pairs_by_flow_and_by_hash() {
    for format in FORMATS {
        let options = NetOptions::with_mac(MAC).pairs(4);
        let device = Arc::new(NetDevice::new(Arc::new(Loopback::default()), options));
        let features = BASE | CTRL | MQ | RSS | HASH_REPORT | format;
        let mut front = NetFront::start(device.clone(), features, 9);
        let header = [0; 20];
        for pair in 0..4 {
            for _ in 0..24 {
                assert!(front.offer_receive(2 * pair, 200));
            }
        }
        // One pair at first, whatever queue it is sent on.
        front.send(5, &header, &tcp(1));
        assert_eq!(front.receive(0).1, tcp(1));
        for bad in [0u16, 5, 0xffff] {
            assert_eq!(front.command(8, &[&[4, 0], &bad.to_le_bytes()]), 1);
        }
        assert_eq!(front.command(8, &[&[4, 0], &4u16.to_le_bytes()]), 0);
        // A flow comes back on the pair that it is sent on.
        for pair in [3, 1, 2, 0] {
            front.send(2 * pair + 1, &header, &tcp(77));
            assert_eq!(front.receive(2 * pair).1, tcp(77), "pair {pair}");
        }
        // By hash: a known one, and as its entry of the table says.
        let table: Vec<u8> = [3u16, 2, 1, 0]
            .iter()
            .flat_map(|p| p.to_le_bytes())
            .collect();
        let start = [
            &0x3fu32.to_le_bytes()[..],
            &3u16.to_le_bytes(),
            &2u16.to_le_bytes(),
        ]
        .concat();
        let end = [&4u16.to_le_bytes()[..], &[40], &KEY].concat();
        assert_eq!(front.command(8, &[&[4, 1], &start, &table, &end]), 0);
        let known = 0x51cc_c178u32;
        front.send(1, &header, &tcp(2794));
        let pair = 3 - (known as usize & 3);
        let (head, got) = front.receive(2 * pair);
        assert_eq!(got, tcp(2794));
        assert_eq!(head[12..16], known.to_le_bytes());
        assert_eq!(head[16..20], [2, 0, 0, 0], "TCP on IPv4");
        // What has no hash.
        front.send(1, &header, &frame(MAC, MAC, 60));
        let (head, _) = front.receive(4);
        assert_eq!(head[12..20], [0; 8]);
        assert_eq!(front.command(8, &[&[4, 1], &start, &table, &end[..20]]), 1);
    }
}

/// A network that only remembers what it is told.
#[derive(Debug, Default)]
struct Told {
    pairs: Mutex<Vec<u16>>,
    offloads: Mutex<Vec<Offloads>>,
}

impl Port for Told {
    fn offloads(&self) -> Offloads {
        Offloads::ALL
    }

    fn set_guest_offloads(&self, offloads: Offloads) {
        self.offloads.lock().unwrap().push(offloads);
    }

    fn set_pairs(&self, pairs: u16) {
        self.pairs.lock().unwrap().push(pairs);
    }

    fn send(&self, _pair: u16, frames: &[Frame<'_>]) -> usize {
        frames.len()
    }
}

#[test]
fn without_a_control_queue_the_open_pairs_are_in_use() {
    let port = Arc::new(Told::default());
    let options = NetOptions::with_mac(MAC).pairs(2);
    let device = Arc::new(NetDevice::new(port.clone(), options));
    let last = || port.pairs.lock().unwrap().last().copied();
    let mut front = NetFront::start(device.clone(), BASE | MQ, 4);
    assert_eq!(last(), Some(2));
    assert!(!front.try_open(4), "the control queue's place");
    assert_eq!(last(), Some(2));
    for (enable, pairs) in [(0, 1), (1, 2), (0, 1)] {
        assert!(front.client.set(18, &raw::pair(2, enable), &[]));
        assert_eq!(last(), Some(pairs));
    }
    drop(front);
    // Somebody else's driver knows of one pair.
    let front = NetFront::start(device, BASE, 2);
    assert_eq!(last(), Some(1));
    drop(front);
}

#[test]
fn the_host_is_told_of_changes_alone_and_so_many_in_a_time() {
    let port = Arc::new(Told::default());
    let device = Arc::new(NetDevice::new(port.clone(), NetOptions::with_mac(MAC)));
    let mut front = NetFront::start(device, BASE | CTRL | GUEST_CSUM, 3);
    let count = || port.offloads.lock().unwrap().len();
    let mut set = |wanted: u64| front.command(2, &[&[5, 0], &wanted.to_le_bytes()]);
    let before = count();
    for _ in 0..20 {
        assert_eq!(set(GUEST_CSUM), 0);
    }
    assert_eq!(count(), before, "as it was");
    let start = Instant::now();
    for round in 0..16 {
        assert_eq!(set(if round % 2 == 0 { 0 } else { GUEST_CSUM }), 0);
    }
    assert_eq!(count(), before + 16);
    // Eight at once, and twenty in a second.
    assert!(start.elapsed() >= Duration::from_millis(300));
}
