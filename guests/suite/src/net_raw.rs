//! Rings of a card that break the rules, and frames and commands that no driver would send: what is
//! wrong is dropped, refused or given back, nothing else is touched, and afterwards the card serves
//! a good driver.
#![allow(unsafe_code)]
// UNSAFETY: looks at private RAM that a descriptor was aimed at.

use crate::cards::{BUFFER, RawCard};
use crate::devices::reset;
use crate::net::{LENGTHS, MAC, card, frame, round_trip};
use crate::{Case, Outcome, ensure, text, thin};
use alloc::string::String;
use alloc::vec::Vec;
use alloc::{format, vec};
use core::time::Duration;
use guest_sdk::flat::Boot;
use guest_sdk::net::{self, Nic, NicConfig, PairConfig};
use guest_sdk::platform::Platform;
use pv_abi::call::number;
use pv_abi::device::kind;
use pv_abi::status::Status;
use pv_abi::virtio::desc_flag::{NEXT, WRITE};
use pv_abi::virtio::feature;
use pv_abi::virtio::net::{control, feature as card_feature};

pub const CASES: &[Case] = &[
    ("net.bad_setup", bad_setup),
    ("net.raw_good", |boot| raw(boot, [1, 1], good)),
    ("net.private_ram_sent", |boot| {
        let secret = [0x5au8; 256];
        let address = secret.as_ptr() as u64;
        raw(boot, [0, 0], |card| {
            card.receive_into(card.buffer());
            card.offer(1, &[(card.data(), 64, NEXT), (address, 256, 0)]);
        })
    }),
    ("net.private_ram_received", private_ram_received),
    ("net.other_arena", |boot| {
        let rng = boot.platform().device_table().find(kind::RNG, None);
        let other = boot.platform().arena(rng.ok_or("no entropy")?.arena);
        let other = other.ok_or("no other arena")?.gpa();
        raw(boot, [0, 0], |card| {
            card.receive_into(card.buffer());
            card.offer(1, &[(other, FRAME, 0)]);
        })
    }),
    ("net.past_the_arena", |boot| {
        raw(boot, [0, 0], |card| {
            card.offer(1, &[(card.arena_end - 64, FRAME, 0)]);
        })
    }),
    ("net.short_header", |boot| {
        raw(boot, [0, 1], |card| {
            card.receive_into(card.buffer());
            card.offer(1, &[(card.data(), 7, 0)]);
        })
    }),
    ("net.written_by_the_device", |boot| {
        raw(boot, [0, 1], |card| {
            card.receive_into(card.buffer());
            card.offer(1, &[(card.data(), FRAME, WRITE)]);
        })
    }),
    ("net.every_length", every_length),
    ("net.wrong_headers", wrong_headers),
    ("net.small_buffers", small_buffers),
    ("net.tiny_buffers", tiny_buffers),
    ("net.split_header", split_header),
    ("net.bad_commands", bad_commands),
    ("net.full_tables", full_tables),
    ("net.flood", flood),
];

/// Bytes of the frame that spoilt rings send, with its header.
const FRAME: u32 = 12 + 100;
/// Entries of the rings made here.
const SIZE: u16 = 256;
/// What a control queue needs to be told all that it is told here.
const CONTROL: u64 = card_feature::CTRL_VQ
    | card_feature::CTRL_RX
    | card_feature::CTRL_RX_EXTRA
    | card_feature::CTRL_VLAN
    | card_feature::CTRL_MAC_ADDR
    | card_feature::GUEST_ANNOUNCE
    | card_feature::STATUS;

/// The card's two queues, with these features beside the first.
fn start(boot: &Boot, features: u64) -> Result<RawCard, String> {
    RawCard::start(boot, card(boot)?, 2, SIZE, features)
}

/// A header, zero from where nothing is given, and a frame.
fn packet(header: &[u8], frame: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; 12];
    for (to, from) in bytes.iter_mut().zip(header) {
        *to = *from;
    }
    bytes.extend(frame);
    bytes
}

/// What is there beside what a case breaks.
fn good(card: &mut RawCard) {
    card.receive_into(card.buffer());
    card.offer(1, &[(card.data(), FRAME, 0)]);
}

