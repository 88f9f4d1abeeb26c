//! Waiting: `poll(2)` on a few descriptors with a deadline, and events that end a wait.
#![allow(unsafe_code)]
// UNSAFETY: poll, fcntl, eventfd and clock_gettime as system calls; no safe wrapper is among the
// dependencies.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};
use vmm_sys_util::epoll::Epoll;
use vmm_sys_util::timerfd::TimerFd;

/// What to wait for on one descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Interest {
    /// Readable, or hung up.
    Read,
    /// Writable, or hung up.
    Write,
}

/// Waits until one of `fds` is ready; says which are. All `false` means that the time is over.
pub(crate) fn wait<const N: usize>(
    fds: [(BorrowedFd<'_>, Interest); N],
    timeout: Option<Duration>,
) -> io::Result<[bool; N]> {
    let mut set = fds.map(asked);
    poll(&mut set, timeout)?;
    Ok(set.map(is_ready))
}

/// The same for any number of descriptors.
pub(crate) fn wait_any(
    fds: &[(BorrowedFd<'_>, Interest)],
    timeout: Option<Duration>,
) -> io::Result<Vec<bool>> {
    let mut set: Vec<_> = fds.iter().copied().map(asked).collect();
    poll(&mut set, timeout)?;
    Ok(set.into_iter().map(is_ready).collect())
}

fn asked((fd, interest): (BorrowedFd<'_>, Interest)) -> libc::pollfd {
    libc::pollfd {
        fd: fd.as_raw_fd(),
        events: match interest {
            Interest::Read => libc::POLLIN,
            Interest::Write => libc::POLLOUT,
        },
        revents: 0,
    }
}

fn is_ready(polled: libc::pollfd) -> bool {
    polled.revents != 0
}

fn poll(set: &mut [libc::pollfd], timeout: Option<Duration>) -> io::Result<()> {
    let deadline = timeout.map(|t| Instant::now() + t);
    loop {
        let ms = deadline.map_or(-1, |d| {
            let left = d.saturating_duration_since(Instant::now());
            // Rounded up, so that the wait does not end before the deadline.
            i32::try_from(left.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
        });
        let count = set.len() as libc::nfds_t;
        // SAFETY: `set` has so many pollfd, and lives through the call.
        if unsafe { libc::poll(set.as_mut_ptr(), count, ms) } >= 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// The file status flags of a descriptor (`O_NONBLOCK`, `O_APPEND`, ...).
pub(crate) fn status_flags(fd: BorrowedFd<'_>) -> io::Result<i32> {
    // SAFETY: F_GETFL takes no pointer.
    match unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) } {
        -1 => Err(io::Error::last_os_error()),
        flags => Ok(flags),
    }
}

/// An epoll as a descriptor to wait for.
pub(crate) fn epoll_fd(epoll: &Epoll) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is the epoll's own, which is borrowed for as long as the result.
    unsafe { BorrowedFd::borrow_raw(epoll.as_raw_fd()) }
}

/// A timer as a descriptor to wait for.
pub(crate) fn timer_fd(timer: &TimerFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is the timer's own, which is borrowed for as long as the result.
    unsafe { BorrowedFd::borrow_raw(timer.as_raw_fd()) }
}

/// Nanoseconds of a clock that all processes of this host share.
pub(crate) fn monotonic_nanos() -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `now` is valid for the call, which cannot fail for this clock.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    // Neither is negative.
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

/// An eventfd of our own: non-blocking, closed on exec.
#[derive(Debug)]
pub(crate) struct Event(File);

impl Event {
    pub(crate) fn new() -> io::Result<Event> {
        // SAFETY: eventfd takes no pointer.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made and nothing else owns it.
        Ok(Event(unsafe { File::from_raw_fd(fd) }))
    }

    /// Makes it readable.
    pub(crate) fn set(&self) {
        // Full means readable: that is what was wanted.
        let _ = (&self.0).write(&1u64.to_ne_bytes());
    }

    /// Makes it not readable.
    pub(crate) fn clear(&self) {
        // Empty means not readable: that is what was wanted.
        let _ = (&self.0).read(&mut [0; 8]);
    }

    pub(crate) fn duplicate(&self) -> io::Result<OwnedFd> {
        Ok(self.0.try_clone()?.into())
    }
}

impl From<OwnedFd> for Event {
    /// Of a descriptor that `duplicate` gave.
    fn from(fd: OwnedFd) -> Event {
        Event(fd.into())
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
