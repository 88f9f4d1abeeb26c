//! The clock page: time without leaving the guest.
//!
//! A seqlock that the VMM owns: `seq` is odd while it is being written. A reader takes `seq`, reads
//! the fields and the TSC, and retries if `seq` was odd or has changed. The guest adds a monotonic
//! clamp of its own (a time that went back is the last one seen), because an update may move the
//! line by up to `error_bound_ns`.

use crate::assert_layout;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// `flags`: the TSC of all CPUs runs at one constant rate; without it the `CLOCK` call is used.
pub const TSC_STABLE: u32 = 1 << 0;
/// Fraction bits of [`ClockPage::mult`].
pub const MULT_SHIFT: u32 = 32;

/// `now = base_ns + ((tsc - base_tsc) * mult) >> 32`, in nanoseconds since the VM was built.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ClockPage {
    /// Seqlock: odd while the VMM writes.
    pub seq: u32,
    /// [`TSC_STABLE`].
    pub flags: u32,
    /// TSC at the moment of `base_ns`.
    pub base_tsc: u64,
    /// Nanoseconds since the VM was built, at `base_tsc`.
    pub base_ns: u64,
    /// Nanoseconds per TSC tick, with [`MULT_SHIFT`] fraction bits.
    pub mult: u64,
    /// Nanoseconds from the Unix epoch to the moment the VM was built.
    pub wall_offset_ns: u64,
    /// How often the VMM updates this page while the VM runs; 0 when it does not.
    pub update_interval_ns: u64,
    /// How far the line may be from the host's monotonic clock.
    pub error_bound_ns: u64,
    /// Zero.
    pub reserved: u64,
}
assert_layout!(ClockPage, size 64, align 8, seq @ 0, flags @ 4, base_tsc @ 8, base_ns @ 16,
    mult @ 24, wall_offset_ns @ 32, update_interval_ns @ 40, error_bound_ns @ 48,
    reserved @ 56);

impl ClockPage {
    /// Nanoseconds since the VM was built, at this TSC value, on a consistent copy of the page.
    ///
    /// A `tsc` before `base_tsc` (another CPU's, or a page updated meanwhile) gives `base_ns`.
    pub fn nanoseconds_at(&self, tsc: u64) -> u64 {
        let ticks = tsc.saturating_sub(self.base_tsc);
        let scaled = (u128::from(ticks) * u128::from(self.mult)) >> MULT_SHIFT;
        self.base_ns
            .saturating_add(u64::try_from(scaled).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_is_exact_and_saturates() {
        let page = ClockPage {
            base_tsc: 1000,
            base_ns: 50,
            mult: 1 << 31,
            ..Default::default()
        };
        assert_eq!(page.nanoseconds_at(1000), 50);
        assert_eq!(page.nanoseconds_at(3000), 1050);
        assert_eq!(page.nanoseconds_at(0), 50);
        let fast = ClockPage {
            mult: u64::MAX,
            ..Default::default()
        };
        assert_eq!(fast.nanoseconds_at(u64::MAX), u64::MAX);
    }
}
