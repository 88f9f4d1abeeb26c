//! What a session needs of a device, and what it gives to one.

use crate::ring::{Retire, Ring, RingState};
use crate::session::{FrontendLink, HangUp, Notifier};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use vhost::vhost_user::VhostUserProtocolFeatures;

/// A device that vhost-user sessions serve. One device outlives many connections.
pub trait Device: Send + Sync {
    /// Queues that it has; at most [`crate::limits::MAX_QUEUES`].
    fn queue_count(&self) -> u16;

    /// Virtio feature bits that it offers: the device's own, and of the ring's the ones it can use.
    fn features(&self) -> u64;

    /// Configuration space.
    fn config(&self) -> Vec<u8>;

    /// A part of configuration space; what it is short of reads as zero.
    fn read_config(&self, offset: u32, len: u32) -> Vec<u8> {
        let config = self.config();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        let rest = config.get(start..).unwrap_or_default();
        rest.get(..len).unwrap_or(rest).to_vec()
    }

    /// A write to configuration space. Refused, unless the device says otherwise.
    fn write_config(&self, _offset: u32, _data: &[u8]) -> Result<(), ConfigRefused> {
        Err(ConfigRefused)
    }

    /// Writes to configuration space, each with its offset, that bring a new device of this kind to
    /// where this one is: for another process that takes its frontend over.
    fn saved_config(&self) -> Vec<(u32, Vec<u8>)> {
        Vec::new()
    }

    /// Goes on with the configuration that another process has told the frontend, as far as that can
    /// differ from this device's own. Whether it is the device that the frontend knows.
    fn resume_config(&self, told: &[u8]) -> bool {
        self.config() == told
    }

    /// Whether its queues and the guest's memory are reached through [`QueueSetup::ring`] and its
    /// chains alone. Then the session also offers what the ring does by itself: packed rings, the
    /// in-flight log and the dirty log.
    fn serves_through_ring(&self) -> bool {
        true
    }

    /// Protocol features that it is offered with, of those served for every device. `owned`: the
    /// frontend has said `SET_OWNER` already.
    fn protocol_features(
        &self,
        served: VhostUserProtocolFeatures,
        _owned: bool,
    ) -> VhostUserProtocolFeatures {
        served
    }

    /// Whether only memory and logs are taken that the frontend cannot cut off (`F_SEAL_SHRINK`).
    /// One that does, under a ring, ends this process with SIGBUS.
    fn needs_sealed_memory(&self) -> bool {
        false
    }

    /// The frontend tells the MTU of its network device (`NET_MTU`). Whether it may be that.
    fn set_mtu(&self, _mtu: u64) -> bool {
        false
    }

    /// The frontend has moved a guest here that cannot announce itself (`RARP`). Whether the
    /// device can do so for it.
    fn announce_guest(&self, _mac: [u8; 6]) -> bool {
        false
    }

    /// The way to tell the frontend something, once there is one; `None` when it is gone.
    fn set_frontend(&self, _frontend: Option<Arc<FrontendLink>>) {}

    /// Starts serving a queue, usually with a thread of its own. It looks at the ring at once,
    /// without waiting for a kick: kicks from before this start may be lost.
    fn open_queue(&self, setup: QueueSetup) -> io::Result<Box<dyn QueueWorker>>;

    /// The frontend reset the device; no queue is open.
    fn reset(&self) {}

    /// The frontend set the status to zero; no queue is open. A driver's reset, or a guest that is
    /// paused: QEMU does not tell them apart, so what its guest relies on after a pause stays.
    fn status_cleared(&self) {}
}

/// The device does not let this part of its configuration be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("configuration is read-only")]
pub struct ConfigRefused;

/// A queue that is being served.
pub trait QueueWorker: Send {
    /// Takes nothing more from the ring, finishes what is in flight, publishes it, and stops.
    fn stop(self: Box<Self>) -> QueueStop;

    /// As [`stop`](QueueWorker::stop), at the end of a connection or of this process. What only waits
    /// for something may stay in the ring's in-flight log, if [it has one](Ring::is_logged): whoever
    /// serves the ring next takes it up again.
    fn leave(self: Box<Self>) -> QueueStop {
        self.stop()
    }
}

/// How a queue ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueStop {
    /// Where the ring has got to.
    pub ring: RingState,
    /// Why it was retired, if it was.
    pub retired: Option<Retire>,
}

/// Everything that serving one queue takes.
#[derive(Debug)]
pub struct QueueSetup {
    /// The queue's index.
    pub index: u16,
    /// Its ring, in place and in the memory that buffers are in.
    pub ring: Ring,
    /// Readable when the driver kicked. Edges count: it need not be drained.
    pub kick: OwnedFd,
    /// Calls the driver.
    pub call: Arc<Notifier>,
    /// Tells the frontend that the ring was retired.
    pub err: Arc<Notifier>,
    /// Virtio features that the frontend accepted.
    pub features: u64,
    /// Ends the connection, for a queue that cannot go on.
    pub hang_up: HangUp,
}
