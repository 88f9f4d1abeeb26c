//! What a card is told, and is told again.

use super::*;
use crate::device::OpenError;
use crate::limits::{CONTROL_QUEUE_SIZE, CONTROL_TIMEOUT, MAX_FILTER, MAX_VLANS};
use crate::net::{Control, Error};
use crate::platform::Platform;
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
    let expected: [((u8, u8), &[u8]); 9] = [
        (control::RX_PROMISC, &[1]),
        (control::RX_PROMISC, &[0]),
        (control::RX_ALLMULTI, &[1]),
        (control::MAC_ADDR_SET, &[2, 1, 2, 3, 4, 5]),
        (control::MAC_TABLE_SET, &table),
        (control::RX_PROMISC, &[0]),
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
    // The addresses are set, and everything is received as before.
    assert_eq!(card.set_filter(&[], &[]), Err(Error::Refused));
    fake.host().card.refuse = None;
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

/// A backend begins with every frame: one that takes another's place has to hear "off" as well.
#[test]
fn a_card_that_comes_back_is_told_what_is_off() {
    let fake = fake(ALL);
    let mut card = control(&mut open_with(fake, 16, RECEIVE_BUFFER));
    let off = |command| (command, [0].to_vec());
    card.set_promiscuous(false).expect("done");
    card.set_all_multicast(false).expect("done");
    told(fake);
    fake.host().die();
    card.set_mac([2, 0, 0, 0, 0, 1]).expect("done");
    let said = told(fake);
    assert_eq!(
        said[..2],
        [off(control::RX_PROMISC), off(control::RX_ALLMULTI)]
    );
    assert_eq!(said[2].0, control::MAC_ADDR_SET);
    assert_eq!(said.len(), 3);
    // A filter is worth nothing while everything is received.
    card.set_promiscuous(true).expect("done");
    card.set_filter(&[], &[]).expect("done");
    told(fake);
    fake.host().die();
    card.acknowledge_announce().expect("done");
    assert_eq!(told(fake)[0], off(control::RX_PROMISC));
    // A refusal changes nothing.
    fake.host().card.refuse = Some(control::RX_PROMISC);
    assert_eq!(card.set_promiscuous(true), Err(Error::Refused));
    fake.host().card.refuse = None;
    fake.host().die();
    card.acknowledge_announce().expect("done");
    let said = told(fake);
    let modes: Vec<_> = said
        .into_iter()
        .filter(|(command, _)| *command == control::RX_PROMISC)
        .collect();
    assert_eq!(
        modes,
        [
            (control::RX_PROMISC, [1].to_vec()),
            off(control::RX_PROMISC)
        ]
    );
}

#[test]
fn a_device_that_never_answers_is_not_waited_for_for_ever() {
    let fake = fake(ALL);
    let mut opened = open_with(fake, 16, RECEIVE_BUFFER);
    let mut card = control(&mut opened);
    fake.host().card.mute = true;
    for loss in [Duration::from_secs(3), Duration::ZERO] {
        opened.nic.set_loss_timeout(loss);
        let limit = (loss + CONTROL_TIMEOUT).as_nanos() as u64;
        let start = fake.now_ns();
        assert_eq!(card.set_promiscuous(true), Err(Error::TimedOut));
        let took = fake.now_ns() - start;
        assert!((limit..limit + 1_000_000_000).contains(&took), "{took}");
    }
    // Its queue is full of what it leaves unanswered: the same answer, for as long as it likes.
    card.set_timeout(Duration::from_millis(1));
    for _ in 0..2 * CONTROL_QUEUE_SIZE {
        assert_eq!(card.set_promiscuous(true), Err(Error::TimedOut));
    }
    fake.host().card.mute = false;
    card.set_timeout(Duration::from_secs(1));
    card.set_mac([2, 0, 0, 0, 0, 1]).expect("it speaks again");
}

/// Done late, it counts; not done by the device that had it, it is forgotten.
#[test]
fn a_command_that_was_given_up_counts_if_it_is_done() {
    for late in [true, false] {
        let fake = fake(ALL);
        let mut card = control(&mut open_with(fake, 16, RECEIVE_BUFFER));
        card.set_timeout(Duration::from_millis(20));
        card.set_mac([2, 0, 0, 0, 0, 1]).expect("done");
        card.add_vlan(5).expect("done");
        fake.host().card.mute = true;
        let gone = Err(Error::TimedOut);
        assert_eq!(card.set_mac([2, 0, 0, 0, 0, 2]), gone);
        assert_eq!(card.set_promiscuous(false), gone);
        assert_eq!(card.remove_vlan(5), gone);
        assert_eq!(card.add_vlan(6), gone);
        if late {
            fake.host().card.mute = false;
            // Answered in front of this one.
            card.set_all_multicast(true).expect("done");
        }
        told(fake);
        fake.host().die();
        fake.host().card.mute = false;
        card.acknowledge_announce().expect("done");
        let (mac, vlan) = if late { (2, 6) } else { (1, 5) };
        let mut expected = Vec::new();
        if late {
            expected.push((control::RX_PROMISC, [0].to_vec()));
            expected.push((control::RX_ALLMULTI, [1].to_vec()));
        }
        expected.push((control::MAC_ADDR_SET, [2, 0, 0, 0, 0, mac].to_vec()));
        expected.push((control::VLAN_ADD, [vlan, 0].to_vec()));
        expected.push((control::ANNOUNCE_ACK, Vec::new()));
        assert_eq!(told(fake), expected, "{late}");
    }
}

/// Its answer was there when the backend went, and nobody had looked.
#[test]
fn an_answer_of_a_dead_backend_is_told_to_the_next_one() {
    let fake = fake(ALL);
    let mut opened = open_with(fake, 16, RECEIVE_BUFFER);
    let mut card = control(&mut opened);
    let (mut receiver, _transmitter) = pair(opened);
    card.set_timeout(Duration::from_millis(1));
    fake.host().card.mute = true;
    assert_eq!(card.set_promiscuous(false), Err(Error::TimedOut));
    fake.host().card.mute = false;
    fake.host().kicked = true;
    fake.run_host();
    let off = [(control::RX_PROMISC, [0].to_vec())];
    assert_eq!(told(fake), off);
    fake.host().die();
    for _ in 0..8 {
        assert!(receiver.poll().expect("fine").is_none());
        fake.run_host();
    }
    assert_eq!(told(fake), off);
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
