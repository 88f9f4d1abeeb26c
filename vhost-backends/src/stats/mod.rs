//! Statistics of a device: what its queues did, how long it took, what went wrong.
//!
//! In come measurements from the queues' threads; out go snapshots, which `render` turns into
//! Prometheus text and JSON. A queue writes its own words and nobody else does, so a measurement is
//! a few plain stores; a reader sees each word whole, and all of them from about the same time.

mod render;
#[cfg(test)]
mod tests;

pub use render::{json, prometheus};

use crate::limit::Limits;
use crate::limits::MAX_IN_FLIGHT;
use serde::Serialize;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Upper bounds of the latency histogram: 1 us times powers of two; the last is about 8 s.
const BOUNDS: usize = 24;
/// What is counted apart.
const KINDS: usize = 6;
const ERRORS: usize = 7;

/// What a request was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Kind {
    /// Disk to guest.
    Read,
    /// Guest to disk.
    Write,
    /// Make writes safe.
    Flush,
    /// Forget a range.
    Discard,
    /// Zero a range.
    WriteZeroes,
    /// Anything else.
    Other,
}

/// Every kind with its name in reports.
pub(crate) const KIND_NAMES: [(Kind, &str); KINDS] = [
    (Kind::Read, "read"),
    (Kind::Write, "write"),
    (Kind::Flush, "flush"),
    (Kind::Discard, "discard"),
    (Kind::WriteZeroes, "write_zeroes"),
    (Kind::Other, "other"),
];

/// Classes of host errors, in the order of their counters.
const ERROR_NAMES: [&str; ERRORS] = [
    "io",
    "no_space",
    "read_only",
    "past_end",
    "too_large",
    "invalid",
    "other",
];

fn error_class(error: &io::Error) -> usize {
    match error.raw_os_error() {
        Some(libc::EIO | libc::EREMOTEIO) => 0,
        Some(libc::ENOSPC | libc::EDQUOT) => 1,
        Some(libc::EROFS | libc::EACCES | libc::EPERM) => 2,
        Some(libc::EFBIG) => 4,
        Some(libc::EINVAL) => 5,
        None if error.kind() == io::ErrorKind::UnexpectedEof => 3,
        None if error.kind() == io::ErrorKind::InvalidInput => 5,
        _ => 6,
    }
}

/// A request on its way. Times are of [`DeviceStats::now`].
#[derive(Clone, Copy, Debug)]
pub struct Measure {
    /// What it is.
    pub kind: Kind,
    /// Bytes that it moves or changes.
    pub bytes: u64,
    /// When it was taken off the ring.
    pub began: u64,
}

/// One word with one writer.
#[derive(Debug, Default)]
struct Word(AtomicU64);

impl Word {
    fn add(&self, n: u64) {
        // Ordering: Relaxed; one thread writes this, so that a load and a store lose nothing.
        let now = self.0.load(Ordering::Relaxed);
        self.0.store(now.wrapping_add(n), Ordering::Relaxed);
    }

    fn set(&self, n: u64) {
        // Ordering: Relaxed, as in `add`.
        self.0.store(n, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        // Ordering: Relaxed; a count says nothing about other memory.
        self.0.load(Ordering::Relaxed)
    }
}

#[derive(Debug, Default)]
struct KindWords {
    bytes: Word,
    nanos: Word,
    /// One for each bound, and one for what took longer.
    buckets: [Word; BOUNDS + 1],
}

/// What one queue counts. Its thread writes, others read.
#[derive(Debug)]
pub struct QueueStats {
    kinds: [KindWords; KINDS],
    errors: [Word; ERRORS],
    held_nanos: Word,
    /// When each request in flight began, plus one; zero is none.
    in_flight: Box<[Word]>,
}

impl Default for QueueStats {
    fn default() -> QueueStats {
        QueueStats {
            kinds: Default::default(),
            errors: Default::default(),
            held_nanos: Word::default(),
            in_flight: std::iter::repeat_with(Word::default)
                .take(MAX_IN_FLIGHT)
                .collect(),
        }
    }
}

impl QueueStats {
    /// A request is over, and was published at `now`.
    pub fn done(&self, measure: Measure, now: u64) {
        let Some(words) = self.kinds.get(measure.kind as usize) else {
            return;
        };
        let nanos = now.saturating_sub(measure.began);
        words.bytes.add(measure.bytes);
        words.nanos.add(nanos);
        if let Some(bucket) = words.buckets.get(bucket(nanos)) {
            bucket.add(1);
        }
    }

