//! What a card is told, and is told again.

use super::*;
use crate::device::OpenError;
use crate::limits::{MAX_FILTER, MAX_VLANS};
use crate::net::{Control, Error};
use core::time::Duration;
use pv_abi::virtio::net::{control, status};

fn control(opened: &mut Opened<Fake>) -> Control<Fake> {
    opened.control.take().expect("a control queue")
}

fn told(fake: &Fake) -> Vec<((u8, u8), Vec<u8>)> {
    core::mem::take(&mut fake.host().card.commands)
}

#[test]
fn commands_say_what_they_say() {
    let fake = fake(ALL);
    let mut opened = open_with(fake, 16, RECEIVE_BUFFER);
    let mut card = control(&mut opened);
    card.set_promiscuous(true).expect("done");
    card.set_promiscuous(false).expect("done");
    card.set_all_multicast(true).expect("done");
    card.set_mac([2, 1, 2, 3, 4, 5]).expect("done");
    card.set_filter(
        &[[2, 0, 0, 0, 0, 9]],
        &[[1, 0, 0, 0, 0, 7], [1, 0, 0, 0, 0, 8]],
    )
    .expect("done");
    card.add_vlan(0x123).expect("done");
    card.remove_vlan(0x123).expect("done");
    card.acknowledge_announce().expect("done");
    let table = [
        &[1, 0, 0, 0, 2, 0, 0, 0, 0, 9, 2, 0, 0, 0][..],
        &[1, 0, 0, 0, 0, 7, 1, 0, 0, 0, 0, 8],
    ]
    .concat();
    let expected: [((u8, u8), &[u8]); 8] = [
        (control::RX_PROMISC, &[1]),
        (control::RX_PROMISC, &[0]),
        (control::RX_ALLMULTI, &[1]),
        (control::MAC_ADDR_SET, &[2, 1, 2, 3, 4, 5]),
        (control::MAC_TABLE_SET, &table),
        (control::VLAN_ADD, &[0x23, 1]),
        (control::VLAN_DEL, &[0x23, 1]),
        (control::ANNOUNCE_ACK, &[]),
    ];
    let told = told(fake);
    assert_eq!(told.len(), expected.len());
    for ((command, data), (wanted, bytes)) in told.iter().zip(expected) {
        assert_eq!((*command, &data[..]), (wanted, bytes));
    }
}

#[test]
fn refusals_and_limits() {
    let fake = fake(ALL);
    let mut opened = open_with(fake, 16, RECEIVE_BUFFER);
    let mut card = control(&mut opened);
    fake.host().card.refuse = Some(control::RX_PROMISC);
    assert_eq!(card.set_promiscuous(true), Err(Error::Refused));
    card.set_all_multicast(true)
        .expect("the next one is unharmed");
    for vlan in 0..MAX_VLANS as u16 {
        card.add_vlan(vlan).expect("at the limit");
    }
    card.add_vlan(0).expect("it is there already");
    assert_eq!(card.add_vlan(MAX_VLANS as u16), Err(Error::TooMany));
    assert_eq!(card.add_vlan(4095), Err(Error::TooMany));
    assert_eq!(card.remove_vlan(65_535), Err(Error::TooMany));
    card.set_filter(&[[2; 6]; MAX_FILTER], &[[3; 6]; MAX_FILTER])
        .expect("at the limit");
    assert_eq!(
        card.set_filter(&[], &[[3; 6]; MAX_FILTER + 1]),
        Err(Error::TooMany)
    );
    assert_eq!(card.set_pairs(1), Err(Error::Unsupported), "there is one");
    // An answer that is none.
    fake.host().card.answer = Some(0xff);
    assert_eq!(card.set_all_multicast(false), Err(Error::Refused));
    fake.host().card.answer = None;
    fake.host().card.mute = true;
    card.set_timeout(Duration::from_millis(20));
    assert_eq!(card.set_all_multicast(false), Err(Error::TimedOut));
    fake.host().card.mute = false;
    card.set_all_multicast(false).expect("it speaks again");
    // Without the feature nothing is sent.
    let fake = super::fake(feature::CTRL_VQ);
    let mut opened = open_with(fake, 16, RECEIVE_BUFFER);
    assert_eq!(
        control(&mut opened).set_promiscuous(true),
        Err(Error::Unsupported)
    );
    assert!(told(fake).is_empty());
    // Without the queue there is nobody to send it.
    let fake = super::fake(feature::CTRL_RX | feature::MQ);
    assert!(open_with(fake, 16, RECEIVE_BUFFER).control.is_none());
}

#[test]
fn a_card_that_comes_back_is_told_everything_again_and_first() {
    let fake = fake(ALL);
    let mut opened = open_with(fake, 16, RECEIVE_BUFFER);
    let mut card = control(&mut opened);
    let (mut receiver, _transmitter) = pair(opened);
    card.set_promiscuous(true).expect("done");
    card.set_mac([2, 0, 0, 0, 0, 1]).expect("done");
    card.set_filter(&[], &[[1, 0, 0, 0, 0, 1]]).expect("done");
    for vlan in 1..=MAX_VLANS as u16 {
        card.add_vlan(vlan).expect("done");
    }
    card.remove_vlan(7).expect("done");
    told(fake);
    for event in 0..3 {
        fake.host().die();
        if event == 0 {
            // A poll of any queue brings it back, and looks after the answers.
            while fake.host().card.commands.len() < 2 + MAX_VLANS {
                assert!(receiver.poll().expect("fine").is_none());
                fake.run_host();
            }
        } else {
            card.set_all_multicast(event == 1).expect("done");
        }
        let told = told(fake);
        let names: Vec<_> = told.iter().map(|(command, _)| *command).collect();
        let first = [
            control::RX_PROMISC,
            control::MAC_ADDR_SET,
            control::MAC_TABLE_SET,
        ];
        // The second time round all-multicast is among what was set.
        let others = usize::from(event == 2);
        assert_eq!(names[0], first[0]);
        assert_eq!(names[1 + others..3 + others], first[1..]);
        let vlans = MAX_VLANS - 1;
        assert!(
            names[3 + others..3 + others + vlans]
                .iter()
                .all(|&name| name == control::VLAN_ADD)
        );
        assert_eq!(names.len(), 3 + others + vlans + usize::from(event > 0));
        assert!(!told.contains(&(control::VLAN_ADD, [7, 0].to_vec())));
        if event > 0 {
            assert_eq!(names.last(), Some(&control::RX_ALLMULTI));
        }
    }
}

