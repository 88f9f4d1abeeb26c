//! Devices: the one transport core, and what can stand behind it.
//!
//! A [`Slot`] is one entry of the device table. It owns the state (absent, negotiated, active,
//! needs-reset), freezes the queues at activation, and is the only place that writes the entry.
//! What serves the queues is a [`Backend`]: an event loop of this process ([`console`], [`rng`]), or
//! who is at the other end of a vhost-user socket ([`vhost_user`], for [`block`] and [`net`]).

pub(crate) mod block;
pub(crate) mod console;
pub(crate) mod local;
pub(crate) mod net;
pub(crate) mod output;
pub(crate) mod rng;
mod setup;
#[cfg(test)]
mod tests;
pub(crate) mod vhost_user;

pub(crate) use setup::{QueueConfig, Setup};

use crate::memory::{Arena, GuestMemory};
use crate::vm::events::{EventTable, signal};
use crate::vm::stats::Counters;
use net::LinkStatus;
use pv_abi::device::{DeviceEntry, DeviceState, kind};
use pv_abi::layout::{DEVICE_TABLE_BASE, VMM_BASE};
use pv_abi::limits::MAX_CONFIG;
use pv_abi::status::Status;
use std::io;
use std::mem::offset_of;
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

/// What a backend offers to the driver.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Offer {
    /// Virtio feature bits.
    pub(crate) features: u64,
    /// Configuration space.
    pub(crate) config: Vec<u8>,
}

/// What a backend gets for its queues.
pub(crate) struct DeviceIo {
    pub(crate) arena: Arena,
    pub(crate) events: Arc<EventTable>,
    pub(crate) event_base: u32,
}

/// What serves a device's queues.
pub(crate) trait Backend: Send {
    /// Starts serving the queues of this set-up.
    fn activate(&mut self, setup: &Setup, io: &DeviceIo) -> io::Result<()>;
    /// Stops; nothing touches the queues or their buffers once this has returned `Ok`.
    ///
    /// With an error it is not known whether that is so: the backend is of no more use, and is
    /// reported lost by whoever watches it.
    fn reset(&mut self) -> io::Result<()>;
    /// Writes configuration space.
    fn config_write(&mut self, offset: u32, bytes: &[u8]) -> Result<(), Status>;
    /// What it offers now, if that can change; the features are those of before.
    fn offer(&mut self) -> io::Result<Option<Offer>> {
        Ok(None)
    }
    /// Has it said on the network where the card with this address is now: by the backend, and by a
    /// guest that can.
    fn announce(&mut self, _mac: [u8; 6]) -> io::Result<()> {
        Ok(())
    }
}

/// What never changes about a device.
#[derive(Clone, Debug)]
pub(crate) struct DeviceInfo {
    pub(crate) index: u32,
    pub(crate) kind: u32,
    pub(crate) name: String,
    pub(crate) arena: u32,
    pub(crate) event_base: u32,
    pub(crate) queue_count: u16,
    pub(crate) max_queue_size: u16,
}

struct SlotState {
    state: DeviceState,
    generation: u32,
    offer: Offer,
    config_vcpu: Option<u32>,
    /// A backend that is gone may still be touching the queues; resets wait until it is known not to.
    undrained: bool,
    waiting: Vec<(u32, u32)>,
    /// What the VMM itself says in configuration space; for network cards.
    link: Option<LinkStatus>,
}

impl SlotState {
    /// Configuration space as the guest sees it.
    fn config(&self) -> [u8; MAX_CONFIG] {
        let mut config = [0; MAX_CONFIG];
        for (to, from) in config.iter_mut().zip(&self.offer.config) {
            *to = *from;
        }
        if let Some(link) = self.link {
            link.apply(&mut config);
        }
        config
    }
}

/// One entry of the device table.
pub(crate) struct Slot {
    pub(crate) info: DeviceInfo,
    pub(crate) io: DeviceIo,
    memory: Arc<GuestMemory>,
    counters: Arc<Counters>,
    /// Held for as long as something is asked of it, which it may take its time to answer. Locked
    /// before `state`, never after.
    backend: Mutex<Option<Box<dyn Backend>>>,
    /// Held for moments only: nobody waits for a backend with it.
    state: Mutex<SlotState>,
}

