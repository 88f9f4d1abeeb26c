//! The C memory functions that compiled code calls.
//!
//! Short ones are done with a few overlapping loads and stores, long ones with string instructions;
//! there is no loop that the compiler could turn into a call of the function it is in.
#![allow(unsafe_code)]
// UNSAFETY: these are the C functions; their contracts are C's.

use core::arch::asm;

/// Above this many bytes the string instructions are worth their start-up time.
const SHORT: usize = 64;

/// `memcpy`.
///
/// # Safety
///
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    // SAFETY: the caller's contract is C's.
    unsafe {
        if len <= SHORT {
            short_copy(to, from, len);
        } else {
            asm!("rep movsb", inout("rcx") len => _, inout("rsi") from => _,
                inout("rdi") to => _, options(nostack, preserves_flags));
        }
    }
    to
}

/// `memmove`.
///
/// # Safety
///
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    // SAFETY: the caller's contract is C's. The backward loop takes 16 bytes off the end at a time
    // and leaves less than 17 for `short_copy`, which reads all before it writes any.
    unsafe {
        if len <= SHORT {
            short_copy(to, from, len);
        } else if to.addr().wrapping_sub(from.addr()) >= len {
            asm!("rep movsb", inout("rcx") len => _, inout("rsi") from => _,
                inout("rdi") to => _, options(nostack, preserves_flags));
        } else {
            let rest: usize;
            asm!(
                "2:",
                "movups {x}, [rsi + rcx - 16]",
                "movups [rdi + rcx - 16], {x}",
                "sub rcx, 16",
                "cmp rcx, 16",
                "ja 2b",
                x = out(xmm_reg) _,
                inout("rcx") len => rest,
                in("rsi") from,
                in("rdi") to,
                options(nostack)
            );
            short_copy(to, from, rest);
        }
    }
    to
}

/// `memset`.
///
/// # Safety
///
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, len: usize) -> *mut u8 {
    // SAFETY: the caller's contract is C's; C says that the value is converted to `unsigned char`.
    unsafe {
        asm!("rep stosb", inout("rcx") len => _, inout("rdi") to => _, in("al") byte as u8,
            options(nostack, preserves_flags));
    }
    to
}

/// `memcmp`.
///
/// # Safety
///
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(left: *const u8, right: *const u8, len: usize) -> i32 {
    let mut at = 0;
    // SAFETY: the caller's contract is C's; every access is below `len`.
    unsafe {
        while len - at >= 8 {
            let a = left.add(at).cast::<u64>().read_unaligned();
            let b = right.add(at).cast::<u64>().read_unaligned();
            if a != b {
                return if u64::from_be(a) < u64::from_be(b) {
                    -1
                } else {
                    1
                };
            }
            at += 8;
        }
        while at < len {
            let (a, b) = (*left.add(at), *right.add(at));
            if a != b {
                return i32::from(a) - i32::from(b);
            }
            at += 1;
        }
    }
    0
}

/// `bcmp`.
///
/// # Safety
///
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(left: *const u8, right: *const u8, len: usize) -> i32 {
    // SAFETY: the same contract.
    unsafe { memcmp(left, right, len) }
}

/// Copies at most [`SHORT`] bytes; reads all of them before it writes any, so overlap is fine.
///
/// # Safety
///
/// Both ranges are valid, and `len <= SHORT`.
#[inline(always)]
unsafe fn short_copy(to: *mut u8, from: *const u8, len: usize) {
    /// Two loads, two stores, which meet or overlap in the middle.
    macro_rules! ends {
        ($word:ty) => {{
            let last = len - size_of::<$word>();
            let a = from.cast::<$word>().read_unaligned();
            let b = from.add(last).cast::<$word>().read_unaligned();
            to.cast::<$word>().write_unaligned(a);
            to.add(last).cast::<$word>().write_unaligned(b);
        }};
    }
    // SAFETY: every access is inside the range that `len` says.
    unsafe {
        if len > 32 {
            let a = from.cast::<u128>().read_unaligned();
            let b = from.add(16).cast::<u128>().read_unaligned();
            let c = from.add(len - 32).cast::<u128>().read_unaligned();
            let d = from.add(len - 16).cast::<u128>().read_unaligned();
            to.cast::<u128>().write_unaligned(a);
            to.add(16).cast::<u128>().write_unaligned(b);
            to.add(len - 32).cast::<u128>().write_unaligned(c);
            to.add(len - 16).cast::<u128>().write_unaligned(d);
        } else if len >= 16 {
            ends!(u128)
        } else if len >= 8 {
            ends!(u64)
        } else if len >= 4 {
            ends!(u32)
        } else if len >= 2 {
            ends!(u16)
        } else if len == 1 {
            *to = *from;
        }
    }
}
