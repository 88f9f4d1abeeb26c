//! Many frames to a descriptor with one system call.
//!
//! In come frames and a descriptor that takes each write as one message; out goes how many it
//! took. Each write is tried once and never waits, so that nothing is left when the call is over.
#![allow(unsafe_code)]
// UNSAFETY: entries of a submission queue, which point to frames and to guest memory.

use crate::net::frame::Frame;
use crate::net::limits::MAX_BATCH;
use io_uring::{IoUring, opcode, types};
use pv_abi::virtio::net::Header;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use zerocopy::IntoBytes;

/// Frames from which on this is less work than a call for each.
pub(super) const WORTH: usize = 4;
/// Frames up to this many bytes are put behind their headers first: the host takes one buffer with
/// less work than it takes two, which is more than the copy costs.
const SMALL: usize = 128;
/// A header and a small frame.
const ROOM: usize = size_of::<Header>() + SMALL;
/// Pieces of a frame, with its header; below `IOV_MAX`.
const MOST: usize = super::vectors::MOST;

/// A queue of writes.
pub(super) struct Writer {
    ring: IoUring,
    vectors: Vec<libc::iovec>,
    /// Vectors of each frame; 0 for one that is in `small`.
    counts: Vec<u32>,
    /// A header and a small frame in each; read by the kernel until a write is over.
    small: Box<[[u8; ROOM]]>,
}

// SAFETY: the vectors are left over from a call that has ended: nobody follows them.
unsafe impl Send for Writer {}

impl std::fmt::Debug for Writer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Writer").finish_non_exhaustive()
    }
}

impl Writer {
    pub(super) fn new() -> io::Result<Writer> {
        Ok(Writer {
            // A power of two.
            ring: IoUring::new(MAX_BATCH as u32)?,
            vectors: Vec::new(),
            counts: Vec::new(),
            small: vec![[0; ROOM]; MAX_BATCH].into_boxed_slice(),
        })
    }

    /// Writes up to [`MAX_BATCH`] frames, each with its header in front. How many were taken. After
    /// an error this is to be thrown away: what it says was not tried is not known.
    pub(super) fn write(&mut self, fd: BorrowedFd<'_>, frames: &[Frame<'_>]) -> io::Result<usize> {
        self.vectors.clear();
        self.counts.clear();
        for (frame, room) in frames.iter().zip(&mut self.small) {
            if frame.len() <= SMALL {
                gather(frame, room);
                self.counts.push(0);
                continue;
            }
            let before = self.vectors.len();
            let header = frame.header.as_bytes();
            self.vectors.push(libc::iovec {
                iov_base: header.as_ptr().cast_mut().cast(),
                iov_len: header.len(),
            });
            let pieces = frame.pieces().iter().take(MOST);
            self.vectors.extend(pieces.map(|piece| libc::iovec {
                iov_base: piece.ptr_guard_mut().as_ptr().cast(),
                iov_len: piece.len(),
            }));
            // At most MOST and one.
            self.counts.push((self.vectors.len() - before) as u32);
        }
        let fd = types::Fd(fd.as_raw_fd());
        let mut first = 0;
        for ((frame, room), count) in frames.iter().zip(&self.small).zip(&self.counts) {
            let entry = if *count == 0 {
                // At most ROOM.
                let len = (size_of::<Header>() + frame.len()) as u32;
                opcode::Write::new(fd, room.as_ptr(), len)
                    .rw_flags(libc::RWF_NOWAIT)
                    .build()
            } else {
                let vectors = self.vectors.get(first..).unwrap_or_default();
                first += *count as usize;
                opcode::Writev::new(fd, vectors.as_ptr(), *count)
                    .rw_flags(libc::RWF_NOWAIT)
                    .build()
            };
            // SAFETY: the vectors and the rooms are not touched before this function ends, and
            // what the vectors point to, the frames' headers and guest memory, is borrowed as
            // long. An entry is over when the call that submits it returns, since it does not wait
            // for anything; one that was never submitted goes with the ring, which the caller
            // drops then.
            unsafe { self.ring.submission().push(&entry) }.map_err(io::Error::other)?;
        }
        self.finish()
    }

    /// Submits everything and takes all of it back.
    fn finish(&mut self) -> io::Result<usize> {
        let (mut left, mut taken) = (self.counts.len(), 0);
        while left > 0 {
            match self.ring.submit_and_wait(left) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                outcome => drop(outcome?),
            }
            for done in self.ring.completion() {
                left = left.saturating_sub(1);
                match done.result() {
                    0.. => taken += 1,
                    // The host cannot try without waiting.
                    error if error == -libc::EOPNOTSUPP => {
                        return Err(io::ErrorKind::Unsupported.into());
                    }
                    // As on any network.
                    _ => {}
                }
            }
        }
        Ok(taken)
    }
}

/// Puts header and frame, which fit, one behind the other.
fn gather(frame: &Frame<'_>, room: &mut [u8; ROOM]) {
    let (header, mut rest) = room.split_at_mut(size_of::<Header>());
    header.copy_from_slice(frame.header.as_bytes());
    for piece in frame.pieces() {
        let n = piece.copy_to(rest);
        rest = rest.get_mut(n..).unwrap_or_default();
    }
}
