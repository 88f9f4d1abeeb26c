//! One queue of a session: what the frontend has said about it, and whether it runs.
//!
//! | state | means | leaves by |
//! |---|---|---|
//! | incomplete | size, addresses, kick or memory are missing, or it is disabled | the last of them: running |
//! | running | a worker serves it | `GET_VRING_BASE`, disable, reset, disconnect: drained, incomplete |
//!
//! A running ring's size and base cannot be changed; its addresses, memory and kick can, between
//! a drained stop and a start that goes on where it stopped.

use crate::ring::{RingConfig, RingState, SplitRing};
use crate::session::device::{Device, Notifier, QueueSetup, QueueStop, QueueWorker};
use crate::session::memory::MemoryTable;
use crate::session::request::Refusal;
use crate::session::wire::VringAddr;
use pv_abi::virtio::feature;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// One queue of a session.
pub(crate) struct Vring {
    index: u16,
    size: Option<u16>,
    /// In the frontend's address space.
    addr: Option<VringAddr>,
    next_avail: u16,
    kick: Option<OwnedFd>,
    call: Arc<Notifier>,
    err: Arc<Notifier>,
    /// What `SET_VRING_ENABLE` said last, if anything.
    enable: Option<bool>,
    worker: Option<Box<dyn QueueWorker>>,
    /// Set when the ring broke a rule; a new base, new addresses or a reset clear it.
    retired: bool,
}

impl Vring {
    pub(crate) fn new(index: u16) -> Vring {
        Vring {
            index,
            size: None,
            addr: None,
            next_avail: 0,
            kick: None,
            call: Arc::default(),
            err: Arc::default(),
            enable: None,
            worker: None,
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

    pub(crate) fn set_base(&mut self, base: u32) -> Result<(), Refusal> {
        self.refuse_running()?;
        self.next_avail = u16::try_from(base).map_err(|_| Refusal::BadValue("queue base"))?;
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

    pub(crate) fn set_call(&mut self, call: Option<OwnedFd>) {
        self.call.set(call);
        if self.is_running() {
            // Completions may have been signalled on the old one while it was not looked at.
            self.call.signal();
        }
    }

    pub(crate) fn set_err(&mut self, err: Option<OwnedFd>) {
        self.err.set(err);
    }

    /// Starts the queue if it is complete and not running. `enabled_by_default` is the rule for
    /// frontends without protocol features.
    pub(crate) fn start(
        &mut self,
        device: &dyn Device,
        memory: &MemoryTable,
        features: u64,
        enabled_by_default: bool,
    ) -> Result<(), Refusal> {
        let enabled = self.enable.unwrap_or(enabled_by_default);
        if self.is_running() || self.retired || !enabled {
            return Ok(());
        }
        let (Some(size), Some(addr), Some(kick), Some(mem)) =
            (self.size, self.addr, self.kick.as_ref(), memory.memory())
        else {
            return Ok(());
        };
        let translate = |user| {
            memory
                .translate(user)
                .ok_or(Refusal::BadValue("ring address outside memory"))
        };
        let config = RingConfig {
            size,
            desc: translate(addr.desc)?,
            avail: translate(addr.avail)?,
            used: translate(addr.used)?,
            event_idx: features & feature::EVENT_IDX != 0,
            indirect: features & feature::INDIRECT_DESC != 0,
        };
        use crate::ring::DeviceRing;
        let mut ring = SplitRing::new(config, Arc::clone(mem))?;
        ring.restore(RingState {
            next_avail: self.next_avail,
            next_used: ring.published_used(),
        });
        self.worker = Some(device.open_queue(QueueSetup {
            index: self.index,
            ring,
            kick: kick.try_clone()?,
            call: Arc::clone(&self.call),
            err: Arc::clone(&self.err),
            features,
        })?);
        Ok(())
    }

    /// Drains and stops the queue; its kick stays.
    pub(crate) fn pause(&mut self) {
        if let Some(worker) = self.worker.take() {
            let QueueStop { ring, retired } = worker.stop();
            self.next_avail = ring.next_avail;
            self.retired = retired.is_some();
        }
    }

    /// Drains and stops the queue until a new kick comes. Gives the index to go on from.
    pub(crate) fn stop(&mut self) -> u16 {
        self.pause();
        self.kick = None;
        self.next_avail
    }

    /// Back to the initial state. Where to call stays known: frontends set that once.
    pub(crate) fn reset(&mut self) {
        self.stop();
        self.size = None;
        self.addr = None;
        self.next_avail = 0;
        self.enable = Some(false);
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
