//! The block device (virtio 1.3 §5.2).
//!
//! [`open`] gives one queue on this vCPU, which is what most guests want; [`Block::open`] gives as
//! many as the device has, each to be moved to the vCPU that it was made for. A [`BlockQueue`] has
//! three faces: blocking calls on byte slices, [`submit`](BlockQueue::submit) and
//! [`poll`](BlockQueue::poll) for many requests in flight, and futures ([`AsyncBlock`]).
//!
//! A backend that dies does not show: the requests that it had are given to the next one
//! ([how](crate::device)). What shows, as an error, is a device that stays away for too long
//! ([`Error::DeviceLost`]) and one that breaks the rules of the ring ([`Error::Broken`]).

mod blocking;
mod config;
mod error;
mod future;
mod queue;
mod request;
#[cfg(test)]
mod tests;

pub use config::Geometry;
pub use error::{Error, SubmitError};
pub use future::{AsyncBlock, Pending};
pub use queue::{BlockQueue, Completion, Token};
pub use request::Request;

use crate::device::{Channel, Core, OpenError, Ring, agree_to_all};
use crate::limits::DEFAULT_QUEUE_SIZE;
use crate::platform::Platform;
use alloc::sync::Arc;
use alloc::vec::Vec;
use config::Shared;
use core::time::Duration;
use pv_abi::device::kind;
use pv_abi::virtio::{block::feature as block_feature, feature};
use request::SEGMENTS;

/// Features that the driver has a use for.
const KNOWN: u64 = feature::VERSION_1
    | feature::EVENT_IDX
    | feature::INDIRECT_DESC
    | block_feature::SIZE_MAX
    | block_feature::SEG_MAX
    | block_feature::RO
    | block_feature::BLK_SIZE
    | block_feature::FLUSH
    | block_feature::MQ
    | block_feature::DISCARD
    | block_feature::WRITE_ZEROES;

/// How a queue is set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueConfig {
    /// The vCPU that will use it and wait for it.
    pub vcpu: u32,
    /// Entries, a power of two; lowered to what the device allows.
    pub size: u16,
}

/// A block device; a handle that is cheap to clone. Requests go through its queues.
pub struct Block<P: Platform> {
    shared: Arc<Shared<P>>,
}

/// Opens a block device with one queue, for the vCPU that runs this.
///
/// `name` is the embedder's name for the device; the first block device if `None`.
///
/// # Errors
///
/// [`OpenError`]; waits for a device that is not there yet, for a few seconds.
pub fn open<P: Platform>(
    platform: &'static P,
    name: Option<&str>,
) -> Result<BlockQueue<P>, OpenError> {
    let queue = QueueConfig {
        vcpu: platform.vcpu_index(),
        size: DEFAULT_QUEUE_SIZE,
    };
    let (_device, mut queues) = Block::open(platform, name, &[queue])?;
    queues.pop().ok_or(OpenError::BadQueues)
}

impl<P: Platform> Block<P> {
    /// Opens a block device with these queues.
    ///
    /// The vCPU of the first one also gets the device's configuration event.
    ///
    /// # Errors
    ///
    /// [`OpenError`]; waits for a device that is not there yet, for a few seconds.
    pub fn open(
        platform: &'static P,
        name: Option<&str>,
        queues: &[QueueConfig],
    ) -> Result<(Self, Vec<BlockQueue<P>>), OpenError> {
        let (info, arena) = Core::find(platform, kind::BLOCK, name)?;
        if queues.len() > usize::from(info.queue_count) {
            return Err(OpenError::BadQueues);
        }
        let mut channels = Vec::with_capacity(queues.len());
        for (index, config) in queues.iter().enumerate() {
            let size = config.size.min(info.max_queue_size);
            if !size.is_power_of_two() || size < 4 || config.vcpu >= platform.vcpu_count() {
                return Err(OpenError::BadQueues);
            }
            let index = index as u16;
            let channel = Channel::new(&info, index, arena, size, config.vcpu, SEGMENTS)?;
            channels.push((Arc::new(channel), size));
        }
        let rings = channels
            .iter()
            .map(|(channel, _)| Arc::clone(channel) as Arc<dyn Ring>)
            .collect();
        let core = Core::bring_up(platform, info, KNOWN, agree_to_all(), rings)?;
        let shared = Arc::new(Shared::new(core, arena));
        let queues = channels
            .into_iter()
            .map(|(channel, size)| BlockQueue::new(Arc::clone(&shared), channel, size))
            .collect::<Result<_, _>>()?;
        Ok((Block { shared }, queues))
    }

    pub(crate) fn from_shared(shared: &Arc<Shared<P>>) -> Self {
        Block {
            shared: Arc::clone(shared),
        }
    }

    /// Size and limits, as last read from the configuration.
    pub fn geometry(&self) -> Geometry {
        self.shared.geometry()
    }

    /// Sectors of 512 bytes, as last read from the configuration.
    pub fn capacity(&self) -> u64 {
        self.shared.geometry().capacity
    }

    /// Whether the device refuses writes.
    pub fn read_only(&self) -> bool {
        self.features() & block_feature::RO != 0
    }

    /// Virtio features in force.
    pub fn features(&self) -> u64 {
        self.shared.core.features()
    }

    /// The generation of the device that is in use; moves when a backend was replaced.
    pub fn generation(&self) -> Option<u32> {
        self.shared.core.generation()
    }

    /// Whether the configuration changed since the last call; what it says is read again if so.
    pub fn take_config_change(&self) -> bool {
        let changed = self.shared.core.take_config_change();
        if changed {
            self.shared.refresh();
        }
        changed
    }

    /// How long the device may stay away before its requests fail; a minute unless set.
    pub fn set_loss_timeout(&self, timeout: Duration) {
        let nanoseconds = u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX);
        self.shared.core.set_loss_timeout(nanoseconds);
    }

    /// Starts the device anew and gives it every request again; heals a broken queue.
    pub fn reset(&self) {
        self.shared.core.reset();
    }
}

impl<P: Platform> Clone for Block<P> {
    fn clone(&self) -> Self {
        Block::from_shared(&self.shared)
    }
}

impl<P: Platform> core::fmt::Debug for Block<P> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Block")
            .field("name", &self.shared.core.info().name())
            .field("geometry", &self.geometry())
            .finish_non_exhaustive()
    }
}
