//! Samples, what is said of them, and the clock that both sides share.
#![allow(unsafe_code)]
// UNSAFETY: the time-stamp counter is an intrinsic.

use serde::Serialize;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// How long the time-stamp counter is compared with the clock.
const CALIBRATION: Duration = Duration::from_millis(100);

/// What is said of samples.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Summary {
    pub(crate) median: f64,
    pub(crate) p10: f64,
    pub(crate) p90: f64,
    pub(crate) samples: usize,
}

impl Summary {
    /// `None` without samples.
    pub(crate) fn of(samples: &[f64]) -> Option<Summary> {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let at = |quantile: f64| {
            let place = (sorted.len().saturating_sub(1)) as f64 * quantile;
            sorted.get(place.round() as usize).copied()
        };
        Some(Summary {
            median: at(0.5)?,
            p10: at(0.1)?,
            p90: at(0.9)?,
            samples: sorted.len(),
        })
    }
}

/// The time-stamp counter.
pub(crate) fn ticks() -> u64 {
    // SAFETY: RDTSC has no precondition in a Linux process that did not forbid it to itself.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Nanoseconds in one tick, measured once.
pub(crate) fn ns_per_tick() -> f64 {
    static RATE: OnceLock<f64> = OnceLock::new();
    *RATE.get_or_init(|| {
        let (clock, start) = (Instant::now(), ticks());
        std::thread::sleep(CALIBRATION);
        let (time, end) = (clock.elapsed(), ticks());
        time.as_nanos() as f64 / (end - start).max(1) as f64
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_is_of_what_was_sampled() {
        assert!(Summary::of(&[]).is_none());
        let samples: Vec<f64> = (0..=100).rev().map(f64::from).collect();
        let summary = Summary::of(&samples).unwrap();
        assert_eq!(
            (summary.p10, summary.median, summary.p90),
            (10.0, 50.0, 90.0)
        );
        assert_eq!(Summary::of(&[7.0]).unwrap().p90, 7.0);
    }
}
