//! Where one stands in a packed ring, and what stands in a descriptor there.

use crate::ring::inflight::LoggedDesc;

/// Descriptor flags: available, in laps in which the wrap counter is one.
pub(super) const AVAIL: u16 = 1 << 7;
/// Descriptor flags: used, in laps in which the wrap counter is one.
pub(super) const USED: u16 = 1 << 15;
/// In [`RingState`](crate::ring::RingState) and in events: the wrap counter.
pub(super) const WRAP: u16 = 1 << 15;
/// Bytes of a descriptor.
pub(super) const DESC: u64 = 16;
/// In a descriptor: length, id and flags, eight bytes together.
pub(super) const AT_REST: u64 = 8;

/// A descriptor of the ring: its index, and in bit 15 the wrap counter of the lap.
///
/// One number, as all that a ring keeps for each chain. A processor that reads in one what it
/// wrote in parts waits until the parts are in memory: behind everything that it wrote before,
/// and thus for lines that the driver has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Position(u16);

impl Position {
    /// `index` is that of a descriptor.
    #[inline]
    pub(super) fn new(index: u16, wrap: bool) -> Position {
        Position(index & !WRAP | if wrap { WRAP } else { 0 })
    }

    #[inline]
    pub(super) fn index(self) -> u16 {
        self.0 & !WRAP
    }

    #[inline]
    pub(super) fn wrap(self) -> bool {
        self.0 & WRAP != 0
    }

    /// `count` is at most `size`.
    #[inline]
    pub(super) fn advanced(self, count: u16, size: u16) -> Position {
        let index = self.index() + count;
        if index >= size {
            Position::new(index - size, !self.wrap())
        } else {
            Position(self.0 + count)
        }
    }

    /// `count` is at most `size`.
    pub(super) fn moved_back(self, count: u16, size: u16) -> Position {
        match self.index().checked_sub(count) {
            Some(index) => Position::new(index, self.wrap()),
            None => Position::new(self.index() + (size - count), !self.wrap()),
        }
    }

    pub(super) fn from_state(state: u16) -> Position {
        Position(state)
    }

    #[inline]
    pub(super) fn to_state(self) -> u16 {
        self.0
    }

    #[inline]
    pub(super) fn available(self, flags: u16) -> bool {
        (flags & AVAIL != 0) == self.wrap() && (flags & USED != 0) != self.wrap()
    }

    /// First byte of the descriptor here.
    #[inline]
    pub(super) fn offset(self) -> u64 {
        DESC * u64::from(self.index())
    }
}

/// A chain in flight, in one number as well; zero if there is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Taken(u64);

impl Taken {
    const READ_ONLY: u64 = 1 << 63;

    /// A chain of so many descriptors from `at` on; whether nothing is written to its buffers.
    #[inline]
    pub(super) fn new(count: u16, at: Position, read_only: bool) -> Taken {
        let flag = if read_only { Taken::READ_ONLY } else { 0 };
        Taken(u64::from(count) | u64::from(at.index()) << 16 | flag)
    }

    /// The same, logged at `entry`.
    pub(super) fn logged(self, entry: u16) -> Taken {
        Taken(self.0 & !0xffff_0000_0000 | u64::from(entry) << 32)
    }

    /// Descriptors that it takes in the ring.
    #[inline]
    pub(super) fn count(self) -> u16 {
        self.0 as u16
    }

    /// Whether it was taken here, and nothing is written to its buffers.
    #[inline]
    pub(super) fn is_read_only_at(self, position: Position) -> bool {
        self.0 & Taken::READ_ONLY != 0 && (self.0 >> 16) as u16 == position.index()
    }

    /// Where it is logged.
    pub(super) fn entry(self) -> u16 {
        (self.0 >> 32) as u16
    }
}

/// The parts of a descriptor, from its two words.
#[inline]
pub(super) fn parse(addr: u64, rest: u64) -> LoggedDesc {
    LoggedDesc {
        addr,
        // 32, 16 and 16 bits.
        len: rest as u32,
        id: (rest >> 32) as u16,
        flags: flags_of(rest),
    }
}

/// The flags in a descriptor's second word.
#[inline]
pub(super) fn flags_of(rest: u64) -> u16 {
    (rest >> 48) as u16
}

/// The second word of a used descriptor.
#[inline]
pub(super) fn used_word(written: u32, id: u16, flags: u16) -> u64 {
    u64::from(written) | u64::from(id) << 32 | u64::from(flags) << 48
}