/// The card starts anew with the driver, and carries frames.
fn serves_a_driver(boot: &Boot, card: &RawCard) -> Outcome {
    reset(boot, card.info.index.into()).map_err(text("reset"))?;
    let mut pair = net::open(boot.platform(), Some("net")).map_err(text("open"))?;
    round_trip(&mut pair, &frame(MAC, 1, 1000))
}

/// Spoils a card's rings; these many receive and transmit chains come back, and after a reset the
/// card serves a good driver.
fn raw(boot: &Boot, expected: [u16; 2], spoil: impl FnOnce(&mut RawCard)) -> Outcome {
    let mut raw = start(boot, 0)?;
    raw.write(&packet(&[], &frame(MAC, 1, 100)));
    spoil(&mut raw);
    for queue in [0, 1] {
        raw.kick(boot, queue);
    }
    let start = boot.platform().now_ns();
    let done = expected == [1, 1];
    while boot.platform().now_ns() - start < if done { 10_000_000_000 } else { 150_000_000 } {
        if done && [0, 1].map(|queue| raw.used(queue)) == expected {
            break;
        }
        boot.platform().idle(Some(Duration::from_millis(5)));
        boot.platform().take_events(0, u64::MAX);
    }
    let used = [0, 1].map(|queue| raw.used(queue));
    ensure!(used == expected, "{used:?} chains came back");
    serves_a_driver(boot, &raw)
}

fn private_ram_received(boot: &Boot) -> Outcome {
    let canary = vec![0xa5u8; 2000];
    let address = canary.as_ptr() as u64;
    raw(boot, [0, 1], |card| {
        card.receive_into(address);
        card.offer(1, &[(card.data(), FRAME, 0)]);
    })?;
    // SAFETY: the vector is alive; volatile, because a device may have written it.
    let same = (0..2000).all(|i| unsafe { canary.as_ptr().add(i).read_volatile() } == 0xa5);
    ensure!(same, "private RAM was written");
    Ok(())
}

fn bad_setup(boot: &Boot) -> Outcome {
    let good = RawCard::new(boot, card(boot)?, 2, 16, 1)?;
    type Spoil = fn(&mut RawCard);
    let spoilt = |spoil: Spoil| -> Result<Result<u64, Status>, String> {
        let mut raw = RawCard::new(boot, card(boot)?, 2, 16, 1)?;
        spoil(&mut raw);
        Ok(raw.activate(boot))
    };
    let refused: [(&str, Spoil, Status); 6] = [
        ("size 0", |c| c.setups[1].size = 0, Status::BadLength),
        ("size 3", |c| c.setups[0].size = 3, Status::BadLength),
        ("a ring at 0", |c| c.setups[1].used = 0, Status::BadAddress),
        (
            "a ring in private RAM",
            |c| c.setups[0].desc = 0x100_0000,
            Status::BadAddress,
        ),
        ("no such vCPU", |c| c.setups[1].vcpu = 64, Status::NotFound),
        (
            "packed",
            |c| c.setups[0].features |= feature::RING_PACKED,
            Status::NotSupported,
        ),
    ];
    for (what, spoil, status) in refused {
        let got = spoilt(spoil)?;
        ensure!(got == Err(status), "{what}: {got:?}");
    }
    good.activate(boot).map_err(text("activate"))?;
    let again = good.activate(boot);
    ensure!(again == Err(Status::BadState), "active twice: {again:?}");
    serves_a_driver(boot, &good)
}

