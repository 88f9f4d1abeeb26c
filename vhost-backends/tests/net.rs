//! The network device from a raw frontend, split and packed: what it carries, and what it refuses.

mod support {
    pub(crate) mod net;
    pub(crate) mod raw;
}

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::Mutex;
use std::time::{Duration, Instant};
use support::net::{
    Buffer, CSUM, CTRL, EVENT_IDX, GUEST_CSUM, GUEST_LARGE, HASH_REPORT, HOST_LARGE, MQ, MRG, MTU,
    NetFront, RSS, TIMEOUT, VERSION_1,
};
use support::raw::{self, PACKED};
use vhost_backends::net::port::{Loopback, Port, Stream, StreamAddress, Switch};
use vhost_backends::net::{Drop, Frame, Mac, NetDevice, NetOptions, Offloads};

const MAC: Mac = Mac([0x52, 0x54, 0, 0, 0, 1]);
const PLAIN: [u8; 12] = [0; 12];
const BASE: u64 = VERSION_1 | EVENT_IDX;
const FORMATS: [u64; 2] = [0, PACKED];

fn device(port: impl Port + 'static) -> Arc<NetDevice> {
    Arc::new(NetDevice::new(Arc::new(port), NetOptions::with_mac(MAC)))
}

/// An Ethernet frame of so many bytes.
fn frame(to: Mac, from: Mac, len: usize) -> Vec<u8> {
    let mut bytes = [to.0, from.0].concat();
    bytes.extend([0x88, 0xb5]);
    bytes.extend((bytes.len()..len).map(|i| (i * 7 + len) as u8));
    bytes.truncate(len);
    bytes
}

#[test]
fn frames_of_every_length_come_back_or_are_dropped() {
    for format in FORMATS {
        let device = device(Loopback::default());
        let mut front = NetFront::start(device.clone(), BASE | MRG | format, 2);
        let mut dropped = 0;
        let lengths = (0..200)
            .chain((200..65_550).step_by(997))
            .chain(65_540..65_560);
        for len in lengths {
            while front.in_flight(0) < 30 {
                assert!(front.offer_receive(0, 2048 + 12));
            }
            let sent = frame(MAC, MAC, len);
            // Every third one with a header split from its frame.
            let before = device.stats().snapshot();
            front.send(1, &PLAIN, &sent);
            let after = device.stats().snapshot();
            if (14..=65_550).contains(&len) && len <= 30 * 2048 {
                let (head, got) = front.receive(0);
                assert!(got == sent, "{len} bytes");
                assert_eq!(head[..10], [0; 10]);
            } else {
                dropped += 1;
                let all = |s: &vhost_backends::net::NetSnapshot| s.drops.values().sum::<u64>();
                assert_eq!(all(&after), all(&before) + 1, "{len} bytes");
            }
        }
        assert!(dropped > 14);
        let stats = device.stats().snapshot();
        assert_eq!(
            stats.dropped(Drop::Length) + stats.dropped(Drop::NoBuffer),
            dropped
        );
    }
}

