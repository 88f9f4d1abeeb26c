//! Arena memory: what a device can reach, handed out in owned pieces.
//!
//! The arena is shared with a peer that may write any byte of it at any time, so there is never a
//! reference into it: bytes are copied in and out. The allocator's books are in private RAM.
#![allow(unsafe_code)]
// UNSAFETY: raw access to memory that is shared with a device.

use crate::sync::SpinLock;
use alloc::collections::BTreeMap;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU16, AtomicU32, AtomicU64};
use pv_abi::layout::PAGE_SIZE;

/// Least bytes that an allocation takes and least alignment: a cache line, so that two buffers never
/// share one.
const GRAIN: u64 = 64;

/// One arena and the allocator over it; every driver with a device in this arena shares it.
#[derive(Debug)]
pub struct Arena {
    index: u32,
    gpa: u64,
    len: u64,
    base: NonNull<u8>,
    /// Free ranges, offset to length; neighbours are always merged.
    free: SpinLock<BTreeMap<u64, u64>>,
}

// SAFETY: `base` points at memory that is valid for the program's life and is accessed only with
// volatile, atomic or opaque copies, which any thread may do; the books are behind a lock.
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

/// The arena has no free range that is large enough.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfArena {
    /// The arena's index.
    pub arena: u32,
    /// Bytes asked for.
    pub wanted: usize,
}

impl core::fmt::Display for OutOfArena {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "arena {} has no {} free bytes", self.arena, self.wanted)
    }
}

impl core::error::Error for OutOfArena {}

impl Arena {
    /// An allocator over the whole arena.
    ///
    /// # Safety
    ///
    /// `base` points at `len` bytes that are readable and writable as long as the program runs, to
    /// which nothing else in the guest holds references, and which the device knows as `gpa`. There
    /// is at most one allocator for an arena.
    pub unsafe fn new(index: u32, gpa: u64, base: NonNull<u8>, len: u64) -> Self {
        let mut free = BTreeMap::new();
        let len = len & !(GRAIN - 1);
        if len != 0 {
            free.insert(0, len);
        }
        Arena {
            index,
            gpa,
            len,
            base,
            free: SpinLock::new(free),
        }
    }

    /// The arena's index in the memory map.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// First byte, as the device knows it.
    pub fn gpa(&self) -> u64 {
        self.gpa
    }

    /// Bytes in the arena.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether the arena holds no memory at all.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes that are free now, in however many pieces.
    pub fn free_bytes(&self) -> u64 {
        self.free.lock().values().sum()
    }

    /// A zeroed buffer of `len` bytes, aligned to a cache line (to a page from 4 KiB on).
    ///
    /// # Errors
    ///
    /// [`OutOfArena`] if no free range is large enough.
    pub fn alloc(&'static self, len: usize) -> Result<DmaBuf, OutOfArena> {
        let align = if len as u64 >= PAGE_SIZE {
            PAGE_SIZE
        } else {
            GRAIN
        };
        self.alloc_aligned(len, align)
    }

    /// A zeroed buffer of `len` bytes, aligned to `align`, a power of two of at most 2 MiB.
    ///
    /// # Errors
    ///
    /// [`OutOfArena`] if no free range is large enough, or `align` is no such power of two.
    pub fn alloc_aligned(&'static self, len: usize, align: u64) -> Result<DmaBuf, OutOfArena> {
        let failed = OutOfArena {
            arena: self.index,
            wanted: len,
        };
        if !align.is_power_of_two() || align > pv_abi::layout::LARGE_PAGE_SIZE {
            return Err(failed);
        }
        let size = (len as u64)
            .max(1)
            .checked_next_multiple_of(GRAIN)
            .ok_or(failed)?;
        let offset = self.take(size, align.max(GRAIN)).ok_or(failed)?;
        let buf = DmaBuf {
            arena: self,
            offset,
            len,
            size,
        };
        buf.zero();
        Ok(buf)
    }

    /// First fit: the lowest free range that holds `size` bytes at an aligned offset.
    fn take(&self, size: u64, align: u64) -> Option<u64> {
        let mut free = self.free.lock();
        let (start, len, offset) = free.iter().find_map(|(&start, &len)| {
            let offset = (self.gpa + start).checked_next_multiple_of(align)? - self.gpa;
            (offset.checked_add(size)? <= start + len).then_some((start, len, offset))
        })?;
        free.remove(&start);
        if offset > start {
            free.insert(start, offset - start);
        }
        if start + len > offset + size {
            free.insert(offset + size, start + len - offset - size);
        }
        Some(offset)
    }

