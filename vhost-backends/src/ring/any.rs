//! A ring of either format, set up in one place.

use super::dirty::RingDirty;
use super::inflight::QueueLog;
use super::{
    Completion, DeviceRing, OwnedChain, PackedRing, Retire, RingConfig, RingError, RingState,
    SplitRing,
};
use std::sync::Arc;
use vm_memory::GuestMemoryMmap;

/// The device's half of a virtqueue, split or packed.
#[derive(Debug)]
pub enum Ring {
    /// Split (virtio 1.3 §2.7).
    Split(SplitRing),
    /// Packed (virtio 1.3 §2.8).
    Packed(PackedRing),
}

/// Everything that makes a ring.
#[derive(Debug)]
pub struct RingSetup {
    /// Registers.
    pub config: RingConfig,
    /// `RING_PACKED` was negotiated.
    pub packed: bool,
    /// Where the ring and its buffers lie.
    pub memory: Arc<GuestMemoryMmap>,
    /// What `SET_VRING_BASE` said. An in-flight log that is not new knows better.
    pub base: u32,
    pub(crate) inflight: Option<QueueLog>,
    pub(crate) dirty: Option<RingDirty>,
}

impl RingSetup {
    /// A ring without logs, at its beginning.
    pub fn new(config: RingConfig, packed: bool, memory: Arc<GuestMemoryMmap>) -> RingSetup {
        RingSetup {
            config,
            packed,
            memory,
            base: 0,
            inflight: None,
            dirty: None,
        }
    }

    /// Makes the ring.
    pub fn start(self) -> Result<Ring, RingError> {
        if self.packed {
            let mut ring = PackedRing::new(self.config, self.memory)?;
            ring.set_base(RingState::from_packed_base(self.base))?;
            if let Some(log) = self.inflight {
                ring.attach_log(log)?;
            }
            if let Some(dirty) = self.dirty {
                ring.attach_dirty(dirty);
            }
            return Ok(Ring::Packed(ring));
        }
        let mut ring = SplitRing::new(self.config, self.memory)?;
        ring.restore(RingState {
            // The session takes no more than 16 bits for a split ring.
            next_avail: self.base as u16,
            next_used: ring.published_used(),
        });
        if let Some(log) = self.inflight {
            ring.attach_log(log)?;
        }
        if let Some(dirty) = self.dirty {
            ring.attach_dirty(dirty);
        }
        Ok(Ring::Split(ring))
    }
}

/// Calls the same method of whichever ring it is.
macro_rules! either {
    ($self:ident, $ring:ident => $call:expr) => {
        match $self {
            Ring::Split($ring) => $call,
            Ring::Packed($ring) => $call,
        }
    };
}

impl Ring {
    /// Entries of the ring.
    pub fn size(&self) -> u16 {
        either!(self, ring => ring.size())
    }

    /// The registers that it was made with.
    pub fn config(&self) -> RingConfig {
        either!(self, ring => ring.config())
    }

    /// The memory that the ring and its buffers lie in.
    pub fn memory(&self) -> &Arc<GuestMemoryMmap> {
        either!(self, ring => ring.memory())
    }

    /// Gives chains back that were taken last and have not been written to, for a ring that
    /// goes on later: they will be taken again. The order is that in which they were taken.
    pub fn put_back(&mut self, chains: impl DoubleEndedIterator<Item = OwnedChain>) {
        for chain in chains.rev() {
            either!(self, ring => ring.put_back(chain.head()));
        }
    }

    /// Whether an in-flight log tells the next one who serves this ring what was not completed.
    pub fn is_logged(&self) -> bool {
        either!(self, ring => ring.is_logged())
    }

    /// Why the ring was retired, if it was.
    pub fn retired(&self) -> Option<Retire> {
        either!(self, ring => ring.retired())
    }
}

impl DeviceRing for Ring {
    #[inline]
    fn pop_into(&mut self, chain: &mut OwnedChain) -> Result<bool, Retire> {
        either!(self, ring => ring.pop_into(chain))
    }

    fn complete(&mut self, batch: &[Completion]) {
        either!(self, ring => ring.complete(batch));
    }

    fn arm(&mut self) -> bool {
        either!(self, ring => ring.arm())
    }

    fn disarm(&mut self) {
        either!(self, ring => ring.disarm());
    }

    fn has_more(&self) -> bool {
        either!(self, ring => ring.has_more())
    }

    fn should_signal(&mut self) -> bool {
        either!(self, ring => ring.should_signal())
    }

    fn in_flight(&self) -> usize {
        either!(self, ring => ring.in_flight())
    }

    fn save(&self) -> RingState {
        either!(self, ring => ring.save())
    }

    fn restore(&mut self, state: RingState) {
        either!(self, ring => ring.restore(state));
    }
}
