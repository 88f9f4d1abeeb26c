//! A read or write in pieces: iovecs into guest memory, shortened as bytes get through.
#![allow(unsafe_code)]
// UNSAFETY: preadv2, pwritev2, sendmsg and recvmsg on guest memory, which no Rust slice may
// describe.

use super::Operation;
use super::geometry::DirectAlign;
use crate::ring::ChainError;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use vm_memory::GuestMemoryMmap;

/// Which way the bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    /// From the disk.
    Read,
    /// To the disk.
    Write,
}

/// What is left of a read or write. The addresses are of the memory given to [`prepare`], which
/// whoever uses them keeps mapped.
///
/// [`prepare`]: Transfer::prepare
#[derive(Clone, Debug)]
pub(super) struct Transfer {
    iovecs: Vec<libc::iovec>,
    /// The iovecs before this one are done.
    first: usize,
    direction: Direction,
    offset: u64,
    left: u64,
}

impl Default for Transfer {
    fn default() -> Transfer {
        Transfer {
            iovecs: Vec::new(),
            first: 0,
            direction: Direction::Read,
            offset: 0,
            left: 0,
        }
    }
}

impl Transfer {
    /// Takes a read or write; `false` for any other operation.
    pub(super) fn prepare(
        &mut self,
        memory: &GuestMemoryMmap,
        operation: Operation<'_>,
    ) -> Result<bool, ChainError> {
        self.iovecs.clear();
        self.first = 0;
        let iovecs = &mut self.iovecs;
        let push = |slice: vm_memory::VolatileSlice<'_, ()>| {
            iovecs.push(libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            });
        };
        match operation {
            Operation::Read { chain, offset, len } => {
                chain.writable_slices(memory, 0, len, push)?;
                (self.direction, self.offset, self.left) = (Direction::Read, offset, len);
            }
            Operation::Write {
                chain,
                from,
                offset,
                len,
            } => {
                chain.readable_slices(memory, from, len, push)?;
                (self.direction, self.offset, self.left) = (Direction::Write, offset, len);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// A transfer of one buffer of our own, which whoever uses this keeps where it is. It is done
    /// after `need` bytes: a read may ask for more than the file has.
    pub(super) fn prepare_buffer(
        &mut self,
        direction: Direction,
        buffer: &mut [u8],
        offset: u64,
        need: u64,
    ) {
        self.iovecs.clear();
        self.iovecs.push(libc::iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: buffer.len(),
        });
        self.first = 0;
        (self.direction, self.offset, self.left) = (direction, offset, need);
    }

    pub(super) fn direction(&self) -> Direction {
        self.direction
    }

    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    pub(super) fn left(&self) -> u64 {
        self.left
    }

    pub(super) fn is_done(&self) -> bool {
        self.left == 0
    }

    pub(super) fn iovecs(&self) -> &[libc::iovec] {
        self.iovecs.get(self.first..).unwrap_or_default()
    }

    /// Whether O_DIRECT takes it as it is.
    pub(super) fn is_aligned(&self, align: DirectAlign) -> bool {
        let address = |v: &libc::iovec| (v.iov_base as usize as u64).is_multiple_of(align.memory);
        let len = |v: &libc::iovec| (v.iov_len as u64).is_multiple_of(align.offset);
        self.offset.is_multiple_of(align.offset)
            && self.iovecs().iter().all(|v| address(v) && len(v))
    }

    /// `n` bytes got through. None at all is the end of the file: the image is shorter than it
    /// was.
    pub(super) fn advance(&mut self, n: usize) -> io::Result<()> {
        if n == 0 && self.left > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.offset += n as u64;
        self.left = self.left.saturating_sub(n as u64);
        let mut n = n;
        while n > 0 {
            let Some(iovec) = self.iovecs.get_mut(self.first) else {
                break;
            };
            let take = n.min(iovec.iov_len);
            // Stays inside the buffer that the iovec describes, or one past its end.
            iovec.iov_base = iovec.iov_base.cast::<u8>().wrapping_add(take).cast();
            iovec.iov_len -= take;
            n -= take;
            if iovec.iov_len == 0 {
                self.first += 1;
            }
        }
        Ok(())
    }

    /// One system call on the rest. The memory of `prepare` must still be mapped, which the
    /// engines' own handle on it sees to.
    pub(super) fn run_once(&mut self, file: &File, flags: i32) -> io::Result<()> {
        let offset = libc::off64_t::try_from(self.offset)
            .map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
        let iovecs = self.iovecs();
        let count = libc::c_int::try_from(iovecs.len())
            .map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
        // SAFETY: the iovecs describe guest memory that is mapped while the engine exists; the
        // kernel copies from or to it, and no Rust reference to it exists.
        let n = unsafe {
            match self.direction {
                Direction::Read => {
                    libc::preadv2(file.as_raw_fd(), iovecs.as_ptr(), count, offset, flags)
                }
                Direction::Write => {
                    libc::pwritev2(file.as_raw_fd(), iovecs.as_ptr(), count, offset, flags)
                }
            }
        };
        let n = usize::try_from(n).map_err(|_| io::Error::last_os_error())?;
        self.advance(n)
    }

    /// Sends `head` and then at most `limit` bytes of what is left, in one call. How many of each
    /// got through.
    pub(super) fn send(
        &mut self,
        socket: &UnixStream,
        head: &[u8],
        limit: u64,
    ) -> io::Result<(usize, u64)> {
        let mut iovecs = Vec::with_capacity(1 + self.iovecs().len());
        iovecs.push(libc::iovec {
            iov_base: head.as_ptr().cast_mut().cast(),
            iov_len: head.len(),
        });
        iovecs.extend(limited(self.iovecs(), limit));
        let n = socket_call(socket, &mut iovecs, Direction::Write)?;
        let from_head = n.min(head.len());
        let data = n - from_head;
        if data > 0 {
            self.advance(data)?;
        }
        Ok((from_head, data as u64))
    }

    /// Receives at most `limit` bytes of what is left, in one call. Zero is the end.
    pub(super) fn receive(&mut self, socket: &UnixStream, limit: u64) -> io::Result<usize> {
        let mut iovecs: Vec<_> = limited(self.iovecs(), limit).collect();
        let n = socket_call(socket, &mut iovecs, Direction::Read)?;
        if n > 0 {
            self.advance(n)?;
        }
        Ok(n)
    }

    /// System calls until all of it is done.
    pub(super) fn run(&mut self, file: &File) -> io::Result<()> {
        while !self.is_done() {
            match self.run_once(file, 0) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => result?,
            }
        }
        Ok(())
    }
}