    fn give_back(&self, mut offset: u64, mut size: u64) {
        let mut free = self.free.lock();
        if let Some((&start, &len)) = free.range(..offset).next_back()
            && start + len == offset
        {
            free.remove(&start);
            offset = start;
            size += len;
        }
        if let Some(len) = free.remove(&(offset + size)) {
            size += len;
        }
        free.insert(offset, size);
    }
}

/// An owned piece of an arena; freed when dropped.
///
/// A driver takes it for the time of a request and gives it back with the completion. The peer may
/// change its bytes at any moment all the same, so they are copied in and out.
pub struct DmaBuf {
    arena: &'static Arena,
    offset: u64,
    len: usize,
    /// Bytes taken from the arena.
    size: u64,
}

impl DmaBuf {
    /// Bytes in the buffer.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the buffer has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The buffer's address, as the device knows it.
    pub fn gpa(&self) -> u64 {
        self.arena.gpa + self.offset
    }

    /// The arena that it lies in.
    pub fn arena(&self) -> &'static Arena {
        self.arena
    }

    /// Copies `data` into the buffer at `offset`.
    ///
    /// # Panics
    ///
    /// If `data` does not fit there: a bug of the caller, whose numbers these are.
    #[track_caller]
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        self.check(offset, data.len());
        // SAFETY: `check` keeps it in bounds; `data` is private memory and so does not overlap.
        unsafe { opaque_copy(data.as_ptr(), self.at(offset), data.len()) }
    }

    /// Copies bytes at `offset` out of the buffer.
    ///
    /// What the peer writes meanwhile may show in part; `out` itself never changes afterwards.
    ///
    /// # Panics
    ///
    /// If `out` runs past the end: a bug of the caller, whose numbers these are.
    #[track_caller]
    pub fn read(&self, offset: usize, out: &mut [u8]) {
        self.check(offset, out.len());
        // SAFETY: `check` keeps it in bounds; `out` is private memory and so does not overlap.
        unsafe { opaque_copy(self.at(offset), out.as_mut_ptr(), out.len()) }
    }

    /// The bytes as a slice, without a copy: for peers that are trusted.
    ///
    /// # Safety
    ///
    /// The device side does not write these bytes while the slice lives. Only an owner who trusts
    /// the backend as himself can know that; otherwise use [`read`](Self::read).
    pub unsafe fn as_slice_trusting_peer(&self) -> &[u8] {
        // SAFETY: in bounds and readable (`Arena::new`); unchanging by this function's contract.
        unsafe { core::slice::from_raw_parts(self.at(0), self.len) }
    }

    /// The bytes as a mutable slice, without a copy: for peers that are trusted.
    ///
    /// # Safety
    ///
    /// The device side neither reads nor writes these bytes while the slice lives.
    pub unsafe fn as_mut_slice_trusting_peer(&mut self) -> &mut [u8] {
        // SAFETY: in bounds and writable (`Arena::new`); ours alone by this function's contract.
        unsafe { core::slice::from_raw_parts_mut(self.at(0), self.len) }
    }

    /// Writes zeroes over the whole buffer.
    pub fn zero(&self) {
        // SAFETY: in bounds (`alloc_aligned`), and opaque to the compiler.
        unsafe { opaque_zero(self.at(0), self.len) }
    }

    /// A 16-bit little-endian field of a ring, for atomic access.
    pub(crate) fn atomic_u16(&self, offset: usize) -> &AtomicU16 {
        self.check(offset, 2);
        assert!(offset.is_multiple_of(2), "ring fields are aligned");
        // SAFETY: in bounds and aligned (buffers start on a cache line); atomics may be shared with
        // a peer that writes, and the lifetime is the buffer's.
        unsafe { AtomicU16::from_ptr(self.at(offset).cast()) }
    }

    /// A 32-bit field of a ring, for atomic access.
    pub(crate) fn atomic_u32(&self, offset: usize) -> &AtomicU32 {
        self.check(offset, 4);
        assert!(offset.is_multiple_of(4), "ring fields are aligned");
        // SAFETY: as in `atomic_u16`.
        unsafe { AtomicU32::from_ptr(self.at(offset).cast()) }
    }

    /// A 64-bit field of a ring, for atomic access.
    pub(crate) fn atomic_u64(&self, offset: usize) -> &AtomicU64 {
        self.check(offset, 8);
        assert!(offset.is_multiple_of(8), "ring fields are aligned");
        // SAFETY: as in `atomic_u16`.
        unsafe { AtomicU64::from_ptr(self.at(offset).cast()) }
    }

    fn at(&self, offset: usize) -> *mut u8 {
        // SAFETY: `offset` was checked against `len`, and the buffer lies within its arena.
        unsafe {
            self.arena
                .base
                .as_ptr()
                .add(self.offset as usize)
                .add(offset)
        }
    }

    #[track_caller]
    fn check(&self, offset: usize, len: usize) {
        assert!(
            offset
                .checked_add(len)
                .is_some_and(|end| end <= self.size as usize && end <= self.len),
            "bytes {offset}+{len} of a buffer of {}",
            self.len
        );
    }
}

