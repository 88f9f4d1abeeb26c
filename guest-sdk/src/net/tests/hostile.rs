//! Hosts that lie: a typed error, for ever, or a frame that is dropped and counted; never a byte of
//! memory that is not the frame's.

use super::*;
use crate::net::{Checksum, Cut, Error, PartialChecksum, Segmentation, SendErrorKind};
use crate::virtqueue::Broken;
use pv_abi::virtio::net::{Header, gso, header_flag};

/// What a card says to a delivery, and that a reset heals it.
fn provoke(delivery: Delivery) -> Broken {
    let (fake, mut receiver, _transmitter) = card(feature::MRG_RXBUF);
    let before = fake.free_bytes();
    deliver(fake, Delivery::honest(&pattern(0, 100)));
    deliver(fake, delivery);
    fake.run_host();
    let frame = receiver.poll().expect("fine").expect("the honest one");
    assert_eq!(bytes(&frame), pattern(0, 100));
    receiver.recycle(frame);
    let broken = match receiver.poll() {
        Err(Error::Broken(broken)) => broken,
        other => panic!("not noticed: {other:?}"),
    };
    for _ in 0..3 {
        assert_eq!(
            receiver.poll().expect_err("for ever"),
            Error::Broken(broken)
        );
    }
    fake.host().card.inbox.clear();
    receiver.nic().reset();
    deliver(fake, Delivery::honest(&pattern(9, 3000)));
    let frame = receiver.receive(None).expect("healed").expect("a frame");
    assert_eq!(bytes(&frame), pattern(9, 3000));
    receiver.recycle(frame);
    assert!(receiver.poll().expect("fine").is_none());
    assert_eq!(fake.free_bytes(), before, "no buffer is lost");
    broken
}

fn with_buffers(said: u16, publish: Option<usize>) -> Delivery {
    Delivery {
        buffers: Some(said),
        publish,
        ..Delivery::honest(&pattern(1, 5000))
    }
}

#[test]
fn a_wrong_number_of_buffers_breaks_the_queue() {
    for (delivery, said, here) in [
        (with_buffers(0, None), 0, 3),
        (with_buffers(4, None), 4, 3),
        (with_buffers(65_535, None), 65_535, 3),
        (with_buffers(3, Some(2)), 3, 2),
        (with_buffers(3, Some(1)), 3, 1),
    ] {
        assert_eq!(provoke(delivery), Broken::GroupCount { said, here });
    }
}

#[test]
fn a_used_length_that_cannot_be_breaks_the_queue() {
    let lie = |lengths: &[u32]| Delivery {
        lengths: Some(lengths.to_vec()),
        ..Delivery::honest(&pattern(2, 5000))
    };
    for short in 0..12 {
        let broken = provoke(lie(&[short]));
        assert!(
            matches!(broken, Broken::Answer { len, least: 12, .. } if len == short),
            "{broken}"
        );
    }
    for lengths in [
        &[2049][..],
        &[u32::MAX],
        &[2048, 2049],
        &[2048, 2048, u32::MAX],
    ] {
        let broken = provoke(lie(lengths));
        assert!(
            matches!(broken, Broken::Length { room: 2048, .. }),
            "{broken}"
        );
    }
}

/// The first buffer holds a part of the header only: no device may do that.
#[test]
fn a_header_that_is_split_breaks_the_queue() {
    for at in 0..12 {
        let broken = provoke(Delivery {
            lengths: Some(alloc::vec![at, 2048, 916]),
            ..Delivery::honest(&pattern(3, 5000))
        });
        assert!(matches!(broken, Broken::Answer { .. }), "{broken}");
    }
}

/// Any neighbour may have sent one; the device that passed it on kept to the rules.
#[test]
fn frames_that_are_too_long_are_dropped_and_counted() {
    // The longest that fits in the ring's 64 buffers with its header.
    let longest = 64 * RECEIVE_BUFFER - 12;
    let (fake, mut receiver, _transmitter) = card(feature::MRG_RXBUF);
    let before = fake.free_bytes();
    for (giants, len) in (1..).zip([MAX_FRAME + 1, MAX_FRAME + 3, longest]) {
        deliver(fake, Delivery::honest(&pattern(4, len)));
        assert!(arrived(fake, &mut receiver).is_none());
        assert_eq!(receiver.stats().giants, giants);
        deliver(fake, Delivery::honest(&pattern(5, MAX_FRAME)));
        let frame = arrived(fake, &mut receiver).expect("the limit, on the same queue");
        assert_eq!(bytes(&frame), pattern(5, MAX_FRAME));
        receiver.recycle(frame);
    }
    assert!(receiver.poll().expect("fine").is_none());
    assert_eq!(fake.free_bytes(), before, "no buffer is lost");
    // The rules of the ring are the rules for those as well.
    deliver(
        fake,
        Delivery {
            buffers: Some(64),
            ..Delivery::honest(&pattern(6, MAX_FRAME + 1))
        },
    );
    fake.run_host();
    let broken = receiver.poll().expect_err("so many are not there");
    let here = MAX_FRAME.div_ceil(RECEIVE_BUFFER) as u16;
    assert_eq!(broken, Error::Broken(Broken::GroupCount { said: 64, here }));
}

