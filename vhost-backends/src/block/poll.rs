//! How long to look for work before sleeping.
//!
//! A sleep and a wake cost more than a request that the page cache answers. When sleeps turn out
//! short, looking for as long first saves them, and the kicks with them; when they turn out long,
//! looking is waste. An idle queue stops looking after one try, so idle costs nothing.
//!
//! A queue keeps two of these: one for the driver's answer to completions, and one for the host,
//! which counts only while the driver answers at once: one that takes its time does not wait for
//! the disk either, and gets the same rate for less.

use std::time::Duration;

/// Longest look: about what a sleep and a wake of both sides cost.
const MOST: Duration = Duration::from_micros(50);
/// First look after a short sleep.
const LEAST: Duration = Duration::from_micros(8);

/// The present estimate.
#[derive(Debug, Default)]
pub(crate) struct AdaptivePoll {
    budget: Duration,
}

impl AdaptivePoll {
    /// How long to look now.
    pub(crate) fn budget(&self) -> Duration {
        self.budget
    }

    /// What was looked for came after this long, the look included.
    pub(super) fn answered(&mut self, time: Duration) {
        match time.checked_sub(self.budget) {
            // The look found it.
            None => {}
            Some(slept) => self.slept(slept),
        }
    }

    /// A look found nothing, and the sleep after it took this long.
    pub(crate) fn slept(&mut self, time: Duration) {
        self.budget = if time > MOST {
            Duration::ZERO
        } else {
            (self.budget * 2).clamp(LEAST, MOST)
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_to_its_limit_and_stops_at_once() {
        let mut poll = AdaptivePoll::default();
        assert_eq!(poll.budget(), Duration::ZERO);
        poll.slept(Duration::from_micros(5));
        assert_eq!(poll.budget(), LEAST);
        for _ in 0..10 {
            poll.slept(MOST);
        }
        assert_eq!(poll.budget(), MOST);
        poll.slept(MOST + Duration::from_nanos(1));
        assert_eq!(poll.budget(), Duration::ZERO);
    }

    #[test]
    fn an_answer_counts_from_the_end_of_the_look() {
        let mut poll = AdaptivePoll::default();
        poll.answered(Duration::from_micros(30));
        assert_eq!(poll.budget(), LEAST);
        poll.answered(LEAST - Duration::from_nanos(1));
        assert_eq!(poll.budget(), LEAST, "the look found it");
        poll.answered(LEAST + MOST);
        assert_eq!(poll.budget(), 2 * LEAST);
        poll.answered(2 * LEAST + MOST + Duration::from_nanos(1));
        assert_eq!(poll.budget(), Duration::ZERO);
    }
}
