//! The benchmarks' guest as the host holds it: one command at a time.

use crate::protocol::{Command, NEXT, Outcome};
use anyhow::{Context, Result, bail};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;
use vmm_core::{Call, Image, VmBuilder, VmHandle};

/// How long one command may take.
const LIMIT: Duration = Duration::from_secs(60);

/// The guest's image, parsed.
pub(crate) fn image() -> Result<Image> {
    Image::from_bytes(guest_images::BENCH).context("the benchmarks' guest is refused")
}

/// A running guest that waits for its next command.
pub(crate) struct Guest {
    pub(crate) handle: VmHandle,
    calls: Receiver<Call>,
    waiting: Option<Call>,
}

impl Guest {
    /// Adds the guest's one call to a builder.
    pub(crate) fn listen(builder: VmBuilder) -> (VmBuilder, Receiver<Call>) {
        let (sender, calls): (Sender<Call>, _) = channel();
        let builder = builder
            .call(NEXT, move |call| {
                // If nobody listens, the call is dropped, which refuses it.
                let _ = sender.send(call);
            })
            .log(|level, line| {
                eprintln!("guest: {level:?}: {}", line.trim_end().escape_debug());
            });
        (builder, calls)
    }

    /// Builds and starts it, and waits for its first call.
    pub(crate) fn start(builder: VmBuilder) -> Result<Guest> {
        let (builder, calls) = Guest::listen(builder);
        let handle = builder.build().context("build")?.run().context("run")?;
        let mut guest = Guest {
            handle,
            calls,
            waiting: None,
        };
        guest.next()?;
        Ok(guest)
    }

    /// Gives it a command and waits until it is carried out.
    pub(crate) fn command(&mut self, command: Command) -> Result<Outcome> {
        self.give(command)?;
        self.next()
    }

    /// Gives it a command.
    pub(crate) fn give(&mut self, command: Command) -> Result<()> {
        let call = self.waiting.take().context("the guest is busy")?;
        call.finish(Ok(command.encode()));
        Ok(())
    }

    fn next(&mut self) -> Result<Outcome> {
        match self.calls.recv_timeout(LIMIT) {
            Ok(call) => {
                let outcome = Outcome::from_args(call.args());
                self.waiting = Some(call);
                Ok(outcome)
            }
            Err(RecvTimeoutError::Timeout) => match self.handle.exit() {
                Some(reason) => bail!("the guest {reason}"),
                None => bail!("the guest did not answer within {} s", LIMIT.as_secs()),
            },
            Err(RecvTimeoutError::Disconnected) => bail!("the guest is gone"),
        }
    }
}
