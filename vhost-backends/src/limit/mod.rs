//! Rate limits: requests and bytes per second of one device, with bursts.
//!
//! In come limits, at any time and from any thread; out comes how long a queue has to hold back.
//! A request is let through while there is credit and charged afterwards, so one request may go
//! into debt, which those after it pay: no chain has to be put back, and the average is exact.
//!
//! One bucket is three words and no lock. What it stores is the time at which it will be full
//! again (generic cell rate algorithm, ITU-T I.371), so nothing has to refill it.

#[cfg(test)]
mod tests;

use crate::limits::{MAX_RATE, MAX_RATE_BURST};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const NANOS: u64 = 1_000_000_000;
/// Part of a second that a burst covers if none is given: a tenth.
const DEFAULT_BURST: u64 = 10;

/// What a device may do each second. Zero is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Limits {
    /// Requests per second.
    pub iops: u64,
    /// Requests at once after a pause. Zero: what a tenth of a second allows.
    pub iops_burst: u64,
    /// Bytes per second.
    pub bandwidth: u64,
    /// Bytes at once after a pause. Zero: what a tenth of a second allows.
    pub bandwidth_burst: u64,
}

/// A limit that is out of range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{name} is {value}, and at most {most} is possible")]
pub struct LimitError {
    /// Which one.
    pub name: &'static str,
    /// What was asked for.
    pub value: u64,
    /// The most that there can be.
    pub most: u64,
}

impl Limits {
    /// Whether every number is in range.
    pub fn check(self) -> Result<Limits, LimitError> {
        for (name, value, most) in [
            ("iops", self.iops, MAX_RATE),
            ("iops-burst", self.iops_burst, MAX_RATE_BURST),
            ("bandwidth", self.bandwidth, MAX_RATE),
            ("bandwidth-burst", self.bandwidth_burst, MAX_RATE_BURST),
        ] {
            if value > most {
                return Err(LimitError { name, value, most });
            }
        }
        Ok(self)
    }
}

/// Limits from JSON text, by their names: a list, which serde takes for a structure too, is none.
pub(crate) fn from_json<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    if text.trim_start().starts_with('[') {
        return Err("limits are an object, not a list".into());
    }
    serde_json::from_str(text).map_err(|error| error.to_string())
}

/// The limits of one device, shared by its queues.
#[derive(Debug)]
pub struct Limiter {
    start: Instant,
    requests: Bucket,
    bytes: Bucket,
}

impl Default for Limiter {
    fn default() -> Limiter {
        Limiter::new(Limits::default())
    }
}

impl Limiter {
    /// With these limits; numbers out of range are brought into it.
    pub fn new(limits: Limits) -> Limiter {
        let limiter = Limiter {
            start: Instant::now(),
            requests: Bucket::default(),
            bytes: Bucket::default(),
        };
        limiter.set(limits);
        limiter
    }

    /// Changes the limits. Debts are forgotten, and both bursts are there.
    pub fn set(&self, limits: Limits) {
        let now = self.now();
        self.requests.set(limits.iops, limits.iops_burst, now);
        self.bytes
            .set(limits.bandwidth, limits.bandwidth_burst, now);
    }

    /// The limits now.
    pub fn get(&self) -> Limits {
        // Ordering: Relaxed, settings that nothing else depends on.
        let load = |value: &AtomicU64| value.load(Ordering::Relaxed);
        Limits {
            iops: load(&self.requests.rate),
            iops_burst: load(&self.requests.burst),
            bandwidth: load(&self.bytes.rate),
            bandwidth_burst: load(&self.bytes.burst),
        }
    }

    /// Whether there is any limit now.
    pub(crate) fn is_open(&self) -> bool {
        self.requests.is_open() && self.bytes.is_open()
    }

    /// How long to hold back the next request; `None`: not at all.
    pub fn delay(&self) -> Option<Duration> {
        if self.is_open() {
            return None;
        }
        let now = self.now();
        let wait = self.requests.delay(now).max(self.bytes.delay(now));
        (wait > 0).then(|| Duration::from_nanos(wait))
    }

    /// Takes a request of so many bytes into account.
    pub fn charge(&self, bytes: u64) {
        self.charge_many(1, bytes);
    }

    /// Takes several requests of so many bytes together into account.
    pub fn charge_many(&self, requests: u64, bytes: u64) {
        if self.is_open() {
            return;
        }
        let now = self.now();
        self.requests.charge(requests, now);
        self.bytes.charge(bytes, now);
    }

    fn now(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

#[derive(Debug, Default)]
struct Bucket {
    /// Units per second; zero is no limit.
    rate: AtomicU64,
    /// Units that may come at once.
    burst: AtomicU64,
    /// When the bucket is full again, in nanoseconds since the limiter was made.
    full_at: AtomicU64,
}

// Ordering: Relaxed throughout. The three words say nothing about other memory; a charge that meets
// a change of the limits is counted by the old or by the new ones, and both are right.
impl Bucket {
    fn set(&self, rate: u64, burst: u64, now: u64) {
        let rate = rate.min(MAX_RATE);
        let burst = match burst {
            0 => (rate / DEFAULT_BURST).max(1),
            given => given.min(MAX_RATE_BURST),
        };
        self.burst
            .store(if rate == 0 { 0 } else { burst }, Ordering::Relaxed);
        self.rate.store(rate, Ordering::Relaxed);
        self.full_at.store(now, Ordering::Relaxed);
    }

    fn is_open(&self) -> bool {
        self.rate.load(Ordering::Relaxed) == 0
    }

    /// Nanoseconds until there is credit.
    fn delay(&self, now: u64) -> u64 {
        let rate = self.rate.load(Ordering::Relaxed);
        if rate == 0 {
            return 0;
        }
        // Centuries at most, so that a debt can be greater than any burst.
        let whole = nanos(self.burst.load(Ordering::Relaxed), rate).min(u64::MAX / 2);
        // Empty when filling it takes the whole of a burst's time.
        let full_at = self.full_at.load(Ordering::Relaxed);
        let to_fill = full_at.saturating_sub(now);
        // Rounded up: a wait that ends a nanosecond early is a wait too many.
        if to_fill < whole {
            0
        } else {
            to_fill - whole + 1
        }
    }

    fn charge(&self, units: u64, now: u64) {
        let rate = self.rate.load(Ordering::Relaxed);
        if rate == 0 {
            return;
        }
        let cost = nanos(units, rate);
        let charged = |full_at: u64| Some(full_at.max(now).saturating_add(cost));
        // The closure never declines.
        let _ = self
            .full_at
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, charged);
    }
}

/// How long so many units take at this rate, which is not zero.
fn nanos(units: u64, rate: u64) -> u64 {
    let nanos = u128::from(units) * u128::from(NANOS) / u128::from(rate.max(1));
    u64::try_from(nanos).unwrap_or(u64::MAX)
}