/// A vCPU waits for an event from now on, or no longer.
pub(crate) type WaitFor<'a> = &'a dyn Fn(u32, u32, bool) -> io::Result<()>;

impl Slot {
    pub(crate) fn new(
        info: DeviceInfo,
        io: DeviceIo,
        memory: Arc<GuestMemory>,
        counters: Arc<Counters>,
    ) -> Slot {
        let state = SlotState {
            state: DeviceState::Absent,
            generation: 0,
            offer: Offer::default(),
            config_vcpu: None,
            undrained: false,
            waiting: Vec::new(),
            link: (info.kind == kind::NET).then_some(LinkStatus::NEW),
        };
        Slot {
            info,
            io,
            memory,
            counters,
            backend: Mutex::new(None),
            state: Mutex::new(state),
        }
    }

    fn lock(&self) -> MutexGuard<'_, SlotState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn backend(&self) -> MutexGuard<'_, Option<Box<dyn Backend>>> {
        self.backend.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn state(&self) -> DeviceState {
        self.lock().state
    }

    /// A backend stands behind the device now. Tells the guest, unless it has a reset to do first.
    pub(crate) fn backend_ready(&self, backend: Box<dyn Backend>, offer: Offer) -> io::Result<()> {
        let mut place = self.backend();
        let mut state = self.lock();
        *place = Some(backend);
        state.offer = offer;
        // A backend takes a new connection only once it is done with the old one.
        state.undrained = false;
        if state.state == DeviceState::Absent {
            state.state = DeviceState::Negotiated;
        }
        if state.generation > 0
            && let Some(link) = &mut state.link
        {
            // It was in use behind another backend.
            link.moved = true;
        }
        self.publish(&state)?;
        self.config_event(&state)
    }

    /// The backend is gone; `drained` says that it is dead, so that it touches nothing any more.
    ///
    /// Returns whether the device was in use.
    pub(crate) fn backend_lost(&self, drained: bool) -> io::Result<bool> {
        let mut backend = self.backend();
        let mut state = self.lock();
        *backend = None;
        let in_use = matches!(state.state, DeviceState::Active | DeviceState::NeedsReset);
        match state.state {
            DeviceState::Active | DeviceState::NeedsReset => state.undrained = !drained,
            DeviceState::Negotiated | DeviceState::Absent => {}
        }
        match state.state {
            DeviceState::Active => {
                state.state = DeviceState::NeedsReset;
                state.generation = state.generation.wrapping_add(1);
            }
            DeviceState::Negotiated => state.state = DeviceState::Absent,
            DeviceState::NeedsReset | DeviceState::Absent => {}
        }
        self.publish(&state)?;
        self.config_event(&state)?;
        Ok(in_use)
    }

    /// The backend's configuration has changed: the guest is told, if it makes a difference.
    ///
    /// `false`: something else is being asked of the backend, and this does not wait for it.
    pub(crate) fn refresh(&self) -> io::Result<bool> {
        let mut backend = match self.backend.try_lock() {
            Ok(backend) => backend,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Ok(false),
        };
        let offer = backend.as_mut().map_or(Ok(None), |b| b.offer())?;
        let mut state = self.lock();
        if let Some(offer) = offer
            && offer.config != state.offer.config
        {
            state.offer.config = offer.config;
            self.publish(&state)?;
            self.config_event(&state)?;
        }
        Ok(true)
    }

    /// Takes a network card's link up or down. `false`: it is no network card.
    pub(crate) fn set_link(&self, up: bool) -> io::Result<bool> {
        let mut state = self.lock();
        let Some(link) = &mut state.link else {
            return Ok(false);
        };
        if link.up != up {
            link.up = up;
            self.publish(&state)?;
            self.config_event(&state)?;
        }
        Ok(true)
    }

    /// `DEVICE_ACTIVATE`: freezes the queues and has them served.
    pub(crate) fn activate(&self, setup: Setup, wait_for: WaitFor<'_>) -> Result<u32, Status> {
        let _span = tracing::debug_span!("activate", device = self.info.index).entered();
        // From here to the end no other activation or reset comes between.
        let mut place = self.backend();
        self.await_queues(&setup, wait_for)?;
        let backend = place.as_mut().ok_or(Status::Again)?;
        if let Err(error) = backend.activate(&setup, &self.io) {
            tracing::debug!(device = self.info.index, %error, "activation failed");
            // Some of the rings may be served by now.
            if backend.reset().is_ok() {
                return Err(Status::HostError);
            }
            // The backend is about to be reported lost; the guest waits for that event.
            *place = None;
            let _ = self.give_up();
            return Err(Status::Again);
        }
        let mut state = self.lock();
        state.state = DeviceState::Active;
        state.generation = state.generation.wrapping_add(1);
        let generation = state.generation;
        let moved = match &mut state.link {
            Some(link) => std::mem::take(&mut link.moved),
            None => false,
        };
        let mac = net::mac(&state.offer.config).filter(|_| moved);
        self.publish(&state).map_err(|_| Status::HostError)?;
        drop(state);
        if let Some(mac) = mac
            && let Err(error) = backend.announce(mac)
        {
            tracing::debug!(device = self.info.index, %error, "not announced");
        }
        Ok(generation)
    }

    /// Checks that the device can be activated, and has the queues' vCPUs wait for their events.
    fn await_queues(&self, setup: &Setup, wait_for: WaitFor<'_>) -> Result<(), Status> {
        let mut state = self.lock();
        match state.state {
            DeviceState::Negotiated => {}
            DeviceState::Absent => return Err(Status::Again),
            DeviceState::Active | DeviceState::NeedsReset => return Err(Status::BadState),
        }
        if setup.features & !state.offer.features != 0 {
            return Err(Status::NotSupported);
        }
        for (vcpu, event) in std::mem::take(&mut state.waiting) {
            if let Err(error) = wait_for(vcpu, event, false) {
                tracing::debug!(vcpu, event, %error, "was not waited for");
            }
        }
        let config_event = self.info.event_base + u32::from(self.info.queue_count);
        let events = (self.info.event_base..)
            .zip(&setup.queues)
            .map(|(e, q)| (q.vcpu, e));
        let events: Vec<_> = events.chain([(setup.config_vcpu, config_event)]).collect();
        for (vcpu, event) in &events {
            if let Err(error) = wait_for(*vcpu, *event, true) {
                tracing::debug!(device = self.info.index, %error, "cannot wait for a queue");
                for (vcpu, event) in events.iter().take_while(|e| **e != (*vcpu, *event)) {
                    let _ = wait_for(*vcpu, *event, false);
                }
                let full = error.kind() == io::ErrorKind::StorageFull;
                return Err(if full {
                    Status::Limit
                } else {
                    Status::HostError
                });
            }
        }
        state.waiting = events;
        state.config_vcpu = Some(setup.config_vcpu);
        Ok(())
    }

    /// `DEVICE_RESET`: nothing touches the queues once this has returned.
    pub(crate) fn reset(&self) -> Result<DeviceState, Status> {
        let _span = tracing::debug_span!("reset", device = self.info.index).entered();
        let mut place = self.backend();
        // While the backend's lock is held, nothing but this makes an active device another.
        let active = self.state() == DeviceState::Active;
        if active
            && let Some(backend) = place.as_mut()
            && let Err(error) = backend.reset()
        {
            tracing::debug!(device = self.info.index, %error, "the backend did not stop");
            *place = None;
            self.give_up().map_err(|_| Status::HostError)?;
            return Err(Status::Again);
        }
        let mut state = self.lock();
        if active {
            state.generation = state.generation.wrapping_add(1);
        }
        if state.undrained {
            // The configuration event will say when to try again.
            return Err(Status::Again);
        }
        state.state = if place.is_some() {
            DeviceState::Negotiated
        } else {
            DeviceState::Absent
        };
        self.publish(&state).map_err(|_| Status::HostError)?;
        Ok(state.state)
    }

    /// `DEVICE_CONFIG_WRITE`.
    pub(crate) fn config_write(&self, offset: u64, width: u64, value: u64) -> Result<(), Status> {
        if !matches!(width, 1 | 2 | 4 | 8) {
            return Err(Status::BadLength);
        }
        let mut backend = self.backend();
        let len = self.lock().offer.config.len();
        let len = u64::try_from(len).map_err(|_| Status::HostError)?;
        if offset.checked_add(width).is_none_or(|end| end > len) {
            return Err(Status::BadAddress);
        }
        if width < 8 && value >> (8 * width) != 0 {
            return Err(Status::BadArgument);
        }
        let offset = u32::try_from(offset).map_err(|_| Status::BadAddress)?;
        let bytes = value.to_le_bytes();
        let bytes = bytes
            .get(..usize::try_from(width).unwrap_or(0))
            .unwrap_or(&[]);
        backend
            .as_mut()
            .ok_or(Status::Again)?
            .config_write(offset, bytes)
    }

    /// Stops serving, for good.
    pub(crate) fn shut_down(&self) {
        let backend = self.backend().take();
        if let Some(mut backend) = backend
            && let Err(error) = backend.reset()
        {
            tracing::debug!(device = self.info.index, %error, "the backend did not stop");
        }
    }

    fn offset(&self) -> u64 {
        let size = size_of::<DeviceEntry>() as u64;
        DEVICE_TABLE_BASE - VMM_BASE + u64::from(self.info.index) * size
    }

    /// Writes the whole entry once, before the guest starts.
    pub(crate) fn publish_initial(&self) -> io::Result<()> {
        let state = self.lock();
        let mut name = [0; 32];
        for (to, from) in name.iter_mut().zip(self.info.name.bytes()) {
            *to = from;
        }
        let entry = DeviceEntry {
            kind: self.info.kind,
            state: state.state.code(),
            generation: state.generation,
            event_base: self.info.event_base,
            queue_count: self.info.queue_count,
            max_queue_size: self.info.max_queue_size,
            arena: self.info.arena,
            features: state.offer.features,
            arena_gpa: self.io.arena.gpa,
            arena_len: self.io.arena.region.len(),
            config_seq: 0,
            config_len: config_len(&state.offer),
            name,
            reserved: [0; 32],
            config: state.config(),
            padding: [0; 136],
        };
        self.memory.vmm.write(self.offset(), &entry)
    }

    /// Writes what may have changed: offer under the seqlock, then generation, then state.
    fn publish(&self, state: &SlotState) -> io::Result<()> {
        let at = self.offset();
        let vmm = &self.memory.vmm;
        let seq = vmm.word32(at + offset_of!(DeviceEntry, config_seq) as u64)?;
        // Ordering: odd is visible before the fields change, and the fields before even (seqlock
        // writer; the slot's lock makes it the only one).
        let odd = seq.load(Ordering::Relaxed) | 1;
        seq.store(odd, Ordering::Relaxed);
        fence(Ordering::Release);
        vmm.write(at + offset_of!(DeviceEntry, config) as u64, &state.config())?;
        vmm.write(
            at + offset_of!(DeviceEntry, features) as u64,
            &state.offer.features,
        )?;
        let len = config_len(&state.offer);
        vmm.write(at + offset_of!(DeviceEntry, config_len) as u64, &len)?;
        fence(Ordering::Release);
        seq.store(odd.wrapping_add(1), Ordering::Release);
        let generation = vmm.word32(at + offset_of!(DeviceEntry, generation) as u64)?;
        // Ordering: Release, generation before state: who sees the state sees its generation.
        generation.store(state.generation, Ordering::Release);
        let word = vmm.word32(at + offset_of!(DeviceEntry, state) as u64)?;
        word.store(state.state.code(), Ordering::Release);
        Ok(())
    }

    /// The backend is of no more use, and may still be at work: its link will say when it is not.
    fn give_up(&self) -> io::Result<()> {
        let mut state = self.lock();
        state.undrained = true;
        state.state = DeviceState::NeedsReset;
        state.generation = state.generation.wrapping_add(1);
        self.publish(&state)
    }

    fn config_event(&self, state: &SlotState) -> io::Result<()> {
        let event = self.info.event_base + u32::from(self.info.queue_count);
        self.counters.config_events.add(1);
        if state.config_vcpu.is_none() {
            // Nobody has said who waits: whoever is idle on vCPU 0 looks again.
            return self.io.events.wake(0).map_or(Ok(()), signal);
        }
        self.io.events.call(event).map_or(Ok(()), signal)
    }
}

fn config_len(offer: &Offer) -> u32 {
    u32::try_from(offer.config.len().min(MAX_CONFIG)).unwrap_or(0)
}
