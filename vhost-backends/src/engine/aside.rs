//! A thread for calls that take long and have no asynchronous form.
//!
//! In come calls under a token; out come results, and an event that becomes readable with each.
//! The thread is made at the first call and makes them one after the other. It never touches guest
//! memory, so that a call which is not over yet holds up nothing but the engine's end.

use super::{Finished, Token};
use crate::readiness::Event;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

type Call = Box<dyn FnOnce() -> io::Result<()> + Send>;

/// The thread, once it is there, and the ways to it and back.
#[derive(Debug)]
pub(super) struct Aside {
    calls: Option<Sender<(Token, Call)>>,
    results: Receiver<Finished>,
    event: Event,
    thread: Option<JoinHandle<()>>,
}

impl Aside {
    /// Starts the thread.
    pub(super) fn new() -> io::Result<Aside> {
        let event = Event::new()?;
        let done = Event::from(event.duplicate()?);
        let (calls, jobs) = channel::<(Token, Call)>();
        let (results_to, results) = channel();
        let thread = std::thread::Builder::new()
            .name("blk-aside".into())
            .spawn(move || {
                for (token, call) in jobs {
                    let result = call();
                    if results_to.send(Finished { token, result }).is_err() {
                        return;
                    }
                    done.set();
                }
            })?;
        Ok(Aside {
            calls: Some(calls),
            results,
            event,
            thread: Some(thread),
        })
    }

    /// Has a call made. It must not panic.
    pub(super) fn run(
        &self,
        token: Token,
        call: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> io::Result<()> {
        let gone = || io::Error::from(io::ErrorKind::BrokenPipe);
        let calls = self.calls.as_ref().ok_or_else(gone)?;
        calls.send((token, Box::new(call))).map_err(|_| gone())
    }

    /// Becomes readable with each result; edges count.
    pub(super) fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// The next result, without waiting.
    pub(super) fn next(&self) -> Option<Finished> {
        self.results.try_recv().ok()
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        self.calls = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
