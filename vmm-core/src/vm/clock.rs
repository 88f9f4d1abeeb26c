//! The clock page: calibrated against the host's boot-time clock, updated while the VM runs.
//!
//! Boot time goes on while the host is suspended, so a guest's wall clock stays right. The TSC may do
//! either then: a line that it has left is noticed at the next update, and the rate, which the gap
//! would spoil for good, is kept.
#![allow(unsafe_code)]
// UNSAFETY: RDTSC is an intrinsic; CLOCK_BOOTTIME has no wrapper.

use crate::limits::CLOCK_UPDATE;
use crate::memory::GuestMemory;
use pv_abi::clock::{ClockPage, MULT_SHIFT, TSC_STABLE};
use pv_abi::layout::{CLOCK_PAGE_BASE, VMM_BASE};
use std::io;
use std::mem::offset_of;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Shortest interval from which a rate is derived.
const CALIBRATION: Duration = Duration::from_millis(2);
/// Bound on the line's error before the first update and after it.
const ERROR_BOUND_NS: (u64, u64) = (1_000_000, 100_000);
/// How far an update may be from the line before it counts as a leap, beside a thousandth of the time
/// since the last: more than a slow reading and the slewing of the host's clock together.
const LEAP: Duration = Duration::from_millis(1);

/// A moment on both clocks.
#[derive(Clone, Copy, Debug)]
struct Pair {
    tsc: u64,
    at: Duration,
}

impl Pair {
    /// The tightest of a few readings: an interrupted one has a wide bracket.
    fn now() -> Pair {
        let mut best: Option<(u64, Pair)> = None;
        for _ in 0..4 {
            let before = rdtsc();
            let at = boot_time();
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
                at: boot_time(),
            },
            |(_, pair)| pair,
        )
    }
}

fn rdtsc() -> u64 {
    // SAFETY: every x86-64 CPU has RDTSC, and Linux lets user space use it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Time since the host was booted, suspends included.
fn boot_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the structure lives here. The call cannot fail: every kernel of today has this clock.
    unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut time) };
    let part = |value: i64| u64::try_from(value).unwrap_or(0);
    Duration::from_secs(part(time.tv_sec)) + Duration::from_nanos(part(time.tv_nsec))
}

/// The rate of the TSC, from the distance between an early pair and the last.
#[derive(Debug)]
struct Rate {
    origin: Pair,
    last: Pair,
    /// Nanoseconds in a tick, with [`MULT_SHIFT`] fraction bits.
    mult: Option<u64>,
}

impl Rate {
    fn new(origin: Pair) -> Rate {
        Rate {
            origin,
            last: origin,
            mult: None,
        }
    }

    /// The rate as this pair leaves it; `None` until [`CALIBRATION`] has passed.
    fn follow(&mut self, now: Pair) -> Option<u64> {
        if self.mult.is_some_and(|mult| self.leaps(now, mult)) {
            self.origin = now;
        }
        self.last = now;
        let elapsed = now.at.saturating_sub(self.origin.at);
        let ticks = now.tsc.saturating_sub(self.origin.tsc);
        if elapsed >= CALIBRATION && ticks > 0 {
            let mult = (elapsed.as_nanos() << MULT_SHIFT) / u128::from(ticks);
            self.mult = u64::try_from(mult).ok();
        }
        self.mult
    }

    /// Whether the two clocks have not gone together since the last pair.
    fn leaps(&self, now: Pair, mult: u64) -> bool {
        let Some(ticks) = now.tsc.checked_sub(self.last.tsc) else {
            return true;
        };
        let expected = (u128::from(ticks) * u128::from(mult)) >> MULT_SHIFT;
        let elapsed = now.at.saturating_sub(self.last.at);
        expected.abs_diff(elapsed.as_nanos()) > (LEAP + elapsed / 1000).as_nanos()
    }
}

/// A pair of now, and the process's rate as it leaves it.
fn reading() -> (Pair, Option<u64>) {
    static RATE: Mutex<Option<Rate>> = Mutex::new(None);
    let mut rate = RATE.lock().unwrap_or_else(PoisonError::into_inner);
    // Under the lock, so that pairs come in their order.
    let now = Pair::now();
    let mult = rate.get_or_insert_with(|| Rate::new(now)).follow(now);
    (now, mult)
}

/// Whether the host itself keeps time by its TSC; if not, neither may a guest.
///
/// As it was when it was last looked at: building a VM is not the time for it.
fn host_trusts_tsc() -> bool {
    *TRUSTED
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .get_or_insert_with(trust_of_host)
}

/// Looks at it anew: a kernel may find its TSC out at any time.
fn look_at_host() -> bool {
    let trusted = trust_of_host();
    *TRUSTED.lock().unwrap_or_else(PoisonError::into_inner) = Some(trusted);
    trusted
}