#[test]
fn a_command_survives_the_death_of_the_backend() {
    for fuel in 0..6 {
        let fake = fake(ALL);
        let mut opened = open_with(fake, 16, RECEIVE_BUFFER);
        let mut card = control(&mut opened);
        card.set_mac([2, 0, 0, 0, 0, 1]).expect("done");
        fake.host().lives = alloc::vec![fuel, 0, fuel / 2];
        fake.host().absence = Some(2);
        fake.host().die();
        card.set_promiscuous(true).expect("in the end");
        assert_eq!(
            told(fake).last().map(|(command, _)| *command),
            Some(control::RX_PROMISC)
        );
    }
}

#[test]
fn several_pairs_of_a_card_that_has_more() {
    let fake = Fake::new(2, 1, 9, true);
    fake.host().become_card(4, ALL | feature::MQ);
    let pairs = [0, 1].map(|vcpu| PairConfig { vcpu, size: 16 });
    let config = NicConfig {
        pairs: &pairs,
        buffer_len: RECEIVE_BUFFER,
        without: 0,
    };
    let mut opened = Nic::open(fake, None, &config).expect("a card");
    assert_eq!(opened.nic.pairs(), 2);
    let mut card = control(&mut opened);
    card.set_pairs(1).expect("done");
    card.set_pairs(2).expect("done");
    assert_eq!(card.set_pairs(3), Err(Error::TooMany));
    let pairs_set = |pairs: u8| (control::MQ_VQ_PAIRS_SET, [pairs, 0].to_vec());
    assert_eq!(told(fake), [pairs_set(2), pairs_set(1), pairs_set(2)]);
    let indices: Vec<_> = opened
        .pairs
        .iter()
        .map(|(receiver, transmitter)| (receiver.index(), transmitter.index()))
        .collect();
    assert_eq!(indices, [(0, 1), (2, 3)]);
    let (mut second, mut sender) = opened.pairs.pop().expect("two");
    crate::fake::enter_vcpu(1);
    fake.host().card.pair = 1;
    deliver(fake, Delivery::honest(&pattern(1, 500)));
    let frame = second.receive(None).expect("fine").expect("a frame");
    assert_eq!(bytes(&frame), pattern(1, 500));
    sender
        .send(&pattern(2, 90), Offload::default())
        .expect("sent");
    assert_eq!(sender.wait_until(0, None), Ok(0));
    assert_eq!(fake.host().card.sent[0].1, pattern(2, 90));
    crate::fake::enter_vcpu(0);
    // It comes back with another number: the control queue would be elsewhere.
    fake.host().set_pairs(3);
    fake.host().die();
    let lost = crate::device::Lost::Changed;
    assert_eq!(card.set_pairs(1), Err(Error::DeviceLost(lost)));
}

#[test]
fn pairs_that_are_not_there_are_refused() {
    let fake = Fake::new(1, 1, 9, true);
    fake.host().become_card(2, ALL | feature::MQ);
    let pair = PairConfig { vcpu: 0, size: 16 };
    for pairs in [
        &[][..],
        &[pair; 3],
        &[PairConfig { vcpu: 1, ..pair }],
        &[PairConfig { size: 3, ..pair }],
    ] {
        let config = NicConfig {
            pairs,
            buffer_len: RECEIVE_BUFFER,
            without: 0,
        };
        let refused = Nic::open(fake, None, &config).expect_err("refused");
        assert_eq!(refused, OpenError::BadQueues);
    }
}

#[test]
fn the_link_and_the_announcement() {
    let fake = fake(ALL);
    let mut opened = open_with(fake, 16, RECEIVE_BUFFER);
    let mut card = control(&mut opened);
    let nic = opened.nic.clone();
    let (_receiver, mut transmitter) = pair(opened);
    let link = nic.link();
    assert_eq!((link.up, link.announce, link.mtu), (true, false, 1500));
    assert_eq!(link.mac, [0x52, 0x54, 0, 1, 2, 3]);
    assert!(!nic.take_config_change());
    fake.host().set_card(0, 9000);
    assert!(nic.take_config_change() && !nic.take_config_change());
    assert_eq!((nic.link().up, nic.link().mtu), (false, 9000));
    fake.host()
        .set_card(status::LINK_UP | status::ANNOUNCE, 9000);
    assert!(nic.link().announce);
    nic.announce(&mut transmitter, &mut card)
        .expect("announced");
    let (_, frame) = fake.host().card.sent.pop().expect("a frame");
    assert_eq!(frame[..6], [0xff; 6]);
    assert_eq!(frame[6..12], nic.mac());
    assert_eq!(frame.len(), 60);
    assert_eq!(told(fake), [(control::ANNOUNCE_ACK, Vec::new())]);
}
