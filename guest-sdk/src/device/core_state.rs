//! One device: its state as the driver sees it, and the way back from a loss.

use super::{Lost, Ring};
use crate::limits::{BRING_UP_TIMEOUT, LOSS_TIMEOUT, MAX_RECOVERY_STEPS, RECOVERY_POLL};
use crate::platform::{Arena, CallError, DeviceInfo, OutOfArena, Platform, Waiter};
use crate::sync::{SpinGuard, SpinLock};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
use pv_abi::call::number;
use pv_abi::device::{DeviceSetup, DeviceState};
use pv_abi::limits::{MAX_CONFIG, MAX_QUEUES};
use pv_abi::status::Status;
use pv_abi::virtio::feature;
use zerocopy::IntoBytes;

/// Why a device could not be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum OpenError {
    /// The device table has no such device.
    NotFound,
    /// The device does not offer a feature that the driver cannot do without.
    MissingFeatures(u64),
    /// Its arena is not in the memory map.
    NoArena(u32),
    /// The arena has no room for rings and buffers.
    OutOfArena(OutOfArena),
    /// No queues, more than the device has, or a size that is no power of two from 2 to its limit.
    BadQueues,
    /// The device could not be brought up.
    Device(Lost),
}

impl core::fmt::Display for OpenError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            OpenError::NotFound => f.write_str("no such device in the device table"),
            OpenError::MissingFeatures(bits) => {
                write!(f, "the device does not offer the features {bits:#x}")
            }
            OpenError::NoArena(index) => write!(f, "arena {index} is not in the memory map"),
            OpenError::OutOfArena(error) => error.fmt(f),
            OpenError::BadQueues => f.write_str("the device has no queues of that number or size"),
            OpenError::Device(lost) => lost.fmt(f),
        }
    }
}

impl core::error::Error for OpenError {}

impl From<OutOfArena> for OpenError {
    fn from(error: OutOfArena) -> Self {
        OpenError::OutOfArena(error)
    }
}

/// How far a [`Core::step`] got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// The device is active and every channel attached.
    Live,
    /// Something is not there yet, or another vCPU is at it.
    Waiting,
}

/// Features that no driver here can do without.
const NEEDED: u64 = feature::VERSION_1;

/// What a driver has a use for whose device has no features of its own.
pub(crate) const KNOWN_TO_ALL: u64 = NEEDED | feature::EVENT_IDX;

/// A device that a driver has in use.
pub(crate) struct Core<P: Platform> {
    platform: &'static P,
    info: DeviceInfo,
    config_vcpu: u32,
    agree: Agree,
    rings: Vec<Arc<dyn Ring>>,
    /// Held over calls that may take seconds, so it is only ever tried. What others want to know or
    /// to have lies beside it.
    life: SpinLock<Life>,
    /// The generation that the rings are attached to, or [`NO_GENERATION`].
    generation: AtomicU64,
    /// How long the device may stay away, in nanoseconds.
    loss_timeout_ns: AtomicU64,
    /// Whether the host may still be using rings and buffers.
    host_has_memory: AtomicBool,
    /// Somebody wants the device started anew.
    reset_wanted: AtomicBool,
    /// Why the device is of no use any more; looked at only if `gone`.
    lost: SpinLock<Option<Lost>>,
    /// Whether `lost` says anything.
    gone: AtomicBool,
    /// Features in force now.
    features: AtomicU64,
    /// The configuration's sequence number that the user has seen.
    config_seen: AtomicU32,
}

/// What only the one who pushes needs.
struct Life {
    /// Features of the first activation, then of the last; only ever fewer.
    features: u64,
    /// When the device was first seen away.
    away_since: Option<u64>,
}

/// No generation: they have 32 bits.
const NO_GENERATION: u64 = u64::MAX;

/// What a driver makes of the features that it could have, given what the table says now: the ones to
/// accept, or `None` if the device is not the one that its queues were made for.
pub(crate) type Agree = Box<dyn Fn(u64, &Offer<'_>) -> Option<u64> + Send + Sync>;

/// What a device offers at the moment of its activation.
#[derive(Debug)]
pub(crate) struct Offer<'a> {
    /// Queues that the driver has set up.
    pub(crate) queues: usize,
    /// Configuration space, zeroes after what is in use.
    pub(crate) config: &'a [u8; MAX_CONFIG],
}

/// Takes what there is.
pub(crate) fn agree_to_all() -> Agree {
    Box::new(|features, _offer| Some(features))
}

impl<P: Platform> Core<P> {
    /// Finds a device and its arena.
    pub(crate) fn find(
        platform: &'static P,
        kind: u32,
        name: Option<&str>,
    ) -> Result<(DeviceInfo, &'static Arena), OpenError> {
        let info = platform
            .device_table()
            .find(kind, name)
            .ok_or(OpenError::NotFound)?;
        let arena = platform
            .arena(info.arena)
            .ok_or(OpenError::NoArena(info.arena))?;
        Ok((info, arena))
    }