    /// A request stays in flight under this token.
    pub fn flies(&self, token: u16, measure: Measure) {
        if let Some(slot) = self.in_flight.get(usize::from(token)) {
            slot.set(measure.began.saturating_add(1));
        }
    }

    /// It came back.
    pub fn landed(&self, token: u16) {
        if let Some(slot) = self.in_flight.get(usize::from(token)) {
            slot.set(0);
        }
    }

    /// The host failed a request.
    pub fn failed(&self, error: &io::Error) {
        if let Some(word) = self.errors.get(error_class(error)) {
            word.add(1);
        }
    }

    /// The queue was held back by its limits.
    pub fn held(&self, time: Duration) {
        self.held_nanos
            .add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
    }

    /// Nothing is in flight: the queue starts, or has stopped.
    pub fn clear_in_flight(&self) {
        for slot in &self.in_flight {
            slot.set(0);
        }
    }
}

/// The index of the first bound that is not below this time.
fn bucket(nanos: u64) -> usize {
    let micros = nanos.div_ceil(1000);
    // Zero and one are in the first; above, the number of bits of what is one less.
    let bits = u64::BITS - micros.saturating_sub(1).leading_zeros();
    (bits as usize).min(BOUNDS)
}

/// The bound of a bucket in seconds.
fn bound_seconds(index: usize) -> f64 {
    (1u64 << index.min(BOUNDS)) as f64 / 1e6
}

/// Statistics of one device: a part for each queue, and its connections.
#[derive(Debug)]
pub struct DeviceStats {
    start: Instant,
    queues: Box<[QueueStats]>,
    connected: AtomicBool,
    connections: AtomicU64,
    broken: AtomicU64,
    /// When the state of the connection changed last.
    changed: AtomicU64,
}

impl DeviceStats {
    /// For a device with so many queues.
    pub fn new(queues: u16) -> DeviceStats {
        DeviceStats {
            start: Instant::now(),
            queues: std::iter::repeat_with(QueueStats::default)
                .take(usize::from(queues))
                .collect(),
            connected: AtomicBool::new(false),
            connections: AtomicU64::new(0),
            broken: AtomicU64::new(0),
            changed: AtomicU64::new(0),
        }
    }

