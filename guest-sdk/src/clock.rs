//! The time, without leaving the guest where the TSC allows it.
//!
//! The host keeps a line `(base_tsc, base_ns, mult)` in the clock page under a seqlock. An update may
//! move the line a little, so the largest time ever returned is kept and never undercut, on any
//! vCPU. Where the TSC is not stable, every reading is a call.
#![allow(unsafe_code)]
// UNSAFETY: the page is memory that the host writes while we read; raw volatile access only.

use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering, fence};
use pv_abi::clock::{ClockPage, TSC_STABLE};

/// Reads of a page that is being written before the reader gives up and makes a call.
const RETRIES: usize = 1000;

/// A reader of the clock page.
#[derive(Debug)]
pub struct Clock {
    page: NonNull<ClockPage>,
    last: AtomicU64,
}

// SAFETY: the page is only read, with volatile accesses, and lives as long as the program (`new`).
unsafe impl Send for Clock {}
// SAFETY: as above; `last` is atomic.
unsafe impl Sync for Clock {}

impl Clock {
    /// A reader of the page at this address.
    ///
    /// # Safety
    ///
    /// The page is readable as long as the program runs.
    pub const unsafe fn new(page: NonNull<ClockPage>) -> Self {
        Clock {
            page,
            last: AtomicU64::new(0),
        }
    }

    /// Nanoseconds since the VM was built, never less than on any call before.
    ///
    /// `tsc` reads the time-stamp counter; `call` asks the host, where the page cannot be used.
    pub fn now_ns(&self, tsc: impl Fn() -> u64, call: impl FnOnce() -> u64) -> u64 {
        let now = match self.snapshot(&tsc) {
            Some((page, ticks)) if page.flags & TSC_STABLE != 0 => page.nanoseconds_at(ticks),
            _ => call(),
        };
        // Ordering: Relaxed, the clamp is about this one number; a thread that learns of another's
        // time through other memory is ordered by that memory, and the maximum only grows.
        self.last.fetch_max(now, Ordering::Relaxed).max(now)
    }

    /// Nanoseconds from the Unix epoch to the moment the VM was built; 0 where the page is not kept.
    pub fn wall_offset_ns(&self) -> u64 {
        self.snapshot(|| 0)
            .map_or(0, |(page, _)| page.wall_offset_ns)
    }

    /// One consistent copy of the page with a TSC reading that belongs to it.
    fn snapshot(&self, tsc: impl Fn() -> u64) -> Option<(ClockPage, u64)> {
        for _ in 0..RETRIES {
            let before = self.seq();
            // Ordering: Acquire keeps the reads of the fields after the read of `seq`.
            fence(Ordering::Acquire);
            // SAFETY: readable (`new`) and aligned; volatile, because the host may be writing.
            let page = unsafe { core::ptr::read_volatile(self.page.as_ptr()) };
            let ticks = tsc();
            // Ordering: Acquire keeps the reads of the fields before the second read of `seq`.
            fence(Ordering::Acquire);
            if before & 1 == 0 && self.seq() == before {
                return Some((page, ticks));
            }
            core::hint::spin_loop();
        }
        None
    }

    fn seq(&self) -> u32 {
        let page = self.page.as_ptr();
        // SAFETY: as in `snapshot`.
        unsafe { core::ptr::read_volatile(&raw const (*page).seq) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::boxed::Box;

    fn clock(page: ClockPage) -> (Clock, *mut ClockPage) {
        let page = Box::into_raw(Box::new(page));
        // SAFETY: leaked, so it lives as long as the program.
        let clock = unsafe { Clock::new(NonNull::new(page).expect("a box is not null")) };
        (clock, page)
    }

    #[test]
    fn follows_the_page_and_never_goes_back() {
        let (clock, page) = clock(ClockPage {
            flags: TSC_STABLE,
            base_tsc: 100,
            base_ns: 1000,
            mult: 1 << 32,
            wall_offset_ns: 7,
            ..Default::default()
        });
        assert_eq!(clock.now_ns(|| 150, || unreachable!()), 1050);
        assert_eq!(clock.now_ns(|| 120, || unreachable!()), 1050);
        assert_eq!(clock.wall_offset_ns(), 7);
        // SAFETY: nobody else uses the page now.
        unsafe { (*page).base_ns = 500 };
        assert_eq!(clock.now_ns(|| 160, || unreachable!()), 1050);
        assert_eq!(clock.now_ns(|| 1000, || unreachable!()), 1400);
    }

    #[test]
    fn asks_the_host_without_a_stable_tsc_or_a_settled_page() {
        let (unstable, _) = clock(ClockPage::default());
        assert_eq!(unstable.now_ns(|| 150, || 42), 42);
        assert_eq!(unstable.now_ns(|| 150, || 41), 42);
        let (stuck, _) = clock(ClockPage {
            seq: 1,
            flags: TSC_STABLE,
            ..Default::default()
        });
        assert_eq!(stuck.now_ns(|| 150, || 9), 9);
    }
}
