//! io_uring, with the page cache tried inline first.
//!
//! A read that the page cache holds costs one `preadv2(RWF_NOWAIT)`, less than a trip through a
//! submission queue; one that it does not hold goes to the ring, as does every O_DIRECT request
//! and every flush. The ring also polls the kick and the stop event, so that the worker sleeps in
//! one place. The polls are multishot and edge-like: the kick is never read.
#![allow(unsafe_code)]
// UNSAFETY: entries of the submission queue carry addresses that the kernel uses until they
// complete.

use super::transfer::{Direction, Transfer, chain_error};
use super::{Engine, Finished, Operation, RawFile, Token, Wake, WakeSources};
use crate::limits::MAX_IN_FLIGHT;
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;
use vm_memory::GuestMemoryMmap;

/// Entries: every operation in flight and both polls.
const ENTRIES: u32 = (MAX_IN_FLIGHT as u32 + 2).next_power_of_two();
const USER_KICK: u64 = u64::MAX;
const USER_STOP: u64 = u64::MAX - 1;
/// Index of the registered descriptors.
const FIXED_MAIN: types::Fixed = types::Fixed(0);
const FIXED_CACHED: types::Fixed = types::Fixed(1);

#[derive(Debug, Default)]
struct Slot {
    busy: bool,
    flush: bool,
    cached: bool,
    transfer: Transfer,
}

/// io_uring and inline attempts, on one raw file.
pub struct UringEngine {
    ring: IoUring,
    file: Arc<RawFile>,
    /// Keeps mapped what operations in flight point to.
    memory: Arc<GuestMemoryMmap>,
    slots: Vec<Slot>,
    in_flight: usize,
    /// Whether the file system answers `RWF_NOWAIT`.
    try_cache: bool,
    stop: bool,
    kick_fd: RawFd,
    stop_fd: RawFd,
}

impl std::fmt::Debug for UringEngine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("UringEngine")
            .field("file", &self.file)
            .field("in_flight", &self.in_flight)
            .finish_non_exhaustive()
    }
}

impl UringEngine {
    /// An engine on `file`, to be used by the calling thread. The descriptors in `wake` must stay
    /// open as long as the engine exists.
    pub fn new(
        file: Arc<RawFile>,
        memory: Arc<GuestMemoryMmap>,
        wake: WakeSources<'_>,
    ) -> io::Result<UringEngine> {
        let ring = build_ring()?;
        let fds = [file.main().as_raw_fd(), file.cached().as_raw_fd()];
        ring.submitter().register_files(&fds)?;
        let mut engine = UringEngine {
            ring,
            try_cache: !file.options().direct,
            file,
            memory,
            slots: std::iter::repeat_with(Slot::default)
                .take(MAX_IN_FLIGHT)
                .collect(),
            in_flight: 0,
            stop: false,
            kick_fd: wake.kick.as_raw_fd(),
            stop_fd: wake.stop.as_raw_fd(),
        };
        engine.poll_event(USER_KICK)?;
        engine.poll_event(USER_STOP)?;
        Ok(engine)
    }

    fn poll_event(&mut self, user: u64) -> io::Result<()> {
        let fd = if user == USER_KICK {
            self.kick_fd
        } else {
            self.stop_fd
        };
        let entry = opcode::PollAdd::new(types::Fd(fd), libc::POLLIN as u32)
            .multi(user == USER_KICK)
            .build()
            .user_data(user);
        // SAFETY: a poll entry has no address in it.
        unsafe { self.push(&entry) }
    }