/// Flags, kind, header length, segment size, where the checksum starts and goes.
fn header(flags: u8, kind: u8, size: u16, start: u16, offset: u16) -> [u8; 12] {
    let mut bytes = [flags, kind, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    bytes[2..4].copy_from_slice(&54u16.to_le_bytes());
    bytes[4..6].copy_from_slice(&size.to_le_bytes());
    bytes[6..8].copy_from_slice(&start.to_le_bytes());
    bytes[8..10].copy_from_slice(&offset.to_le_bytes());
    bytes
}

#[test]
fn wrong_headers_are_dropped_and_counted() {
    for format in FORMATS {
        let device = device(Loopback::default());
        let features = BASE | MRG | CSUM | GUEST_CSUM | HOST_LARGE | GUEST_LARGE | format;
        let mut front = NetFront::start(device.clone(), features, 2);
        assert!(front.offer_receive(0, 4096));
        let sent = frame(MAC, MAC, 1000);
        let bad = [
            header(1, 0, 0, 999, 0),
            header(1, 0, 0, 34, 65_535),
            header(1, 0, 0, 65_535, 65_535),
            header(1, 0, 0, 0, 6),
            // Large frames: no checksum, no size, an unknown kind, ECN that was not negotiated,
            // no room for a transport header.
            header(0, 1, 1000, 34, 16),
            header(1, 1, 0, 34, 16),
            header(1, 3, 1000, 34, 16),
            header(1, 77, 1000, 34, 16),
            header(1, 0x81, 1000, 34, 16),
            header(1, 1, 1000, 985, 6),
        ];
        for head in bad {
            front.send(1, &head, &sent);
        }
        let stats = device.stats().snapshot();
        assert_eq!(stats.dropped(Drop::BadHeader), bad.len() as u64);
        assert_eq!((stats.sent_frames, stats.received_frames), (0, 0));
        // Ones that are well go through, with whatever number of buffers they claim.
        let mut good = header(1, 0, 0, 34, 16);
        good[10..].copy_from_slice(&[0xff, 0xff]);
        front.send(1, &good, &sent);
        let (head, got) = front.receive(0);
        assert_eq!((head[0], &head[6..]), (1, &[34, 0, 16, 0, 1, 0][..]));
        assert!(got == sent);
    }
}

/// A large TCP or UDP frame on IPv4 of so many bytes of payload, and its header.
fn large(to: Mac, udp: bool, payload: usize, size: u16) -> ([u8; 12], Vec<u8>) {
    let transport: usize = if udp { 8 } else { 20 };
    let mut bytes = [to.0, mac(1).0].concat();
    bytes.extend([0x08, 0, 0x45, 0]);
    bytes.extend(((20 + transport + payload) as u16).to_be_bytes());
    let protocol = if udp { 17 } else { 6 };
    bytes.extend([0, 1, 0, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    let mut head = vec![0; transport];
    if !udp {
        head[12] = 0x50;
    }
    bytes.extend(head);
    bytes.resize(bytes.len() + payload, 7);
    let kind = if udp { 5 } else { 1 };
    (header(1, kind, size, 34, if udp { 6 } else { 16 }), bytes)
}

#[test]
fn what_would_be_cut_into_crumbs_is_refused() {
    let device = device(Loopback::default());
    let features = BASE | MRG | CSUM | GUEST_CSUM | HOST_LARGE | GUEST_LARGE;
    let mut front = NetFront::start(device.clone(), features, 2);
    let mut refused = 0;
    for (udp, payload, size, well) in [
        (false, 60_000, 1, false),
        (false, 60_000, 47, false),
        (false, 60_000, 48, true),
        (true, 129, 1, false),
        (true, 128, 1, true),
        (true, 60_000, 468, false),
        (true, 60_000, 469, true),
    ] {
        while front.in_flight(0) < 30 {
            assert!(front.offer_receive(0, 4096));
        }
        let (head, bytes) = large(MAC, udp, payload, size);
        front.send(1, &head, &bytes);
        if well {
            assert!(front.receive(0).1 == bytes, "{payload} by {size}");
        } else {
            refused += 1;
        }
        let stats = device.stats().snapshot();
        assert_eq!(
            stats.dropped(Drop::BadHeader),
            refused,
            "{payload} by {size}"
        );
    }
}

#[test]
fn a_frame_is_cut_no_further_than_there_is_room() {
    // Who receives takes no large frames, and has room for three pieces of one.
    let (devices, mut fronts) = switched(2, BASE | MRG | CSUM | HOST_LARGE);
    for _ in 0..3 {
        assert!(fronts[1].offer_receive(0, 2048));
    }
    let (head, bytes) = large(mac(2), false, 48 * 1000, 48);
    fronts[0].send(1, &head, &bytes);
    for _ in 0..3 {
        assert_eq!(fronts[1].receive(0).1.len(), 54 + 48);
    }
    let stats = devices[1].stats().snapshot();
    assert_eq!(
        (stats.received_frames, stats.dropped(Drop::NoBuffer)),
        (3, 1)
    );
}

#[test]
fn a_large_frame_floods_as_its_pieces_would() {
    let (devices, mut fronts) = switched(3, BASE | MRG | CSUM | HOST_LARGE);
    for _ in 0..40 {
        let (head, bytes) = large(Mac([0xff; 6]), false, 48 * 1300, 48);
        fronts[0].send(1, &head, &bytes);
    }
    let stats = devices[0].stats().snapshot();
    println!("{} of 40 were dropped", stats.dropped(Drop::Flood));
    assert!(stats.dropped(Drop::Flood) > 0);
}

#[test]
fn frames_beyond_the_mtu_are_dropped() {
    for format in FORMATS {
        let mut options = NetOptions::with_mac(MAC);
        options.mtu = Some(1500);
        let port = Arc::new(Loopback::default());
        let device = Arc::new(NetDevice::new(port, options));
        for (features, told) in [(BASE | MTU, true), (BASE, false)] {
            let mut front = NetFront::start(device.clone(), features | format, 2);
            let before = device.stats().snapshot().dropped(Drop::Length);
            let mut dropped = 0;
            for (len, tagged, well) in [
                (1514, false, true),
                (1515, false, false),
                (1518, true, true),
                (1519, true, false),
                (4000, false, false),
            ] {
                assert!(front.offer_receive(0, 5000));
                let mut sent = frame(MAC, MAC, len);
                if tagged {
                    sent[12..16].copy_from_slice(&[0x81, 0, 0, 5]);
                }
                front.send(1, &PLAIN, &sent);
                if well || !told {
                    assert_eq!(front.receive(0).1, sent);
                } else {
                    dropped += 1;
                }
                let after = device.stats().snapshot().dropped(Drop::Length);
                assert_eq!(after - before, dropped, "{len} bytes, told: {told}");
            }
        }
    }
}

#[test]
fn offloads_that_were_not_negotiated_are_refused() {
    let device = device(Loopback::default());
    let mut front = NetFront::start(device.clone(), BASE, 2);
    assert!(front.offer_receive(0, 4096));
    front.send(1, &header(1, 0, 0, 34, 16), &frame(MAC, MAC, 100));
    front.send(1, &header(1, 1, 40, 34, 16), &frame(MAC, MAC, 100));
    assert_eq!(device.stats().snapshot().dropped(Drop::BadHeader), 2);
    front.send(1, &PLAIN, &frame(MAC, MAC, 100));
    assert_eq!(front.receive(0).1, frame(MAC, MAC, 100));
}

#[test]
fn receive_buffers_that_are_too_small() {
    for format in FORMATS {
        // Without mergeable buffers, a frame that does not fit is dropped, and the next one gets
        // the buffer.
        let device = device(Loopback::default());
        let mut front = NetFront::start(device.clone(), BASE | format, 2);
        assert!(front.offer_receive(0, 12 + 100));
        front.send(1, &PLAIN, &frame(MAC, MAC, 101));
        assert_eq!(device.stats().snapshot().dropped(Drop::TooSmall), 1);
        front.send(1, &PLAIN, &frame(MAC, MAC, 100));
        assert_eq!(front.receive(0).1, frame(MAC, MAC, 100));
        // None at all.
        front.send(1, &PLAIN, &frame(MAC, MAC, 100));
        assert_eq!(device.stats().snapshot().dropped(Drop::NoBuffer), 1);
        // Shorter than a header, or not writable: given back, empty.
        assert!(front.offer_receive(0, 11));
        let at = front.place(200);
        let readable = Buffer {
            at,
            len: 200,
            writable: false,
        };
        front.offer(0, &[readable]).unwrap();
        assert!(front.offer_receive(0, 200));
        front.send(1, &PLAIN, &frame(MAC, MAC, 60));
        assert_eq!(front.wait_used(0).1, 0);
        assert_eq!(front.wait_used(0).1, 0);
        assert_eq!(front.receive(0).1, frame(MAC, MAC, 60));
        assert_eq!(device.stats().snapshot().dropped(Drop::BadBuffer), 2);
    }
    for format in FORMATS {
        // With them, one frame may take many, and no more than a bound of them.
        let device = device(Loopback::default());
        let mut front = NetFront::start(device.clone(), BASE | MRG | format, 2);
        for _ in 0..20 {
            assert!(front.offer_receive(0, 12));
        }
        front.send(1, &PLAIN, &frame(MAC, MAC, 19 * 12));
        let (head, got) = front.receive(0);
        assert_eq!(head[10], 20, "the first has the header alone");
        assert_eq!(got, frame(MAC, MAC, 19 * 12));
    }
}

#[test]
fn headers_and_frames_split_anywhere() {
    for format in FORMATS {
        let device = device(Loopback::default());
        let mut front = NetFront::start(device.clone(), BASE | format, 2);
        let sent = frame(MAC, MAC, 64);
        for cut in 1..70 {
            // Both the sent chain and the receive chain are cut there, and again further on.
            let bytes = [&PLAIN[..], &sent].concat();
            let at = front.place(bytes.len());
            front.memory.fill(at, &bytes);
            let second = (bytes.len() - cut).min(9);
            let piece = |from: usize, to: usize, writable| Buffer {
                at: at + from as u64,
                len: (to - from) as u32,
                writable,
            };
            let cuts = [(0, cut), (cut, cut + second), (cut + second, bytes.len())];
            let out = cuts.map(|(from, to)| piece(from, to, false));
            let into = front.place(bytes.len());
            let receive = cuts.map(|(from, to)| Buffer {
                at: into + from as u64,
                ..piece(from, to, true)
            });
            let some = |chain: [Buffer; 3]| chain.into_iter().filter(|b| b.len > 0).collect();
            let (out, receive): (Vec<_>, Vec<_>) = (some(out), some(receive));
            front.offer(0, &receive).unwrap();
            front.offer(1, &out).unwrap();
            front.kick(1);
            front.wait_used(1);
            assert_eq!(front.receive(0).1, sent, "cut at {cut}");
        }
    }
}

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

/// Guests on one switch, each with one pair of queues.
fn switched(count: u8, features: u64) -> (Vec<Arc<NetDevice>>, Vec<NetFront>) {
    let switch = Arc::new(Switch::default());
    let devices: Vec<_> = (1..=count)
        .map(|index| {
            let port = Arc::new(switch.port().unwrap());
            let options = NetOptions::with_mac(Mac([0x52, 0x54, 0, 0, 0, index]));
            Arc::new(NetDevice::new(port, options))
        })
        .collect();
    let fronts = devices
        .iter()
        .map(|device| NetFront::start(device.clone(), features, 2))
        .collect();
    (devices, fronts)
}

fn mac(index: u8) -> Mac {
    Mac([0x52, 0x54, 0, 0, 0, index])
}

#[test]
fn a_switch_learns_and_floods() {
    for format in FORMATS {
        let (_devices, mut fronts) = switched(3, BASE | MRG | format);
        let offer = |fronts: &mut Vec<NetFront>| {
            for front in fronts {
                while front.in_flight(0) < 8 {
                    assert!(front.offer_receive(0, 2048));
                }
            }
        };
        offer(&mut fronts);
        // Known by configuration: to one, and to nobody else.
        let direct = frame(mac(2), mac(1), 100);
        fronts[0].send(1, &PLAIN, &direct);
        assert_eq!(fronts[1].receive(0).1, direct);
        assert!(fronts[2].try_receive(0).is_none());
        // To all, but not back.
        let all = frame(Mac([0xff; 6]), mac(1), 60);
        fronts[0].send(1, &PLAIN, &all);
        assert_eq!(fronts[1].receive(0).1, all);
        assert_eq!(fronts[2].receive(0).1, all);
        assert!(fronts[0].try_receive(0).is_none());
        // A station that nobody knows is flooded until it is heard of.
        let station = Mac([2, 9, 9, 9, 9, 9]);
        let unknown = frame(station, mac(1), 61);
        fronts[0].send(1, &PLAIN, &unknown);
        assert_eq!(fronts[1].receive(0).1, unknown);
        assert_eq!(fronts[2].receive(0).1, unknown);
        let hello = frame(mac(1), station, 62);
        fronts[2].send(1, &PLAIN, &hello);
        assert_eq!(fronts[0].receive(0).1, hello);
        fronts[0].send(1, &PLAIN, &unknown);
        assert_eq!(fronts[2].receive(0).1, unknown);
        assert!(fronts[1].try_receive(0).is_none());
    }
}

#[test]
fn nobody_takes_another_ports_address() {
    let (devices, mut fronts) = switched(3, BASE);
    for front in &mut fronts {
        assert!(front.offer_receive(0, 2048));
    }
    fronts[0].send(1, &PLAIN, &frame(mac(3), mac(2), 60));
    assert_eq!(devices[0].stats().snapshot().dropped(Drop::Spoofed), 1);
    let real = frame(mac(2), mac(3), 60);
    fronts[2].send(1, &PLAIN, &real);
    assert_eq!(fronts[1].receive(0).1, real);
    assert!(fronts[2].try_receive(0).is_none());
}

#[test]
fn a_port_that_floods_leaves_the_others_their_share() {
    let (devices, mut fronts) = switched(3, BASE | MRG);
    let flooder = fronts.remove(0);
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let stopped = stop.clone();
    let flood = std::thread::spawn(move || {
        let mut flooder = flooder;
        let mut sent = 0u32;
        while !stopped.load(std::sync::atomic::Ordering::Relaxed) {
            // Every source and destination is a new one.
            let [a, b, c, d] = sent.to_le_bytes();
            let bytes = frame(Mac([2, 1, a, b, c, d]), Mac([2, 0, a, b, c, d]), 60);
            flooder.send(1, &PLAIN, &bytes);
            sent += 1;
        }
        sent
    });
    let [second, third] = &mut fronts[..] else {
        panic!()
    };
    for round in 0..500usize {
        for front in [&mut *second, &mut *third] {
            while front.in_flight(0) < 30 {
                assert!(front.offer_receive(0, 2048));
            }
        }
        let bytes = frame(mac(3), mac(2), 100 + round);
        second.send(1, &PLAIN, &bytes);
        loop {
            let got = third.receive(0).1;
            if got == bytes {
                break;
            }
            assert_eq!(got.len(), 60, "a flooded one");
            assert!(third.offer_receive(0, 2048));
        }
        while second.try_receive(0).is_some() {}
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let sent = flood.join().unwrap();
    let stats = devices[0].stats().snapshot();
    println!(
        "flooded {sent} frames, of which {} were dropped",
        stats.dropped(Drop::Flood)
    );
    assert_eq!(stats.sent_frames, u64::from(sent));
}

#[test]
fn the_link_goes_down_and_up() {
    let device = device(Loopback::default());
    let mut front = NetFront::start(device.clone(), BASE, 2);
    assert!(front.offer_receive(0, 2048));
    let status = |front: &mut NetFront| {
        let ask = [6u32.to_le_bytes(), 2u32.to_le_bytes(), [0; 4]].concat();
        let reply = front.client.query(24, &[&ask[..], &[0; 2]].concat());
        u16::from_le_bytes([reply[12], reply[13]])
    };
    assert_eq!(status(&mut front), 1);
    device.set_link(false).unwrap();
    assert_eq!(status(&mut front), 0);
    front.send(1, &PLAIN, &frame(MAC, MAC, 60));
    assert_eq!(device.stats().snapshot().dropped(Drop::LinkDown), 1);
    device.set_link(true).unwrap();
    device.announce().unwrap();
    assert_eq!(status(&mut front), 3);
    front.send(1, &PLAIN, &frame(MAC, MAC, 60));
    assert_eq!(front.receive(0).1, frame(MAC, MAC, 60));
}

#[test]
fn qemus_order_of_messages() {
    let device = device(Loopback::default());
    let mut client = raw::Client::connect(device);
    // Queues are enabled before anything was negotiated, eight times.
    for round in 0..8u32 {
        client.send(18, 1, &raw::pair(round % 3, 1), &[]);
    }
    assert_ne!(client.query_u64(1), 0);
    let config = 1 << 9;
    let protocol = client.query_u64(15);
    assert_eq!(protocol & config, 0, "QEMU asks before SET_OWNER");
    client.send(16, 1, &protocol.to_ne_bytes(), &[]);
    client.send(3, 1, &[], &[]);
    assert_ne!(client.query_u64(15) & config, 0, "others ask after it");
    assert!(client.set(20, &1500u64.to_ne_bytes(), &[]), "an MTU");
    assert!(!client.set(20, &0u64.to_ne_bytes(), &[]), "none");
    assert!(
        client.set(19, &[0x52, 0x54, 0, 0, 0, 1, 0, 0], &[]),
        "announce"
    );
    assert!(!client.set(19, &[0; 6], &[]), "too short");
    assert!(client.set(39, &1u64.to_ne_bytes(), &[]), "a status");
    assert_eq!(client.query_u64(40), 1);
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

#[test]
fn a_status_of_zero_is_a_reset() {
    let device = device(Loopback::default());
    let mut front = NetFront::start(device, BASE | CTRL, 3);
    let mac = |front: &mut NetFront| {
        let ask = [0u32.to_le_bytes(), 6u32.to_le_bytes(), [0; 4]].concat();
        front.client.query(24, &[&ask[..], &[0; 6]].concat())[12..].to_vec()
    };
    let other = [0x52, 0x54, 0, 0, 0, 9];
    assert_eq!(front.command(2, &[&[1, 1], &other]), 0);
    assert!(front.client.set(39, &15u64.to_ne_bytes(), &[]));
    assert_eq!(mac(&mut front), other);
    assert!(front.client.set(39, &0u64.to_ne_bytes(), &[]));
    assert_eq!(mac(&mut front), MAC.0);
}

#[test]
fn who_announces_a_guest_keeps_to_its_link_and_limits() {
    let device = device(Loopback::default());
    let mut front = NetFront::start(device.clone(), BASE, 2);
    let mut announce = || {
        let mac = [0x52, 0x54, 0, 0, 0, 1, 0, 0];
        assert!(front.client.set(19, &mac, &[]));
        device.stats().snapshot()
    };
    let first = announce();
    assert_eq!(first.dropped(Drop::NoBuffer), 1, "it comes back");
    device.set_link(false).unwrap();
    let down = announce();
    assert_eq!(
        (down.dropped(Drop::LinkDown), down.dropped(Drop::NoBuffer)),
        (1, 1)
    );
    device.set_link(true).unwrap();
    let limits = vhost_backends::limit::Limits {
        iops: 1,
        ..Default::default()
    };
    device.limiter().set(limits);
    device.limiter().charge_many(1000, 0);
    let held = announce();
    assert_eq!(
        (held.dropped(Drop::Limited), held.dropped(Drop::NoBuffer)),
        (1, 1)
    );
}

#[test]
fn memory_that_can_be_cut_off_is_refused_where_others_depend_on_it() {
    for needed in [false, true] {
        let mut options = NetOptions::with_mac(MAC);
        options.sealed_memory = needed;
        let port = Arc::new(Loopback::default());
        let device = Arc::new(NetDevice::new(port, options));
        // It has brought sealed memory already.
        let mut front = NetFront::start(device, BASE, 2);
        let size = 1 << 20;
        let unsealed = tempfile::tempfile_in("/dev/shm").unwrap();
        unsealed.set_len(size).unwrap();
        let mut table = raw::pair(1, 0);
        table.extend(raw::words(&[0x4000_0000, size, 0x7f00_0000_0000, 0]));
        assert_eq!(front.client.set(5, &table, &[&unsealed]), !needed);
        assert!(front.client.set(5, &table, &[&raw::memory(size)]));
    }
}

fn streamed() -> (Arc<NetDevice>, NetFront, UnixStream) {
    let (ours, peer) = UnixStream::pair().unwrap();
    peer.set_read_timeout(Some(TIMEOUT)).unwrap();
    let device = device(Stream::new(StreamAddress::Connected(ours)).unwrap());
    let front = NetFront::start(device.clone(), BASE, 2);
    (device, front, peer)
}

/// Sends until the peer's backlog is full.
fn overfill(device: &NetDevice, front: &mut NetFront) {
    while device.stats().snapshot().dropped(Drop::PortFull) == 0 {
        front.send(1, &PLAIN, &frame(MAC, MAC, 1500));
    }
}

#[test]
fn a_stream_whose_peer_reads_no_more_is_given_up() {
    for full in [false, true] {
        let (device, mut front, mut peer) = streamed();
        assert!(front.offer_receive(0, 2048));
        if full {
            overfill(&device, &mut front);
        }
        peer.shutdown(Shutdown::Read).unwrap();
        front.send(1, &PLAIN, &frame(MAC, MAC, 1500));
        let deadline = Instant::now() + TIMEOUT;
        while peer.write(&[0]).is_ok() {
            assert!(Instant::now() < deadline, "the connection goes on");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

#[test]
fn what_waits_for_a_streams_peer_goes_on_without_receive_buffers() {
    let (device, mut front, mut peer) = streamed();
    // It comes to a guest without a buffer.
    let hello = frame(MAC, MAC, 60);
    peer.write_all(&[&60u32.to_be_bytes()[..], &hello].concat())
        .unwrap();
    overfill(&device, &mut front);
    let sent = device.stats().snapshot().sent_frames;
    let mut all = vec![0; sent as usize * 1504];
    peer.read_exact(&mut all).unwrap();
    let each = [&1500u32.to_be_bytes()[..], &frame(MAC, MAC, 1500)].concat();
    assert!(all.chunks(1504).all(|got| got == each));
    assert!(front.offer_receive(0, 2048));
    front.kick(0);
    assert_eq!(front.receive(0).1, hello);
}