/// Lengths that are too small but possible: what was not written is not part of the frame.
#[test]
fn shorter_lengths_are_shorter_frames() {
    let (fake, mut receiver, _transmitter) = card(feature::MRG_RXBUF);
    let data = pattern(5, 5000);
    deliver(
        fake,
        Delivery {
            lengths: Some(alloc::vec![112, 0, 30]),
            ..Delivery::honest(&data)
        },
    );
    let frame = arrived(fake, &mut receiver).expect("a frame");
    let mut expected = data[..100].to_vec();
    expected.extend_from_slice(&data[2036 + 2048..2036 + 2048 + 30]);
    assert_eq!(bytes(&frame), expected);
    assert_eq!(frame.read(100, &mut [0; 64]), 30);
}

#[test]
fn headers_that_cannot_be_true_are_dropped_and_counted() {
    let header = Header::default();
    let partial = |start, offset| Header {
        flags: header_flag::NEEDS_CSUM,
        csum_start: start,
        csum_offset: offset,
        ..header
    };
    let cut = |gso_type, gso_size| Header {
        gso_type,
        gso_size,
        ..partial(34, 16)
    };
    let bad = [
        partial(99, 0),
        partial(0, 99),
        partial(65_535, 65_535),
        cut(gso::TCPV4, 0),
        cut(2, 1000),
        cut(3, 1000),
        cut(0x7f, 1000),
        cut(gso::ECN, 1000),
        cut(gso::UDP_L4 | gso::ECN, 1000),
    ];
    let (fake, mut receiver, _transmitter) = card(ALL);
    for header in bad {
        deliver(
            fake,
            Delivery {
                header,
                ..Delivery::honest(&pattern(6, 100))
            },
        );
        deliver(fake, Delivery::honest(&pattern(7, 100)));
        let frame = arrived(fake, &mut receiver).expect("the next one is unharmed");
        assert_eq!(bytes(&frame), pattern(7, 100), "{header:?}");
        receiver.recycle(frame);
    }
    assert_eq!(receiver.stats().bad_headers, bad.len() as u64);
    // What was not agreed on cannot be either.
    let (fake, mut receiver, _transmitter) = card(feature::MRG_RXBUF);
    for header in [
        partial(34, 16),
        cut(gso::TCPV4, 1000),
        Header {
            flags: header_flag::DATA_VALID,
            ..header
        },
    ] {
        deliver(
            fake,
            Delivery {
                header,
                ..Delivery::honest(&pattern(6, 100))
            },
        );
        assert!(arrived(fake, &mut receiver).is_none());
    }
    assert_eq!(receiver.stats().bad_headers, 3);
}

/// A flood of frames that are dropped does not keep a poll for ever.
#[test]
fn a_flood_of_junk_lets_go() {
    let (fake, mut receiver, _transmitter) = card(feature::MRG_RXBUF);
    for _ in 0..500 {
        deliver(fake, Delivery::honest(&[0; 5]));
    }
    let mut polls = 0;
    while receiver.stats().runts < 500 {
        assert!(arrived(fake, &mut receiver).is_none());
        polls += 1;
        assert!(polls < 100);
    }
    assert!(polls > 500 / (crate::limits::MAX_DROPS + 1), "{polls}");
}

