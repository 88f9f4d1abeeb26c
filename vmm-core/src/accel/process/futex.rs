//! Futexes on words that another process maps too.
#![allow(unsafe_code)]
// UNSAFETY: futex(2) has no wrapper.

use std::sync::atomic::AtomicU32;
use std::time::Duration;

/// Waits until somebody wakes the word, or at once if it is not `expected`. May return early.
pub(super) fn wait(word: &AtomicU32, expected: u32, limit: Option<Duration>) {
    let limit = limit.map(|l| libc::timespec {
        tv_sec: i64::try_from(l.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(l.subsec_nanos()),
    });
    let limit = limit.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: the word and the time limit outlive the call. It is not private: the guest's process
    // waits on the same page. Every result (woken, not equal, time out, signal) means "look again".
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAIT,
            expected,
            limit,
        );
    }
}

/// Wakes whoever waits on the word.
pub(super) fn wake(word: &AtomicU32) {
    // SAFETY: the word outlives the call; waking touches no memory.
    unsafe {
        libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX);
    }
}
