//! Size and limits of a block device, read from its configuration space.

use crate::device::Core;
use crate::limits::MAX_BLOCK_BYTES;
use crate::platform::{Arena, Platform};
use crate::sync::SpinLock;
use pv_abi::virtio::block::{Config, SECTOR_SIZE, feature};
use zerocopy::FromBytes;

/// What a block device is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Sectors of 512 bytes.
    pub capacity: u64,
    /// Bytes of a logical block; 512 where the device does not say.
    pub block_size: u32,
    /// Most bytes in one request, a multiple of 512.
    pub max_bytes: usize,
    /// Most sectors in one discard.
    pub max_discard_sectors: u32,
    /// Most sectors in one write-zeroes.
    pub max_write_zeroes_sectors: u32,
}

/// What the queues of one device share.
pub(crate) struct Shared<P: Platform> {
    pub(crate) core: Core<P>,
    pub(crate) arena: &'static Arena,
    geometry: SpinLock<Geometry>,
}

impl<P: Platform> Shared<P> {
    pub(crate) fn new(core: Core<P>, arena: &'static Arena) -> Self {
        let geometry = SpinLock::new(read(&core));
        Shared {
            core,
            arena,
            geometry,
        }
    }

    pub(crate) fn geometry(&self) -> Geometry {
        *self.geometry.lock()
    }

    /// Reads the configuration again.
    pub(crate) fn refresh(&self) -> Geometry {
        let now = read(&self.core);
        *self.geometry.lock() = now;
        now
    }
}

/// Reads the configuration; what it leaves out or says absurdly becomes the least that is useful.
fn read<P: Platform>(core: &Core<P>) -> Geometry {
    let (mut bytes, len) = core.config();
    bytes[len..].fill(0);
    let config = Config::read_from_prefix(&bytes).map_or_else(|_| Config::default(), |(c, _)| c);
    let features = core.features();
    let offered = |bit: u64| features & bit != 0;
    let sector = SECTOR_SIZE as u32;
    let block_size = config.blk_size;
    let size_max = config.size_max as usize;
    Geometry {
        capacity: config.capacity,
        block_size: if offered(feature::BLK_SIZE) && block_size.is_multiple_of(sector) {
            block_size.max(sector)
        } else {
            sector
        },
        max_bytes: if offered(feature::SIZE_MAX) {
            let whole = size_max - size_max % SECTOR_SIZE as usize;
            whole.clamp(SECTOR_SIZE as usize, MAX_BLOCK_BYTES)
        } else {
            MAX_BLOCK_BYTES
        },
        max_discard_sectors: if offered(feature::DISCARD) {
            config.max_discard_sectors
        } else {
            0
        },
        max_write_zeroes_sectors: if offered(feature::WRITE_ZEROES) {
            config.max_write_zeroes_sectors
        } else {
            0
        },
    }
}
