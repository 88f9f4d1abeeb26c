//! Where frames go to, and come from.

mod loopback;
mod packet;
mod stream;
mod switch;
mod tap;
pub(super) mod vectors;
mod writer;

pub use loopback::Loopback;
pub use packet::Interface;
pub use stream::{Stream, StreamAddress};
pub use switch::{Switch, SwitchPort};
pub(crate) use tap::LATE_IOCTLS as TAP_LATE_IOCTLS;
pub use tap::Tap;

use super::frame::{Frame, Mac};
use super::limits::MAX_QUEUE_PAIRS;
use super::offload::Offloads;
use super::receive::Inlet;
use super::source::Reader;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// The other side of a network device. One that has a descriptor to read from is read by the
/// device's receive queues; any other gives frames to the guest's [`Inlet`] itself.
pub trait Port: Send + Sync + std::fmt::Debug {
    /// The guest that it serves, told once, and the guest's address.
    fn attach(&self, _guest: &Arc<Inlet>, _mac: Mac) {}

    /// Pairs of queues that it can serve.
    fn max_pairs(&self) -> u16 {
        MAX_QUEUE_PAIRS
    }

    /// Offloads that it carries; for others, the device sends it completed frames.
    fn offloads(&self) -> Offloads;

    /// What the guest takes has changed.
    fn set_guest_offloads(&self, _offloads: Offloads) {}

    /// How many pairs of queues the guest uses has changed.
    fn set_pairs(&self, _pairs: u16) {}

    /// Takes frames that the guest sends on this pair's queue: the first so many, in order. The
    /// rest is dropped.
    fn send(&self, pair: u16, frames: &[Frame<'_>]) -> usize;

    /// What is readable when there are frames for this pair's receive queue. The same descriptor
    /// as long as the port exists.
    fn source(&self, _pair: u16) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Reads frames until there are no more, or [`Reader::BATCH`] were read, or the guest has no
    /// buffer. An error ends the receive queue.
    fn receive(&self, _pair: u16, _reader: &mut Reader<'_>) -> io::Result<Received> {
        Ok(Received::Drained)
    }
}

/// Whether a port has more frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// Not now.
    Drained,
    /// Likely.
    More,
    /// Its descriptor says nothing for now: to be asked again after a while, and when the guest
    /// kicks.
    Away,
}

impl Received {
    /// After a batch of which so many were lost: where nothing else comes, there is no hurry.
    fn after_losing(lost: usize) -> Received {
        if lost < Reader::BATCH {
            Received::More
        } else {
            Received::Away
        }
    }
}

/// A frame that says where an address is (RFC 903).
pub(super) fn reverse_arp(mac: [u8; 6]) -> [u8; 60] {
    let mut frame = [0; 60];
    let parts: [&[u8]; 7] = [
        &[0xff; 6],
        &mac,
        // Ethernet type RARP; Ethernet, IPv4, lengths, request reverse.
        &[0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3],
        &mac,
        &[0; 4],
        &mac,
        &[0; 4],
    ];
    let mut at = 0;
    for part in parts {
        if let Some(to) = frame.get_mut(at..at + part.len()) {
            to.copy_from_slice(part);
        }
        at += part.len();
    }
    frame
}
