//! One queue of a session: what the frontend has said about it, and whether it runs.
//!
//! | state | means | leaves by |
//! |---|---|---|
//! | incomplete | size, addresses, kick or memory are missing, or it is disabled | the last of them: running |
//! | running | a worker serves it | `GET_VRING_BASE`, disable, reset, disconnect: drained, incomplete |
//!
//! A running ring's size and base cannot be changed; its addresses, memory and kick can, between
//! a drained stop and a start that goes on where it stopped.

use crate::ring::{DirtyLog, InflightLog, RingConfig, RingDirty, RingSetup};
use crate::session::device::{Device, QueueSetup, QueueStop, QueueWorker};
use crate::session::memory::MemoryTable;
use crate::session::request::Refusal;
use crate::session::wire::{VRING_F_LOG, VringAddr};
use crate::session::{HangUp, Notifier, set_notifier};
use pv_abi::virtio::feature;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use vhost::vhost_user::VhostUserVirtioFeatures;

/// The virtio feature bit that says that writes are to be logged.
pub(crate) const LOG_ALL: u64 = VhostUserVirtioFeatures::LOG_ALL.bits();

/// What a queue of a session runs on beside what it was told itself.
pub(crate) struct Surroundings<'s> {
    pub(crate) device: &'s dyn Device,
    pub(crate) memory: &'s MemoryTable,
    pub(crate) features: u64,
    pub(crate) inflight: Option<&'s Arc<InflightLog>>,
    pub(crate) dirty: Option<&'s Arc<DirtyLog>>,
    pub(crate) dirty_call: &'s Arc<Notifier>,
    /// No queue starts yet.
    pub(crate) held: bool,
    pub(crate) hang_up: &'s HangUp,
}

impl Surroundings<'_> {
    /// The rule for frontends without protocol features.
    fn enabled_by_default(&self) -> bool {
        self.features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0
    }

    fn packed(&self) -> bool {
        self.features & feature::RING_PACKED != 0
    }
}

/// One queue of a session.
pub(crate) struct Vring {
    pub(super) index: u16,
    pub(super) size: Option<u16>,
    /// In the frontend's address space.
    pub(super) addr: Option<VringAddr>,
    /// As `SET_VRING_BASE` and `GET_VRING_BASE` have it.
    pub(super) base: u32,
    pub(super) kick: Option<OwnedFd>,
    pub(super) call: Arc<Notifier>,
    pub(super) err: Arc<Notifier>,
    /// What `SET_VRING_ENABLE` said last, if anything.
    pub(super) enable: Option<bool>,
    worker: Option<Box<dyn QueueWorker>>,
    /// The ring that runs, or ran last, is a packed one.
    packed: bool,
    /// Set when the ring broke a rule; a new base or a reset clear it. New
    /// addresses do not: frontends send those again while the driver runs, to log or not to.
    pub(super) retired: bool,
}

impl Vring {
    pub(crate) fn new(index: u16) -> Vring {
        Vring {
            index,
            size: None,
            addr: None,
            base: 0,
            kick: None,
            call: Arc::default(),
            err: Arc::default(),
            enable: None,
            worker: None,
            packed: false,
            retired: false,
        }
    }

    pub(crate) fn is_running(&self) -> bool {
        self.worker.is_some()
    }

    pub(crate) fn set_size(&mut self, size: u32) -> Result<(), Refusal> {
        self.refuse_running()?;
        let size = u16::try_from(size)
            .ok()
            .filter(|s| s.is_power_of_two() && *s <= crate::limits::MAX_RING_SIZE)
            .ok_or(Refusal::BadValue("queue size"))?;
        self.size = Some(size);
        Ok(())
    }

    /// A packed ring's base has an index for either side.
    pub(crate) fn set_base(&mut self, base: u32, packed: bool) -> Result<(), Refusal> {
        self.refuse_running()?;
        if !packed && base > u32::from(u16::MAX) {
            return Err(Refusal::BadValue("queue base"));
        }
        self.base = base;
        self.retired = false;
        Ok(())
    }

    pub(crate) fn set_addr(&mut self, addr: VringAddr) {
        self.addr = Some(addr);
    }

