//! The network driver against the real backend, whose port gives every frame back.

use crate::devices::reset;
use crate::{Case, Outcome, ensure, text};
use alloc::string::String;
use alloc::vec::Vec;
use alloc::{format, vec};
use core::time::Duration;
use guest_sdk::flat::{Boot, Flat};
use guest_sdk::net::{
    self, Coalescing, Error, Nic, NicConfig, Offload, Opened, PairConfig, Receiver, Transmitter,
};
use guest_sdk::platform::{DeviceInfo, Platform};
use pv_abi::call::number;
use pv_abi::device::kind;
use pv_abi::vcpu::EVENT_WORDS;
use pv_abi::virtio::net::feature::{GUEST_ANNOUNCE, MRG_RXBUF, STATUS};

pub const CASES: &[Case] = &[
    ("net.echo", echo),
    ("net.echo_unmerged", echo_unmerged),
    ("net.two_pairs", two_pairs),
    ("net.control", control),
    ("net.link", link),
    ("net.backend_link", backend_link),
    ("net.reopen", reopen),
    ("net.forgotten", forgotten),
    ("net.announce", announce),
    ("net.coalesce", coalesce),
    ("net.kill", kill),
];

const DAY: Option<Duration> = Some(Duration::from_secs(20));
pub const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// Bytes of the smallest and of the largest frame.
pub const LENGTHS: (usize, usize) = (14, 65_550);

/// A frame to `to` with a number in it and bytes that follow from it.
pub fn frame(to: [u8; 6], sequence: u64, len: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..len as u64)
        .map(|i| (i * 7 + sequence * 31 + i / 251) as u8)
        .collect();
    bytes[..6].copy_from_slice(&to);
    bytes[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 2]);
    bytes[12..14].copy_from_slice(&[0x88, 0xb5]);
    if let Some(place) = bytes.get_mut(14..22) {
        place.copy_from_slice(&sequence.to_le_bytes());
    }
    bytes
}

type Pair = (Receiver<Flat>, Transmitter<Flat>);

/// Sends a frame and takes it back.
pub fn round_trip((receiver, transmitter): &mut Pair, bytes: &[u8]) -> Outcome {
    transmitter
        .send(bytes, Offload::default())
        .map_err(text("send"))?;
    let got = receiver.receive(DAY).map_err(text("receive"))?;
    let got = got.ok_or_else(|| format!("{} bytes did not come back", bytes.len()))?;
    let mut back = vec![0; got.len()];
    got.read(0, &mut back);
    ensure!(back == bytes, "{} bytes came back otherwise", bytes.len());
    receiver.recycle(got);
    Ok(())
}

fn open(boot: &Boot, pairs: u16, without: u64) -> Result<Opened<Flat>, String> {
    let pair = PairConfig { vcpu: 0, size: 256 };
    let config = NicConfig {
        pairs: &vec![pair; usize::from(pairs)],
        buffer_len: 2048,
        without,
    };
    Nic::open(boot.platform(), Some("net"), &config).map_err(text("open"))
}

fn echo(boot: &Boot) -> Outcome {
    let mut pair = net::open(boot.platform(), None).map_err(text("open"))?;
    let long = (1601..=LENGTHS.1).step_by(997).chain([LENGTHS.1]);
    for len in (LENGTHS.0..=1600).chain(long) {
        round_trip(&mut pair, &frame(MAC, len as u64, len))?;
    }
    for len in [0, 1, 13, LENGTHS.1 + 1] {
        let sent = pair.1.send(&vec![0; len], Offload::default());
        ensure!(sent.is_err(), "{len} bytes were sent");
    }
    let stats = pair.0.stats();
    ensure!(
        stats.runts + stats.giants + stats.bad_headers == 0,
        "{stats:?}"
    );
    Ok(())
}

/// Without mergeable buffers what does not fit is dropped, and the card goes on.
fn echo_unmerged(boot: &Boot) -> Outcome {
    let mut opened = open(boot, 1, MRG_RXBUF)?;
    let mut pair = opened.pairs.pop().ok_or("no pair")?;
    for len in LENGTHS.0..=1514 {
        round_trip(&mut pair, &frame(MAC, len as u64, len))?;
    }
    let large = frame(MAC, 0, 9000);
    pair.1
        .send(&large, Offload::default())
        .map_err(text("send"))?;
    round_trip(&mut pair, &frame(MAC, 1, 100))
}

