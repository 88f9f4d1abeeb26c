//! Waiting, losing the backend, and getting another.

use super::*;
use crate::device::Lost;
use crate::net::Error;
use crate::platform::{Platform, block_on};
use core::time::Duration;

/// Frames in both directions while backends die, as many as it takes.
fn traffic(fake: &'static Fake, features: u64) {
    let (mut receiver, mut transmitter) = pair(open_with(fake, 16, RECEIVE_BUFFER));
    for round in 0..8 {
        for slot in 0..6 {
            let data = pattern(round * 10 + slot, 60 + slot * 100);
            transmitter.send(&data, Offload::default()).expect("sent");
        }
        transmitter.wait_until(0, None).expect("sent in the end");
        let len = if features & feature::MRG_RXBUF == 0 {
            1400
        } else {
            20_000
        };
        // A frame that a backend died with is lost, as on any network; what comes is whole.
        for attempt in 0.. {
            assert!(attempt < 20);
            deliver(fake, Delivery::honest(&pattern(round, len)));
            let waited = receiver.receive(Some(Duration::from_millis(500)));
            if let Some(frame) = waited.expect("never broken") {
                assert_eq!(bytes(&frame), pattern(round, len));
                receiver.recycle(frame);
                break;
            }
        }
    }
    let sent = fake.host().card.sent.clone();
    for round in 0..8 {
        for slot in 0..6 {
            let data = pattern(round * 10 + slot, 60 + slot * 100);
            assert!(sent.iter().any(|(_, frame)| *frame == data), "lost");
        }
    }
}

#[test]
fn a_backend_may_die_at_every_point_of_a_frame() {
    for features in [0, ALL] {
        for fuel in 0..140 {
            let fake = fake(features);
            fake.host().lives = alloc::vec![fuel];
            traffic(fake, features);
        }
        for fuel in 0..40 {
            let fake = fake(features);
            fake.host().lives = alloc::vec![fuel + 9, 0, fuel / 2, 1, fuel, 2, 30];
            fake.host().absence = Some((fuel % 4) as u32);
            fake.host().agains = (fuel % 3) as u32;
            traffic(fake, features);
            assert!(fake.host().activations > 4);
        }
    }
}

/// A backend that dies with half of a frame published: its buffers are posted again.
#[test]
fn half_a_frame_of_a_dead_backend_is_forgotten() {
    let (fake, mut receiver, _transmitter) = card(feature::MRG_RXBUF);
    let before = fake.free_bytes();
    deliver(fake, Delivery::honest(&pattern(1, 3000)));
    deliver(
        fake,
        Delivery {
            publish: Some(2),
            ..Delivery::honest(&pattern(2, 5000))
        },
    );
    fake.run_host();
    fake.host().die();
    deliver(fake, Delivery::honest(&pattern(3, 4000)));
    for seed in [1, 3] {
        let frame = receiver.receive(None).expect("fine").expect("a frame");
        assert_eq!(
            bytes(&frame),
            pattern(seed, if seed == 1 { 3000 } else { 4000 })
        );
        receiver.recycle(frame);
    }
    assert!(receiver.poll().expect("fine").is_none());
    assert_eq!(fake.free_bytes(), before);
}

#[test]
fn frames_may_be_kept_and_dropped() {
    let (fake, mut receiver, transmitter) = card(feature::MRG_RXBUF);
    let before = fake.free_bytes();
    let mut kept = Vec::new();
    for seed in 0..300 {
        deliver(fake, Delivery::honest(&pattern(seed, 1000)));
        kept.push(arrived(fake, &mut receiver).expect("new buffers are found"));
    }
    for (seed, frame) in kept.iter().enumerate() {
        assert_eq!(bytes(frame), pattern(seed, 1000));
    }
    kept.clear();
    assert!(receiver.poll().expect("fine").is_none());
    assert_eq!(fake.free_bytes(), before);
    let all = fake.the_arena().len();
    drop((receiver, transmitter));
    assert_eq!(fake.free_bytes(), all);
}

#[test]
fn a_full_queue_gives_the_packet_back() {
    let (_fake, _receiver, mut transmitter) = card(0);
    let mut count = 0;
    let refused = loop {
        let mut packet = transmitter.packet(100).expect("room");
        packet.set_len(100);
        match transmitter.submit(packet, Offload::default()) {
            Ok(()) => count += 1,
            Err(refused) => break refused,
        }
    };
    assert_eq!(
        (count, refused.kind),
        (64, crate::net::SendErrorKind::QueueFull)
    );
    assert!(!transmitter.has_room());
    assert_eq!(
        transmitter.wait_until(10, None).map(|left| left <= 10),
        Ok(true)
    );
    transmitter
        .submit(refused.packet, refused.offload)
        .expect("room again");
    assert_eq!(transmitter.wait_until(0, None), Ok(0));
    assert_eq!(transmitter.sent(), 65);
}

