//! The packed ring (virtio 1.3 §2.8).
//!
//! One ring of descriptors: the driver makes them available, the device overwrites them with used
//! ones, and the flags of each say whose it is. A chain is read once, checked, and named by its
//! buffer id from then on; ids are below the ring's size, as every driver has it.

mod give;
mod position;
mod take;

use super::chain::Near;
use super::dirty::RingDirty;
use super::inflight::{LoggedDesc, PackedLog, QueueLog};
use super::{
    DeviceRing, Mapped, OwnedChain, Retire, RingConfig, RingError, RingPart, RingState, map_part,
};
use crate::limits::MAX_RING_SIZE;
use crate::ring::Completion;
use position::{AT_REST, Position, Taken, USED, WRAP, flags_of};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vm_memory::GuestMemoryMmap;

/// A chain that the last process had in flight.
#[derive(Debug)]
struct Resubmit {
    id: u16,
    descs: Vec<LoggedDesc>,
}

/// The device's half of a packed virtqueue. `desc`, `avail` and `used` of its [`RingConfig`] are
/// the descriptor ring, the driver's and the device's event suppression structure.
#[derive(Debug)]
pub struct PackedRing {
    config: RingConfig,
    mem: Arc<GuestMemoryMmap>,
    desc_part: Mapped,
    driver_part: Mapped,
    device_part: Mapped,
    next_avail: Position,
    next_used: Position,
    /// By buffer id.
    taken: Vec<Taken>,
    in_flight: usize,
    /// Descriptors in flight.
    outstanding: u16,
    /// Used descriptors of the batch that is being given back, and where they go.
    unwritten: Vec<(Position, u64)>,
    /// Descriptors used since `should_signal` was last asked.
    unsignalled: u16,
    /// The first answer after a start is always yes: what the driver waits for is not known.
    signalled_valid: bool,
    /// Whether the driver was asked for kicks.
    armed: bool,
    retired: Option<Retire>,
    near: Near,
    resubmit: VecDeque<Resubmit>,
    log: Option<PackedLog>,
    dirty: Option<RingDirty>,
}

impl PackedRing {
    /// Sets a ring up in `mem`, at its beginning.
    pub fn new(config: RingConfig, mem: Arc<GuestMemoryMmap>) -> Result<PackedRing, RingError> {
        let size = config.size;
        if size == 0 || size > MAX_RING_SIZE {
            return Err(RingError::BadSize(size));
        }
        let len = position::DESC * u64::from(size);
        let desc_part = map_part(&mem, RingPart::DescriptorRing, config.desc, 16, len)?;
        let driver_part = map_part(&mem, RingPart::DriverEvent, config.avail, 4, 4)?;
        let device_part = map_part(&mem, RingPart::DeviceEvent, config.used, 4, 4)?;
        let start = Position::new(0, true);
        Ok(PackedRing {
            config,
            mem,
            desc_part,
            driver_part,
            device_part,
            next_avail: start,
            next_used: start,
            taken: vec![Taken::default(); usize::from(size)],
            in_flight: 0,
            outstanding: 0,
            unwritten: Vec::new(),
            unsignalled: 0,
            signalled_valid: false,
            armed: true,
            retired: None,
            near: Near::default(),
            resubmit: VecDeque::new(),
            log: None,
            dirty: None,
        })
    }

    /// Entries of the ring.
    pub fn size(&self) -> u16 {
        self.config.size
    }

    /// The registers that it was made with.
    pub fn config(&self) -> RingConfig {
        self.config
    }

    /// The memory that the ring and its buffers lie in.
    pub fn memory(&self) -> &Arc<GuestMemoryMmap> {
        &self.mem
    }

    /// Why the ring was retired, if it was.
    pub fn retired(&self) -> Option<Retire> {
        self.retired
    }

    /// Goes on from what a frontend said. Some say zero for a new ring, which would be the wrap
    /// counters of every second lap: a ring in which nothing was ever used is at its first.
    pub(crate) fn set_base(&mut self, state: RingState) -> Result<(), RingError> {
        for value in [state.next_avail, state.next_used] {
            if value & !WRAP >= self.size() {
                return Err(RingError::BadState(value));
            }
        }
        let mut state = state;
        if state == RingState::default() && self.is_untouched() {
            (state.next_avail, state.next_used) = (WRAP, WRAP);
        }
        self.restore(state);
        Ok(())
    }