fn two_pairs(boot: &Boot) -> Outcome {
    let mut opened = open(boot, 2, 0)?;
    ensure!(opened.nic.pairs() == 2, "{} pairs", opened.nic.pairs());
    if let Some(control) = &mut opened.control {
        control.set_pairs(2).map_err(text("set pairs"))?;
    }
    // Whichever pair a frame comes back on.
    let mut found = 0;
    for round in 0..64u64 {
        let bytes = frame(MAC, round, 100);
        let (_, transmitter) = opened.pairs.get_mut((round % 2) as usize).ok_or("pair")?;
        transmitter
            .send(&bytes, Offload::default())
            .map_err(text("send"))?;
        transmitter
            .wait_until(0, DAY)
            .map_err(text("wait until sent"))?;
    }
    let start = boot.platform().now_ns();
    while found < 64 && boot.platform().now_ns() - start < 10_000_000_000 {
        for (receiver, _) in &mut opened.pairs {
            while let Some(got) = receiver.poll().map_err(text("poll"))? {
                found += 1;
                receiver.recycle(got);
            }
        }
    }
    ensure!(found == 64, "{found} of 64 frames came back");
    Ok(())
}

/// Nothing comes within a moment.
fn nothing(receiver: &mut Receiver<Flat>) -> Outcome {
    let got = receiver
        .receive(Some(Duration::from_millis(30)))
        .map_err(text("receive"))?;
    ensure!(got.is_none(), "a frame that is not wanted came");
    Ok(())
}

fn control(boot: &Boot) -> Outcome {
    let mut opened = open(boot, 1, 0)?;
    let mut pair = opened.pairs.pop().ok_or("no pair")?;
    let control = opened.control.as_mut().ok_or("no control queue")?;
    let mine = opened.nic.mac();
    ensure!(mine == MAC, "address {mine:?}");
    let other = [2, 0, 0, 0, 0, 9];
    control
        .set_promiscuous(false)
        .map_err(text("promiscuous"))?;
    round_trip(&mut pair, &frame(mine, 1, 100))?;
    let foreign = frame(other, 2, 100);
    pair.1
        .send(&foreign, Offload::default())
        .map_err(text("send"))?;
    nothing(&mut pair.0)?;
    control.set_mac(other).map_err(text("address"))?;
    round_trip(&mut pair, &foreign)?;
    control.set_filter(&[mine], &[]).map_err(text("filter"))?;
    round_trip(&mut pair, &frame(mine, 3, 100))?;
    // And all of it again for a device that was reset.
    opened.nic.reset();
    round_trip(&mut pair, &foreign)
}

/// Asks the host to take the link up or down, by the embedder's switch or by the backend's; whether
/// it can.
fn ask(boot: &Boot, switch: u64, up: bool) -> Result<bool, String> {
    let args = [switch, u64::from(up), 0, 0, 0, 0];
    let answer = boot.platform().call(number::EMBEDDER + 8, args);
    Ok(answer.map_err(text("ask for the link"))? != 0)
}

/// Looks again and again until it is so.
fn until(boot: &Boot, what: &str, mut so: impl FnMut() -> Result<bool, String>) -> Outcome {
    let start = boot.platform().now_ns();
    while !so()? {
        let late = boot.platform().now_ns() - start > 20_000_000_000;
        ensure!(!late, "not seen in time: {what}");
        boot.platform().idle(Some(Duration::from_millis(5)));
        boot.platform().take_events(0, u64::MAX);
    }
    Ok(())
}

/// Waits until the link is seen so.
fn see(boot: &Boot, nic: &Nic<Flat>, up: bool) -> Outcome {
    until(boot, "the link", || Ok(nic.link().up == up))?;
    ensure!(nic.take_config_change(), "the change was not told");
    Ok(())
}

fn link_by(boot: &Boot, switch: u64) -> Outcome {
    let mut opened = open(boot, 1, 0)?;
    let nic = opened.nic;
    let mut pair = opened.pairs.pop().ok_or("no pair")?;
    ensure!(nic.features() & STATUS != 0, "no status");
    ensure!(nic.link().up, "down at the start");
    let _ = nic.take_config_change();
    for _ in 0..3 {
        if !ask(boot, switch, false)? {
            return Ok(());
        }
        see(boot, &nic, false)?;
        ask(boot, switch, true)?;
        see(boot, &nic, true)?;
        round_trip(&mut pair, &frame(MAC, 1, 100))?;
    }
    Ok(())
}

fn link(boot: &Boot) -> Outcome {
    link_by(boot, 0)
}

fn backend_link(boot: &Boot) -> Outcome {
    link_by(boot, 1)
}

fn reopen(boot: &Boot) -> Outcome {
    for round in 0..5 {
        let mut pair = net::open(boot.platform(), None).map_err(text("open"))?;
        round_trip(&mut pair, &frame(MAC, round, 1000))?;
        pair.0.nic().reset();
        round_trip(&mut pair, &frame(MAC, round, 1000))?;
        let device = card(boot)?.index.into();
        reset(boot, device).map_err(text("reset"))?;
    }
    Ok(())
}