    /// Waits until a device says what it offers; its entry and its configuration space then.
    pub(crate) fn wait_for_offer(
        platform: &'static P,
        found: &DeviceInfo,
    ) -> Result<(DeviceInfo, [u8; MAX_CONFIG]), OpenError> {
        let table = platform.device_table();
        let mut waiter = Waiter::new(platform, &[found.config_event()]);
        let give_up = platform
            .now_ns()
            .saturating_add(nanoseconds(BRING_UP_TIMEOUT));
        loop {
            waiter.clear();
            let state = table.state(found.index).map(|(state, _)| state);
            if state.is_some_and(|state| state != DeviceState::Absent) {
                let info = table.info(found.index).ok_or(OpenError::NotFound)?;
                let (mut config, len, _) = table.config(found.index).ok_or(OpenError::NotFound)?;
                config[len..].fill(0);
                return Ok((info, config));
            }
            if platform.now_ns() >= give_up {
                return Err(OpenError::Device(Lost::TimedOut));
            }
            // Nobody was told of this vCPU yet, so the event may go elsewhere.
            waiter.idle(Some(RECOVERY_POLL));
        }
    }

    /// Brings the device up with these queues; waits until it is there.
    ///
    /// `known` are the features that the driver has a use for, [`NEEDED`] among them.
    pub(crate) fn bring_up(
        platform: &'static P,
        info: DeviceInfo,
        known: u64,
        agree: Agree,
        rings: Vec<Arc<dyn Ring>>,
    ) -> Result<Self, OpenError> {
        if rings.is_empty() || rings.len() > usize::from(info.queue_count) {
            return Err(OpenError::BadQueues);
        }
        let config_vcpu = rings.first().map_or(0, |ring| ring.vcpu());
        let core = Core {
            platform,
            info,
            config_vcpu,
            agree,
            rings,
            life: SpinLock::new(Life {
                features: known,
                away_since: None,
            }),
            generation: AtomicU64::new(NO_GENERATION),
            loss_timeout_ns: AtomicU64::new(nanoseconds(BRING_UP_TIMEOUT)),
            host_has_memory: AtomicBool::new(false),
            reset_wanted: AtomicBool::new(false),
            lost: SpinLock::new(None),
            gone: AtomicBool::new(false),
            features: AtomicU64::new(0),
            config_seen: AtomicU32::new(0),
        };
        let mut waiter = Waiter::new(platform, &[info.config_event()]);
        loop {
            waiter.clear();
            match core.step() {
                Ok(Step::Live) => break,
                Ok(Step::Waiting) => waiter.idle(Some(RECOVERY_POLL)),
                Err(Lost::Changed) => {
                    let offered = platform
                        .device_table()
                        .info(info.index)
                        .map_or(0, |now| now.features);
                    let missing = NEEDED & !offered;
                    return Err(if missing != 0 {
                        OpenError::MissingFeatures(missing)
                    } else {
                        OpenError::BadQueues
                    });
                }
                Err(lost) => return Err(OpenError::Device(lost)),
            }
        }
        drop(waiter);
        core.set_loss_timeout(nanoseconds(LOSS_TIMEOUT));
        core.take_config_change();
        Ok(core)
    }