/// Frames of every length, and chains too short for a header; on emulated machines (`thin`) one of
/// so many in the middle. Nobody takes them in: each comes back, and the host counts why.
fn every_length(boot: &Boot) -> Outcome {
    let thin = thin(boot) as usize;
    let mut card = start(boot, card_feature::MRG_RXBUF)?;
    card.write(&packet(&[], &frame(MAC, 1, LENGTHS.1)));
    let longest = LENGTHS.1 + 12;
    let ends = |len: usize| len <= 1600 || len + 100 > longest;
    let lengths = (1..longest + 50).filter(|len| ends(*len) || len % thin == 0);
    let mut waiting = 0;
    for len in lengths {
        card.send(len);
        waiting += 1;
        if waiting == SIZE / 2 {
            card.kick(boot, 1);
            card.wait_all(boot, 1)?;
            waiting = 0;
        }
    }
    card.kick(boot, 1);
    card.wait_all(boot, 1)?;
    ensure!(card.used(0) == 0, "a frame came");
    // The longest one, into as many buffers as it takes.
    let whole = packet(&[], &frame(MAC, 2, LENGTHS.1));
    card.write(&whole);
    let pieces = longest.div_ceil(BUFFER as usize) as u16;
    for n in 0..pieces {
        card.receive_into(card.buffer() + u64::from(n) * u64::from(BUFFER));
    }
    card.send_and_wait(boot, longest)?;
    card.wait_all(boot, 0)?;
    let came = card.received(0, longest);
    ensure!(came.get(12..) == whole.get(12..), "it came otherwise");
    ensure!(
        came.get(10) == Some(&(pieces as u8)),
        "not {pieces} buffers"
    );
    serves_a_driver(boot, &card)
}

/// Flags, kind, header length, segment size, where the checksum starts and goes, buffers.
fn header(flags: u8, kind: u8, size: u16, start: u16, offset: u16) -> Vec<u8> {
    let mut bytes = vec![flags, kind];
    for word in [54, size, start, offset, 0xffff] {
        bytes.extend(word.to_le_bytes());
    }
    bytes
}

/// Offloads that were not negotiated or do not fit their frame: dropped, each alone.
fn wrong_headers(boot: &Boot) -> Outcome {
    let features = card_feature::CSUM | card_feature::GUEST_CSUM | card_feature::HOST_TSO4;
    let mut card = start(boot, features | card_feature::MRG_RXBUF)?;
    for _ in 0..4 {
        card.receive_into(card.buffer());
    }
    let sent = frame(MAC, 1, 1000);
    let bad = [
        header(1, 0, 0, 999, 0),
        header(1, 0, 0, 998, 1),
        header(1, 0, 0, 34, 65_535),
        header(1, 0, 0, 65_535, 65_535),
        header(1, 0, 0, 0, 6),
        // Large frames: no checksum, no size, crumbs, kinds that are unknown or were not negotiated,
        // no room for a transport header.
        header(0, 1, 1000, 34, 16),
        header(1, 1, 0, 34, 16),
        header(1, 1, 1, 34, 16),
        header(1, 3, 1000, 34, 16),
        header(1, 4, 1000, 34, 16),
        header(1, 5, 1000, 34, 6),
        header(1, 77, 1000, 34, 16),
        header(1, 0x81, 1000, 34, 16),
        header(1, 1, 1000, 985, 6),
    ];
    for header in bad {
        card.write(&packet(&header, &sent));
        card.send_and_wait(boot, 1012)?;
        ensure!(card.used(0) == 0, "{header:?} came");
    }
    // Whatever number of buffers a sent one claims.
    card.write(&packet(&header(1, 0, 0, 34, 16), &sent));
    card.send_and_wait(boot, 1012)?;
    card.wait_used(boot, 0, 1)?;
    let came = card.received(0, 1012);
    ensure!(came.get(12..) == Some(&sent[..]), "it came otherwise");
    ensure!(came.get(10..12) == Some(&[1, 0]), "not one buffer");
    serves_a_driver(boot, &card)
}

