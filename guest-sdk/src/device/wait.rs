//! Waiting for a channel: looking for a short while, then idling.

use super::{Channel, Core, Submission};
use crate::limits::{LOOK_AGAIN, LOOK_NS, LOOK_ROUNDS, LOOKS_PER_ROUND};
use crate::platform::Platform;
use core::time::Duration;

/// Waits until `missing` says that nothing is (`None`), or the time is up.
///
/// `missing` looks at the channel, takes what is there, and says how many completions it lacks.
///
/// # Errors
///
/// What `missing` fails with.
pub(crate) fn wait<P: Platform, R: Submission, E>(
    core: &Core<P>,
    channel: &Channel<R>,
    looking: &mut Looking,
    limit: Option<Duration>,
    mut missing: impl FnMut() -> Result<Option<u16>, E>,
) -> Result<(), E> {
    let platform = core.platform();
    if missing()?.is_none() {
        return Ok(());
    }
    // The first look found nothing: from here on it is a wait, which takes the pending bits and
    // looks again before it sleeps.
    let mut waiter = channel.waiter(core);
    waiter.clear();
    let deadline = limit.map(|limit| {
        let nanoseconds = u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX);
        platform.now_ns().saturating_add(nanoseconds)
    });
    loop {
        let Some(lacking) = missing()? else {
            return Ok(());
        };
        if deadline.is_some_and(|deadline| platform.now_ns() >= deadline)
            || looking.look(platform, || Ok(missing()?.is_none()))?
        {
            return Ok(());
        }
        if channel.arm(lacking) {
            waiter.idle(channel.idle_limit(core, deadline));
        }
        waiter.clear();
    }
}

/// How long to look before idling; learnt from what came of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Looking {
    budget_ns: u64,
    waits: u32,
}

impl Looking {
    pub(crate) const fn new() -> Self {
        Looking {
            budget_ns: LOOK_NS,
            waits: 0,
        }
    }

    /// Looks for a short while; whether `found` did.
    ///
    /// An idle costs a trip to the host and back, often longer than a cached read takes. Looking
    /// stops where it does not help, and is tried again now and then.
    pub(crate) fn look<P: Platform, E>(
        &mut self,
        platform: &P,
        mut found: impl FnMut() -> Result<bool, E>,
    ) -> Result<bool, E> {
        let budget = self.budget_ns();
        if budget == 0 {
            return Ok(false);
        }
        let until = platform.now_ns().saturating_add(budget);
        // Bounded by looks as well: a clock need not go on while nobody idles.
        for _ in 0..LOOK_ROUNDS {
            // The clock is asked now and then only; where it is a call, that is what it costs.
            for _ in 0..LOOKS_PER_ROUND {
                if found()? {
                    self.hit();
                    return Ok(true);
                }
                core::hint::spin_loop();
            }
            if platform.now_ns() >= until {
                break;
            }
        }
        self.miss();
        Ok(false)
    }

    fn budget_ns(&mut self) -> u64 {
        self.waits = self.waits.wrapping_add(1);
        if self.budget_ns == 0 && self.waits.is_multiple_of(LOOK_AGAIN) {
            return LOOK_NS;
        }
        self.budget_ns
    }

    fn hit(&mut self) {
        self.budget_ns = LOOK_NS;
    }

    fn miss(&mut self) {
        self.budget_ns /= 2;
        if self.budget_ns < LOOK_NS / 8 {
            self.budget_ns = 0;
        }
    }
}