    /// # Safety
    ///
    /// What the entry points to stays valid until it completes.
    unsafe fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        loop {
            // SAFETY: as this function's own.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return Ok(());
            }
            self.ring.submit()?;
        }
    }

    /// Queues what is left of the operation in a slot.
    fn queue(&mut self, token: Token) -> io::Result<()> {
        let Some(slot) = self.slots.get(usize::from(token)) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let file = if slot.cached {
            FIXED_CACHED
        } else {
            FIXED_MAIN
        };
        let iovecs = slot.transfer.iovecs();
        let offset = slot.transfer.offset();
        let entry = match (iovecs, slot.transfer.direction()) {
            _ if slot.flush => opcode::Fsync::new(file)
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
            ([one], Direction::Read) if u32::try_from(one.iov_len).is_ok() => {
                opcode::Read::new(file, one.iov_base.cast(), one.iov_len as u32)
                    .offset(offset)
                    .build()
            }
            ([one], Direction::Write) if u32::try_from(one.iov_len).is_ok() => {
                opcode::Write::new(file, one.iov_base.cast(), one.iov_len as u32)
                    .offset(offset)
                    .build()
            }
            (many, Direction::Read) => opcode::Readv::new(file, many.as_ptr(), many.len() as u32)
                .offset(offset)
                .build(),
            (many, Direction::Write) => opcode::Writev::new(file, many.as_ptr(), many.len() as u32)
                .offset(offset)
                .build(),
        };
        let entry = entry.user_data(u64::from(token));
        // SAFETY: the buffers are guest memory, mapped as long as `self.memory`; the iovecs are
        // in the slot, which is not touched while it is busy. The engine is dropped only after
        // everything in flight has completed.
        unsafe { self.push(&entry) }
    }

    fn start_inner(&mut self, token: Token, operation: Operation<'_>) -> io::Result<bool> {
        let align = self.file.align();
        let slot = self
            .slots
            .get_mut(usize::from(token))
            .filter(|slot| !slot.busy)
            .ok_or(io::ErrorKind::InvalidInput)?;
        slot.flush = false;
        slot.cached = false;
        match operation {
            Operation::Discard { offset, len } => {
                self.file.discard(offset, len)?;
                return Ok(true);
            }
            Operation::WriteZeroes { offset, len, unmap } => {
                self.file.write_zeroes(offset, len, unmap)?;
                return Ok(true);
            }
            Operation::Flush => slot.flush = true,
            Operation::Read { .. } | Operation::Write { .. } => {
                slot.transfer
                    .prepare(&self.memory, operation)
                    .map_err(chain_error)?;
                if slot.transfer.is_done() {
                    return Ok(true);
                }
                slot.cached = !slot.transfer.is_aligned(align);
                if self.try_cache
                    && try_inline(&mut slot.transfer, &self.file, &mut self.try_cache)?
                {
                    return Ok(true);
                }
            }
        }
        self.queue(token)?;
        if let Some(slot) = self.slots.get_mut(usize::from(token)) {
            slot.busy = true;
            self.in_flight += 1;
        }
        Ok(false)
    }

    /// Handles one completion: goes on with a short one, or gives its end.
    fn completed(&mut self, entry: &cqueue::Entry) -> io::Result<Option<Finished>> {
        let user = entry.user_data();
        if user == USER_STOP {
            self.stop = true;
            return Ok(None);
        }
        if user == USER_KICK {
            // A multishot poll ends when the completion queue was full.
            if !cqueue::more(entry.flags()) {
                // An error (a peer's descriptor that cannot be polled) must not spin.
                if entry.result() >= 0 {
                    self.poll_event(USER_KICK)?;
                }
            }
            return Ok(None);
        }
        let Some((token, slot)) = Token::try_from(user)
            .ok()
            .and_then(|token| Some((token, self.slots.get_mut(usize::from(token))?)))
        else {
            return Ok(None);
        };
        let result = match usize::try_from(entry.result()) {
            Ok(_) if slot.flush => Ok(()),
            Ok(n) => slot.transfer.advance(n),
            Err(_) => Err(io::Error::from_raw_os_error(-entry.result())),
        };
        let again = match &result {
            Ok(()) => !slot.flush && !slot.transfer.is_done(),
            Err(error) => matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)),
        };
        if again {
            self.queue(token)?;
            return Ok(None);
        }
        slot.busy = false;
        self.in_flight -= 1;
        Ok(Some(Finished { token, result }))
    }
}