/// Without mergeable buffers, what does not fit is dropped and its buffer kept; what is no receive
/// buffer comes back empty.
fn small_buffers(boot: &Boot) -> Outcome {
    let mut card = start(boot, 0)?;
    card.write(&packet(&[], &frame(MAC, 1, 200)));
    card.offer(0, &[(card.buffer(), 12 + 100, WRITE)]);
    card.send_and_wait(boot, 12 + 101)?;
    ensure!(card.used(0) == 0, "a frame came that does not fit");
    card.send_and_wait(boot, 12 + 100)?;
    card.wait_used(boot, 0, 1)?;
    ensure!(card.used_len(0, 0) == 112, "{} bytes", card.used_len(0, 0));
    card.send_and_wait(boot, 12 + 100)?;
    ensure!(card.used(0) == 1, "a frame came without a buffer");
    // Shorter than a header, of no bytes to write, readable in front.
    card.offer(0, &[(card.buffer(), 11, WRITE)]);
    card.offer(0, &[(card.buffer(), BUFFER, 0)]);
    let (at, readable) = (card.buffer(), (card.data(), 12, 0));
    card.offer_chain(0, &[readable, (at, BUFFER, WRITE)]);
    card.receive_into(at);
    card.send_and_wait(boot, 12 + 60)?;
    card.wait_used(boot, 0, 5)?;
    let lengths = [1, 2, 3, 4].map(|n| card.used_len(0, n));
    ensure!(lengths == [0, 0, 0, 72], "{lengths:?} bytes");
    serves_a_driver(boot, &card)
}

/// With them, a frame has a bounded number of the smallest that there are.
fn tiny_buffers(boot: &Boot) -> Outcome {
    let mut card = start(boot, card_feature::MRG_RXBUF)?;
    let sent = frame(MAC, 1, 200 * 12);
    card.write(&packet(&[], &sent));
    for n in 0..200 {
        card.offer(0, &[(card.buffer() + n * 12, 12, WRITE)]);
    }
    card.send_and_wait(boot, 12 + 199 * 12)?;
    ensure!(card.used(0) == 0, "a frame came in pieces");
    card.send_and_wait(boot, 12 + 19 * 12)?;
    card.wait_used(boot, 0, 20)?;
    let came = card.received(0, 20 * 12);
    ensure!(came.get(10) == Some(&20), "not 20 buffers");
    ensure!(came.get(12..) == sent.get(..19 * 12), "it came otherwise");
    serves_a_driver(boot, &card)
}

/// A header, and the frame behind it, cut anywhere, on both ways.
fn split_header(boot: &Boot) -> Outcome {
    let mut card = start(boot, 0)?;
    let bytes = packet(&[], &frame(MAC, 1, 64));
    card.write(&bytes);
    let len = bytes.len() as u32;
    for cut in 1..len {
        let second = (cut + 9).min(len);
        let cuts = [(0, cut), (cut, second), (second, len)];
        let chain = |at: u64, flags| {
            let cuts = cuts.iter().filter(|(from, to)| from < to);
            let piece = |&(from, to): &(u32, u32)| (at + u64::from(from), to - from, flags);
            cuts.map(piece).collect::<Vec<_>>()
        };
        card.offer_chain(0, &chain(card.buffer(), WRITE));
        card.offer_chain(1, &chain(card.data(), 0));
        card.kick(boot, 1);
        card.wait_all(boot, 0)?;
        card.wait_all(boot, 1)?;
        let came = card.received(12, 64);
        ensure!(bytes.get(12..) == Some(&came[..]), "cut at {cut}");
    }
    serves_a_driver(boot, &card)
}

/// Sends a command, and gives the card's answer.
fn command(boot: &Boot, card: &mut RawCard, bytes: &[u8]) -> Result<u8, String> {
    card.write(&[bytes, &[0x77]].concat());
    let answer = card.data() + bytes.len() as u64;
    let out = (card.data(), bytes.len() as u32, 0);
    if bytes.is_empty() {
        card.offer(2, &[(answer, 1, WRITE)]);
    } else {
        card.offer_chain(2, &[out, (answer, 1, WRITE)]);
    }
    card.kick(boot, 2);
    card.wait_all(boot, 2)?;
    Ok(card.written_at(bytes.len()))
}

fn with_control(boot: &Boot) -> Result<RawCard, String> {
    RawCard::start(boot, card(boot)?, 3, SIZE, CONTROL)
}