static TRUSTED: Mutex<Option<bool>> = Mutex::new(None);

fn trust_of_host() -> bool {
    let path = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
    std::fs::read_to_string(path).is_ok_and(|name| name.trim() == "tsc")
}

/// Starts calibration early, so that a rate is there when the first VM is built.
pub(crate) fn prepare() {
    reading();
}

/// The clock of one VM.
#[derive(Debug)]
pub(crate) struct Clock {
    built: Duration,
    wall_offset_ns: u64,
    stable: AtomicBool,
}

impl Clock {
    pub(crate) fn new() -> Clock {
        let since_epoch = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        Clock {
            built: boot_time(),
            wall_offset_ns: ns(since_epoch),
            stable: AtomicBool::new(host_trusts_tsc()),
        }
    }

    /// Nanoseconds since the VM was built.
    pub(crate) fn now_ns(&self) -> u64 {
        ns(boot_time().saturating_sub(self.built))
    }

    /// Writes the page again, while the guest runs.
    pub(crate) fn update(&self, memory: &GuestMemory) -> io::Result<()> {
        if !look_at_host() {
            self.distrust_tsc();
        }
        self.publish(memory, false)
    }

    /// The guest's TSC is not the host's, or the host has found it out: from the next page on, and for
    /// good, the guest asks for every reading.
    pub(crate) fn distrust_tsc(&self) {
        // Ordering: Relaxed, called before the guest starts, and by who writes the pages.
        self.stable.store(false, Ordering::Relaxed);
    }

    /// Writes the page. `first` for the one before the guest starts.
    pub(crate) fn publish(&self, memory: &GuestMemory, first: bool) -> io::Result<()> {
        let stable = self.stable.load(Ordering::Relaxed);
        let (mut now, mut mult) = reading();
        while stable && mult.is_none() {
            std::thread::sleep(CALIBRATION / 4);
            (now, mult) = reading();
        }
        let page = ClockPage {
            seq: 0,
            flags: if stable { TSC_STABLE } else { 0 },
            base_tsc: now.tsc,
            base_ns: ns(now.at.saturating_sub(self.built)),
            mult: mult.unwrap_or(0),
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
    fn the_rate_follows_the_host() {
        let mut rate = Rate::new(Pair::now());
        std::thread::sleep(Duration::from_millis(30));
        let b = Pair::now();
        let page = ClockPage {
            base_tsc: b.tsc,
            mult: rate.follow(b).unwrap(),
            ..Default::default()
        };
        let c = Pair::now();
        let error = page
            .nanoseconds_at(c.tsc)
            .abs_diff(ns(c.at.saturating_sub(b.at)));
        assert!(error < 5_000_000, "{error} ns");
    }

    /// A TSC of 2 GHz that began at 1000, seen `ms` after the host's boot.
    fn at(ms: u64) -> Pair {
        Pair {
            tsc: 1000 + ms * 2_000_000,
            at: Duration::from_millis(ms),
        }
    }

    #[test]
    fn a_suspended_host_does_not_spoil_the_rate() {
        const HALF: Option<u64> = Some(1 << (MULT_SHIFT - 1));
        let hour = 3_600_000;
        let mut rate = Rate::new(at(0));
        assert_eq!(rate.follow(at(1)), None, "too short to tell");
        assert_eq!(rate.follow(at(2000)), HALF);
        // The TSC stood still for an hour, and later began again.
        let stood = |ms| Pair {
            at: Duration::from_millis(ms + hour),
            ..at(ms)
        };
        for ms in [2001, 4000, 6000] {
            assert_eq!(rate.follow(stood(ms)), HALF, "{ms}");
        }
        let reset = |ms| Pair {
            at: Duration::from_millis(ms + 2 * hour),
            ..at(ms)
        };
        for ms in [1, 2, 2000] {
            assert_eq!(rate.follow(reset(ms)), HALF, "{ms}");
        }
    }

    #[test]
    fn a_page_does_not_say_stable_of_a_tsc_that_is_not_the_hosts() {
        let memory = GuestMemory::plain(4 << 20, &[]);
        let clock = Clock::new();
        let page = || {
            let page: ClockPage = memory.vmm.read(CLOCK_PAGE_BASE - VMM_BASE).unwrap();
            assert!(page.seq.is_multiple_of(2));
            page.flags & TSC_STABLE != 0
        };
        clock.publish(&memory, true).unwrap();
        assert_eq!(page(), host_trusts_tsc());
        clock.update(&memory).unwrap();
        assert_eq!(page(), look_at_host());
        clock.distrust_tsc();
        clock.update(&memory).unwrap();
        assert!(!page(), "for good");
    }
}
