//! io_uring, with the page cache tried inline first.
//!
//! A read that the page cache holds costs one `preadv2(RWF_NOWAIT)`, less than a trip through a
//! submission queue; one that it does not hold goes to the ring, as does every O_DIRECT request,
//! every flush, and what the host may take long for: discards and zeroes. What O_DIRECT does not
//! take goes through a buffer of our own. The ring also polls the kick and the stop event, so that
//! the worker sleeps in one place. The polls are multishot and edge-like: the kick is never read.
#![allow(unsafe_code)]
// UNSAFETY: entries of the submission queue carry addresses that the kernel uses until they
// complete.

mod slot;

use super::aside::Aside;
use super::bounce::Bounce;
use super::buffer::AlignedBuffer;
use super::file::{ZERO_CHUNK, is_unsupported};
use super::sleep::Sleeper;
use super::transfer::{Direction, Transfer, chain_error};
use super::{Engine, Finished, Operation, RawFile, Token, Wake, WakeSources, started};
use crate::limits::{MAX_IN_FLIGHT, MAX_POLLS};
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use slot::{Range, Slot, Work};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;
use vm_memory::GuestMemoryMmap;

/// Entries: every operation in flight and the polls.
const ENTRIES: u32 = (MAX_IN_FLIGHT as u32 + 3).next_power_of_two();
const USER_KICK: u64 = u64::MAX;
const USER_STOP: u64 = u64::MAX - 1;
const USER_ASIDE: u64 = u64::MAX - 2;