    fn is_untouched(&self) -> bool {
        (0..self.size()).all(|index| {
            let offset = Position::new(index, true).offset() + AT_REST;
            // Ordering: Relaxed, nothing is taken yet.
            let rest = self.desc_part.load64(offset, Ordering::Relaxed);
            rest.is_ok_and(|rest| flags_of(rest) & USED == 0)
        })
    }

    /// Keeps an in-flight log from here on. What an old one holds decides where the ring goes on,
    /// and its chains are given out first.
    pub(crate) fn attach_log(&mut self, queue: QueueLog) -> Result<(), RingError> {
        let fresh = (self.next_used.index(), self.next_used.wrap());
        let (log, recovered) = PackedLog::open(queue, self.size(), fresh, |(index, wrap)| {
            let available = self.is_available(Position::new(index, wrap));
            available.is_ok_and(|available| !available)
        })?;
        self.log = Some(log);
        let Some(recovered) = recovered else {
            return Ok(());
        };
        let (index, wrap) = recovered.used;
        let used = Position::new(index, wrap);
        let state = used.to_state();
        self.restore(RingState {
            next_avail: state,
            next_used: state,
        });
        for (entry, descs) in recovered.chains {
            let id = descs.last().map_or(u16::MAX, |desc| desc.id);
            // The log's reader has bounded the sum by the ring's size.
            let taken = Taken::new(descs.len() as u16, used, false);
            self.mark_taken(id, taken.logged(entry))
                .map_err(|_| RingError::BadInflightLog)?;
            self.resubmit.push_back(Resubmit { id, descs });
        }
        self.next_avail = used.advanced(self.outstanding, self.size());
        Ok(())
    }

    pub(crate) fn is_logged(&self) -> bool {
        self.log.is_some()
    }

    /// Marks dirty what is written from here on.
    pub(crate) fn attach_dirty(&mut self, dirty: RingDirty) {
        self.dirty = Some(dirty);
    }
}

impl DeviceRing for PackedRing {
    #[inline]
    fn pop_into(&mut self, chain: &mut OwnedChain) -> Result<bool, Retire> {
        if let Some(reason) = self.retired {
            return Err(reason);
        }
        match self.take(chain) {
            Ok(taken) => {
                if taken && let Some(dirty) = &mut self.dirty {
                    dirty.taken(chain);
                }
                Ok(taken)
            }
            Err(reason) => Err(*self.retired.get_or_insert(reason)),
        }
    }

    fn complete(&mut self, batch: &[Completion]) {
        if let Err(reason) = self.publish(batch) {
            self.retired.get_or_insert(reason);
        }
    }

    fn arm(&mut self) -> bool {
        if self.retired.is_some() {
            return false;
        }
        match self.ask_for_kicks() {
            Ok(more) => more,
            Err(reason) => {
                self.retired = Some(reason);
                false
            }
        }
    }

    fn disarm(&mut self) {
        if self.retired.is_none()
            && std::mem::take(&mut self.armed)
            && let Err(reason) = self.ask_for_no_kicks()
        {
            self.retired = Some(reason);
        }
    }

    fn has_more(&self) -> bool {
        let next = self.next_avail;
        self.retired.is_none()
            && (!self.resubmit.is_empty() || self.is_available(next).unwrap_or(false))
    }

    fn should_signal(&mut self) -> bool {
        match self.wants_signal() {
            Ok(wanted) => wanted,
            Err(reason) => {
                self.retired.get_or_insert(reason);
                false
            }
        }
    }

    fn in_flight(&self) -> usize {
        self.in_flight - self.resubmit.len()
    }

    fn save(&self) -> RingState {
        RingState {
            next_avail: self.next_avail.to_state(),
            next_used: self.next_used.to_state(),
        }
    }

    fn restore(&mut self, state: RingState) {
        let size = self.size();
        let position = |value| {
            let position = Position::from_state(value);
            Position::new(position.index() % size, position.wrap())
        };
        self.next_avail = position(state.next_avail);
        self.next_used = position(state.next_used);
        self.taken.fill(Taken::default());
        self.in_flight = 0;
        self.outstanding = 0;
        self.unwritten.clear();
        self.unsignalled = 0;
        self.signalled_valid = false;
        self.armed = true;
        self.resubmit.clear();
    }
}
