//! What all drivers share: bringing a device up, and bringing it back.
//!
//! A driver consists of one `Core` per device and one `Channel` per queue. The core speaks with
//! the host about the device's state; a channel is a ring with the requests that it holds.
//!
//! # Loss
//!
//! A device can lose its backend at any moment, on any vCPU's watch: its entry in the device table
//! then says needs-reset and has a new generation. One path leads back, and it is the same for a
//! killed backend, a restored checkpoint and a forked VM:
//!
//! 1. Every operation on a channel compares the table with the generation that the channel is
//!    attached to, under the channel's lock. Who finds a difference calls `Core::step`.
//! 2. `step` is a state machine that any vCPU may push; its lock is only ever tried, so nobody spins
//!    while somebody else waits for the host; what others ask for (`reset`) or about lies beside it. It first **detaches** every channel, each under its
//!    lock: from then on no vCPU touches any of the rings, whatever it was about to do.
//! 3. `DEVICE_RESET`. When it returns, nobody on the host's side touches the rings either.
//! 4. Each ring is reaped a last time and then emptied in place; the requests that are left go to the
//!    front of the channel's backlog, in the order of their submission.
//! 5. Absent: there is no backend yet. The step ends; the configuration event, or the short limit of
//!    every wait during a recovery, has somebody push again.
//! 6. Negotiated: features are agreed on anew, never more than at first, and `DEVICE_ACTIVATE`
//!    starts the new generation. `Again` from either call ends the step as in 5.
//! 7. Every channel is **attached** to the new generation, which puts its backlog into its ring and
//!    rings its doorbell.
//!
//! A request is thus given to as many generations as it takes, and completes once: a completion
//! takes it out of the ring's books, and only what is in the books is given again.

mod buffer;
mod channel;
mod core_state;
#[cfg(test)]
mod tests;
mod wait;
mod wakers;

use crate::limits::MAX_SEGMENTS;
use crate::virtqueue::Segment;
pub(crate) use buffer::Buffer;
pub use buffer::Error;
pub(crate) use channel::{Channel, Failed, Ring, Submission};
pub use core_state::OpenError;
pub(crate) use core_state::{Agree, Core, KNOWN_TO_ALL, Offer, Step, agree_to_all};
pub(crate) use wait::{Looking, wait};
pub use wakers::Wakers;

/// Why a device is of no use any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Lost {
    /// It stayed away for longer than the driver waits.
    TimedOut,
    /// It came back without a feature, a queue or a queue size that the driver had in use.
    Changed,
    /// The host refused to reset or activate it.
    Refused(crate::platform::CallError),
}

impl core::fmt::Display for Lost {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Lost::TimedOut => f.write_str("the device did not come back in time"),
            Lost::Changed => f.write_str("the device came back as something else"),
            Lost::Refused(error) => write!(f, "the host refused the device: {error}"),
        }
    }
}

impl core::error::Error for Lost {}

/// The segments of one request, on their way into a ring.
#[derive(Debug)]
pub(crate) struct Segments {
    list: [Segment; MAX_SEGMENTS],
    len: usize,
}

impl Segments {
    pub(crate) fn new() -> Self {
        const NONE: Segment = Segment {
            gpa: 0,
            len: 0,
            writable: false,
        };
        Segments {
            list: [NONE; MAX_SEGMENTS],
            len: 0,
        }
    }

    /// Adds a segment; one too many is left out, and no driver here has that many.
    pub(crate) fn push(&mut self, gpa: u64, len: u32, writable: bool) {
        if let Some(place) = self.list.get_mut(self.len) {
            *place = Segment { gpa, len, writable };
            self.len += 1;
        }
    }

    pub(crate) fn as_slice(&self) -> &[Segment] {
        &self.list[..self.len]
    }
}
