//! The driver against a model of the host that delivers, lies, and dies where the test says.

mod coalesce;
mod control;
mod hostile;
mod life;
#[cfg(any(feature = "smoltcp", feature = "embassy"))]
mod stacks;

use super::{Frame, Nic, NicConfig, Offload, Opened, PairConfig, Receiver, Transmitter};
use crate::fake::{Delivery, Fake};
use crate::limits::{MAX_FRAME, RECEIVE_BUFFER};
use alloc::vec::Vec;
use pv_abi::virtio::net::feature;

/// All that the driver knows, but several pairs.
const ALL: u64 = feature::CSUM
    | feature::GUEST_CSUM
    | feature::GUEST_TSO4
    | feature::GUEST_TSO6
    | feature::GUEST_ECN
    | feature::GUEST_USO4
    | feature::GUEST_USO6
    | feature::HOST_TSO4
    | feature::HOST_TSO6
    | feature::HOST_ECN
    | feature::HOST_USO
    | feature::MRG_RXBUF
    | feature::CTRL_VQ
    | feature::CTRL_RX
    | feature::CTRL_VLAN
    | feature::CTRL_MAC_ADDR
    | feature::GUEST_ANNOUNCE
    | feature::VQ_NOTF_COAL
    | feature::NOTF_COAL;

fn fake(features: u64) -> &'static Fake {
    let fake = Fake::new(1, 1, 3, true);
    fake.host().become_card(1, features);
    fake
}

fn open_with(fake: &'static Fake, size: u16, buffer_len: usize) -> Opened<Fake> {
    let config = NicConfig {
        pairs: &[PairConfig { vcpu: 0, size }],
        buffer_len,
        without: 0,
    };
    Nic::open(fake, None, &config).expect("a card")
}

fn pair(opened: Opened<Fake>) -> (Receiver<Fake>, Transmitter<Fake>) {
    opened.pairs.into_iter().next().expect("one pair")
}

fn card(features: u64) -> (&'static Fake, Receiver<Fake>, Transmitter<Fake>) {
    let fake = fake(features);
    let (receiver, transmitter) = pair(open_with(fake, 64, RECEIVE_BUFFER));
    (fake, receiver, transmitter)
}

/// Bytes that differ from place to place and from one seed to the next.
fn pattern(seed: usize, len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 + seed * 7) as u8).collect()
}

fn deliver(fake: &Fake, delivery: Delivery) {
    let mut host = fake.host();
    host.card.inbox.push_back(delivery);
    host.kicked = true;
}

fn bytes(frame: &Frame) -> Vec<u8> {
    let mut out = alloc::vec![0; frame.len()];
    assert_eq!(frame.read(0, &mut out), frame.len());
    out
}

/// What arrives when the host delivers what it has.
fn arrived(fake: &Fake, receiver: &mut Receiver<Fake>) -> Option<Frame> {
    // The first look shows the device what it was given back.
    let early = receiver.poll().expect("nothing is broken");
    fake.run_host();
    early.or_else(|| receiver.poll().expect("nothing is broken"))
}

#[test]
fn every_length_arrives_whole() {
    let data = pattern(1, MAX_FRAME);
    // Buffers that are merged, and ones that hold any frame.
    for (features, buffer_len, step) in [
        (feature::MRG_RXBUF, RECEIVE_BUFFER, 1),
        (feature::MRG_RXBUF, 300, 257),
        (0, MAX_FRAME + 12, 101),
    ] {
        let fake = fake(features);
        let size = if buffer_len > 4096 { 16 } else { 256 };
        let (mut receiver, _) = pair(open_with(fake, size, buffer_len));
        let mut out = alloc::vec![0; MAX_FRAME];
        let lengths = (0..200)
            .chain((200..=MAX_FRAME).step_by(step))
            .chain([MAX_FRAME]);
        let mut runts = 0;
        for len in lengths {
            let expected = &data[..len];
            deliver(fake, Delivery::honest(expected));
            let frame = arrived(fake, &mut receiver);
            let Some(frame) = frame else {
                assert!(len < 14, "{len} did not arrive");
                runts += 1;
                continue;
            };
            assert_eq!(frame.len(), len);
            assert_eq!(frame.read(0, &mut out), len);
            assert!(out[..len] == *expected, "{len}");
            receiver.recycle(frame);
        }
        assert_eq!((runts, receiver.stats().runts), (14, 14));
    }
}

