//! The virtio structures that appear in rings and configuration space (virtio 1.3).

use crate::assert_layout;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

pub mod net;

/// Feature bits, as masks (virtio 1.3 §6).
pub mod feature {
    /// Indirect descriptors.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// `used_event` and `avail_event`.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// Virtio 1.0 or later.
    pub const VERSION_1: u64 = 1 << 32;
    /// Packed virtqueues.
    pub const RING_PACKED: u64 = 1 << 34;
    /// Buffers are used in the order in which they were made available.
    pub const IN_ORDER: u64 = 1 << 35;
}

/// `Desc::flags` (virtio 1.3 §2.7.5).
pub mod desc_flag {
    /// The chain goes on at `next`.
    pub const NEXT: u16 = 1;
    /// The device writes this buffer.
    pub const WRITE: u16 = 2;
    /// The buffer is a table of descriptors.
    pub const INDIRECT: u16 = 4;
}

/// `avail.flags`: the driver wants no used buffer notifications.
pub const AVAIL_NO_INTERRUPT: u16 = 1;
/// `used.flags`: the device wants no available buffer notifications.
pub const USED_NO_NOTIFY: u16 = 1;

/// A descriptor of a split ring (virtio 1.3 §2.7.5).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C, align(16))]
pub struct Desc {
    /// Guest-physical address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// [`desc_flag`].
    pub flags: u16,
    /// Index of the next descriptor, with `NEXT`.
    pub next: u16,
}
assert_layout!(Desc, size 16, align 16, addr @ 0, len @ 8, flags @ 12, next @ 14);

/// An element of the used ring (virtio 1.3 §2.7.8).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct UsedElem {
    /// Head of the chain that was used.
    pub id: u32,
    /// Bytes that the device wrote.
    pub len: u32,
}
assert_layout!(UsedElem, size 8, align 4, id @ 0, len @ 4);

/// Byte sizes of the three parts of a split ring with `size` entries (virtio 1.3 §2.7).
pub mod split {
    /// Descriptor table; aligned to 16.
    pub const fn desc_len(size: u16) -> u64 {
        16 * size as u64
    }
    /// Available ring with `used_event`; aligned to 2.
    pub const fn avail_len(size: u16) -> u64 {
        6 + 2 * size as u64
    }
    /// Used ring with `avail_event`; aligned to 4.
    pub const fn used_len(size: u16) -> u64 {
        6 + 8 * size as u64
    }
    /// Whether moving an index from `old` to `new` passes `event` (virtio 1.3 §2.7.10.1).
    ///
    /// All arithmetic is modulo 2^16; comparing the indices directly loses kicks at the wrap.
    pub const fn need_event(event: u16, new: u16, old: u16) -> bool {
        new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
    }
}

/// Block device (virtio 1.3 §5.2).
pub mod block {
    use super::*;

    /// Bytes in a sector, always.
    pub const SECTOR_SIZE: u64 = 512;

    /// Feature bits, as masks (virtio 1.3 §5.2.3).
    pub mod feature {
        /// `size_max` is valid.
        pub const SIZE_MAX: u64 = 1 << 1;
        /// `seg_max` is valid.
        pub const SEG_MAX: u64 = 1 << 2;
        /// Read-only.
        pub const RO: u64 = 1 << 5;
        /// `blk_size` is valid.
        pub const BLK_SIZE: u64 = 1 << 6;
        /// Flush requests.
        pub const FLUSH: u64 = 1 << 9;
        /// Topology fields are valid.
        pub const TOPOLOGY: u64 = 1 << 10;
        /// `writeback` may be changed.
        pub const CONFIG_WCE: u64 = 1 << 11;
        /// More than one queue.
        pub const MQ: u64 = 1 << 12;
        /// Discard requests.
        pub const DISCARD: u64 = 1 << 13;
        /// Write-zeroes requests.
        pub const WRITE_ZEROES: u64 = 1 << 14;
    }

    /// Request types (virtio 1.3 §5.2.6).
    pub mod request {
        /// Read.
        pub const IN: u32 = 0;
        /// Write.
        pub const OUT: u32 = 1;
        /// Flush.
        pub const FLUSH: u32 = 4;
        /// Device identification string.
        pub const GET_ID: u32 = 8;
        /// Discard.
        pub const DISCARD: u32 = 11;
        /// Write zeroes.
        pub const WRITE_ZEROES: u32 = 13;
    }