#[test]
fn what_is_known_of_a_frame_is_shown() {
    let (fake, mut receiver, _transmitter) = card(ALL);
    let checksum = PartialChecksum {
        start: 34,
        offset: 16,
    };
    let cut = |cut, ecn| {
        Some(Segmentation {
            cut,
            size: 1460,
            header_len: 54,
            ecn,
        })
    };
    let gso_header = |gso_type| Header {
        flags: header_flag::NEEDS_CSUM,
        gso_type,
        hdr_len: 54,
        gso_size: 1460,
        csum_start: 34,
        csum_offset: 16,
        num_buffers: 0,
    };
    for (header, sum, segmentation) in [
        (Header::default(), Checksum::Unverified, None),
        (
            Header {
                flags: header_flag::DATA_VALID,
                ..Default::default()
            },
            Checksum::Verified,
            None,
        ),
        (gso_header(gso::NONE), Checksum::Partial(checksum), None),
        (
            gso_header(gso::TCPV4),
            Checksum::Partial(checksum),
            cut(Cut::Tcp4, false),
        ),
        (
            gso_header(gso::TCPV6 | gso::ECN),
            Checksum::Partial(checksum),
            cut(Cut::Tcp6, true),
        ),
        (
            gso_header(gso::UDP_L4),
            Checksum::Partial(checksum),
            cut(Cut::Udp, false),
        ),
    ] {
        deliver(
            fake,
            Delivery {
                header,
                ..Delivery::honest(&pattern(8, 40_000))
            },
        );
        let frame = arrived(fake, &mut receiver).expect("a frame");
        assert_eq!(
            (frame.checksum(), frame.segmentation()),
            (sum, segmentation)
        );
        receiver.recycle(frame);
    }
}

#[test]
fn what_is_left_to_the_device_is_checked_and_said() {
    let checksum = Some(PartialChecksum {
        start: 34,
        offset: 16,
    });
    let cut = Segmentation {
        cut: Cut::Tcp4,
        size: 1460,
        header_len: 54,
        ecn: true,
    };
    let whole = Offload {
        checksum,
        segmentation: Some(cut),
    };
    let refuse = |features, offload: Offload, len: usize| {
        let (_fake, _receiver, mut transmitter) = card(features);
        let mut packet = transmitter.packet(len).expect("room");
        packet.set_len(len);
        let refused = transmitter.submit(packet, offload).expect_err("refused");
        assert_eq!((refused.packet.len(), refused.offload), (len, offload));
        refused.kind
    };
    let with = |change: &dyn Fn(&mut Segmentation)| {
        let mut cut = cut;
        change(&mut cut);
        Offload {
            segmentation: Some(cut),
            ..whole
        }
    };
    for (offload, len) in [
        (whole, 51),
        (with(&|cut| cut.size = 0), 5000),
        (with(&|cut| cut.header_len = 5001), 5000),
        (with(&|cut| cut.cut = Cut::Udp), 5000),
        (
            Offload {
                checksum: None,
                ..whole
            },
            5000,
        ),
    ] {
        assert_eq!(refuse(ALL, offload, len), SendErrorKind::BadOffload);
    }
    for missing in [feature::CSUM, feature::HOST_TSO4, feature::HOST_ECN] {
        assert_eq!(
            refuse(ALL & !missing, whole, 5000),
            SendErrorKind::Unsupported
        );
    }
    assert_eq!(refuse(ALL, whole, 13), SendErrorKind::BadLength);
    let (fake, _receiver, mut transmitter) = card(ALL);
    transmitter
        .send(&pattern(1, 9000), whole)
        .expect("the device does it");
    fake.run_host();
    let (header, data) = fake.host().card.sent.pop().expect("sent");
    assert_eq!(data, pattern(1, 9000));
    assert_eq!(
        header,
        Header {
            flags: header_flag::NEEDS_CSUM,
            gso_type: gso::TCPV4 | gso::ECN,
            hdr_len: 54,
            gso_size: 1460,
            csum_start: 34,
            csum_offset: 16,
            num_buffers: 0,
        }
    );
    // A packet of another card's arena would be read from the wrong place.
    let (_other, _receiver, mut stranger) = card(ALL);
    let mut packet = stranger.packet(100).expect("room");
    packet.set_len(100);
    let refused = transmitter.submit(packet, Offload::default());
    assert_eq!(
        refused.expect_err("not ours").kind,
        SendErrorKind::OtherArena
    );
}

#[test]
fn a_device_that_says_it_wrote_what_it_sent_breaks_the_queue() {
    let (fake, _receiver, mut transmitter) = card(0);
    fake.host().card.sent_length = 1;
    transmitter
        .send(&pattern(1, 60), Offload::default())
        .expect("taken");
    fake.run_host();
    let broken = transmitter.poll().expect_err("it cannot");
    assert!(matches!(
        broken,
        Error::Broken(Broken::Length {
            len: 1,
            room: 0,
            ..
        })
    ));
    assert_eq!(
        transmitter.send(&pattern(1, 60), Offload::default()),
        Err(broken)
    );
}