/// Commands that are cut, too long, unknown or not negotiated: refused, and the next one is heard.
fn bad_commands(boot: &Boot) -> Outcome {
    let mut card = with_control(boot)?;
    let table = [&[1, 0, 2, 0, 0, 0][..], &[2; 12], &[0; 4]].concat();
    for cut in 0..table.len() {
        let answer = command(boot, &mut card, table.get(..cut).unwrap_or_default())?;
        ensure!(answer == control::ERR, "a table of {cut} bytes: {answer}");
    }
    let bad: [&[u8]; 20] = [
        &[0, 0],
        &[0, 0, 2],
        &[0, 0, 1, 0],
        &[0, 6, 1],
        // A table that is longer than it says, and ones that are not there.
        &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        &[1, 0, 255, 255, 255, 255],
        &[1, 0, 0, 0, 0, 0, 171, 170, 170, 42],
        &[1, 1, 2, 0, 0, 0, 0],
        &[1, 1, 2, 0, 0, 0, 0, 1, 0],
        // The address of a group.
        &[1, 1, 3, 0, 0, 0, 0, 1],
        &[1, 2],
        &[2, 0, 1],
        &[2, 0, 0, 16],
        &[2, 2, 1, 0],
        &[3, 0, 0],
        &[3, 1],
        // Not negotiated: pairs, spreading, hashes, offloads.
        &[4, 0, 1, 0],
        &[4, 1, 0, 0, 0, 0],
        &[5, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        &[255, 255, 255],
    ];
    for bytes in bad {
        let answer = command(boot, &mut card, bytes)?;
        ensure!(answer == control::ERR, "{bytes:?}: {answer}");
    }
    let long = [&[1, 0, 200, 3, 0, 0][..], &[2; 6 * 968], &[0; 4]].concat();
    let answer = command(boot, &mut card, &long)?;
    ensure!(answer == control::ERR, "one that is too long: {answer}");
    // Nowhere to put the answer, in whole and in a command of one byte.
    for len in [1, 3] {
        card.offer(2, &[(card.data(), len, 0)]);
        card.kick(boot, 2);
        card.wait_all(boot, 2)?;
    }
    // And good ones, the first cut into single bytes.
    card.write(&[0, 0, 1, 0x77]);
    let at = card.data();
    let byte = |n: u64| (at + n, 1, if n == 3 { WRITE } else { 0 });
    card.offer_chain(2, &[byte(0), byte(1), byte(2), byte(3)]);
    card.kick(boot, 2);
    card.wait_all(boot, 2)?;
    ensure!(card.written_at(3) == control::OK, "in single bytes");
    for bytes in [&table[..], &[2, 0, 255, 15], &[2, 1, 7, 0], &[3, 0]] {
        let answer = command(boot, &mut card, bytes)?;
        ensure!(answer == control::OK, "{bytes:?}: {answer}");
    }
    serves_a_driver(boot, &card)
}

/// Whether a frame for this address comes; there is a buffer for it.
fn comes(boot: &Boot, card: &mut RawCard, to: [u8; 6]) -> Result<bool, String> {
    card.write(&packet(&[], &frame(to, 1, 60)));
    let before = card.used(0);
    card.send_and_wait(boot, 72)?;
    // It is delivered before its chain is given back.
    let came = card.used(0) != before;
    if came {
        card.receive_into(card.buffer());
    }
    Ok(came)
}

/// Tables of addresses at their limit filter, beyond it let all through, and all VLANs there are fit.
fn full_tables(boot: &Boot) -> Outcome {
    let mut card = with_control(boot)?;
    for _ in 0..4 {
        card.receive_into(card.buffer());
    }
    let (foreign, group) = ([2, 0, 0, 0, 0, 9], [3, 0, 0, 0, 0, 9]);
    let tables = |unicast: u16, multicast: u16| {
        let mut bytes = vec![1, 0];
        for (first, count) in [(2, unicast), (3, multicast)] {
            bytes.extend(u32::from(count).to_le_bytes());
            for n in 0..count {
                bytes.extend([first, 1, 1, 1, (n >> 8) as u8, n as u8]);
            }
        }
        bytes
    };
    let set = |card: &mut RawCard, bytes: &[u8]| command(boot, card, bytes);
    ensure!(
        set(&mut card, &[0, 0, 0])? == control::OK,
        "not promiscuous"
    );
    // How many there are of each, whether that is taken, and what comes then.
    for (counts, answer, expected) in [
        ((64, 64), control::OK, [false, false]),
        ((65, 64), control::OK, [true, false]),
        ((0, 65), control::OK, [false, true]),
        ((64, 0), control::OK, [false, false]),
        ((400, 280), control::OK, [true, true]),
        // Longer than any command: what was set stays.
        ((400, 300), control::ERR, [true, true]),
        ((0, 0), control::OK, [false, false]),
    ] {
        let got = set(&mut card, &tables(counts.0, counts.1))?;
        ensure!(got == answer, "{counts:?} addresses: {got}");
        let found = [
            comes(boot, &mut card, foreign)?,
            comes(boot, &mut card, group)?,
        ];
        ensure!(found == expected, "{counts:?} addresses: {found:?}");
        ensure!(comes(boot, &mut card, MAC)?, "its own address");
    }
    // One after the other would take long where each costs an exit.
    for id in (0u16..4096).step_by(67).chain([4095]) {
        let [low, high] = id.to_le_bytes();
        let got = set(&mut card, &[2, 0, low, high])?;
        ensure!(got == control::OK, "VLAN {id}: {got}");
    }
    for id in [4096u16, 0x8000, u16::MAX] {
        let [low, high] = id.to_le_bytes();
        let got = set(&mut card, &[2, 0, low, high])?;
        ensure!(got == control::ERR, "VLAN {id}: {got}");
    }
    serves_a_driver(boot, &card)
}

/// The card floods a switch with frames for all, two others on it talk all the while, and lose
/// nothing.
fn flood(boot: &Boot) -> Outcome {
    let platform = boot.platform();
    let features = card_feature::CSUM | card_feature::GUEST_CSUM | card_feature::HOST_TSO4;
    let mut card = start(boot, features | card_feature::MRG_RXBUF)?;
    let mut talkers = Vec::new();
    for name in ["left", "right"] {
        let pair = PairConfig {
            vcpu: 0,
            size: SIZE,
        };
        let config = NicConfig {
            pairs: &[pair],
            buffer_len: 2048,
            without: 0,
        };
        let mut opened = Nic::open(platform, Some(name), &config).map_err(text("open"))?;
        let pair = opened.pairs.pop().ok_or("no pair")?;
        talkers.push((opened.nic, pair));
    }
    // A large frame counts as what it can be cut into: 1,362 of them.
    let mut flooding = frame([0xff; 6], 1, 65_400);
    flooding[6..12].copy_from_slice(&MAC);
    let ip = [0x45, 0, 0xff, 0x6a, 0, 1, 0, 0, 64, 6, 0, 0];
    flooding[12..14].copy_from_slice(&[8, 0]);
    flooding[14..26].copy_from_slice(&ip);
    flooding[46] = 0x50;
    let len = 12 + flooding.len();
    card.write(&packet(&header(1, 1, 48, 34, 16), &flooding));
    for round in 0..25u64 {
        for _ in 0..4 {
            card.send(len);
        }
        card.kick(boot, 1);
        for (from, to) in [(0, 1), (1, 0)] {
            let target = talkers[to].0.mac();
            let bytes = frame(target, round, 300);
            talkers[from]
                .1
                .1
                .send(&bytes, net::Offload::default())
                .map_err(text("send"))?;
            let start = platform.now_ns();
            loop {
                let got = talkers[to].1.0.receive(Some(Duration::from_secs(20)));
                let got = got.map_err(text("receive"))?;
                let got = got.ok_or_else(|| format!("round {round}: a frame was lost"))?;
                let mut back = vec![0; got.len()];
                got.read(0, &mut back);
                talkers[to].1.0.recycle(got);
                if back == bytes {
                    break;
                }
                ensure!(back.starts_with(&[0xff; 6]), "another frame came");
                let late = platform.now_ns() - start > 20_000_000_000;
                ensure!(!late, "round {round}: nothing but the flood comes");
            }
        }
        card.wait_all(boot, 1)?;
    }
    // What the host has counted as dropped.
    let dropped = platform.call(number::EMBEDDER + 9, [0; 6]);
    let dropped = dropped.map_err(text("ask what was dropped"))?;
    ensure!(dropped > 0, "nothing of the flood was dropped");
    reset(boot, card.info.index.into()).map_err(text("reset"))?;
    Ok(())
}
