//! The block device (virtio 1.3 §5.2), served over vhost-user.

use super::Offer;
use super::vhost_user::{DeviceConfig, Model, Served};
use pv_abi::device::kind;
use pv_abi::virtio::block::Config;
use std::io;

/// A block device and the vhost-user backend that serves it.
pub type BlockConfig = DeviceConfig<Block>;

/// Configuration space up to and including write-zeroes, and as older backends have it.
const CONFIG_LENS: [usize; 2] = [size_of::<Config>(), 36];

/// What a block device has of its own.
#[derive(Clone, Debug)]
pub struct Block {
    queues: u16,
}

impl Default for Block {
    fn default() -> Block {
        Block { queues: 1 }
    }
}

impl BlockConfig {
    /// Queues, 1 to 32; 1 if none is given. The backend must serve as many.
    pub fn queues(mut self, queues: u16) -> BlockConfig {
        self.model.queues = queues;
        self
    }
}

impl Model for Block {
    fn kind(&self) -> u32 {
        kind::BLOCK
    }

    fn queues(&self) -> u16 {
        self.queues
    }

    fn config_lens(&self) -> &'static [usize] {
        &CONFIG_LENS
    }

    fn offer(&self, served: &Served) -> io::Result<Offer> {
        served.need_queues(self.queues)?;
        let missing = || io::Error::other("the backend does not offer its configuration (CONFIG)");
        Ok(Offer {
            features: served.features,
            config: served.config.clone().ok_or_else(missing)?,
        })
    }
}
