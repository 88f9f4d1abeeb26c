//! Waiting for a channel: looking for a short while, then idling.

use super::{Channel, Core, Submission};
use crate::limits::{
    LONGEST_LOOK_NS, LOOK_AGAIN, LOOK_NS, LOOK_ROUNDS, LOOK_TRIPS, LOOKS_PER_ROUND,
};
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
///
/// A look is worth what it can save: at most as long as sleeping costs, so that one in vain at most
/// doubles it. That is far more where a trip to the host is slow, which only a trip tells.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Looking {
    budget_ns: u64,
    full_ns: u64,
    waits: u32,
}

impl Looking {
    pub(crate) const fn new() -> Self {
        Looking {
            budget_ns: LOOK_NS,
            full_ns: LOOK_NS,
            waits: 0,
        }
    }

    /// Looks for a short while; whether `found` did.
    ///
    /// Looking stops where it does not help, and is tried again now and then.
    pub(crate) fn look<P: Platform, E>(
        &mut self,
        platform: &P,
        mut found: impl FnMut() -> Result<bool, E>,
    ) -> Result<bool, E> {
        self.waits = self.waits.wrapping_add(1);
        let mut budget_ns = self.budget_ns;
        if budget_ns == 0 {
            if !self.waits.is_multiple_of(LOOK_AGAIN) {
                return Ok(false);
            }
            // Anew each time: the host, or the way to it, may be another by now.
            self.full_ns = worthwhile(platform);
            budget_ns = self.full_ns;
        }
        let until = platform.now_ns().saturating_add(budget_ns);
        // Bounded by looks as well: a clock need not go on while nobody idles.
        for _ in 0..LOOK_ROUNDS {
            // The clock is asked now and then only; where it is a call, that is what it costs.
            for _ in 0..LOOKS_PER_ROUND {
                if found()? {
                    self.budget_ns = self.full_ns;
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

    fn miss(&mut self) {
        self.budget_ns /= 2;
        if self.budget_ns < self.full_ns / 8 {
            self.budget_ns = 0;
        }
    }
}

/// How long looking is worth it, by the time that one trip to the host takes.
fn worthwhile<P: Platform>(platform: &P) -> u64 {
    let start = platform.now_ns();
    // Comes back at once; what it finds stays pending.
    platform.idle(Some(Duration::ZERO));
    let trip = platform.now_ns().saturating_sub(start);
    LOOK_NS
        .saturating_add(trip.saturating_mul(LOOK_TRIPS))
        .min(LONGEST_LOOK_NS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::Fake;
    use core::sync::atomic::Ordering;

    /// Looks that find nothing until one is tried again.
    fn in_vain(looking: &mut Looking, fake: &Fake) {
        for _ in 0..2 * LOOK_AGAIN {
            let found = looking.look(fake, || Ok::<_, ()>(false));
            assert_eq!(found, Ok(false));
        }
        assert_eq!(looking.budget_ns, 0);
    }

    #[test]
    fn a_look_lasts_longer_where_a_trip_to_the_host_does() {
        let fake = Fake::new(1, 1, 1, true);
        let mut looking = Looking::new();
        for (trip, full) in [
            (0, LOOK_NS),
            (30_000, LOOK_NS + 60_000),
            (1 << 40, LONGEST_LOOK_NS),
            // The guest has moved to a faster host.
            (1_000, LOOK_NS + 2_000),
        ] {
            fake.trip_ns.store(trip, Ordering::Relaxed);
            in_vain(&mut looking, fake);
            assert_eq!(looking.full_ns, full, "a trip of {trip} ns");
        }
    }

    #[test]
    fn looking_stops_where_it_is_in_vain_and_begins_where_it_helps() {
        let fake = Fake::new(1, 1, 1, true);
        let mut looking = Looking::new();
        in_vain(&mut looking, fake);
        let mut looks = 0;
        for _ in 0..LOOK_AGAIN {
            let found = looking.look(fake, || {
                looks += 1;
                Ok::<_, ()>(true)
            });
            if found == Ok(true) {
                break;
            }
        }
        assert_eq!(looks, 1, "tried again within so many waits");
        assert_eq!(looking.budget_ns, looking.full_ns, "and again from now on");
        let idles = fake.idles.load(Ordering::Relaxed);
        assert_eq!(looking.look(fake, || Ok::<_, ()>(true)), Ok(true));
        assert_eq!(fake.idles.load(Ordering::Relaxed), idles, "no trip");
    }
}