    pub(crate) fn set_enable(&mut self, enable: bool) {
        self.enable = Some(enable);
    }

    pub(crate) fn set_kick(&mut self, kick: Option<OwnedFd>) {
        self.kick = kick;
    }

    pub(crate) fn set_call(&mut self, call: Option<OwnedFd>) -> Result<(), Refusal> {
        set_notifier(&self.call, call)?;
        if self.is_running() {
            // Completions may have been signalled on the old one while it was not looked at.
            self.call.signal();
        }
        Ok(())
    }

    pub(crate) fn set_err(&mut self, err: Option<OwnedFd>) -> Result<(), Refusal> {
        set_notifier(&self.err, err)
    }

    /// Starts the queue if it is complete and not running.
    pub(crate) fn start(&mut self, with: &Surroundings<'_>) -> Result<(), Refusal> {
        let enabled = self.enable.unwrap_or(with.enabled_by_default());
        if self.is_running() || self.retired || !enabled || with.held {
            return Ok(());
        }
        let (Some(size), Some(addr), Some(kick), Some(memory)) = (
            self.size,
            self.addr,
            self.kick.as_ref(),
            with.memory.memory(),
        ) else {
            return Ok(());
        };
        let translate = |user| {
            (with.memory)
                .translate(user)
                .ok_or(Refusal::BadValue("ring address outside memory"))
        };
        let config = RingConfig {
            size,
            desc: translate(addr.desc)?,
            avail: translate(addr.avail)?,
            used: translate(addr.used)?,
            event_idx: with.features & feature::EVENT_IDX != 0,
            indirect: with.features & feature::INDIRECT_DESC != 0,
            in_order: with.features & feature::IN_ORDER != 0,
        };
        let mut setup = RingSetup::new(config, with.packed(), Arc::clone(memory));
        setup.base = self.base;
        if let Some(log) = with.inflight {
            let part = log.queue(self.index);
            setup.inflight =
                Some(part.ok_or(Refusal::BadState("no in-flight log for this queue"))?);
        }
        if let Some(log) = with.dirty.filter(|_| with.features & LOG_ALL != 0) {
            let ring = (addr.flags & VRING_F_LOG != 0).then_some(addr.log);
            let call = Arc::clone(with.dirty_call);
            setup.dirty = Some(RingDirty::new(Arc::clone(log), call, ring));
        }
        self.worker = Some(with.device.open_queue(QueueSetup {
            index: self.index,
            ring: setup.start()?,
            kick: kick.try_clone()?,
            call: Arc::clone(&self.call),
            err: Arc::clone(&self.err),
            features: with.features,
            hang_up: with.hang_up.clone(),
        })?);
        self.packed = with.packed();
        Ok(())
    }

    /// Drains and stops the queue; its kick stays.
    pub(crate) fn pause(&mut self) {
        self.pause_by(|worker| worker.stop());
    }

    /// The same for the next one who serves the ring; what waits may stay in the in-flight log.
    pub(crate) fn leave(&mut self) {
        self.pause_by(|worker| worker.leave());
    }

    fn pause_by(&mut self, stop: impl FnOnce(Box<dyn QueueWorker>) -> QueueStop) {
        if let Some(worker) = self.worker.take() {
            let QueueStop { ring, retired } = stop(worker);
            self.base = if self.packed {
                ring.to_packed_base()
            } else {
                u32::from(ring.next_avail)
            };
            self.retired = retired.is_some();
        }
    }

    /// Drains and stops the queue until a new kick comes. Gives the index to go on from.
    pub(crate) fn stop(&mut self) -> u32 {
        self.pause();
        self.kick = None;
        self.base
    }

    /// Back to the initial state. Where to call stays known: frontends set that once.
    pub(crate) fn reset(&mut self) {
        self.stop();
        self.size = None;
        self.addr = None;
        self.base = 0;
        // As at first: whether it starts is for the features to say.
        self.enable = None;
        self.retired = false;
    }

    fn refuse_running(&self) -> Result<(), Refusal> {
        if self.is_running() {
            Err(Refusal::BadState("the ring is running"))
        } else {
            Ok(())
        }
    }
}
