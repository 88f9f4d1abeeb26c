//! What the device is told of its calls, and told again.

use super::*;
use crate::net::{Coalescing, Error};
use core::time::Duration;
use pv_abi::virtio::net::control;

/// Packets, and microseconds.
fn wish(packets: u32, micros: u64) -> Coalescing {
    Coalescing {
        packets,
        time: Duration::from_micros(micros),
    }
}

fn wire(packets: u32, micros: u32) -> Vec<u8> {
    [packets.to_le_bytes(), micros.to_le_bytes()].concat()
}

fn told(fake: &Fake) -> Vec<((u8, u8), Vec<u8>)> {
    core::mem::take(&mut fake.host().card.commands)
}

#[test]
fn wishes_are_sent_and_what_is_in_force_is_read() {
    let fake = fake(ALL);
    let mut card = open_with(fake, 16, RECEIVE_BUFFER).control.expect("one");
    card.coalesce_sent(wish(0, 70)).expect("done");
    card.coalesce_received(wish(32, 1000)).expect("done");
    // Rounded up, so that a little is not nothing; what is too long for the field is the longest.
    card.coalesce_queue(
        1,
        Coalescing {
            packets: 1,
            time: Duration::from_nanos(1),
        },
    )
    .expect("done");
    card.coalesce_queue(
        0,
        Coalescing {
            packets: u32::MAX,
            time: Duration::MAX,
        },
    )
    .expect("done");
    let one = |queue: u8, data: Vec<u8>| [&[queue, 0, 0, 0][..], &data].concat();
    let expected = [
        (control::NOTF_COAL_TX_SET, wire(0, 70)),
        (control::NOTF_COAL_RX_SET, wire(32, 1000)),
        (control::NOTF_COAL_VQ_SET, one(1, wire(1, 1))),
        (control::NOTF_COAL_VQ_SET, one(0, wire(u32::MAX, u32::MAX))),
    ];
    assert_eq!(told(fake), expected);
    fake.host().card.result = wire(7, 12_345).try_into().expect("eight bytes");
    assert_eq!(card.coalescing(1), Ok(wish(7, 12_345)));
    assert_eq!(
        told(fake),
        [(control::NOTF_COAL_VQ_GET, [1, 0, 0, 0].to_vec())]
    );
    for queue in [2, 3, u16::MAX] {
        assert_eq!(card.coalesce_queue(queue, wish(1, 1)), Err(Error::TooMany));
        assert_eq!(card.coalescing(queue), Err(Error::TooMany));
    }
    // What a device that refuses has written is nobody's result.
    fake.host().card.refuse = Some(control::NOTF_COAL_VQ_GET);
    assert_eq!(card.coalescing(0), Err(Error::Refused));
    // A device that does one of the two, and one without a queue to be told on.
    for (features, all, each) in [
        (
            feature::CTRL_VQ | feature::NOTF_COAL,
            Ok(()),
            Err(Error::Unsupported),
        ),
        (
            feature::CTRL_VQ | feature::VQ_NOTF_COAL,
            Err(Error::Unsupported),
            Ok(()),
        ),
    ] {
        let fake = super::fake(features);
        let mut card = open_with(fake, 16, RECEIVE_BUFFER).control.expect("one");
        assert_eq!(card.coalesce_received(wish(1, 1)), all);
        assert_eq!(card.coalesce_sent(wish(1, 1)), all);
        assert_eq!(card.coalesce_queue(0, wish(1, 1)), each);
        assert_eq!(card.coalescing(0).map(|_| ()), each);
        assert_eq!(told(fake).len(), 2);
    }
    let bare = super::fake(feature::NOTF_COAL | feature::VQ_NOTF_COAL);
    let opened = open_with(bare, 16, RECEIVE_BUFFER);
    assert_eq!(
        opened.nic.features() & (feature::NOTF_COAL | feature::VQ_NOTF_COAL),
        0
    );
}

#[test]
fn a_card_that_comes_back_coalesces_as_before() {
    let fake = fake(ALL);
    let mut card = open_with(fake, 16, RECEIVE_BUFFER).control.expect("one");
    for queue in [0, 1] {
        card.coalesce_queue(queue, wish(9, 90)).expect("done");
    }
    card.coalesce_received(wish(2, 20)).expect("done");
    card.coalesce_queue(0, wish(8, 80)).expect("done");
    card.coalesce_queue(0, wish(3, 30)).expect("done");
    // The one for all of a kind is over what single ones of it were told before.
    card.coalesce_sent(wish(4, 40)).expect("done");
    let _ = card.coalescing(0).expect("done");
    told(fake);
    for _ in 0..2 {
        fake.host().die();
        card.acknowledge_announce().expect("done");
        let expected = [
            (control::NOTF_COAL_TX_SET, wire(4, 40)),
            (control::NOTF_COAL_RX_SET, wire(2, 20)),
            (
                control::NOTF_COAL_VQ_SET,
                [&[0, 0, 0, 0][..], &wire(3, 30)].concat(),
            ),
            (control::ANNOUNCE_ACK, Vec::new()),
        ];
        assert_eq!(told(fake), expected);
    }
}

/// A question that a dead backend had is asked of the next one.
#[test]
fn an_answer_behind_which_there_is_a_result_survives_the_death_of_the_backend() {
    for fuel in 0..6 {
        let fake = fake(ALL);
        let mut card = open_with(fake, 16, RECEIVE_BUFFER).control.expect("one");
        fake.host().card.result = wire(5, 50).try_into().expect("eight bytes");
        fake.host().lives = alloc::vec![fuel, 0, fuel / 2];
        fake.host().absence = Some(2);
        fake.host().die();
        assert_eq!(card.coalescing(0), Ok(wish(5, 50)), "{fuel}");
    }
}