#[test]
fn waits_end_when_their_time_is_up_and_lose_nothing() {
    let (fake, mut receiver, _transmitter) = card(0);
    let start = fake.now_ns();
    let limit = Duration::from_millis(30);
    assert!(receiver.receive(Some(limit)).expect("fine").is_none());
    assert!(fake.now_ns() - start >= 30_000_000);
    fake.raise_events(0, 1 << 40);
    deliver(fake, Delivery::honest(&pattern(1, 60)));
    assert!(receiver.receive(None).expect("fine").is_some());
    assert!(fake.take_event(40), "another's event is left pending");
}

#[test]
fn frames_as_futures() {
    let (fake, mut receiver, mut transmitter) = card(feature::MRG_RXBUF);
    let waker = core::task::Waker::noop();
    let mut context = core::task::Context::from_waker(waker);
    assert!(receiver.poll_receive(&mut context).is_pending());
    deliver(fake, Delivery::honest(&pattern(1, 2500)));
    let sent = block_on(fake, async {
        for seed in 0..200 {
            transmitter
                .send_async(&pattern(seed, 70), Offload::default())
                .await?;
        }
        let frame = receiver.receive_async().await?;
        assert_eq!(bytes(&frame), pattern(1, 2500));
        Ok::<_, Error>(())
    });
    assert_eq!(sent, Ok(()));
    transmitter.wait_until(0, None).expect("sent");
    assert_eq!(fake.host().card.sent.len(), 200);
}

#[test]
fn a_card_that_stays_away_fails_and_gives_everything_back() {
    let (fake, mut receiver, mut transmitter) = card(ALL);
    receiver.nic().set_loss_timeout(Duration::from_secs(3));
    transmitter
        .send(&pattern(1, 60), Offload::default())
        .expect("taken");
    fake.host().absence = None;
    fake.host().die();
    let lost = Error::DeviceLost(Lost::TimedOut);
    assert_eq!(receiver.receive(None).expect_err("lost"), lost);
    assert_eq!(transmitter.poll(), Err(lost));
    assert_eq!(receiver.poll().expect_err("for good"), lost);
    let all = fake.the_arena().len();
    drop((receiver, transmitter));
    assert_eq!(fake.free_bytes(), all);
}

#[test]
fn a_card_may_come_back_with_less() {
    let (fake, mut receiver, mut transmitter) = card(ALL);
    let features = receiver.nic().features();
    assert_eq!(features & ALL, ALL);
    // Without merging, a cut frame would not fit into a buffer: those go as well.
    fake.host().offered &= !feature::MRG_RXBUF;
    fake.host().die();
    deliver(fake, Delivery::honest(&pattern(1, 1500)));
    let frame = receiver.receive(None).expect("fine").expect("a frame");
    assert_eq!(frame.buffers(), 1);
    let gone = features & !receiver.nic().features();
    assert_eq!(
        gone,
        feature::MRG_RXBUF
            | feature::GUEST_TSO4
            | feature::GUEST_TSO6
            | feature::GUEST_ECN
            | feature::GUEST_USO4
            | feature::GUEST_USO6
    );
    transmitter
        .send(&pattern(1, 60), Offload::default())
        .expect("sent");
    // Without the control queue it is another card.
    fake.host().offered &= !feature::CTRL_VQ;
    fake.host().die();
    assert_eq!(
        receiver.receive(None).expect_err("lost"),
        Error::DeviceLost(Lost::Changed)
    );
}

#[test]
fn features_that_need_others_are_not_taken_alone() {
    for (offered, taken) in [
        (
            ALL & !feature::CSUM,
            !(feature::HOST_TSO4 | feature::HOST_TSO6 | feature::HOST_ECN | feature::HOST_USO),
        ),
        (
            ALL & !feature::GUEST_CSUM,
            !(feature::GUEST_TSO4
                | feature::GUEST_TSO6
                | feature::GUEST_ECN
                | feature::GUEST_USO4
                | feature::GUEST_USO6),
        ),
        (
            ALL & !feature::CTRL_VQ,
            !(feature::CTRL_RX
                | feature::CTRL_VLAN
                | feature::CTRL_MAC_ADDR
                | feature::GUEST_ANNOUNCE
                | feature::VQ_NOTF_COAL
                | feature::NOTF_COAL),
        ),
    ] {
        let (_fake, receiver, _transmitter) = card(offered);
        assert_eq!(receiver.nic().features() & ALL, offered & taken);
    }
}

/// As for a disk: a card that nobody could make let go takes nothing more, however often it is asked.
#[test]
fn a_card_that_never_let_go_takes_nothing_more() {
    let fake = fake(ALL);
    let opened = open_with(fake, 16, RECEIVE_BUFFER);
    opened.nic.set_loss_timeout(Duration::from_secs(3));
    let (mut receiver, mut transmitter) = pair(opened);
    transmitter
        .send(&pattern(1, 60), Offload::default())
        .expect("sent");
    fake.host().holds_on = true;
    fake.host().die();
    let lost = Error::DeviceLost(Lost::TimedOut);
    assert_eq!(receiver.receive(None).err(), Some(lost));
    transmitter.poll().expect_err("gone");
    let before = fake.free_bytes();
    for _ in 0..200 {
        assert_eq!(receiver.poll().err(), Some(lost));
        let refused = transmitter.send(&pattern(2, 60), Offload::default());
        assert_eq!(refused, Err(lost));
    }
    assert_eq!(fake.free_bytes(), before);
}
