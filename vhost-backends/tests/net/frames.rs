//! Frames and their headers: lengths, offloads, and buffers cut anywhere.

use super::support::net::{Buffer, CSUM, GUEST_CSUM, GUEST_LARGE, HOST_LARGE, MRG, MTU, NetFront};
use super::{BASE, FORMATS, MAC, PLAIN, device, frame, header, large};
use std::sync::Arc;
use vhost_backends::net::port::Loopback;
use vhost_backends::net::{Drop, NetDevice, NetOptions};

#[test]
fn frames_of_every_length_come_back_or_are_dropped() {
    for format in FORMATS {
        let device = device(Loopback::default());
        let mut front = NetFront::start(device.clone(), BASE | MRG | format, 2);
        let mut dropped = 0;
        let bytes = frame(MAC, MAC, 65_560);
        // The odd ones with one format, the others with the other, and the ends with both.
        let turn = |len: usize| len.is_multiple_of(2) == (format == 0);
        let ends = |len: usize| !(200..=65_500).contains(&len);
        for len in (0..65_560).filter(|len| turn(*len) || ends(*len)) {
            while front.in_flight(0) < 30 {
                assert!(front.offer_receive(0, 4096));
            }
            let mut sent = bytes[..len].to_vec();
            if let Some(number) = sent.get_mut(14..18) {
                number.copy_from_slice(&(len as u32).to_ne_bytes());
            }
            let before = device.stats().snapshot();
            front.send(1, &PLAIN, &sent);
            let after = device.stats().snapshot();
            if (14..=65_550).contains(&len) {
                let (head, got) = front.receive(0);
                assert!(got == sent, "{len} bytes");
                assert_eq!(head[..10], [0; 10]);
            } else {
                dropped += 1;
                let all = |s: &vhost_backends::net::NetSnapshot| s.drops.values().sum::<u64>();
                assert_eq!(all(&after), all(&before) + 1, "{len} bytes");
            }
        }
        assert_eq!(dropped, 14 + 9);
        let stats = device.stats().snapshot();
        assert_eq!(stats.dropped(Drop::Length), dropped);
    }
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
