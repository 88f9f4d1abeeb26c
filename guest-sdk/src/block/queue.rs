//! One queue of a block device, with many requests in flight.

use super::config::Shared;
use super::request::{HEAD_LEN, Submitted};
use super::{Block, Error, Request, SubmitError};
use crate::device::{Channel, Failed, Looking, wait};
use crate::platform::{DmaBuf, OutOfArena, Platform};
use alloc::collections::{BTreeSet, VecDeque};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::time::Duration;
use pv_abi::virtio::block::ID_LEN;

/// Stands for a request of one queue; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token(u64);

/// A request that is done, one way or the other.
#[derive(Debug)]
pub struct Completion {
    /// What [`submit`](BlockQueue::submit) returned.
    pub token: Token,
    /// How it went.
    pub result: Result<(), Error>,
    /// The buffer of a read or a write.
    ///
    /// `None` for a request without one, and where a lost device could not be kept from using it.
    pub buf: Option<DmaBuf>,
    /// The identification string, for [`Request::GetId`] that went well; padded with zeroes.
    pub id: Option<[u8; ID_LEN]>,
}

/// A queue of a block device. Belongs to the vCPU that it was set up for: that one is woken.
pub struct BlockQueue<P: Platform> {
    pub(super) shared: Arc<Shared<P>>,
    pub(super) channel: Arc<Channel<Submitted>>,
    /// Head buffers that are not with a request.
    heads: Vec<DmaBuf>,
    /// Completions that were taken from the ring and not from us.
    pub(super) ready: VecDeque<Completion>,
    /// Buffers of the blocking calls.
    pub(super) bounce: Vec<DmaBuf>,
    /// Requests of blocking calls that gave up: nobody has their tokens.
    pub(super) abandoned: BTreeSet<Token>,
    next_token: u64,
    looking: Looking,
}

impl<P: Platform> BlockQueue<P> {
    pub(super) fn new(
        shared: Arc<Shared<P>>,
        channel: Arc<Channel<Submitted>>,
        size: u16,
    ) -> Result<Self, OutOfArena> {
        let heads = (0..size)
            .map(|_| shared.arena.alloc(HEAD_LEN))
            .collect::<Result<_, _>>()?;
        Ok(BlockQueue {
            shared,
            channel,
            heads,
            ready: VecDeque::new(),
            bounce: Vec::new(),
            abandoned: BTreeSet::new(),
            next_token: 0,
            looking: Looking::new(),
        })
    }

    /// The device.
    pub fn device(&self) -> Block<P> {
        Block::from_shared(&self.shared)
    }

    /// The queue's index in the device.
    pub fn index(&self) -> u16 {
        self.channel.index()
    }

    /// The queue's event, which is pending when it has something new.
    pub fn event(&self) -> u32 {
        self.channel.event()
    }

    /// Sectors of 512 bytes.
    pub fn capacity(&self) -> u64 {
        self.shared.geometry().capacity
    }

    /// A zeroed buffer that this device can reach.
    ///
    /// # Errors
    ///
    /// [`OutOfArena`].
    pub fn alloc(&self, len: usize) -> Result<DmaBuf, OutOfArena> {
        self.shared.arena.alloc(len)
    }

    /// Requests whose completion was not taken yet.
    pub fn in_flight(&self) -> usize {
        usize::from(self.channel.held()) + self.ready.len()
    }

