//! The global allocator, over every usable region of the memory map.
#![allow(unsafe_code)]
// UNSAFETY: claims raw memory for the allocator; implements its lock.

use core::sync::atomic::{AtomicBool, Ordering};
use pv_abi::boot::{MemoryRegion, memory_kind};
use talc::DefaultBinning;
use talc::lock_api::{GuardSend, RawMutex};
use talc::source::Manual;
use talc::sync::TalcLock;

#[global_allocator]
static HEAP: TalcLock<RawSpin, Manual, DefaultBinning> = TalcLock::new(Manual);

/// Gives the allocator its memory.
///
/// # Safety
///
/// Called once; the usable regions of `map` are mapped, writable and used by nobody else.
pub(super) unsafe fn start(map: &[MemoryRegion]) {
    let mut heap = HEAP.lock();
    for region in map.iter().filter(|r| r.kind == memory_kind::USABLE) {
        let base = core::ptr::with_exposed_provenance_mut(region.gpa as usize);
        // SAFETY: by contract. A region that is too small to hold anything is not claimed.
        let _end = unsafe { heap.claim(base, region.len as usize) };
    }
}

/// The allocator's lock.
#[derive(Debug)]
struct RawSpin(AtomicBool);

// SAFETY: one `compare_exchange` winner at a time holds it until its `unlock`.
unsafe impl RawMutex for RawSpin {
    #[allow(
        clippy::declare_interior_mutable_const,
        reason = "what lock_api asks for"
    )]
    const INIT: Self = RawSpin(AtomicBool::new(false));
    type GuardMarker = GuardSend;

    fn lock(&self) {
        while !self.try_lock() {
            core::hint::spin_loop();
        }
    }

    fn try_lock(&self) -> bool {
        // Ordering: Acquire on success pairs with the Release in `unlock`; failure publishes nothing.
        self.0
            .compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed)
            .is_ok()
    }

    unsafe fn unlock(&self) {
        // Ordering: Release publishes the holder's writes to the next `try_lock`.
        self.0.store(false, Ordering::Release);
    }
}