/// The first `limit` bytes of some buffers, and no more of them than one call takes.
fn limited(iovecs: &[libc::iovec], limit: u64) -> impl Iterator<Item = libc::iovec> {
    /// Fewer than `IOV_MAX`, with room for a head.
    const MOST: usize = 512;
    let mut left = usize::try_from(limit).unwrap_or(usize::MAX);
    iovecs.iter().take(MOST).map_while(move |iovec| {
        let len = iovec.iov_len.min(left);
        left -= len;
        (len > 0).then_some(libc::iovec {
            iov_base: iovec.iov_base,
            iov_len: len,
        })
    })
}

/// Sends from or receives to buffers that are mapped: guest memory that the engine keeps, or a
/// slice that the caller borrows.
fn socket_call(
    socket: &UnixStream,
    iovecs: &mut [libc::iovec],
    direction: Direction,
) -> io::Result<usize> {
    // SAFETY: all-zero is a valid msghdr.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = iovecs.as_mut_ptr();
    message.msg_iovlen = iovecs.len();
    // SAFETY: the iovecs describe memory that is mapped, as the caller sees to; a head is only
    // read. The message has no name and no control data.
    let n = unsafe {
        match direction {
            Direction::Read => libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_DONTWAIT),
            Direction::Write => libc::sendmsg(
                socket.as_raw_fd(),
                &message,
                libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
            ),
        }
    };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// A chain that does not fit its operation, as an I/O error.
pub(super) fn chain_error(error: ChainError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, error)
}