    /// Takes a request. The device sees it at the next [`kick`](Self::kick), [`poll`](Self::poll) or
    /// [`wait_for`](Self::wait_for), so that a batch costs one doorbell.
    ///
    /// # Errors
    ///
    /// [`SubmitError`], with the request and its buffer; `QueueFull` when completions must be taken
    /// first, `DeviceLost` once the device is gone for good.
    pub fn submit(&mut self, request: Request) -> Result<Token, SubmitError> {
        // Taken, it would cost its buffer where the device could not be stopped.
        if let Some(lost) = self.shared.core.lost() {
            return Err(SubmitError {
                error: Error::DeviceLost(lost),
                request,
            });
        }
        let features = self.shared.core.features();
        let checked =
            request
                .check(features, &self.shared.geometry())
                .or_else(|error| match error {
                    // The device may have grown since its configuration was read.
                    Error::OutOfRange => request.check(features, &self.shared.refresh()),
                    error => Err(error),
                });
        if let Err(error) = checked {
            return Err(SubmitError { error, request });
        }
        let Some(head) = self.heads.pop() else {
            return Err(SubmitError {
                error: Error::QueueFull,
                request,
            });
        };
        let token = Token(self.next_token);
        let submitted = Submitted {
            token,
            request,
            head,
        };
        match self.channel.submit(submitted) {
            Ok(()) => {
                self.next_token += 1;
                Ok(token)
            }
            Err((refused, broken)) => {
                self.heads.push(refused.head);
                Err(SubmitError {
                    error: broken.map_or(Error::QueueFull, Error::Broken),
                    request: refused.request,
                })
            }
        }
    }

    /// Shows the device what was submitted.
    pub fn kick(&mut self) {
        self.channel.kick(&self.shared.core);
    }

    /// Takes one completion if there is one; never waits.
    ///
    /// Every token that `submit` returned comes out once, in whatever order the device finishes.
    ///
    /// # Errors
    ///
    /// [`Error::Broken`] if the device broke the rules of the ring. The requests stay with the queue
    /// until [`Block::reset`].
    pub fn poll(&mut self) -> Result<Option<Completion>, Error> {
        match self.ready.pop_front() {
            Some(completion) => Ok(Some(completion)),
            None => self.poll_ring(),
        }
    }

    /// Waits until `count` completions can be polled, or everything in flight if that is less, or the
    /// time is up; returns how many can be polled.
    ///
    /// The vCPU idles, and is woken once for the whole count where the device allows.
    ///
    /// # Errors
    ///
    /// As [`poll`](Self::poll).
    pub fn wait_for(&mut self, count: usize, limit: Option<Duration>) -> Result<usize, Error> {
        let shared = Arc::clone(&self.shared);
        let channel = Arc::clone(&self.channel);
        let mut looking = self.looking;
        let waited = wait(&shared.core, &channel, &mut looking, limit, || {
            self.drain()?;
            let missing = count.saturating_sub(self.ready.len());
            if missing == 0 || channel.held() == 0 {
                return Ok(None);
            }
            Ok(Some(u16::try_from(missing).unwrap_or(u16::MAX)))
        });
        self.looking = looking;
        waited.map(|()| self.ready.len())
    }

    /// Moves every completion from the ring to `ready`.
    pub(super) fn drain(&mut self) -> Result<(), Error> {
        while let Some(completion) = self.poll_ring()? {
            self.ready.push_back(completion);
        }
        Ok(())
    }

    fn poll_ring(&mut self) -> Result<Option<Completion>, Error> {
        loop {
            let completion = self.take_one()?;
            match &completion {
                // Its buffer goes back to the arena with it.
                Some(done) if self.abandoned.remove(&done.token) => {}
                _ => return Ok(completion),
            }
        }
    }

    fn take_one(&mut self) -> Result<Option<Completion>, Error> {
        let (completion, head) = match self.channel.poll(&self.shared.core) {
            Ok(None) => return Ok(None),
            Ok(Some((submitted, written))) => submitted.complete(written),
            Err(Failed::Broken(broken)) => return Err(Error::Broken(broken)),
            Err(Failed::Lost(lost)) => {
                let Some(submitted) = self.channel.take_lost() else {
                    return Ok(None);
                };
                let (mut completion, head) = submitted.fail(Error::DeviceLost(lost));
                if !self.shared.core.memory_is_ours() {
                    // The device could not be stopped and may write there until the VM ends.
                    core::mem::forget(completion.buf.take());
                    core::mem::forget(head);
                    return Ok(Some(completion));
                }
                (completion, head)
            }
        };
        self.heads.push(head);
        Ok(Some(completion))
    }
}

impl<P: Platform> core::fmt::Debug for BlockQueue<P> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("BlockQueue")
            .field("index", &self.index())
            .field("in_flight", &self.in_flight())
            .finish_non_exhaustive()
    }
}
