//! Waiting without stealing other drivers' events.

use super::Platform;
use core::time::Duration;
use pv_abi::vcpu::EVENT_WORDS;

/// A wait of this vCPU: takes every pending bit, and gives back on drop those that were not its own.
///
/// The order that loses nothing is: [`clear`](Self::clear), look at memory, [`idle`](Self::idle),
/// and again. A bit that is set after the look ends the idle.
pub struct Waiter<'p, P: Platform + ?Sized> {
    platform: &'p P,
    foreign: [u64; EVENT_WORDS],
    own: [u64; EVENT_WORDS],
}

impl<'p, P: Platform + ?Sized> Waiter<'p, P> {
    /// A wait for the given events.
    pub fn new(platform: &'p P, events: &[u32]) -> Self {
        let mut own = [0; EVENT_WORDS];
        for &event in events {
            if let Some(word) = own.get_mut(event as usize / 64) {
                *word |= 1 << (event % 64);
            }
        }
        Waiter {
            platform,
            foreign: [0; EVENT_WORDS],
            own,
        }
    }

    /// Takes what is pending, so that the next `idle` waits for something new.
    pub fn clear(&mut self) {
        for (index, (foreign, own)) in self.foreign.iter_mut().zip(self.own).enumerate() {
            *foreign |= self.platform.take_events(index, u64::MAX) & !own;
        }
    }

    /// Waits for any event, at most `limit`.
    pub fn idle(&self, limit: Option<Duration>) {
        self.platform.idle(limit);
    }
}

impl<P: Platform + ?Sized> Drop for Waiter<'_, P> {
    fn drop(&mut self) {
        for (index, &foreign) in self.foreign.iter().enumerate() {
            if foreign != 0 {
                self.platform.raise_events(index, foreign);
            }
        }
    }
}

impl<P: Platform + ?Sized> core::fmt::Debug for Waiter<'_, P> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Waiter")
            .field("own", &self.own)
            .field("foreign", &self.foreign)
            .finish_non_exhaustive()
    }
}