    /// Nanoseconds since this was made.
    pub fn now(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// A queue's part; one thread at a time may write it.
    pub fn queue(&self, index: u16) -> Option<&QueueStats> {
        self.queues.get(usize::from(index))
    }

    /// A frontend connected.
    pub fn connected(&self) {
        // Ordering: Relaxed, counts and states that are read apart.
        self.connections.fetch_add(1, Ordering::Relaxed);
        self.connected.store(true, Ordering::Relaxed);
        self.changed.store(self.now(), Ordering::Relaxed);
    }

    /// Its connection ended; `broken`: not by hanging up between two messages.
    pub fn disconnected(&self, broken: bool) {
        // Ordering: Relaxed, as in `connected`.
        self.broken.fetch_add(u64::from(broken), Ordering::Relaxed);
        self.connected.store(false, Ordering::Relaxed);
        self.changed.store(self.now(), Ordering::Relaxed);
    }

    /// Everything now, summed over the queues.
    pub fn snapshot(&self) -> Snapshot {
        let now = self.now();
        let seconds = |nanos: u64| nanos as f64 / 1e9;
        let operations = KIND_NAMES.map(|(kind, name)| {
            let words = |queue: &QueueStats, f: &dyn Fn(&KindWords) -> u64| {
                queue.kinds.get(kind as usize).map_or(0, f)
            };
            let sum = |f: &dyn Fn(&KindWords) -> u64| -> u64 {
                self.queues.iter().map(|queue| words(queue, f)).sum()
            };
            let buckets: Vec<u64> = (0..=BOUNDS)
                .map(|at| sum(&|k: &KindWords| k.buckets.get(at).map_or(0, Word::get)))
                .collect();
            Operation {
                name,
                requests: buckets.iter().sum(),
                bytes: sum(&|k| k.bytes.get()),
                seconds: seconds(sum(&|k| k.nanos.get())),
                p50_seconds: quantile(&buckets, 0.50),
                p99_seconds: quantile(&buckets, 0.99),
                p999_seconds: quantile(&buckets, 0.999),
                buckets,
            }
        });
        let queues = self.queues.iter().map(|queue| {
            let began = queue.in_flight.iter().map(Word::get).filter(|b| *b > 0);
            let oldest = began.clone().min();
            QueueSnapshot {
                in_flight: began.count() as u64,
                oldest_seconds: oldest.map_or(0.0, |b| seconds(now.saturating_sub(b - 1))),
                held_seconds: seconds(queue.held_nanos.get()),
            }
        });
        let errors = ERROR_NAMES.iter().enumerate().map(|(at, name)| {
            let of = |queue: &QueueStats| queue.errors.get(at).map_or(0, Word::get);
            (*name, self.queues.iter().map(of).sum())
        });
        // Ordering: Relaxed, as in `connected`.
        let connections = self.connections.load(Ordering::Relaxed);
        Snapshot {
            uptime_seconds: seconds(now),
            connection: Connection {
                connected: self.connected.load(Ordering::Relaxed),
                since_seconds: seconds(now.saturating_sub(self.changed.load(Ordering::Relaxed))),
                connections,
                reconnects: connections.saturating_sub(1),
                broken: self.broken.load(Ordering::Relaxed),
            },
            operations: operations.to_vec(),
            queues: queues.collect(),
            errors: errors.collect(),
        }
    }
}

/// The upper bound of the bucket that holds this part of all requests; zero without any.
fn quantile(buckets: &[u64], part: f64) -> f64 {
    let total: u64 = buckets.iter().sum();
    let rank = (total as f64 * part).ceil() as u64;
    let mut seen = 0;
    for (at, count) in buckets.iter().enumerate() {
        seen += count;
        if total > 0 && seen >= rank {
            return bound_seconds(at);
        }
    }
    0.0
}

/// Statistics of a device at one moment.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Snapshot {
    /// Since the device was made.
    pub uptime_seconds: f64,
    /// Its frontend.
    pub connection: Connection,
    /// By kind of request.
    pub operations: Vec<Operation>,
    /// By queue.
    pub queues: Vec<QueueSnapshot>,
    /// Requests that failed on the host, by class.
    pub errors: std::collections::BTreeMap<&'static str, u64>,
}

/// The connection of a device.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Connection {
    /// A frontend is connected.
    pub connected: bool,
    /// Since it is or is not.
    pub since_seconds: f64,
    /// Connections that there were.
    pub connections: u64,
    /// Connections after the first.
    pub reconnects: u64,
    /// Connections that ended in the middle of a message or by an error.
    pub broken: u64,
}

/// Requests of one kind.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Operation {
    /// Which kind.
    pub name: &'static str,
    /// Completed, in whatever way.
    pub requests: u64,
    /// Moved or changed.
    pub bytes: u64,
    /// Sum of all latencies, from taken off the ring to published.
    pub seconds: f64,
    /// Half of them took at most this (rounded up to a bound of the histogram).
    pub p50_seconds: f64,
    /// 99 of 100 took at most this.
    pub p99_seconds: f64,
    /// 999 of 1000 took at most this.
    pub p999_seconds: f64,
    /// By latency: up to 1 us, 2 us, 4 us and so on; the last is what took longer.
    pub buckets: Vec<u64>,
}

/// One queue at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct QueueSnapshot {
    /// Requests that the host works on.
    pub in_flight: u64,
    /// Age of the oldest of them.
    pub oldest_seconds: f64,
    /// Time that the limits held it back.
    pub held_seconds: f64,
}

/// One disk in a report.
#[derive(Clone, Debug, Serialize)]
pub struct DiskReport {
    /// Its name.
    pub disk: String,
    /// Its limits.
    pub limits: Limits,
    /// Requests refused: malformed, out of range, or not supported.
    pub refused: u64,
    /// Rings that broke a rule.
    pub retired_rings: u64,
    /// Times that the driver was called.
    pub calls: u64,
    /// Times that a queue slept and was woken.
    pub wakes: u64,
    /// The rest.
    #[serde(flatten)]
    pub snapshot: Snapshot,
}
