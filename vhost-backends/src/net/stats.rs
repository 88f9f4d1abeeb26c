//! What a network device counts.

use serde::Serialize;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Why a frame, or a buffer, came to nothing. Each has a counter of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Drop {
    /// The frame is too short or too long.
    Length,
    /// Its header asks for what was not negotiated, or does not fit it.
    BadHeader,
    /// Its chain could not be read.
    BadChain,
    /// The guest has no receive buffer.
    NoBuffer,
    /// The guest's receive buffers are too small.
    TooSmall,
    /// A receive buffer that is none, given back empty.
    BadBuffer,
    /// The guest has no receive queue open.
    NoQueue,
    /// The guest's filter does not want it.
    Filtered,
    /// The link is down.
    LinkDown,
    /// The port did not take it: its peer is away, or slower than the guest.
    PortFull,
    /// The host failed to carry it.
    PortError,
    /// The sender's address is another port's.
    Spoofed,
    /// One frame to all too many.
    Flood,
    /// A limit on what is sent for the guest.
    Limited,
}

/// How many kinds of drops there are.
const DROPS: usize = 14;

/// Every kind with its name in reports.
const DROP_NAMES: [&str; DROPS] = [
    "length",
    "bad_header",
    "bad_chain",
    "no_buffer",
    "too_small",
    "bad_buffer",
    "no_queue",
    "filtered",
    "link_down",
    "port_full",
    "port_error",
    "spoofed",
    "flood",
    "limited",
];

/// Counts of one batch, added up when it is over.
#[derive(Debug, Default)]
pub(super) struct Tally {
    frames: u64,
    bytes: u64,
    drops: [u64; DROPS],
}

impl Tally {
    pub(super) fn frame(&mut self, bytes: usize) {
        self.frames += 1;
        self.bytes += bytes as u64;
    }

    pub(super) fn drop(&mut self, reason: Drop) {
        if let Some(count) = self.drops.get_mut(reason as usize) {
            *count += 1;
        }
    }
}

/// Counters of a device, all of them since it was made.
#[derive(Debug, Default)]
pub struct NetStats {
    sent: [AtomicU64; 2],
    received: [AtomicU64; 2],
    drops: [AtomicU64; DROPS],
    commands: AtomicU64,
    refused: AtomicU64,
    calls: AtomicU64,
    wakes: AtomicU64,
    retired: AtomicU64,
    connected: AtomicBool,
    connections: AtomicU64,
    broken: AtomicU64,
}

// Ordering: Relaxed throughout; a count says nothing about other memory.
fn add(counter: &AtomicU64, n: u64) {
    if n > 0 {
        counter.fetch_add(n, Ordering::Relaxed);
    }
}

fn get(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

impl NetStats {
    pub(super) fn sent(&self, tally: &Tally) {
        self.add(&self.sent, tally);
    }

    pub(super) fn received(&self, tally: &Tally) {
        self.add(&self.received, tally);
    }

    fn add(&self, [frames, bytes]: &[AtomicU64; 2], tally: &Tally) {
        add(frames, tally.frames);
        add(bytes, tally.bytes);
        for (counter, n) in self.drops.iter().zip(tally.drops) {
            add(counter, n);
        }
    }

    /// Counts frames that came to nothing.
    pub fn drop(&self, reason: Drop, n: u64) {
        if let Some(counter) = self.drops.get(reason as usize) {
            add(counter, n);
        }
    }

    pub(super) fn command(&self, done: bool) {
        add(&self.commands, 1);
        add(&self.refused, u64::from(!done));
    }

    pub(super) fn called(&self) {
        add(&self.calls, 1);
    }

    pub(super) fn woke(&self) {
        add(&self.wakes, 1);
    }

    pub(super) fn retired(&self) {
        add(&self.retired, 1);
    }

    /// A frontend connected.
    pub fn connected(&self) {
        add(&self.connections, 1);
        self.connected.store(true, Ordering::Relaxed);
    }

    /// Its connection ended; `broken`: not by hanging up between two messages.
    pub fn disconnected(&self, broken: bool) {
        add(&self.broken, u64::from(broken));
        self.connected.store(false, Ordering::Relaxed);
    }

    /// All of them now.
    pub fn snapshot(&self) -> NetSnapshot {
        let drops = DROP_NAMES.iter().zip(&self.drops);
        NetSnapshot {
            sent_frames: get(&self.sent[0]),
            sent_bytes: get(&self.sent[1]),
            received_frames: get(&self.received[0]),
            received_bytes: get(&self.received[1]),
            drops: drops.map(|(name, count)| (*name, get(count))).collect(),
            commands: get(&self.commands),
            refused_commands: get(&self.refused),
            calls: get(&self.calls),
            wakes: get(&self.wakes),
            retired_rings: get(&self.retired),
            connected: self.connected.load(Ordering::Relaxed),
            connections: get(&self.connections),
            broken: get(&self.broken),
        }
    }
}

/// A network device's counters at one moment. Sent and received are the guest's.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct NetSnapshot {
    /// Frames that the guest sent and the port took.
    pub sent_frames: u64,
    /// Bytes of them.
    pub sent_bytes: u64,
    /// Frames that the guest got.
    pub received_frames: u64,
    /// Bytes of them.
    pub received_bytes: u64,
    /// Frames and buffers that came to nothing, by reason.
    pub drops: std::collections::BTreeMap<&'static str, u64>,
    /// Control commands.
    pub commands: u64,
    /// Of these: refused.
    pub refused_commands: u64,
    /// Times that the driver was called.
    pub calls: u64,
    /// Times that a queue's thread slept and was woken.
    pub wakes: u64,
    /// Rings that broke a rule.
    pub retired_rings: u64,
    /// A frontend is connected.
    pub connected: bool,
    /// Connections that there were.
    pub connections: u64,
    /// Connections that ended in the middle of a message or by an error.
    pub broken: u64,
}

impl NetSnapshot {
    /// Frames that came to nothing for this reason.
    pub fn dropped(&self, reason: Drop) -> u64 {
        let name = DROP_NAMES.get(reason as usize).copied().unwrap_or_default();
        self.drops.get(name).copied().unwrap_or(0)
    }
}
