//! Virtqueues, seen from the device.
//!
//! In come a ring's addresses and guest memory; out come descriptor chains, each walked once into
//! an owned, bounded value, and back go batches of completions. This is the one seam between
//! rings and devices: a device sees [`DeviceRing`] and [`OwnedChain`], never a descriptor.
//!
//! The driver is not trusted. A ring that breaks a rule is *retired*: [`DeviceRing::pop`] gives
//! the same typed [`Retire`] from then on, and only a new ring (a reset) ends that. Nothing here
//! logs, allocates or loops without a bound that the driver cannot move.

mod any;
#[cfg(test)]
mod both_tests;
mod chain;
pub(crate) mod crash;
mod dirty;
mod inflight;
mod packed;
mod place;
mod split;
#[cfg(test)]
mod tests;

pub use any::{Ring, RingSetup};
pub use chain::{ChainError, OwnedChain, Segment};
pub use dirty::{DirtyLog, DirtyLogError};
pub use inflight::{InflightError, InflightLog};
pub use packed::PackedRing;
pub use split::{RingConfig, SplitRing};

pub(crate) use chain::Finder;
pub(crate) use dirty::RingDirty;
use place::{Mapped, map_part};
pub(crate) use place::{cut, will_read, will_write};

use vm_memory::GuestAddress;

/// Where a ring has got to: what a stop hands out and a start takes in. Of a packed ring, bit 15
/// is the wrap counter and the rest an index into the ring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingState {
    /// Index of the next available entry to take.
    pub next_avail: u16,
    /// Index of the next used element to write.
    pub next_used: u16,
}

impl RingState {
    /// As `SET_VRING_BASE` of a packed ring gives it.
    pub(crate) fn from_packed_base(base: u32) -> RingState {
        // Halves of a u32.
        let (next_avail, next_used) = (base as u16, (base >> 16) as u16);
        RingState {
            next_avail,
            // Frontends that know one index only mean both: nothing is in flight.
            next_used: if next_used == 0 {
                next_avail
            } else {
                next_used
            },
        }
    }

    /// As `GET_VRING_BASE` of a packed ring gives it.
    pub(crate) fn to_packed_base(self) -> u32 {
        u32::from(self.next_avail) | u32::from(self.next_used) << 16
    }
}

/// Why a ring was retired: one variant per rule that a driver can break.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Retire {
    /// The available index moved by more than the queue holds.
    #[error("the available index moved by {moved}, more than the {size} entries of the queue")]
    AvailJump {
        /// Entries that the index moved by.
        moved: u16,
        /// Entries of the queue.
        size: u16,
    },
    /// A head that is not a descriptor of the table.
    #[error("head {head} is outside the table")]
    BadHead {
        /// The head.
        head: u16,
    },
    /// A head whose chain has not been completed yet.
    #[error("head {head} is already in flight")]
    HeadInFlight {
        /// The head.
        head: u16,
    },
    /// A `next` that is not a descriptor of the table.
    #[error("next descriptor {next} is outside the table")]
    BadNext {
        /// The index.
        next: u16,
    },
    /// A chain that comes back to itself.
    #[error("the chain at head {head} has a loop")]
    Loop {
        /// The head.
        head: u16,
    },
    /// More descriptors than [`pv_abi::limits::MAX_CHAIN_LEN`].
    #[error("the chain at head {head} has too many descriptors")]
    TooLong {
        /// The head.
        head: u16,
    },
    /// More bytes than a used element can count.
    #[error("the chain at head {head} has too many bytes")]
    TooManyBytes {
        /// The head.
        head: u16,
    },
    /// A readable buffer after a writable one (virtio 1.3 §2.7.4.2).
    #[error("the chain at head {head} has a readable buffer after a writable one")]
    ReadableAfterWritable {
        /// The head.
        head: u16,
    },
    /// A buffer that does not lie in the memory table.
    #[error("buffer of {len} bytes at {addr:#x} is outside memory")]
    BadAddress {
        /// First byte.
        addr: u64,
        /// Bytes.
        len: u32,
    },
    /// An indirect table although the feature was not negotiated.
    #[error("indirect descriptor without the feature")]
    IndirectNotNegotiated,
    /// An indirect table inside an indirect table.
    #[error("indirect descriptor inside an indirect table")]
    NestedIndirect,
    /// An indirect descriptor that says that the chain goes on after it (virtio 1.3 §2.7.5.3.1).
    #[error("indirect descriptor with the next flag")]
    IndirectWithNext,
    /// An indirect table that is empty, not a multiple of 16 bytes, or longer than a chain may be.
    #[error("indirect table of {len} bytes")]
    BadIndirectLen {
        /// Bytes.
        len: u32,
    },
    /// The ring itself could not be read or written any more.
    #[error("the ring is not accessible")]
    RingAccess,
}

