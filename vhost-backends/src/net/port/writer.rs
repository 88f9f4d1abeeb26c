//! Many frames to a descriptor with one system call.
//!
//! In come frames and a descriptor that takes each write as one message; out goes how many it
//! took. Each write is tried once and never waits, so that nothing is left when the call is over.
#![allow(unsafe_code)]
// UNSAFETY: entries of a submission queue, which point to frames and to guest memory.

use crate::net::frame::Frame;
use crate::net::limits::MAX_BATCH;
use io_uring::{IoUring, opcode, types};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use zerocopy::IntoBytes;

/// Frames from which on this is less work than a call for each.
pub(super) const WORTH: usize = 4;
/// Pieces of a frame, with its header; below `IOV_MAX`.
const MOST: usize = super::vectors::MOST;

/// A queue of writes.
pub(super) struct Writer {
    ring: IoUring,
    vectors: Vec<libc::iovec>,
    /// Vectors of each frame.
    counts: Vec<u32>,
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
        })
    }

    /// Writes up to [`MAX_BATCH`] frames, each with its header in front. How many were taken. After
    /// an error this is to be thrown away: what it says was not tried is not known.
    pub(super) fn write(&mut self, fd: BorrowedFd<'_>, frames: &[Frame<'_>]) -> io::Result<usize> {
        self.vectors.clear();
        self.counts.clear();
        for frame in frames.iter().take(MAX_BATCH) {
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
        let mut first = 0;
        for count in &self.counts {
            let vectors = self.vectors.get(first..).unwrap_or_default();
            let entry = opcode::Writev::new(types::Fd(fd.as_raw_fd()), vectors.as_ptr(), *count)
                .rw_flags(libc::RWF_NOWAIT)
                .build();
            // SAFETY: the vectors are not touched before this function ends, and what they point
            // to, the frames' headers and guest memory, is borrowed as long. An entry is over
            // when the call that submits it returns, since it does not wait for anything; one
            // that was never submitted goes with the ring, which the caller drops then.
            unsafe { self.ring.submission().push(&entry) }.map_err(io::Error::other)?;
            first += *count as usize;
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