    pub(crate) fn platform(&self) -> &'static P {
        self.platform
    }

    pub(crate) fn info(&self) -> &DeviceInfo {
        &self.info
    }

    pub(crate) fn config_vcpu(&self) -> u32 {
        self.config_vcpu
    }

    /// The generation in force, if the device is up.
    pub(crate) fn generation(&self) -> Option<u32> {
        // Ordering: Relaxed, one number on its own; the table is what decides.
        u32::try_from(self.generation.load(Ordering::Relaxed)).ok()
    }

    /// Features in force.
    pub(crate) fn features(&self) -> u64 {
        // Ordering: Relaxed, one number on its own.
        self.features.load(Ordering::Relaxed)
    }

    /// How long the device may stay away.
    pub(crate) fn set_loss_timeout(&self, nanoseconds: u64) {
        // Ordering: Relaxed, one number on its own.
        self.loss_timeout_ns.store(nanoseconds, Ordering::Relaxed);
    }

    /// How long the device may stay away, in nanoseconds.
    pub(crate) fn loss_timeout(&self) -> u64 {
        // Ordering: Relaxed, one number on its own.
        self.loss_timeout_ns.load(Ordering::Relaxed)
    }

    /// Configuration space and its bytes in use.
    pub(crate) fn config(&self) -> ([u8; MAX_CONFIG], usize) {
        self.platform
            .device_table()
            .config(self.info.index)
            .map_or(([0; MAX_CONFIG], 0), |(config, len, _)| (config, len))
    }

    /// Whether the configuration has changed since the last time this was asked.
    pub(crate) fn take_config_change(&self) -> bool {
        let Some(now) = self.platform.device_table().config_seq(self.info.index) else {
            return false;
        };
        // Ordering: Relaxed, the configuration itself is read under its own seqlock.
        self.config_seen.swap(now, Ordering::Relaxed) != now
    }

    /// Whether the table still says that the generation a channel is attached to is active.
    pub(crate) fn is_live(&self, attached: Option<u32>) -> bool {
        attached.is_some_and(|generation| {
            self.platform.device_table().state(self.info.index)
                == Some((DeviceState::Active, generation))
        })
    }

    /// Starts the device anew, now or as soon as whoever is pushing it lets go.
    pub(crate) fn reset(&self) {
        self.reset_wanted.store(true, Ordering::Relaxed);
        // Ordering: a full fence, and another one in `step` between letting go of the lock and
        // looking at the flag: either we get the lock, or its holder sees the flag afterwards.
        fence(Ordering::SeqCst);
        // What this fails with, the next step meets again.
        let _later = self.step().is_err();
    }

    /// Why the device is gone for good, if it is. What is submitted to it then would only be lost.
    pub(crate) fn lost(&self) -> Option<Lost> {
        // Ordering: Acquire pairs with the Release in `give_up`.
        if !self.gone.load(Ordering::Acquire) {
            return None;
        }
        *self.lost.lock()
    }

    /// Whether every buffer is the driver's again, now that the device is lost.
    pub(crate) fn memory_is_ours(&self) -> bool {
        // Ordering: Acquire pairs with the Release after a reset, behind which nobody writes.
        !self.host_has_memory.load(Ordering::Acquire)
    }

    /// Pushes the device towards being live, as far as that goes without waiting for another vCPU.
    pub(crate) fn step(&self) -> Result<Step, Lost> {
        loop {
            let Some(life) = self.life.try_lock() else {
                return Ok(Step::Waiting);
            };
            let step = self.step_with(life);
            // Ordering: a full fence, the other half of the one in `reset`. Somebody may have wanted
            // one while the lock was held, and gone away.
            fence(Ordering::SeqCst);
            if step.is_err() || !self.reset_wanted.load(Ordering::Relaxed) {
                return step;
            }
        }
    }

    fn step_with(&self, mut life: SpinGuard<'_, Life>) -> Result<Step, Lost> {
        if let Some(lost) = self.lost() {
            return Err(lost);
        }
        // Ordering: Relaxed, the fences are what orders it.
        if self.reset_wanted.swap(false, Ordering::Relaxed) {
            self.detach_all();
            // What this fails with, the push meets again.
            let _again = self.reset_device(&life).is_err();
        }
        let step = self.push(&mut life);
        match step {
            Ok(Step::Live) => {
                life.away_since = None;
                Ok(Step::Live)
            }
            Ok(Step::Waiting) => {
                let now = self.platform.now_ns();
                let since = *life.away_since.get_or_insert(now);
                if now.saturating_sub(since) < self.loss_timeout() {
                    return Ok(Step::Waiting);
                }
                Err(self.give_up(Lost::TimedOut))
            }
            Err(lost) => Err(self.give_up(lost)),
        }
    }

    fn push(&self, life: &mut Life) -> Result<Step, Lost> {
        for _ in 0..MAX_RECOVERY_STEPS {
            // An entry whose state is no known number is as good as absent.
            let (state, generation) = self
                .platform
                .device_table()
                .state(self.info.index)
                .unwrap_or((DeviceState::Absent, 0));
            if state == DeviceState::Active && self.generation() == Some(generation) {
                return Ok(Step::Live);
            }
            self.detach_all();
            let outcome = match state {
                DeviceState::Active | DeviceState::NeedsReset => self.reset_device(life),
                // The host let go of it on its own.
                DeviceState::Absent => {
                    self.rebuild_all(life);
                    return Ok(Step::Waiting);
                }
                DeviceState::Negotiated => self.activate(life)?,
            };
            match outcome {
                Ok(()) => {}
                // The state has moved on between the look and the call.
                Err(error) if error.status == Status::BadState => {}
                Err(error) if error.status == Status::Again => return Ok(Step::Waiting),
                Err(error) => return Err(Lost::Refused(error)),
            }
        }
        Ok(Step::Waiting)
    }

    fn reset_device(&self, life: &Life) -> Result<(), CallError> {
        let index = u64::from(self.info.index);
        self.platform
            .call(number::DEVICE_RESET, [index, 0, 0, 0, 0, 0])?;
        self.rebuild_all(life);
        Ok(())
    }

    fn activate(&self, life: &mut Life) -> Result<Result<(), CallError>, Lost> {
        let Some(now) = self.platform.device_table().info(self.info.index) else {
            return Err(Lost::Changed);
        };
        let (config, len) = self.config();
        let mut offered = [0; MAX_CONFIG];
        offered[..len].copy_from_slice(&config[..len]);
        let offer = Offer {
            queues: self.rings.len(),
            config: &offered,
        };
        let Some(features) = (self.agree)(now.features & life.features, &offer) else {
            return Err(Lost::Changed);
        };
        let fits = |ring: &Arc<dyn Ring>| ring.setup().size <= now.max_queue_size;
        if features & NEEDED != NEEDED
            || self.rings.len() > usize::from(now.queue_count)
            || now.kind != self.info.kind
            || now.arena != self.info.arena
            || now.event_base != self.info.event_base
            || !self.rings.iter().all(fits)
        {
            return Err(Lost::Changed);
        }
        // The rings are empty already; only now is it known for which features.
        life.features = features;
        self.empty_rings(features);
        // Ordering: Release, as all stores to this flag.
        self.host_has_memory.store(true, Ordering::Release);
        let setup = self.setup(features);
        let Some(address) = self.platform.fill_scratch(&setup) else {
            return Err(Lost::Changed);
        };
        let args = [
            u64::from(self.info.index),
            address,
            setup.len() as u64,
            0,
            0,
            0,
        ];
        let generation = match self.platform.call(number::DEVICE_ACTIVATE, args) {
            Ok(generation) => generation,
            Err(error) => {
                // What was refused was never looked at; what failed half-way may be served until
                // the device is seen absent or reset.
                let maybe = matches!(error.status, Status::Again | Status::HostError);
                self.host_has_memory.store(maybe, Ordering::Release);
                return Ok(Err(error));
            }
        };
        // Generations are 32 bits in the table.
        let generation = generation as u32;
        // Ordering: Relaxed, one number each, on its own.
        self.generation
            .store(u64::from(generation), Ordering::Relaxed);
        self.features.store(features, Ordering::Relaxed);
        for (index, ring) in self.rings.iter().enumerate() {
            if ring.attach(generation) {
                self.platform.notify(self.info.queue_event(index as u16));
            }
            if ring.vcpu() != self.platform.vcpu_index() {
                // Its owner may be idling for a completion that was reaped.
                self.platform.wake(ring.vcpu());
            }
        }
        Ok(Ok(()))
    }

    /// The bytes that `DEVICE_ACTIVATE` reads.
    fn setup(&self, features: u64) -> Vec<u8> {
        debug_assert!(self.rings.len() <= MAX_QUEUES as usize);
        let head = DeviceSetup {
            features,
            queue_count: self.rings.len() as u32,
            config_vcpu: self.config_vcpu,
        };
        let mut bytes = Vec::from(head.as_bytes());
        for ring in &self.rings {
            bytes.extend_from_slice(ring.setup().as_bytes());
        }
        bytes
    }

    fn detach_all(&self) {
        // Ordering: Relaxed, one number on its own.
        if self.generation.swap(NO_GENERATION, Ordering::Relaxed) != NO_GENERATION {
            log::warn!("device {}: lost, starting it anew", self.info.name());
        }
        for ring in &self.rings {
            ring.detach();
        }
    }

    /// The device has let go: reap and empty the rings.
    fn rebuild_all(&self, life: &Life) {
        // Ordering: AcqRel, the Release tells `memory_is_ours` what the reset's return told us.
        if self.host_has_memory.swap(false, Ordering::AcqRel) {
            self.empty_rings(life.features);
        }
    }

    fn empty_rings(&self, features: u64) {
        let event_idx = features & feature::EVENT_IDX != 0;
        let indirect = features & feature::INDIRECT_DESC != 0;
        for ring in &self.rings {
            ring.rebuild(event_idx, indirect);
        }
    }

    fn give_up(&self, lost: Lost) -> Lost {
        log::error!("device {}: {lost}", self.info.name());
        self.detach_all();
        *self.lost.lock() = Some(lost);
        // Ordering: Release, for the Acquire in `lost`.
        self.gone.store(true, Ordering::Release);
        lost
    }
}

impl<P: Platform> Drop for Core<P> {
    fn drop(&mut self) {
        if !*self.host_has_memory.get_mut() {
            return;
        }
        let index = u64::from(self.info.index);
        let stopped = self
            .platform
            .call(number::DEVICE_RESET, [index, 0, 0, 0, 0, 0]);
        if stopped.is_err() {
            // Memory that a device may still write must never be handed out again.
            log::error!("device {}: cannot be stopped", self.info.name());
            for ring in &self.rings {
                core::mem::forget(Arc::clone(ring));
            }
        }
    }
}

fn nanoseconds(duration: core::time::Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
