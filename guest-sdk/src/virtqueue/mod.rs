//! The driver half of a split virtqueue.
//!
//! In come segments (addresses and lengths in an arena) with a value of the driver's own that stands
//! for the request; out comes that value, once, with the number of bytes that the device wrote.
//!
//! **The device is not believed.** Free lists, chains and lengths are kept in private memory; the
//! descriptor table and the available ring are only ever written. What the device says, a head and a
//! length per completion and one running index, is checked against what is in flight. The first
//! thing that cannot be true breaks the queue ([`Broken`]): it says no more until it is reset, and
//! gives no buffer back that the device might still have.
//!
//! | file | what |
//! |---|---|
//! | `memory` | the shared bytes: one accessor per field, each with its ordering |
//! | `queue` | [`DriverQueue`]: the private half and its rules |

mod memory;
mod queue;

#[cfg(test)]
mod hostile;
#[cfg(test)]
mod tests;

pub use memory::RingMemory;
pub use queue::{AddError, DriverQueue, Refused, Used};

/// One piece of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Address, as the device knows it.
    pub gpa: u64,
    /// Bytes.
    pub len: u32,
    /// Whether the device writes it; readable segments come first.
    pub writable: bool,
}

/// What a device did that no device may do. The queue is of no use until it is reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Broken {
    /// The used index says that more was completed than is in flight, or it went back.
    UsedIndex {
        /// The index that the device wrote.
        index: u16,
        /// The last one that was believed.
        last: u16,
        /// Requests that the device had.
        in_flight: u16,
    },
    /// A completion for a head outside the ring.
    HeadOutOfRange {
        /// The head that the device wrote.
        id: u32,
    },
    /// A completion for a head that is not in flight: never was, or for the second time.
    HeadNotInFlight {
        /// The head that the device wrote.
        id: u16,
    },
    /// More bytes written than the chain has room for.
    Length {
        /// The head that was completed.
        id: u16,
        /// The length that the device wrote.
        len: u32,
        /// Bytes that the device could write.
        room: u32,
    },
    /// A request whose answer lies in several buffers, of which the device says a number that cannot
    /// be, or has not completed all.
    GroupCount {
        /// The number that the device wrote.
        said: u16,
        /// Completions that are there.
        here: u16,
    },
    /// An answer of a length that cannot be.
    Answer {
        /// Bytes that the device says it wrote.
        len: u32,
        /// Least and most that it can be.
        least: u32,
        /// See `least`.
        most: u32,
    },
}

impl core::fmt::Display for Broken {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Broken::UsedIndex {
                index,
                last,
                in_flight,
            } => write!(
                f,
                "used index went from {last} to {index} with {in_flight} requests in flight"
            ),
            Broken::HeadOutOfRange { id } => write!(f, "completion of head {id}, out of range"),
            Broken::HeadNotInFlight { id } => {
                write!(f, "completion of head {id}, which is not in flight")
            }
            Broken::Length { id, len, room } => write!(
                f,
                "completion of head {id} with {len} bytes written, of {room}"
            ),
            Broken::GroupCount { said, here } => write!(
                f,
                "an answer in {said} buffers, of which {here} are completed"
            ),
            Broken::Answer { len, least, most } => {
                write!(f, "an answer of {len} bytes, which has {least} to {most}")
            }
        }
    }
}

impl core::error::Error for Broken {}