/// io_uring and inline attempts, on one raw file.
pub struct UringEngine {
    ring: IoUring,
    file: Arc<RawFile>,
    /// Keeps mapped what operations in flight point to.
    memory: Arc<GuestMemoryMmap>,
    slots: Vec<Slot>,
    /// What zeroes are written from; made at the first use.
    zeroes: Option<AlignedBuffer>,
    /// For calls that io_uring has no operation for; made at the first one.
    aside: Option<Aside>,
    in_flight: usize,
    /// Handed to the host ahead of the others since something was last over.
    fresh: usize,
    /// Whether the file system answers `RWF_NOWAIT`.
    try_cache: bool,
    stop: bool,
    /// Times that a poll of the kick which ended is begun anew before the next operation begins.
    polls_left: u32,
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
        // Refuses a kick that cannot be waited for, such as a regular file, as epoll does: the
        // ring would call it ready all the time.
        Sleeper::new(wake)?;
        let ring = build_ring()?;
        let submitter = ring.submitter();
        // What is registered stays open until the ring is gone, which is after its last operation.
        let mut files = vec![file.file().as_raw_fd()];
        files.extend(file.held().iter().map(AsRawFd::as_raw_fd));
        submitter.register_files(&files)?;
        let mut engine = UringEngine {
            ring,
            try_cache: !file.options().direct,
            file,
            memory,
            slots: std::iter::repeat_with(Slot::default)
                .take(MAX_IN_FLIGHT)
                .collect(),
            zeroes: None,
            aside: None,
            in_flight: 0,
            fresh: 0,
            stop: false,
            polls_left: MAX_POLLS,
            kick_fd: wake.kick.as_raw_fd(),
            stop_fd: wake.stop.as_raw_fd(),
        };
        engine.poll_event(USER_KICK)?;
        engine.poll_event(USER_STOP)?;
        Ok(engine)
    }

    fn poll_event(&mut self, user: u64) -> io::Result<()> {
        let fd = match (user, &self.aside) {
            (USER_KICK, _) => self.kick_fd,
            (USER_ASIDE, Some(aside)) => aside.event().as_raw_fd(),
            _ => self.stop_fd,
        };
        let entry = opcode::PollAdd::new(types::Fd(fd), libc::POLLIN as u32)
            .multi(user != USER_STOP)
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
        let Some(entry) = slot.entry() else {
            return Ok(());
        };
        let entry = entry.user_data(u64::from(token));
        // SAFETY: the buffers are guest memory, mapped as long as `self.memory`, or a buffer in
        // the slot or in `self.zeroes`, whose bytes do not move; the iovecs are in the slot. The
        // slot is not touched while it is busy. The engine is dropped only after everything in
        // flight has completed.
        unsafe { self.push(&entry) }
    }

    fn start_inner(&mut self, token: Token, operation: Operation<'_>) -> io::Result<bool> {
        // Kicks bring work.
        self.polls_left = MAX_POLLS;
        let align = self.file.align();
        let slot = self
            .slots
            .get_mut(usize::from(token))
            .filter(|slot| !slot.busy)
            .ok_or(io::ErrorKind::InvalidInput)?;
        slot.work = match operation {
            // There is no io_uring operation for it.
            Operation::SecureErase { .. } => Work::Aside,
            Operation::Discard { offset, len } => Work::Discard(Range { offset, len }),
            Operation::WriteZeroes { offset, len, unmap } => {
                Work::WriteZeroes(Range { offset, len }, unmap)
            }
            Operation::Flush => Work::Flush,
            Operation::Read { .. } | Operation::Write { .. } => {
                slot.transfer
                    .prepare(&self.memory, operation)
                    .map_err(chain_error)?;
                if slot.transfer.is_done() {
                    return Ok(true);
                }
                if self.try_cache
                    && try_inline(&mut slot.transfer, &self.file, &mut self.try_cache)?
                {
                    return Ok(true);
                }
                if slot.transfer.is_aligned(align) {
                    Work::Direct
                } else {
                    let file = &self.file;
                    match Bounce::new(file, &self.memory, &mut slot.transfer, operation)? {
                        Some(bounce) => Work::Bounced(bounce),
                        None => return Ok(true),
                    }
                }
            }
        };
        if let Operation::SecureErase { offset, len } = operation {
            self.call_aside(token, move |file| file.secure_erase(offset, len))?;
        }
        self.queue(token)?;
        if let Some(slot) = self.slots.get_mut(usize::from(token)) {
            slot.busy = true;
            self.in_flight += 1;
        }
        Ok(false)
    }

    /// Has the thread aside make a call.
    fn call_aside(
        &mut self,
        token: Token,
        call: impl FnOnce(&RawFile) -> io::Result<()> + Send + 'static,
    ) -> io::Result<()> {
        if self.aside.is_none() {
            self.aside = Some(Aside::new()?);
            self.poll_event(USER_ASIDE)?;
        }
        let file = Arc::clone(&self.file);
        match &self.aside {
            Some(aside) => aside.run(token, move || call(&file)),
            None => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    /// What a slot has to do after the host said `result`: `None` is more of the same.
    fn advance(&mut self, token: Token, result: i32) -> Option<io::Result<()>> {
        let slot = self.slots.get_mut(usize::from(token))?;
        let error = io::Error::from_raw_os_error(result.wrapping_neg());
        let Ok(n) = usize::try_from(result) else {
            return match (&slot.work, error.raw_os_error()) {
                (_, Some(libc::EINTR | libc::EAGAIN)) => None,
                // A hint: where the file system cannot do it, nothing happens.
                (Work::Discard(_), _) if is_unsupported(&error) => Some(Ok(())),
                (Work::WriteZeroes(range, _), _) if is_unsupported(&error) => {
                    let range = *range;
                    if !range.offset.is_multiple_of(self.file.align().offset)
                        || !range.len.is_multiple_of(self.file.align().offset)
                    {
                        slot.work = Work::Aside;
                        let zero =
                            move |file: &RawFile| file.write_zeroes(range.offset, range.len, false);
                        return self.call_aside(token, zero).err().map(Err);
                    }
                    slot.work = Work::Zeroing(range);
                    self.zero_next(token)
                }
                _ => Some(Err(error)),
            };
        };
        match &mut slot.work {
            Work::Flush | Work::Discard(_) | Work::WriteZeroes(..) | Work::Aside => Some(Ok(())),
            Work::Direct => match slot.transfer.advance(n) {
                Ok(()) if !slot.transfer.is_done() => None,
                result => Some(result),
            },
            Work::Bounced(bounce) => match slot.transfer.advance(n) {
                Ok(()) if !slot.transfer.is_done() => None,
                Ok(()) => Some(bounce.deliver(&self.memory)),
                result => Some(result),
            },
            Work::Zeroing(range) => {
                if n == 0 {
                    return Some(Err(io::ErrorKind::WriteZero.into()));
                }
                let done = (n as u64).min(range.len);
                range.offset += done;
                range.len -= done;
                self.zero_next(token)
            }
        }
    }

    /// Prepares the next chunk of zeroes; `Some` once there is none.
    fn zero_next(&mut self, token: Token) -> Option<io::Result<()>> {
        let zeroes = self
            .zeroes
            .get_or_insert_with(|| AlignedBuffer::new(ZERO_CHUNK));
        let slot = self.slots.get_mut(usize::from(token))?;
        let Work::Zeroing(range) = &slot.work else {
            return Some(Ok(()));
        };
        if range.len == 0 {
            return Some(Ok(()));
        }
        // At most ZERO_CHUNK.
        let len = range.len.min(ZERO_CHUNK as u64) as usize;
        let chunk = zeroes.get_mut().get_mut(..len).unwrap_or_default();
        slot.transfer
            .prepare_buffer(Direction::Write, chunk, range.offset, len as u64);
        None
    }

    /// Handles one completion: goes on with a short one, or gives its end.
    fn completed(&mut self, entry: &cqueue::Entry) -> io::Result<Option<Finished>> {
        let user = entry.user_data();
        if user == USER_STOP {
            self.stop = true;
            return Ok(None);
        }
        if user == USER_KICK || user == USER_ASIDE {
            // A multishot poll ends when the completion queue was full. An error (a peer's
            // descriptor that cannot be polled) must not spin, nor must one that is ready whenever
            // it is asked.
            if !cqueue::more(entry.flags()) && entry.result() >= 0 {
                if user == USER_KICK {
                    let Some(left) = self.polls_left.checked_sub(1) else {
                        return Ok(None);
                    };
                    self.polls_left = left;
                }
                self.poll_event(user)?;
            }
            return Ok(None);
        }
        let Some(token) = Token::try_from(user).ok().filter(|t| self.is_busy(*t)) else {
            return Ok(None);
        };
        let Some(result) = self.advance(token, entry.result()) else {
            self.queue(token)?;
            return Ok(None);
        };
        self.release(token);
        Ok(Some(Finished { token, result }))
    }

    /// The slot's operation is over.
    fn release(&mut self, token: Token) {
        if let Some(slot) = self.slots.get_mut(usize::from(token)) {
            slot.busy = false;
            // Gives a buffer back.
            slot.work = Work::Direct;
            self.in_flight -= 1;
        }
    }

    /// Takes what the completion queue holds.
    fn collect(&mut self, finished: &mut Vec<Finished>) -> io::Result<Wake> {
        loop {
            let Some(entry) = self.ring.completion().next() else {
                break;
            };
            if let Some(done) = self.completed(&entry)? {
                self.fresh = 0;
                finished.push(done);
            }
        }
        while let Some(done) = self.aside.as_ref().and_then(Aside::next) {
            self.release(done.token);
            finished.push(done);
        }
        Ok(Wake { stop: self.stop })
    }

    fn is_busy(&self, token: Token) -> bool {
        self.slots
            .get(usize::from(token))
            .is_some_and(|slot| slot.busy)
    }
}

impl Engine for UringEngine {
    fn start(&mut self, token: Token, operation: Operation<'_>) -> Option<io::Result<()>> {
        started(self.start_inner(token, operation))
    }

    fn submit(&mut self) -> io::Result<()> {
        retry(|| self.ring.submit())
    }

    fn more_follows(&mut self) -> io::Result<()> {
        // Never holds back more than the host has: an idle disk gets its first request at once,
        // and a busy one the rest in few calls. Disks finish what they were given at about the
        // same time, so when something is over, only what came after the last look surely is not.
        let held_back = self.ring.submission().len();
        let at_host = if self.has_finished() {
            self.fresh
        } else {
            self.in_flight.saturating_sub(held_back)
        };
        if held_back > at_host {
            self.submit()?;
            self.fresh += held_back;
        }
        Ok(())
    }

    fn reap(&mut self, finished: &mut Vec<Finished>) -> io::Result<Wake> {
        if self.ring.submission().taskrun() {
            // Completions wait in the kernel for a call that lets them out.
            retry(|| self.ring.submit())?;
        }
        self.collect(finished)
    }

    fn wait(&mut self, finished: &mut Vec<Finished>) -> io::Result<Wake> {
        retry(|| self.ring.submit_and_wait(1))?;
        // What the kernel still keeps back is for the next call: the driver should hear of these.
        self.collect(finished)
    }

    fn wait_for(&mut self, finished: &mut Vec<Finished>, limit: Duration) -> io::Result<Wake> {
        let limit = types::Timespec::from(limit);
        let args = types::SubmitArgs::new().timespec(&limit);
        retry(|| match self.ring.submitter().submit_with_args(1, &args) {
            // The time is over.
            Err(error) if error.raw_os_error() == Some(libc::ETIME) => Ok(0),
            result => result,
        })?;
        self.collect(finished)
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
                std::mem::forget(self.zeroes.take());
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
    match transfer.run_once(file.file(), flags) {
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
