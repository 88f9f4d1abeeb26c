//! Requests that are one buffer and nothing else: console and entropy.

use super::{Failed, Lost, Segments, Submission};
use crate::platform::{DmaBuf, OutOfArena};
use crate::virtqueue::Broken;

/// One buffer on its way to a device that writes it or reads it.
#[derive(Debug)]
pub(crate) struct Buffer {
    pub(crate) buf: DmaBuf,
    /// Bytes of it that the device gets.
    pub(crate) len: usize,
    pub(crate) writable: bool,
}

impl Submission for Buffer {
    fn prepare(&mut self, segments: &mut Segments) {
        let len = u32::try_from(self.len.min(self.buf.len())).unwrap_or(u32::MAX);
        segments.push(self.buf.gpa(), len, self.writable);
    }
}

/// Why a simple device gave no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// The device broke the rules of the ring.
    Broken(Broken),
    /// The device is gone for good.
    DeviceLost(Lost),
    /// The arena has no room for the driver's buffers.
    OutOfArena(OutOfArena),
    /// The device completed a request without a single byte.
    Empty,
}

impl core::fmt::Display for Error {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Error::Broken(broken) => write!(f, "the device broke the queue: {broken}"),
            Error::DeviceLost(lost) => lost.fmt(f),
            Error::OutOfArena(error) => error.fmt(f),
            Error::Empty => f.write_str("the device gave no bytes"),
        }
    }
}

impl core::error::Error for Error {}

impl From<Failed> for Error {
    fn from(failed: Failed) -> Self {
        match failed {
            Failed::Broken(broken) => Error::Broken(broken),
            Failed::Lost(lost) => Error::DeviceLost(lost),
        }
    }
}

impl From<OutOfArena> for Error {
    fn from(error: OutOfArena) -> Self {
        Error::OutOfArena(error)
    }
}
