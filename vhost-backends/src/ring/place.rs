//! Where the parts of a ring may lie, and the way to their bytes.
#![allow(unsafe_code)]
// UNSAFETY: atomic accesses to memory of a guest, found once and not again for each access.

use super::{Retire, RingError, RingPart};
use std::arch::asm;
use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    VolatileSlice,
};

/// A part of a ring in memory of ours.
#[derive(Debug)]
pub(super) struct Mapped {
    start: NonNull<u8>,
    len: usize,
    /// Keeps it mapped.
    _memory: Arc<GuestMemoryMmap>,
}

// SAFETY: the memory is mapped as long as this exists, whoever has it, and every access is atomic.
unsafe impl Send for Mapped {}
// SAFETY: as above.
unsafe impl Sync for Mapped {}

impl Mapped {
    /// Where `T` lies. Every `T` here is an atomic integer without padding.
    #[inline]
    fn at<T>(&self, offset: u64) -> Result<NonNull<T>, Retire> {
        let offset = usize::try_from(offset).map_err(|_| Retire::RingAccess)?;
        let inside = offset
            .checked_add(size_of::<T>())
            .is_some_and(|end| end <= self.len);
        if !inside {
            return Err(Retire::RingAccess);
        }
        // SAFETY: inside the part, which is inside one mapping.
        let place = unsafe { self.start.add(offset) }.cast::<T>();
        if place.is_aligned() {
            Ok(place)
        } else {
            Err(Retire::RingAccess)
        }
    }

    #[inline]
    pub(super) fn load16(&self, offset: u64, order: Ordering) -> Result<u16, Retire> {
        // SAFETY: mapped and aligned; others change it at most as atomically as this reads it.
        let value = unsafe { self.at::<AtomicU16>(offset)?.as_ref() }.load(order);
        Ok(u16::from_le(value))
    }

    #[inline]
    pub(super) fn store16(&self, offset: u64, value: u16, order: Ordering) -> Result<(), Retire> {
        // SAFETY: as in `load16`.
        unsafe { self.at::<AtomicU16>(offset)?.as_ref() }.store(value.to_le(), order);
        Ok(())
    }

    #[inline]
    pub(super) fn store32(&self, offset: u64, value: u32) -> Result<(), Retire> {
        // SAFETY: as in `load16`. Ordering: Relaxed, what publishes it comes later.
        unsafe { self.at::<AtomicU32>(offset)?.as_ref() }.store(value.to_le(), Ordering::Relaxed);
        Ok(())
    }

    /// Eight bytes, the first in the lowest.
    #[inline]
    pub(super) fn load64(&self, offset: u64, order: Ordering) -> Result<u64, Retire> {
        // SAFETY: as in `load16`.
        let value = unsafe { self.at::<AtomicU64>(offset)?.as_ref() }.load(order);
        Ok(u64::from_le(value))
    }

    /// Eight bytes, the lowest first.
    #[inline]
    pub(super) fn store64(&self, offset: u64, value: u64, order: Ordering) -> Result<(), Retire> {
        // SAFETY: as in `load16`.
        unsafe { self.at::<AtomicU64>(offset)?.as_ref() }.store(value.to_le(), order);
        Ok(())
    }

    /// Asks the processor for a place that will be read soon. One outside is let be.
    #[inline]
    pub(super) fn prefetch(&self, offset: u64) {
        if let Ok(place) = self.at::<AtomicU16>(offset) {
            // SAFETY: a hint that reads nothing; SSE is there on every x86-64.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(place.as_ptr().cast()) };
        }
    }

    /// Asks for one that will be read and then written.
    #[inline]
    pub(super) fn prefetch_to_write(&self, offset: u64) {
        if let Ok(place) = self.at::<AtomicU16>(offset) {
            prefetch_to_write(place.as_ptr().cast());
        }
    }
}

/// Bytes that the processor fetches together.
pub(super) const LINE: usize = 64;

/// The whole of a buffer, where it lies in this region. Like this, and not by the region's own
/// way: what that gives back goes through memory, and a batch of buffers waits for it.
#[inline]
pub(super) fn view_in(
    region: &GuestRegionMmap,
    addr: GuestAddress,
    len: usize,
) -> Option<VolatileSlice<'_, ()>> {
    let from = addr.0.checked_sub(region.start_addr().0)?;
    let end = from.checked_add(len as u64)?;
    if end > region.len() {
        return None;
    }
    // Below the region's length, which is a mapping's.
    let from = from as usize;
    // SAFETY: these bytes are in the mapping, which is there as long as the region is borrowed.
    Some(unsafe { VolatileSlice::new(region.as_ptr().add(from), len) })
}

/// A view in two, the first of them `at` bytes long.
#[inline]
pub(crate) fn cut<'m>(
    view: VolatileSlice<'m, ()>,
    at: usize,
) -> Option<(VolatileSlice<'m, ()>, VolatileSlice<'m, ()>)> {
    let rest = view.len().checked_sub(at)?;
    let start = view.ptr_guard_mut().as_ptr();
    // SAFETY: both are in the view, and live as long.
    Some(unsafe {
        (
            VolatileSlice::new(start, at),
            VolatileSlice::new(start.add(at), rest),
        )
    })
}

/// Asks the processor for the start of a buffer that will be read soon: a header, and what comes
/// behind it.
#[inline]
pub(crate) fn will_read(view: &VolatileSlice<'_, ()>) {
    let start: *const i8 = view.ptr_guard().as_ptr().cast();
    // SAFETY: hints that read nothing, whatever is there; SSE is there on every x86-64.
    unsafe {
        _mm_prefetch::<_MM_HINT_T0>(start);
        _mm_prefetch::<_MM_HINT_T0>(start.wrapping_add(LINE));
    }
}

/// Asks the processor for the start of a buffer that will be written soon.
#[inline]
pub(crate) fn will_write(view: &VolatileSlice<'_, ()>) {
    let start = view.ptr_guard().as_ptr();
    prefetch_to_write(start);
    prefetch_to_write(start.wrapping_add(LINE));
}

/// Asks for a line alone. The intrinsic for this asks for a line to share, but where a compiler is
/// told of a newer processor; and the one who has it would be asked a second time.
#[inline]
fn prefetch_to_write(place: *const u8) {
    // SAFETY: a hint that changes nothing, whatever is there; a processor that does not know it
    // takes it for none.
    unsafe {
        asm!("prefetchw [{}]", in(reg) place, options(nostack, preserves_flags, readonly));
    }
}

/// A part of a ring lies in one region and is aligned for guest and host alike.
pub(super) fn map_part(
    mem: &Arc<GuestMemoryMmap>,
    part: RingPart,
    addr: GuestAddress,
    align: u64,
    len: u64,
) -> Result<Mapped, RingError> {
    let misaligned = RingError::Misaligned { part, addr: addr.0 };
    let outside = RingError::OutsideMemory { part, addr: addr.0 };
    if !addr.0.is_multiple_of(align) {
        return Err(misaligned);
    }
    let region = mem.find_region(addr).ok_or(outside)?;
    let end = addr.0.checked_add(len - 1).ok_or(outside)?;
    if end > region.last_addr().0 {
        return Err(outside);
    }
    // An odd region base makes aligned guest addresses misaligned here.
    let host = GuestMemoryBackend::get_host_address(&**mem, addr).map_err(|_| outside)?;
    if !(host as usize as u64).is_multiple_of(align) {
        return Err(misaligned);
    }
    Ok(Mapped {
        start: NonNull::new(host).ok_or(outside)?,
        len: usize::try_from(len).map_err(|_| outside)?,
        _memory: Arc::clone(mem),
    })
}
