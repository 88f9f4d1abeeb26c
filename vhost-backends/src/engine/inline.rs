//! Engines that are done with an operation when they return: everything but the operation itself.

use super::sleep::Sleeper;
use super::{Engine, Finished, Operation, Token, Wake, WakeSources};
use std::io;
use std::time::Duration;

/// An engine without anything in flight.
pub(super) trait Inline {
    /// Carries an operation out.
    fn run(&mut self, operation: Operation<'_>) -> io::Result<()>;

    /// Where it sleeps.
    fn sleeper(&mut self) -> io::Result<&mut Sleeper>;
}

impl<I: Inline> Engine for I {
    fn start(&mut self, _token: Token, operation: Operation<'_>) -> Option<io::Result<()>> {
        Some(self.run(operation))
    }

    fn submit(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn reap(&mut self, _finished: &mut Vec<Finished>) -> io::Result<Wake> {
        self.sleeper()?.glance()
    }

    fn wait(&mut self, _finished: &mut Vec<Finished>) -> io::Result<Wake> {
        self.sleeper()?.sleep()
    }

    fn wait_for(&mut self, _finished: &mut Vec<Finished>, limit: Duration) -> io::Result<Wake> {
        self.sleeper()?.sleep_for(limit)
    }

    fn has_finished(&mut self) -> bool {
        false
    }

    fn in_flight(&self) -> usize {
        0
    }
}

/// Stands in for an engine that failed: every operation is an I/O error. On a host that has nothing
/// to sleep on, sleeping is one too.
#[derive(Debug)]
pub(crate) struct FailedEngine(Option<Sleeper>);

impl FailedEngine {
    pub(crate) fn new(wake: WakeSources<'_>) -> FailedEngine {
        FailedEngine(Sleeper::new(wake).ok())
    }
}

impl Inline for FailedEngine {
    fn run(&mut self, _operation: Operation<'_>) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::EIO))
    }

    fn sleeper(&mut self) -> io::Result<&mut Sleeper> {
        self.0
            .as_mut()
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EIO))
    }
}