/// Why a ring cannot be set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// Zero, not a power of two, or over [`crate::limits::MAX_RING_SIZE`].
    #[error("queue size {0} is not a power of two between 1 and {max}", max = crate::limits::MAX_RING_SIZE)]
    BadSize(u16),
    /// A part of the ring breaks its alignment, in guest or in host addresses.
    #[error("the {part} at {addr:#x} is not aligned")]
    Misaligned {
        /// Which part.
        part: RingPart,
        /// Its address.
        addr: u64,
    },
    /// A part of the ring is not in one region of memory.
    #[error("the {part} at {addr:#x} is outside memory")]
    OutsideMemory {
        /// Which part.
        part: RingPart,
        /// Its address.
        addr: u64,
    },
    /// A state to go on from that is not one of this ring.
    #[error("there is no index {0:#x}")]
    BadState(u16),
    /// An in-flight log that is not of this ring, or was damaged.
    #[error("the in-flight log does not belong to this ring")]
    BadInflightLog,
}

/// The three parts of a split ring, and of a packed one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingPart {
    /// Descriptor table.
    DescriptorTable,
    /// Available ring.
    AvailableRing,
    /// Used ring.
    UsedRing,
    /// Descriptor ring.
    DescriptorRing,
    /// Driver event suppression structure.
    DriverEvent,
    /// Device event suppression structure.
    DeviceEvent,
}

impl std::fmt::Display for RingPart {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            RingPart::DescriptorTable => "descriptor table",
            RingPart::AvailableRing => "available ring",
            RingPart::UsedRing => "used ring",
            RingPart::DescriptorRing => "descriptor ring",
            RingPart::DriverEvent => "driver event structure",
            RingPart::DeviceEvent => "device event structure",
        })
    }
}

/// A chain that is finished.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// Head of the chain, as [`OwnedChain::head`] gave it.
    pub head: u16,
    /// Bytes that the device wrote into the chain, from its first writable byte on.
    pub written: u32,
}

/// The device's half of a virtqueue.
pub trait DeviceRing {
    /// Takes the next chain into `chain`, in the place of what was there. `false` when the driver
    /// has made no more available: then, and with an error, what is in `chain` is nothing.
    fn pop_into(&mut self, chain: &mut OwnedChain) -> Result<bool, Retire>;

    /// Takes the next chain, or `None` when the driver has made no more available.
    fn pop(&mut self) -> Result<Option<OwnedChain>, Retire> {
        let mut chain = OwnedChain::empty();
        Ok(self.pop_into(&mut chain)?.then_some(chain))
    }

    /// Gives chains back: writes their used elements, then publishes the index once.
    ///
    /// A head that is not in flight is the caller's mistake and is left out.
    fn complete(&mut self, batch: &[Completion]);

    /// Asks the driver for a kick at the next chain. `true`: more came meanwhile, look again
    /// before sleeping. Always `false` once the ring is retired.
    fn arm(&mut self) -> bool;

    /// Takes back the wish for a kick, where that was not fulfilled: the device is awake and will
    /// look before it sleeps.
    fn disarm(&mut self);

    /// Whether the driver has made more available, without asking for kicks and without taking
    /// anything: for a device that polls for a moment before it sleeps.
    fn has_more(&self) -> bool;

    /// Whether the driver wants to be called for what was completed since this was last asked.
    fn should_signal(&mut self) -> bool;

    /// Chains that were popped and not completed yet.
    fn in_flight(&self) -> usize;

    /// Where the ring has got to.
    fn save(&self) -> RingState;

    /// Goes on from `state` with nothing in flight. A retired ring stays retired.
    fn restore(&mut self, state: RingState);
}

/// The available ring's field that a device reads after completing: `used_event` or `flags`.
pub(crate) const fn used_event_offset(size: u16) -> u64 {
    4 + 2 * size as u64
}

/// First byte of used element `index % size`.
pub(crate) const fn used_elem_offset(index: u16, size: u16) -> u64 {
    4 + 8 * (index % size) as u64
}

/// The used ring's field in which a device asks for a kick with `EVENT_IDX`: `avail_event`.
pub(crate) const fn avail_event_offset(size: u16) -> u64 {
    4 + 8 * size as u64
}

/// `base + offset`, for offsets inside a part that was checked when the ring was set up.
pub(crate) fn at(base: GuestAddress, offset: u64) -> GuestAddress {
    GuestAddress(base.0.wrapping_add(offset))
}
