//! What the device offers, and its configuration space (virtio 1.3 §5.2.3, §5.2.4).

use super::Disk;
use crate::limits::{MAX_QUEUES, MAX_RANGE_SECTORS, MAX_RANGES, MAX_REQUEST_BYTES};
use pv_abi::limits::MAX_CHAIN_LEN;
use pv_abi::virtio::block::{Config, ID_LEN, SECTOR_SIZE, feature};
use pv_abi::virtio::feature as ring;
use std::mem::offset_of;
use zerocopy::{Immutable, IntoBytes};

/// How a block device shows itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockOptions {
    /// Queues, 1 to [`MAX_QUEUES`].
    pub queues: u16,
    /// What `GET_ID` returns: ASCII, padded with zeroes.
    pub id: [u8; ID_LEN],
}

impl BlockOptions {
    /// As many queues, brought into range, and the default name.
    pub fn with_queues(queues: u16) -> BlockOptions {
        let mut id = [0; ID_LEN];
        for (to, from) in id.iter_mut().zip(b"paravane") {
            *to = *from;
        }
        BlockOptions {
            queues: queues.clamp(1, MAX_QUEUES),
            id,
        }
    }
}

/// Segments of data in one request: a chain without header and status.
const SEG_MAX: u32 = MAX_CHAIN_LEN as u32 - 2;

/// Bytes of one segment: a whole request may be one.
const SEGMENT_MAX: u32 = MAX_REQUEST_BYTES as u32;

/// Feature bits of virtio 1.3 §5.2.3 that the ABI does not use.
pub(super) const LIFETIME: u64 = 1 << 15;
pub(super) const SECURE_ERASE: u64 = 1 << 16;

/// What follows [`Config`] in configuration space (virtio 1.3 §5.2.4).
#[derive(Clone, Copy, Debug, Default, IntoBytes, Immutable)]
#[repr(C)]
struct SecureErase {
    max_sectors: u32,
    max_seg: u32,
    sector_alignment: u32,
}

pub(super) fn features(disk: &Disk, options: &BlockOptions) -> u64 {
    let mut features = ring::VERSION_1
        | ring::EVENT_IDX
        | ring::INDIRECT_DESC
        | feature::SIZE_MAX
        | feature::SEG_MAX
        | feature::BLK_SIZE
        | feature::TOPOLOGY
        | feature::FLUSH
        | LIFETIME;
    if options.queues > 1 {
        features |= feature::MQ;
    }
    if disk.read_only {
        return features | feature::RO;
    }
    features |= feature::CONFIG_WCE | feature::WRITE_ZEROES;
    if disk.geometry.discard {
        features |= feature::DISCARD;
    }
    if disk.geometry.secure_erase {
        features |= SECURE_ERASE;
    }
    features
}

pub(super) fn space(disk: &Disk, options: &BlockOptions) -> Vec<u8> {
    let geometry = &disk.geometry;
    // All of these are zero, or powers of two of at least a sector, unless a store lies.
    let block = geometry.logical_block.max(SECTOR_SIZE as u32);
    let blocks = |bytes: u32| bytes / block;
    let writable = !disk.read_only;
    let discard = writable && geometry.discard;
    let most = |offered| {
        if offered {
            MAX_RANGE_SECTORS.to_le()
        } else {
            0
        }
    };
    let segments = |offered| (u32::from(offered) * MAX_RANGES as u32).to_le();
    let sectors = (block / SECTOR_SIZE as u32).to_le();
    let config = Config {
        capacity: disk.capacity().to_le(),
        size_max: SEGMENT_MAX.to_le(),
        seg_max: SEG_MAX.to_le(),
        blk_size: block.to_le(),
        // At most 31, and far less in fact.
        physical_block_exp: (geometry.physical_block / block).max(1).ilog2() as u8,
        alignment_offset: u8::try_from(blocks(geometry.alignment_offset)).unwrap_or(0),
        min_io_size: u16::try_from(blocks(geometry.minimum_io))
            .unwrap_or(0)
            .to_le(),
        opt_io_size: blocks(geometry.optimal_io).to_le(),
        writeback: u8::from(disk.writeback()),
        num_queues: options.queues.to_le(),
        max_discard_sectors: most(discard),
        max_discard_seg: segments(discard),
        discard_sector_alignment: sectors,
        max_write_zeroes_sectors: most(writable),
        max_write_zeroes_seg: segments(writable),
        write_zeroes_may_unmap: u8::from(writable),
        ..Config::default()
    };
    let erase = writable && geometry.secure_erase;
    let erase = SecureErase {
        max_sectors: most(erase),
        max_seg: segments(erase),
        sector_alignment: if erase { sectors } else { 0 },
    };
    [config.as_bytes(), erase.as_bytes()].concat()
}

/// Sectors that this configuration space tells of.
pub(super) fn capacity_in(space: &[u8]) -> Option<u64> {
    let bytes = space.get(offset_of!(Config, capacity)..)?.first_chunk()?;
    Some(u64::from_le_bytes(*bytes))
}

/// The write to configuration space that chooses this.
pub(super) fn write_of(writeback: bool) -> Option<(u32, Vec<u8>)> {
    let offset = u32::try_from(offset_of!(Config, writeback)).ok()?;
    Some((offset, vec![u8::from(writeback)]))
}

/// A write to configuration space: the driver may only choose how writes are cached.
pub(super) fn parse_write(offset: u32, data: &[u8]) -> Option<bool> {
    let writable = u32::try_from(offset_of!(Config, writeback)).ok()?;
    match (offset == writable, data) {
        (true, [0]) => Some(false),
        (true, [1]) => Some(true),
        _ => None,
    }
}