    /// Status byte of a request (virtio 1.3 §5.2.6).
    pub mod status {
        /// Done.
        pub const OK: u8 = 0;
        /// Device or driver error.
        pub const IOERR: u8 = 1;
        /// Request unsupported by the device.
        pub const UNSUPP: u8 = 2;
    }

    /// Bytes of the string that `GET_ID` returns.
    pub const ID_LEN: usize = 20;

    /// The head of every request.
    #[derive(
        Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
    )]
    #[repr(C)]
    pub struct RequestHeader {
        /// [`request`].
        pub kind: u32,
        /// Zero.
        pub reserved: u32,
        /// First sector.
        pub sector: u64,
    }
    assert_layout!(RequestHeader, size 16, align 8, kind @ 0, reserved @ 4, sector @ 8);

    /// `RangeSegment::flags`: the device may unmap the range (write-zeroes only).
    pub const RANGE_UNMAP: u32 = 1;

    /// One range of a discard or write-zeroes request.
    #[derive(
        Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
    )]
    #[repr(C)]
    pub struct RangeSegment {
        /// First sector.
        pub sector: u64,
        /// Sectors.
        pub count: u32,
        /// [`RANGE_UNMAP`].
        pub flags: u32,
    }
    assert_layout!(RangeSegment, size 16, align 8, sector @ 0, count @ 8, flags @ 12);

    /// Configuration space (virtio 1.3 §5.2.4), up to and including write-zeroes.
    #[derive(
        Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
    )]
    #[repr(C, packed)]
    pub struct Config {
        /// Sectors of 512 bytes.
        pub capacity: u64,
        /// Most bytes in one segment.
        pub size_max: u32,
        /// Most segments in one request.
        pub seg_max: u32,
        /// Cylinders.
        pub cylinders: u16,
        /// Heads.
        pub heads: u8,
        /// Sectors per track.
        pub sectors: u8,
        /// Optimal block size, in bytes.
        pub blk_size: u32,
        /// log2 of logical blocks per physical block.
        pub physical_block_exp: u8,
        /// Offset of the first aligned logical block.
        pub alignment_offset: u8,
        /// Least I/O size, in blocks.
        pub min_io_size: u16,
        /// Best I/O size, in blocks.
        pub opt_io_size: u32,
        /// 1: write-back, 0: write-through.
        pub writeback: u8,
        /// Zero.
        pub unused0: u8,
        /// Queues.
        pub num_queues: u16,
        /// Most sectors in one discard segment.
        pub max_discard_sectors: u32,
        /// Most discard segments in one request.
        pub max_discard_seg: u32,
        /// Alignment of discards, in sectors.
        pub discard_sector_alignment: u32,
        /// Most sectors in one write-zeroes segment.
        pub max_write_zeroes_sectors: u32,
        /// Most write-zeroes segments in one request.
        pub max_write_zeroes_seg: u32,
        /// 1 if write-zeroes may unmap.
        pub write_zeroes_may_unmap: u8,
        /// Zero.
        pub unused1: [u8; 3],
    }
    assert_layout!(Config, size 60, align 1, capacity @ 0, size_max @ 8, seg_max @ 12,
        cylinders @ 16, heads @ 18, sectors @ 19, blk_size @ 20, physical_block_exp @ 24,
        alignment_offset @ 25, min_io_size @ 26, opt_io_size @ 28, writeback @ 32, unused0 @ 33,
        num_queues @ 34, max_discard_sectors @ 36,
        max_discard_seg @ 40, discard_sector_alignment @ 44, max_write_zeroes_sectors @ 48,
        max_write_zeroes_seg @ 52, write_zeroes_may_unmap @ 56, unused1 @ 57);
}

#[cfg(test)]
mod tests {
    use super::split::need_event;

    /// Every old index and step around every event distance, against the plain definition: some
    /// index in `old..new` (walking forward) equals the event.
    #[test]
    fn need_event_agrees_with_its_definition() {
        for old in (0..=u16::MAX)
            .step_by(257)
            .chain([u16::MAX, u16::MAX - 1, 0, 1])
        {
            for step in (0u16..40).chain([255, 256, 1023, 1024]) {
                let new = old.wrapping_add(step);
                for offset in (0u16..44).chain([1024, 1025, 0x7fff, 0x8000, 0xfffe, 0xffff]) {
                    let event = old.wrapping_add(offset);
                    assert_eq!(need_event(event, new, old), offset < step);
                }
            }
        }
    }
}