#[test]
fn every_length_is_sent_or_refused() {
    let (fake, _receiver, mut transmitter) = card(0);
    let data = pattern(2, MAX_FRAME + 2);
    for len in 0..=MAX_FRAME + 1 {
        if len > 20_000 && len % 64 > 2 && len < MAX_FRAME - 2 {
            continue;
        }
        let sent = transmitter.send(&data[..len], Offload::default());
        fake.run_host();
        let got = core::mem::take(&mut fake.host().card.sent);
        if (14..=MAX_FRAME).contains(&len) {
            sent.expect("a frame");
            assert_eq!(got.len(), 1);
            assert!(got[0].1 == data[..len], "{len}");
            assert_eq!(got[0].0, Default::default());
        } else {
            sent.expect_err("no frame");
            assert!(got.is_empty());
        }
    }
}

#[test]
fn a_frame_is_read_from_anywhere_and_forwarded_without_a_copy() {
    let (fake, mut receiver, mut transmitter) = card(feature::MRG_RXBUF);
    let data = pattern(3, 5000);
    deliver(fake, Delivery::honest(&data));
    let frame = arrived(fake, &mut receiver).expect("a frame");
    assert_eq!((frame.buffers(), frame.is_empty()), (3, false));
    assert_eq!(
        frame.pieces().map(|(_, range)| range.len()).sum::<usize>(),
        5000
    );
    let mut out = [0; 700];
    for offset in (0..5200).step_by(333) {
        let count = frame.read(offset, &mut out);
        assert_eq!(count, 5000usize.saturating_sub(offset).min(700));
        let from = offset.min(5000);
        assert_eq!(out[..count], data[from..from + count]);
    }
    let frame = frame.into_packet().expect_err("it lies in three buffers");
    receiver.recycle(frame);
    deliver(fake, Delivery::honest(&data[..600]));
    let packet = arrived(fake, &mut receiver).expect("a frame").into_packet();
    let packet = packet.expect("it lies in one buffer");
    transmitter
        .submit(packet, Offload::default())
        .expect("room");
    transmitter.kick();
    fake.run_host();
    assert_eq!(fake.host().card.sent[0].1, data[..600]);
}

#[test]
fn a_batch_costs_one_kick_and_no_signal_that_nobody_asked_for() {
    for event_idx in [true, false] {
        let fake = fake(0);
        if !event_idx {
            fake.host().offered &= !pv_abi::virtio::feature::EVENT_IDX;
            fake.host().show();
        }
        let (mut receiver, mut transmitter) = pair(open_with(fake, 64, RECEIVE_BUFFER));
        fake.run_host();
        let kicks = fake.kicks.load(core::sync::atomic::Ordering::Relaxed);
        for round in 0..40 {
            let mut packet = transmitter.packet(100).expect("room");
            packet.set_len(100);
            packet.write(0, &pattern(round, 100));
            transmitter
                .submit(packet, Offload::default())
                .expect("room");
        }
        transmitter.kick();
        let now = fake.kicks.load(core::sync::atomic::Ordering::Relaxed);
        assert_eq!(now - kicks, 1);
        fake.run_host();
        assert_eq!(fake.host().card.sent.len(), 40);
        assert_eq!(transmitter.poll().expect("fine"), 40);
        // A wait asks for a signal, and takes the wish back when it is over.
        deliver(fake, Delivery::honest(&pattern(0, 60)));
        let frame = receiver.receive(None).expect("fine").expect("a frame");
        receiver.recycle(frame);
        let signals = fake.host().signals;
        for seed in 0..10 {
            deliver(fake, Delivery::honest(&pattern(seed, 60)));
        }
        let mut count = 0;
        while arrived(fake, &mut receiver).is_some() {
            count += 1;
        }
        assert_eq!(
            (count, fake.host().signals - signals),
            (10, 0),
            "{event_idx}"
        );
    }
}