impl Drop for DmaBuf {
    fn drop(&mut self) {
        self.arena.give_back(self.offset, self.size);
    }
}

impl core::fmt::Debug for DmaBuf {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "DmaBuf({:#x}+{:#x})", self.gpa(), self.len)
    }
}

/// Copies bytes in a way that the compiler sees nothing of, so that a peer's writes meanwhile are
/// not undefined behaviour but merely show or do not show.
///
/// # Safety
///
/// Both ranges are valid, and they do not overlap.
unsafe fn opaque_copy(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: by contract; the direction flag is clear by the ABI.
    unsafe {
        core::arch::asm!("rep movsb", inout("rcx") len => _, inout("rsi") from => _,
            inout("rdi") to => _, options(nostack, preserves_flags));
    }
}

/// As [`opaque_copy`], with zeroes.
///
/// # Safety
///
/// The range is valid for writes.
unsafe fn opaque_zero(to: *mut u8, len: usize) {
    // SAFETY: by contract; the direction flag is clear by the ABI.
    unsafe {
        core::arch::asm!("rep stosb", inout("rcx") len => _, inout("rdi") to => _, in("al") 0u8,
            options(nostack, preserves_flags));
    }
}

#[cfg(test)]
mod tests {
    use crate::fake::Fake;
    use alloc::vec::Vec;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Buffers never overlap, are aligned and zeroed, and leave one whole free range behind.
        #[test]
        fn buffers_are_apart_and_come_back(
            actions in proptest::collection::vec((any::<bool>(), 0usize..9000, 0u32..14), 1..120)
        ) {
            let arena = Fake::new(1, 1, 1, true).the_arena();
            let mut held = Vec::new();
            for (free, len, shift) in actions {
                if free && !held.is_empty() {
                    held.swap_remove(len % held.len());
                    continue;
                }
                let mut buf = arena.alloc_aligned(len, 1 << shift).expect("plenty of room");
                prop_assert_eq!(buf.gpa() % (1 << shift), 0);
                prop_assert_eq!(buf.gpa() % 64, 0);
                let mut bytes = alloc::vec![1; len];
                buf.read(0, &mut bytes);
                prop_assert!(bytes.iter().all(|&byte| byte == 0));
                bytes.fill(0xff);
                buf.write(0, &bytes);
                held.push(buf);
                let mut ranges: Vec<_> = held
                    .iter()
                    .map(|buf| (buf.gpa(), buf.gpa() + buf.len() as u64))
                    .collect();
                ranges.sort_unstable();
                prop_assert!(ranges.windows(2).all(|pair| pair[0].1 <= pair[1].0));
            }
            drop(held);
            prop_assert_eq!(arena.free_bytes(), arena.len());
            let whole = arena.alloc(arena.len() as usize);
            prop_assert!(whole.is_ok(), "the free range is in one piece");
            prop_assert!(arena.alloc(1).is_err());
        }
    }

    #[test]
    fn what_cannot_be_had_is_refused() {
        let arena = Fake::new(1, 1, 1, true).the_arena();
        for (len, align) in [
            (usize::MAX, 64),
            (arena.len() as usize + 1, 64),
            (64, 3),
            (64, 4 << 20),
        ] {
            assert!(arena.alloc_aligned(len, align).is_err(), "{len} {align}");
        }
        assert_eq!(arena.free_bytes(), arena.len());
    }

    #[test]
    #[should_panic(expected = "bytes 60+5 of a buffer of 64")]
    fn a_copy_past_the_end_is_the_callers_bug() {
        let arena = Fake::new(1, 1, 1, true).the_arena();
        arena.alloc(64).expect("room").write(60, &[0; 5]);
    }
}