/// What a driver has set does not meet the next one.
fn forgotten(boot: &Boot) -> Outcome {
    let foreign = frame([2, 0, 0, 0, 0, 9], 1, 100);
    for round in 0..3 {
        let mut opened = open(boot, 1, 0)?;
        let mut pair = opened.pairs.pop().ok_or("no pair")?;
        let control = opened.control.as_mut().ok_or("no control queue")?;
        round_trip(&mut pair, &foreign).map_err(|e| format!("round {round}: {e}"))?;
        control
            .set_promiscuous(false)
            .map_err(text("promiscuous"))?;
        pair.1
            .send(&foreign, Offload::default())
            .map_err(text("send"))?;
        nothing(&mut pair.0)?;
        drop((opened, pair));
        let device = card(boot)?.index.into();
        reset(boot, device).map_err(text("reset"))?;
    }
    Ok(())
}

/// A card whose backend was replaced is asked to say where it is, until it has, and is not asked again:
/// all of it while it stays as it is.
fn announce(boot: &Boot) -> Outcome {
    let mut opened = open(boot, 1, 0)?;
    let mut pair = opened.pairs.pop().ok_or("no pair")?;
    let control = opened.control.as_mut().ok_or("no control queue")?;
    let nic = opened.nic;
    ensure!(nic.features() & GUEST_ANNOUNCE != 0, "it cannot be asked");
    ensure!(!nic.link().announce, "a new card is asked");
    let mut ends = 0;
    for round in 0..3u64 {
        let before = nic.generation();
        until(boot, "that it is asked", || {
            while let Some(frame) = pair.0.poll().map_err(text("poll"))? {
                pair.0.recycle(frame);
            }
            if nic.generation() == before {
                ends += 1;
                let args = [ends, 0, 0, 0, 0, 0];
                let answer = boot.platform().call(number::EMBEDDER + 7, args);
                answer.map_err(text("ask for its end"))?;
            }
            Ok(nic.generation().is_some_and(|now| before != Some(now)) && nic.link().announce)
        })?;
        let generation = nic.generation();
        round_trip(&mut pair, &frame(MAC, round, 100))?;
        ensure!(nic.link().announce, "it has not said where it is");
        let _ = nic.take_config_change();
        nic.announce(&mut pair.1, control)
            .map_err(text("announce"))?;
        until(boot, "that it is over", || Ok(!nic.link().announce))?;
        ensure!(nic.take_config_change(), "that it is over was not told");
        let own = pair.0.receive(DAY).map_err(text("receive"))?;
        let own = own.ok_or("its own announcement did not come back")?;
        let mut bytes = [0; 14];
        own.read(0, &mut bytes);
        pair.0.recycle(own);
        ensure!(bytes.ends_with(&[0x80, 0x35]), "another frame: {bytes:?}");
        round_trip(&mut pair, &frame(MAC, round, 100))?;
        ensure!(!nic.link().announce, "it is asked again");
        ensure!(nic.generation() == generation, "it was reset");
    }
    Ok(())
}

/// Frames go round one by one, and each is to be called for; how many calls there are.
fn calls(boot: &Boot, (receiver, transmitter): &mut Pair) -> Result<u64, String> {
    let (platform, event) = (boot.platform(), receiver.event());
    let called = || {
        let pending = |word| platform.take_events(word, u64::MAX);
        let pending: [u64; EVENT_WORDS] = core::array::from_fn(pending);
        let word = pending.get(event as usize / 64);
        word.is_some_and(|word| word & 1 << (event % 64) != 0)
    };
    called();
    let mut count = 0;
    for round in 0..64 {
        let sent = frame(MAC, round, 60);
        let _nothing_there = receiver.arm();
        transmitter
            .send(&sent, Offload::default())
            .map_err(text("send"))?;
        let start = platform.now_ns();
        let got = loop {
            if let Some(got) = receiver.poll().map_err(text("poll"))? {
                break got;
            }
            let late = platform.now_ns() - start > 20_000_000_000;
            ensure!(!late, "frame {round} did not come back");
        };
        ensure!(got.len() == sent.len(), "{} bytes came", got.len());
        receiver.recycle(got);
        // Takes in what has fired, and waits for nothing.
        platform.idle(Some(Duration::ZERO));
        count += u64::from(called());
    }
    Ok(count)
}

