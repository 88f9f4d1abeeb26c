//! Requests as futures, for any executor.
//!
//! A future looks at the ring each time it is polled, and asks for an event before it says that it is
//! pending. So an executor needs no interrupt: it polls again when [`AsyncBlock::process`] has called
//! the waker, or when the queue's event ended the vCPU's idle, as `flat::block_on` does. It must not
//! idle for longer than [`LOSS_POLL`](crate::limits::LOSS_POLL) on a vCPU that does not get the
//! device's configuration event, or a loss may go unnoticed there.

use super::{BlockQueue, Completion, Error, Request, Token};
use crate::platform::{DmaBuf, OutOfArena, Platform};
use crate::sync::SpinLock;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::future::Future;
use core::pin::Pin;
use core::task::{Context, Poll, Waker};

/// A block queue whose requests are futures; many at once may be waiting.
pub struct AsyncBlock<P: Platform> {
    inner: SpinLock<Inner<P>>,
}

struct Inner<P: Platform> {
    queue: BlockQueue<P>,
    /// By token: futures that wait, and results whose future was not polled since.
    waiting: BTreeMap<Token, Slot>,
    /// Futures whose request found the queue full.
    full: Vec<Waker>,
    /// Why nothing will complete any more, unless the device is reset.
    broken: Option<Error>,
}

enum Slot {
    Waiting(Waker),
    Done(Completion),
}

/// A request that is on its way; resolves to its completion.
///
/// Dropped before that, the request goes on and its buffer is freed when it is done.
#[must_use = "futures do nothing unless polled"]
pub struct Pending<'a, P: Platform> {
    device: &'a AsyncBlock<P>,
    stage: Stage,
}

enum Stage {
    New(Request),
    Submitted(Token),
    Over,
}

impl<P: Platform> AsyncBlock<P> {
    /// Futures over this queue; requests that are in flight already come out of
    /// [`into_queue`](Self::into_queue)'s queue, not here.
    pub fn new(queue: BlockQueue<P>) -> Self {
        AsyncBlock {
            inner: SpinLock::new(Inner {
                queue,
                waiting: BTreeMap::new(),
                full: Vec::new(),
                broken: None,
            }),
        }
    }

    /// The queue again. Requests in flight stay in it; their completions can be polled there.
    pub fn into_queue(self) -> BlockQueue<P> {
        self.inner.into_inner().queue
    }

    /// Any request.
    pub fn request(&self, request: Request) -> Pending<'_, P> {
        Pending {
            device: self,
            stage: Stage::New(request),
        }
    }

    /// Reads as many sectors as the buffer holds, and gives the buffer back with the completion.
    pub fn read(&self, sector: u64, buf: DmaBuf) -> Pending<'_, P> {
        self.request(Request::Read { sector, buf })
    }

    /// Writes the buffer, and gives it back with the completion.
    pub fn write(&self, sector: u64, buf: DmaBuf) -> Pending<'_, P> {
        self.request(Request::Write { sector, buf })
    }

    /// Makes every write that has completed durable.
    pub fn flush(&self) -> Pending<'_, P> {
        self.request(Request::Flush)
    }

    /// A zeroed buffer that the device can reach.
    ///
    /// # Errors
    ///
    /// [`OutOfArena`].
    pub fn alloc(&self, len: usize) -> Result<DmaBuf, OutOfArena> {
        self.inner.lock().queue.alloc(len)
    }

    /// The queue's event, for executors that wait for events themselves.
    pub fn event(&self) -> u32 {
        self.inner.lock().queue.event()
    }

    /// Looks at the ring and wakes the futures whose requests are done. Never waits.
    ///
    /// When it returns, the queue's event is armed: the next completion makes it pending.
    pub fn process(&self) {
        let wakers = self.inner.lock().process();
        // Outside the lock: a waker may poll right away.
        wakers.into_iter().for_each(Waker::wake);
    }
}

impl<P: Platform> Inner<P> {
    fn process(&mut self) -> Vec<Waker> {
        let mut wakers = Vec::new();
        loop {
            loop {
                match self.queue.poll() {
                    Ok(Some(completion)) => {
                        self.broken = None;
                        // Without a slot its future was dropped: so is the completion.
                        if let Some(slot) = self.waiting.get_mut(&completion.token)
                            && let Slot::Waiting(waker) =
                                core::mem::replace(slot, Slot::Done(completion))
                        {
                            wakers.push(waker);
                        }
                        wakers.append(&mut self.full);
                    }
                    Ok(None) => {
                        self.broken = None;
                        break;
                    }
                    Err(error) => {
                        self.broken = Some(error);
                        wakers.append(&mut self.full);
                        for slot in self.waiting.values() {
                            if let Slot::Waiting(waker) = slot {
                                wakers.push(waker.clone());
                            }
                        }
                        return wakers;
                    }
                }
            }
            if self.queue.channel.arm(1) {
                return wakers;
            }
        }
    }
}

impl<P: Platform> Future for Pending<'_, P> {
    type Output = Result<Completion, Error>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        let mut inner = this.device.inner.lock();
        match core::mem::replace(&mut this.stage, Stage::Over) {
            Stage::New(request) => match inner.queue.submit(request) {
                Ok(token) => {
                    let waiting = Slot::Waiting(context.waker().clone());
                    inner.waiting.insert(token, waiting);
                    this.stage = Stage::Submitted(token);
                }
                Err(refused) if refused.error == Error::QueueFull => {
                    this.stage = Stage::New(refused.request);
                    let waker = context.waker();
                    if !inner.full.iter().any(|other| other.will_wake(waker)) {
                        inner.full.push(waker.clone());
                    }
                }
                Err(refused) => return Poll::Ready(Err(refused.error)),
            },
            stage => this.stage = stage,
        }
        let wakers = inner.process();
        let outcome = this.look(&mut inner, context);
        drop(inner);
        wakers.into_iter().for_each(Waker::wake);
        outcome
    }
}

impl<P: Platform> Pending<'_, P> {
    fn look(
        &mut self,
        inner: &mut Inner<P>,
        context: &mut Context<'_>,
    ) -> Poll<Result<Completion, Error>> {
        let Stage::Submitted(token) = self.stage else {
            return Poll::Pending;
        };
        match inner.waiting.remove(&token) {
            Some(Slot::Done(completion)) => {
                self.stage = Stage::Over;
                Poll::Ready(Ok(completion))
            }
            _ => match inner.broken {
                Some(error) => {
                    self.stage = Stage::Over;
                    Poll::Ready(Err(error))
                }
                None => {
                    let waiting = Slot::Waiting(context.waker().clone());
                    inner.waiting.insert(token, waiting);
                    Poll::Pending
                }
            },
        }
    }
}

impl<P: Platform> Drop for Pending<'_, P> {
    fn drop(&mut self) {
        if let Stage::Submitted(token) = self.stage {
            self.device.inner.lock().waiting.remove(&token);
        }
    }
}

impl<P: Platform> core::fmt::Debug for AsyncBlock<P> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("AsyncBlock").finish_non_exhaustive()
    }
}

impl<P: Platform> core::fmt::Debug for Pending<'_, P> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Pending").finish_non_exhaustive()
    }
}