impl Engine for UringEngine {
    fn start(&mut self, token: Token, operation: Operation<'_>) -> Option<io::Result<()>> {
        match self.start_inner(token, operation) {
            Ok(true) => Some(Ok(())),
            Ok(false) => None,
            Err(error) => Some(Err(error)),
        }
    }

    fn submit(&mut self) -> io::Result<()> {
        retry(|| self.ring.submit())
    }

    fn reap(&mut self, finished: &mut Vec<Finished>) -> io::Result<Wake> {
        if self.ring.submission().taskrun() {
            // Completions wait in the kernel for a call that lets them out.
            retry(|| self.ring.submit())?;
        }
        loop {
            let Some(entry) = self.ring.completion().next() else {
                return Ok(Wake { stop: self.stop });
            };
            if let Some(done) = self.completed(&entry)? {
                finished.push(done);
            }
        }
    }

    fn wait(&mut self, finished: &mut Vec<Finished>) -> io::Result<Wake> {
        retry(|| self.ring.submit_and_wait(1))?;
        self.reap(finished)
    }

    fn wait_for(&mut self, finished: &mut Vec<Finished>, limit: Duration) -> io::Result<Wake> {
        let limit = types::Timespec::from(limit);
        let args = types::SubmitArgs::new().timespec(&limit);
        retry(|| match self.ring.submitter().submit_with_args(1, &args) {
            // The time is over.
            Err(error) if error.raw_os_error() == Some(libc::ETIME) => Ok(0),
            result => result,
        })?;
        self.reap(finished)
    }

    fn has_finished(&mut self) -> bool {
        self.ring.submission().taskrun() || !self.ring.completion().is_empty()
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }
}

impl Drop for UringEngine {
    fn drop(&mut self) {
        // The kernel must be done with guest memory and with the slots before they go away.
        let mut finished = Vec::new();
        while self.in_flight > 0 {
            if self.wait(&mut finished).is_err() {
                // The ring cannot be waited for. Leaking what it points to is the only safe end.
                std::mem::forget(std::mem::take(&mut self.slots));
                std::mem::forget(Arc::clone(&self.memory));
                return;
            }
            finished.clear();
        }
    }
}

/// Tries what the page cache can do at once. `true`: all of it was done.
fn try_inline(transfer: &mut Transfer, file: &RawFile, try_cache: &mut bool) -> io::Result<bool> {
    let flags = match transfer.direction() {
        Direction::Read => libc::RWF_NOWAIT,
        // A buffered write is a copy; file systems do not take it with NOWAIT.
        Direction::Write => 0,
    };
    match transfer.run_once(file.main(), flags) {
        Ok(()) => Ok(transfer.is_done()),
        Err(error) => match error.raw_os_error() {
            Some(libc::EAGAIN | libc::EINTR) => Ok(false),
            Some(libc::EOPNOTSUPP) => {
                *try_cache = false;
                Ok(false)
            }
            _ => Err(error),
        },
    }
}

fn retry(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<()> {
    loop {
        match call() {
            Ok(_) => return Ok(()),
            Err(error) => match error.raw_os_error() {
                // EBUSY and EAGAIN: completions must be taken first, which the caller does next.
                Some(libc::EBUSY | libc::EAGAIN) => return Ok(()),
                Some(libc::EINTR) => {}
                _ => return Err(error),
            },
        }
    }
}

fn build_ring() -> io::Result<IoUring> {
    // One thread submits and takes completions in its own time (Linux 6.1); plain otherwise.
    IoUring::builder()
        .dontfork()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .setup_cqsize(2 * ENTRIES)
        .build(ENTRIES)
        .or_else(|_| IoUring::builder().dontfork().build(ENTRIES))
}
