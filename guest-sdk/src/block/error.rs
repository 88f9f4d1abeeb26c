//! What can go wrong with a block request.

use super::Request;
use crate::device::Lost;
use crate::platform::OutOfArena;
use crate::virtqueue::Broken;

/// Why a block request failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// The device could not do it.
    Io,
    /// The device does not do this kind of request.
    Unsupported,
    /// Past the end of the device.
    OutOfRange,
    /// The device is read-only.
    ReadOnly,
    /// No bytes, not whole sectors, or more than the device takes at once.
    BadLength,
    /// As many requests are in flight as the queue holds; take completions first.
    QueueFull,
    /// The arena has no room for the copy that a blocking call makes.
    OutOfArena(OutOfArena),
    /// The device broke the rules of the ring; the queue is of no use until the device is reset.
    Broken(Broken),
    /// The device is gone for good.
    DeviceLost(Lost),
    /// Not done when the caller's time was up.
    TimedOut,
}

impl core::fmt::Display for Error {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Error::Io => f.write_str("the device reports an i/o error"),
            Error::Unsupported => f.write_str("the device does not support this request"),
            Error::OutOfRange => f.write_str("past the end of the device"),
            Error::ReadOnly => f.write_str("the device is read-only"),
            Error::BadLength => f.write_str("not whole sectors, or too many"),
            Error::QueueFull => f.write_str("the queue is full"),
            Error::OutOfArena(error) => error.fmt(f),
            Error::Broken(broken) => write!(f, "the device broke the queue: {broken}"),
            Error::DeviceLost(lost) => lost.fmt(f),
            Error::TimedOut => f.write_str("the device did not answer in time"),
        }
    }
}

impl core::error::Error for Error {}

impl From<OutOfArena> for Error {
    fn from(error: OutOfArena) -> Self {
        Error::OutOfArena(error)
    }
}

/// A request that was not taken, given back with its buffer.
#[derive(Debug)]
pub struct SubmitError {
    /// Why.
    pub error: Error,
    /// The request.
    pub request: Request,
}

impl core::fmt::Display for SubmitError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        self.error.fmt(f)
    }
}

impl core::error::Error for SubmitError {}
