//! Looking for the next call for a while before sleeping for it.
//!
//! A guest that has just had an answer often calls again at once. Where the two threads are on two
//! CPUs, a look sees that within a microsecond, while sleeping costs two wake-ups of an idle CPU.
//! Where they share one, looking only keeps the guest from running: it is given up after a few
//! misses and tried again now and then.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Longest look: about what sleeping and being woken costs.
const LONGEST: Duration = Duration::from_micros(20);
/// Looks between two glances at the clock.
const ROUND: u32 = 64;
/// Waits after which a look is tried again where it did not help.
const AGAIN: u32 = 256;

/// What came of looking so far.
#[derive(Debug)]
pub(super) struct Look {
    budget: Duration,
    waits: u32,
}

impl Default for Look {
    fn default() -> Look {
        Look {
            budget: LONGEST,
            waits: 0,
        }
    }
}

impl Look {
    /// Whether looking helps where the two threads are now.
    pub(super) fn helps(&self) -> bool {
        !self.budget.is_zero()
    }

    /// Looks whether the word changes from `state`; bounded by [`LONGEST`].
    pub(super) fn changes(&mut self, word: &AtomicU32, state: u32) -> bool {
        self.waits = self.waits.wrapping_add(1);
        let budget = if self.budget.is_zero() && self.waits.is_multiple_of(AGAIN) {
            LONGEST
        } else {
            self.budget
        };
        if budget.is_zero() {
            return false;
        }
        let started = Instant::now();
        loop {
            for _ in 0..ROUND {
                // Ordering: Relaxed, the caller loads the word again.
                if word.load(Ordering::Relaxed) != state {
                    self.budget = LONGEST;
                    return true;
                }
                std::hint::spin_loop();
            }
            if started.elapsed() >= budget {
                break;
            }
        }
        self.budget /= 2;
        if self.budget < LONGEST / 8 {
            self.budget = Duration::ZERO;
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looking_in_vain_is_given_up_and_tried_again() {
        let word = AtomicU32::new(0);
        let mut look = Look::default();
        assert!(look.changes(&word, 1), "it differs already");
        let misses = (0..10).take_while(|_| {
            look.changes(&word, 0);
            look.helps()
        });
        assert!(misses.count() < 10);
        word.store(1, Ordering::Relaxed);
        let tries = (0..=AGAIN).find(|_| look.changes(&word, 0));
        assert!(tries.is_some() && look.helps());
    }
}
