//! The clock page: calibrated against the host's monotonic clock, updated while the VM runs.
#![allow(unsafe_code)]
// UNSAFETY: RDTSC is an intrinsic.

use crate::limits::CLOCK_UPDATE;
use crate::memory::GuestMemory;
use pv_abi::clock::{ClockPage, MULT_SHIFT, TSC_STABLE};
use pv_abi::layout::{CLOCK_PAGE_BASE, VMM_BASE};
use std::io;
use std::mem::offset_of;
use std::sync::OnceLock;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Shortest interval from which a rate is derived.
const CALIBRATION: Duration = Duration::from_millis(2);
/// Bound on the line's error before the first update and after it.
const ERROR_BOUND_NS: (u64, u64) = (1_000_000, 100_000);

/// A moment on both clocks.
#[derive(Clone, Copy, Debug)]
struct Pair {
    tsc: u64,
    at: Instant,
}

impl Pair {
    /// The tightest of a few readings: an interrupted one has a wide bracket.
    fn now() -> Pair {
        let mut best: Option<(u64, Pair)> = None;
        for _ in 0..4 {
            let before = rdtsc();
            let at = Instant::now();
            let width = rdtsc().wrapping_sub(before);
            let pair = Pair {
                tsc: before.wrapping_add(width / 2),
                at,
            };
            if best.is_none_or(|(w, _)| width < w) {
                best = Some((width, pair));
            }
        }
        best.map_or_else(
            || Pair {
                tsc: rdtsc(),
                at: Instant::now(),
            },
            |(_, pair)| pair,
        )
    }
}

fn rdtsc() -> u64 {
    // SAFETY: every x86-64 CPU has RDTSC, and Linux lets user space use it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// The first pair that this process took; rates are derived from the distance to it.
fn origin() -> Pair {
    static ORIGIN: OnceLock<Pair> = OnceLock::new();
    *ORIGIN.get_or_init(Pair::now)
}

/// Whether the host itself keeps time by its TSC; if not, neither may a guest.
fn host_trusts_tsc() -> bool {
    static TRUSTED: OnceLock<bool> = OnceLock::new();
    *TRUSTED.get_or_init(|| {
        let path = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
        std::fs::read_to_string(path).is_ok_and(|name| name.trim() == "tsc")
    })
}

/// Starts calibration early, so that a rate is there when the first VM is built.
pub(crate) fn prepare() {
    origin();
}

/// The clock of one VM.
#[derive(Debug)]
pub(crate) struct Clock {
    built: Instant,
    wall_offset_ns: u64,
    stable: bool,
}

impl Clock {
    pub(crate) fn new() -> Clock {
        let since_epoch = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        Clock {
            built: Instant::now(),
            wall_offset_ns: ns(since_epoch),
            stable: host_trusts_tsc(),
        }
    }

    /// Nanoseconds since the VM was built.
    pub(crate) fn now_ns(&self) -> u64 {
        ns(self.built.elapsed())
    }

    /// Writes the page. `first` for the one before the guest starts.
    pub(crate) fn publish(&self, memory: &GuestMemory, first: bool) -> io::Result<()> {
        let origin = origin();
        let mut now = Pair::now();
        if self.stable {
            while now.at.duration_since(origin.at) < CALIBRATION {
                std::thread::sleep(CALIBRATION / 4);
                now = Pair::now();
            }
        }
        let ticks = now.tsc.saturating_sub(origin.tsc).max(1);
        let elapsed = now.at.duration_since(origin.at).as_nanos();
        let mult = u64::try_from((elapsed << MULT_SHIFT) / u128::from(ticks)).unwrap_or(u64::MAX);
        let page = ClockPage {
            seq: 0,
            flags: if self.stable { TSC_STABLE } else { 0 },
            base_tsc: now.tsc,
            base_ns: ns(now.at.duration_since(self.built)),
            mult,
            wall_offset_ns: self.wall_offset_ns,
            update_interval_ns: ns(CLOCK_UPDATE),
            error_bound_ns: if first {
                ERROR_BOUND_NS.0
            } else {
                ERROR_BOUND_NS.1
            },
            reserved: 0,
        };
        let at = CLOCK_PAGE_BASE - VMM_BASE;
        let seq = memory.vmm.word32(at + offset_of!(ClockPage, seq) as u64)?;
        // Ordering: the fences make the odd count visible before any field changes, and every
        // field before the even one (seqlock writer; there is one writer).
        let odd = seq.load(Ordering::Relaxed) | 1;
        seq.store(odd, Ordering::Relaxed);
        fence(Ordering::Release);
        let skip = size_of::<u32>();
        let bytes = zerocopy::IntoBytes::as_bytes(&page);
        let result = memory
            .vmm
            .write_bytes(at + skip as u64, bytes.get(skip..).unwrap_or(&[]));
        fence(Ordering::Release);
        seq.store(odd.wrapping_add(1), Ordering::Release);
        result
    }
}

fn ns(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_follows_the_monotonic_clock() {
        let (a, b) = (origin(), {
            std::thread::sleep(Duration::from_millis(30));
            Pair::now()
        });
        let page = ClockPage {
            base_tsc: a.tsc,
            mult: u64::try_from(
                (b.at.duration_since(a.at).as_nanos() << MULT_SHIFT) / u128::from(b.tsc - a.tsc),
            )
            .unwrap(),
            ..Default::default()
        };
        let c = Pair::now();
        let error = page
            .nanoseconds_at(c.tsc)
            .abs_diff(ns(c.at.duration_since(a.at)));
        assert!(error < 5_000_000, "{error} ns");
    }
}
