//! Lines in the log that a peer can cause at will: so many in a time for the whole process, and
//! how many were left out.

use crate::limits::{MAX_PEER_LINES, PEER_LINES_SECS};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Of this process, whatever the number of its devices, connections and rings.
pub(crate) static PEER_LINES: Quota = Quota::new();

/// Lines that may be said, by time.
#[derive(Debug)]
pub(crate) struct Quota(Mutex<Lines>);

#[derive(Debug)]
struct Lines {
    /// When the present time began.
    since: Option<Instant>,
    said: u32,
    left_out: u64,
}

impl Quota {
    const fn new() -> Quota {
        Quota(Mutex::new(Lines {
            since: None,
            said: 0,
            left_out: 0,
        }))
    }

    /// Whether a line may be said now. Says first how many were not.
    pub(crate) fn may_say(&self) -> bool {
        match self.ask(Instant::now()) {
            None => false,
            Some(left_out) => {
                tell(left_out);
                true
            }
        }
    }

    /// Says how many lines were left out and not yet spoken of.
    pub(crate) fn settle(&self) {
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tell(std::mem::take(&mut lines.left_out));
    }

    /// `Some`: a line may be said, after so many that were not.
    fn ask(&self, now: Instant) -> Option<u64> {
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let time = Duration::from_secs(PEER_LINES_SECS);
        if (lines.since).is_none_or(|since| now.saturating_duration_since(since) >= time) {
            (lines.since, lines.said) = (Some(now), 0);
        }
        if lines.said >= MAX_PEER_LINES {
            lines.left_out += 1;
            return None;
        }
        lines.said += 1;
        Some(std::mem::take(&mut lines.left_out))
    }
}

fn tell(left_out: u64) {
    if left_out > 0 {
        tracing::warn!("{left_out} lines about frontends and guests were left out");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn so_many_in_a_time_and_the_rest_counted() {
        let quota = Quota::new();
        let start = Instant::now();
        let mut said = 0;
        for _ in 0..1000 {
            said += u32::from(quota.ask(start) == Some(0));
        }
        assert_eq!(said, MAX_PEER_LINES);
        let later = start + Duration::from_secs(PEER_LINES_SECS);
        assert_eq!(quota.ask(later - Duration::from_millis(1)), None);
        let left_out = 1001 - u64::from(MAX_PEER_LINES);
        assert_eq!(quota.ask(later), Some(left_out));
        assert_eq!(quota.ask(later), Some(0));
    }
}
