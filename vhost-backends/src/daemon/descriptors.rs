//! How many descriptors this process may have: as many as the host lets it, and enough for every
//! device, so that none finds out in the middle of a connection.
#![allow(unsafe_code)]
// UNSAFETY: getrlimit and setrlimit are system calls without a safe wrapper here.

use crate::limits::{DEVICE_DESCRIPTORS, QUEUE_DESCRIPTORS};
use std::io;

/// Raises the limit as far as it goes. How far that is.
pub(super) fn raise() -> io::Result<u64> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the limit is valid for the call.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let raised = libc::rlimit {
        rlim_cur: limit.rlim_max,
        ..limit
    };
    // SAFETY: the limit is valid for the call.
    match unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const raised) } {
        0 => Ok(raised.rlim_cur),
        _ => Ok(limit.rlim_cur),
    }
}

/// Whether devices with so many queues each fit. The error is a sentence.
pub(super) fn check(limit: u64, queues: impl Iterator<Item = u16>) -> Result<(), String> {
    let needs = |queues: u16| DEVICE_DESCRIPTORS + QUEUE_DESCRIPTORS * u64::from(queues);
    let needed = queues.map(needs).sum::<u64>();
    if needed > limit {
        return Err(format!(
            "so many devices and queues need {needed} descriptors, and this process may have \
             {limit}: raise the hard limit (ulimit -Hn, LimitNOFILE=)"
        ));
    }
    Ok(())
}
