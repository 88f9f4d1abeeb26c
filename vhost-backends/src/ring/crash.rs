//! Named points at which a test ends the process, to see what the next one makes of it.
//!
//! Nothing is compiled here without the feature `crash-points`, which only tests turn on. With
//! it, `PV_CRASH_AT=P3:17` ends the process when it comes to P3 for the 17th time.

/// Where a process may end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Point {
    /// A chain was marked in flight.
    P1,
    /// The chain was read.
    P2,
    /// Its I/O is done.
    P3,
    /// Its used element is written, but not published.
    P4,
    /// The used element is published.
    P5,
    /// It is no longer marked in flight.
    P6,
    /// The memory table is being exchanged: everything is drained.
    P7,
}

#[cfg(not(feature = "crash-points"))]
pub(crate) const fn hit(_point: Point) {}

#[cfg(feature = "crash-points")]
pub(crate) fn hit(point: Point) {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};
    static TARGET: OnceLock<Option<(String, u64)>> = OnceLock::new();
    static HITS: AtomicU64 = AtomicU64::new(0);
    let target = TARGET.get_or_init(|| {
        let value = std::env::var("PV_CRASH_AT").ok()?;
        let (name, count) = value.split_once(':')?;
        Some((name.to_owned(), count.parse().ok()?))
    });
    let Some((name, count)) = target else { return };
    // Ordering: Relaxed, it is only a count.
    if *name == format!("{point:?}") && HITS.fetch_add(1, Ordering::Relaxed) + 1 == *count {
        std::process::abort();
    }
}