/// The device calls less often where the guest wants that, for each frame in the end, and again after
/// a reset.
fn coalesce(boot: &Boot) -> Outcome {
    let mut opened = open(boot, 1, 0)?;
    let mut pair = opened.pairs.pop().ok_or("no pair")?;
    let control = opened.control.as_mut().ok_or("no control queue")?;
    let (each, some) = (
        Coalescing::default(),
        Coalescing {
            packets: 64,
            time: Duration::from_millis(10),
        },
    );
    let many = calls(boot, &mut pair)?;
    ensure!(many >= 32, "{many} calls for 64 frames, one by one");
    control.coalesce_received(some).map_err(text("some"))?;
    let start = boot.platform().now_ns();
    let few = calls(boot, &mut pair)?;
    // One for so many packets, one for so much time, and what was on its way at either end: few, but
    // where a frame takes as long as that.
    let took = Duration::from_nanos(boot.platform().now_ns() - start);
    let most = took.as_millis() / some.time.as_millis() + 3;
    ensure!(
        u128::from(few) <= most,
        "{few} calls in {took:?} instead of {many}, and not {most}"
    );
    let (receives, sends) = (pair.0.index(), pair.1.index());
    let now = |control: &mut net::Control<Flat>, queue| {
        let now = control.coalescing(queue);
        now.map_err(text("what is in force"))
    };
    ensure!(now(control, receives)? == some, "received ones");
    ensure!(now(control, sends)? == each, "sent ones");
    control
        .coalesce_queue(sends, some)
        .map_err(text("a queue"))?;
    // One that comes alone is waited for no longer than that.
    for round in 0..5 {
        round_trip(&mut pair, &frame(MAC, round, 100))?;
        pair.1.wait_until(0, DAY).map_err(text("wait"))?;
    }
    opened.nic.reset();
    round_trip(&mut pair, &frame(MAC, 5, 100))?;
    for queue in [receives, sends] {
        ensure!(now(control, queue)? == some, "queue {queue} after a reset");
    }
    let long = Coalescing {
        packets: 0,
        time: Duration::from_secs(5),
    };
    control
        .coalesce_queue(receives, long)
        .map_err(text("a long time"))?;
    let bounded = now(control, receives)?;
    ensure!(bounded.time == some.time, "{bounded:?}");
    round_trip(&mut pair, &frame(MAC, 6, 100))?;
    let other = control.coalesce_queue(2, some);
    ensure!(other == Err(Error::TooMany), "no such queue: {other:?}");
    Ok(())
}

/// The host ends the backend again and again, each time after frames came back from the one before:
/// frames may be lost, and nothing else.
fn kill(boot: &Boot) -> Outcome {
    let mut opened = open(boot, 1, 0)?;
    let (mut receiver, mut transmitter) = opened.pairs.pop().ok_or("no pair")?;
    let control = opened.control.as_mut().ok_or("no control queue")?;
    let (nic, mut enough) = (opened.nic, false);
    let (mut sent, mut came, mut announced, mut last) = (0u64, 0u64, 0u64, None);
    while !enough {
        for _ in 0..50 {
            sent += 1;
            let bytes = frame(MAC, sent, 64 + (sent % 1400) as usize);
            transmitter
                .send(&bytes, Offload::default())
                .map_err(text("send"))?;
            let wait = Duration::from_millis(u64::from(sent % 8 == 0) * 5);
            while let Some(got) = receiver.receive(Some(wait)).map_err(text("receive"))? {
                let mut back = vec![0; got.len()];
                got.read(0, &mut back);
                if back.get(12..14) == Some(&[0x80, 0x35]) {
                    // Its own announcement.
                    receiver.recycle(got);
                    continue;
                }
                let number = back.get(14..22).ok_or("a short frame came")?;
                let number = u64::from_le_bytes(number.try_into().unwrap_or_default());
                ensure!(
                    back == frame(MAC, number, 64 + (number % 1400) as usize) && number <= sent,
                    "frame {number} came back otherwise"
                );
                came += 1;
                receiver.recycle(got);
            }
        }
        let generation = nic.generation();
        if nic.link().announce && generation.is_some() && generation != last {
            nic.announce(&mut transmitter, control)
                .map_err(text("announce"))?;
            announced += 1;
            last = generation;
        }
        let args = [came, 0, 0, 0, 0, 0];
        let answer = boot.platform().call(number::EMBEDDER + 7, args);
        enough = answer.map_err(text("ask"))? != 0;
    }
    ensure!(announced > 0, "it was never asked to announce itself");
    transmitter
        .wait_until(0, DAY)
        .map_err(text("wait until sent"))?;
    while let Some(got) = receiver
        .receive(Some(Duration::from_millis(50)))
        .map_err(text("receive"))?
    {
        receiver.recycle(got);
    }
    round_trip(&mut (receiver, transmitter), &frame(MAC, 1, 1000))
}

pub fn card(boot: &Boot) -> Result<DeviceInfo, String> {
    let found = boot.platform().device_table().find(kind::NET, Some("net"));
    found.ok_or_else(|| "no card".into())
}
