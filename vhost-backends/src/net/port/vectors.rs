//! Reads and writes of frames: vectors into memory that may be a guest's.
#![allow(unsafe_code)]
// UNSAFETY: readv, writev, sendmsg, recvmsg on guest memory, which no Rust slice may describe.

use smallvec::SmallVec;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use vm_memory::VolatileSlice;

/// Pieces in one call, with a head and a tail; below `IOV_MAX`.
pub(in crate::net) const MOST: usize = 1000;

/// Room for the vectors of a call.
#[derive(Debug)]
struct Vectors {
    list: SmallVec<[libc::iovec; 8]>,
}

impl Vectors {
    fn new(pieces: usize) -> Vectors {
        Vectors {
            list: SmallVec::with_capacity(pieces + 2),
        }
    }

    fn push(&mut self, start: *mut u8, len: usize) {
        if len > 0 && self.list.len() < MOST {
            self.list.push(libc::iovec {
                iov_base: start.cast(),
                iov_len: len,
            });
        }
    }

    fn push_pieces(&mut self, pieces: &[VolatileSlice<'_, ()>]) {
        for piece in pieces {
            self.push(piece.ptr_guard_mut().as_ptr(), piece.len());
        }
    }

    fn count(&self) -> libc::c_int {
        // At most MOST.
        self.list.len() as libc::c_int
    }
}

fn outcome(n: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// Reads one message into a head, views of memory and a tail, in this order.
pub(super) fn read(
    fd: BorrowedFd<'_>,
    head: &mut [u8],
    views: &[VolatileSlice<'_, ()>],
    tail: &mut [u8],
) -> io::Result<usize> {
    let mut vectors = Vectors::new(views.len());
    vectors.push(head.as_mut_ptr(), head.len());
    vectors.push_pieces(views);
    vectors.push(tail.as_mut_ptr(), tail.len());
    // SAFETY: head and tail are borrowed mutably, and the views are mapped memory to which no
    // Rust reference exists, all through the call.
    outcome(unsafe { libc::readv(fd.as_raw_fd(), vectors.list.as_ptr(), vectors.count()) })
}

/// Receives as [`read`] does, with what the socket says about the message: so many bytes of
/// `control`.
pub(super) fn receive(
    fd: BorrowedFd<'_>,
    head: &mut [u8],
    views: &[VolatileSlice<'_, ()>],
    tail: &mut [u8],
    control: &mut [u64],
) -> io::Result<(usize, usize)> {
    let mut vectors = Vectors::new(views.len());
    vectors.push(head.as_mut_ptr(), head.len());
    vectors.push_pieces(views);
    vectors.push(tail.as_mut_ptr(), tail.len());
    // SAFETY: all-zero is a valid msghdr.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = vectors.list.as_mut_ptr();
    message.msg_iovlen = vectors.list.len();
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(control);
    // SAFETY: as in `read`; the control data is borrowed mutably, and as long as is said.
    let n = outcome(unsafe { libc::recvmsg(fd.as_raw_fd(), &mut message, 0) })?;
    Ok((n, message.msg_controllen))
}

/// Writes a head and pieces as one message.
pub(super) fn write(
    fd: BorrowedFd<'_>,
    head: &[u8],
    pieces: &[VolatileSlice<'_, ()>],
) -> io::Result<usize> {
    let mut vectors = Vectors::new(pieces.len());
    vectors.push(head.as_ptr().cast_mut(), head.len());
    vectors.push_pieces(pieces);
    // SAFETY: the kernel only reads; the head is borrowed and the pieces are mapped memory, both
    // through the call.
    outcome(unsafe { libc::writev(fd.as_raw_fd(), vectors.list.as_ptr(), vectors.count()) })
}

/// Sends what the socket takes of a head and pieces, without waiting and without a signal.
pub(in crate::net) fn send(
    fd: BorrowedFd<'_>,
    head: &[u8],
    pieces: &[VolatileSlice<'_, ()>],
) -> io::Result<usize> {
    let mut vectors = Vectors::new(pieces.len());
    vectors.push(head.as_ptr().cast_mut(), head.len());
    vectors.push_pieces(pieces);
    // SAFETY: all-zero is a valid msghdr.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = vectors.list.as_mut_ptr();
    message.msg_iovlen = vectors.list.len();
    // SAFETY: as in `write`; the message has no name and no control data.
    outcome(unsafe {
        libc::sendmsg(
            fd.as_raw_fd(),
            &message,
            libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
        )
    })
}
