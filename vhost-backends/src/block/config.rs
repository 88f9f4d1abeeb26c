//! What the device offers, and its configuration space (virtio 1.3 §5.2.3, §5.2.4).

use super::Disk;
use crate::limits::{MAX_QUEUES, MAX_RANGE_SECTORS, MAX_RANGES};
use pv_abi::limits::MAX_CHAIN_LEN;
use pv_abi::virtio::block::{Config, ID_LEN, SECTOR_SIZE, feature};
use pv_abi::virtio::feature as ring;
use zerocopy::IntoBytes;

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

pub(super) fn features(disk: &Disk, options: &BlockOptions) -> u64 {
    let mut features = ring::VERSION_1
        | ring::EVENT_IDX
        | ring::INDIRECT_DESC
        | feature::SEG_MAX
        | feature::BLK_SIZE
        | feature::FLUSH;
    if options.queues > 1 {
        features |= feature::MQ;
    }
    if disk.read_only {
        features |= feature::RO;
    } else {
        features |= feature::DISCARD | feature::WRITE_ZEROES;
    }
    features
}

pub(super) fn space(disk: &Disk, options: &BlockOptions) -> Vec<u8> {
    let block = disk.file.align().max(SECTOR_SIZE);
    let writable = !disk.read_only;
    let config = Config {
        capacity: disk.capacity.to_le(),
        seg_max: SEG_MAX.to_le(),
        // 512 or 4096.
        blk_size: (block as u32).to_le(),
        writeback: 1,
        num_queues: options.queues.to_le(),
        max_discard_sectors: if writable { MAX_RANGE_SECTORS } else { 0 },
        max_discard_seg: u32::from(writable) * MAX_RANGES as u32,
        discard_sector_alignment: (block / SECTOR_SIZE) as u32,
        max_write_zeroes_sectors: if writable { MAX_RANGE_SECTORS } else { 0 },
        max_write_zeroes_seg: u32::from(writable) * MAX_RANGES as u32,
        write_zeroes_may_unmap: u8::from(writable),
        ..Config::default()
    };
    config.as_bytes().to_vec()
}
