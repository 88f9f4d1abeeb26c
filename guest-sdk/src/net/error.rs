//! What can go wrong with a network card.

use super::{Offload, Packet};
use crate::device::{Failed, Lost};
use crate::platform::OutOfArena;
use crate::virtqueue::Broken;

/// Why a card does no more for now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// The arena has no room for buffers.
    OutOfArena(OutOfArena),
    /// The device broke the rules of the ring; the queue is of no use until the device is reset.
    Broken(Broken),
    /// The device is gone for good.
    DeviceLost(Lost),
    /// The device has no control queue, or it does not do this command.
    Unsupported,
    /// The device refused the command.
    Refused,
    /// More VLANs or addresses than [`limits`](crate::limits) allow, or a number that cannot be.
    TooMany,
    /// Not done when the caller's time was up.
    TimedOut,
}

impl core::fmt::Display for Error {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Error::OutOfArena(error) => error.fmt(f),
            Error::Broken(broken) => write!(f, "the device broke the queue: {broken}"),
            Error::DeviceLost(lost) => lost.fmt(f),
            Error::Unsupported => f.write_str("the device does not support this command"),
            Error::Refused => f.write_str("the device refused the command"),
            Error::TooMany => f.write_str("more than the filter holds"),
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

impl From<Failed> for Error {
    fn from(failed: Failed) -> Self {
        match failed {
            Failed::Broken(broken) => Error::Broken(broken),
            Failed::Lost(lost) => Error::DeviceLost(lost),
        }
    }
}

/// A packet that was not taken, given back.
#[derive(Debug)]
pub struct SendError {
    /// Why.
    pub kind: SendErrorKind,
    /// The packet.
    pub packet: Packet,
    /// What it was to leave to the device.
    pub offload: Offload,
}

/// Why a packet was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SendErrorKind {
    /// As many packets are in flight as the queue holds; take completions first.
    QueueFull,
    /// Shorter than an Ethernet header, or longer than any frame.
    BadLength,
    /// The offload lies outside of the packet, or contradicts itself.
    BadOffload,
    /// The device does not do this offload.
    Unsupported,
    /// The packet lies in the arena of another device.
    OtherArena,
    /// The device broke the rules of the ring.
    Broken(Broken),
    /// The device is gone for good.
    DeviceLost(Lost),
}

impl core::fmt::Display for SendErrorKind {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            SendErrorKind::QueueFull => f.write_str("the queue is full"),
            SendErrorKind::BadLength => f.write_str("no frame has this length"),
            SendErrorKind::BadOffload => f.write_str("the offload does not fit the packet"),
            SendErrorKind::Unsupported => f.write_str("the device does not do this offload"),
            SendErrorKind::OtherArena => f.write_str("the packet is in another device's arena"),
            SendErrorKind::Broken(broken) => write!(f, "the device broke the queue: {broken}"),
            SendErrorKind::DeviceLost(lost) => lost.fmt(f),
        }
    }
}

impl core::error::Error for SendErrorKind {}

impl core::fmt::Display for SendError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        self.kind.fmt(f)
    }
}

impl core::error::Error for SendError {}
