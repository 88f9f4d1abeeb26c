//! Guests on one switch.

use super::support::net::{CSUM, HOST_LARGE, MRG, NetFront};
use super::{BASE, FORMATS, PLAIN, frame, large, mac};
use std::sync::Arc;
use vhost_backends::net::port::Switch;
use vhost_backends::net::{Drop, Mac, NetDevice, NetOptions};

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
