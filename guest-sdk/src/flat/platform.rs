//! [`Platform`] over the gate.
#![allow(unsafe_code)]
// UNSAFETY: implements the unsafe trait on fixed guest-physical addresses.

use super::gate;
use crate::clock::Clock;
use crate::platform::{Arena, CallError, DeviceTable, Platform};
use crate::sync::SpinLock;
use alloc::boxed::Box;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicPtr, AtomicU64, Ordering};
use core::time::Duration;
use pv_abi::boot::{BootBlock, memory_kind};
use pv_abi::call::number;
use pv_abi::clock::ClockPage;
use pv_abi::device::DeviceEntry;
use pv_abi::gate::IDLE_FOREVER;
use pv_abi::layout::{CLOCK_PAGE_BASE, DEVICE_TABLE_BASE};
use pv_abi::limits::MAX_ARENAS;
use pv_abi::status::Status;

/// The platform of flat guests. There is one: [`platform`].
#[derive(Debug)]
pub struct Flat {
    boot: AtomicPtr<BootBlock>,
    features: AtomicU64,
    clock: Clock,
    arenas: SpinLock<[Option<&'static Arena>; MAX_ARENAS as usize]>,
}

static FLAT: Flat = Flat {
    boot: AtomicPtr::new(core::ptr::null_mut()),
    features: AtomicU64::new(0),
    // SAFETY: the host maps the page at this address for the guest's life. On a host that only
    // links this crate nobody reads it, since `platform` refuses.
    clock: unsafe { Clock::new(fixed::<ClockPage>(CLOCK_PAGE_BASE)) },
    arenas: SpinLock::new([None; MAX_ARENAS as usize]),
};

/// The platform of the running guest.
///
/// # Panics
///
/// Before the runtime has started, and outside a flat guest.
pub fn platform() -> &'static Flat {
    assert!(
        FLAT.boot_block().is_some(),
        "the flat runtime is not running"
    );
    &FLAT
}

/// Called once by the entry point, before anything else of this module.
pub(super) fn start(boot: &'static BootBlock, features: u64) -> &'static Flat {
    // Ordering: Relaxed, no other vCPU runs yet; starting one orders all of this before it.
    FLAT.features.store(features, Ordering::Relaxed);
    FLAT.boot
        .store(core::ptr::from_ref(boot).cast_mut(), Ordering::Relaxed);
    &FLAT
}

impl Flat {
    /// The features in force: [`pv_abi::feature`].
    pub fn features(&self) -> u64 {
        // Ordering: Relaxed, written once before any other vCPU runs.
        self.features.load(Ordering::Relaxed)
    }

    /// Time from the Unix epoch to now; counts from the VM's start where the host tells no time.
    pub fn wall_time(&self) -> Duration {
        Duration::from_nanos(self.clock.wall_offset_ns().saturating_add(self.now_ns()))
    }

    pub(super) fn boot_block(&self) -> Option<&'static BootBlock> {
        // Ordering: Relaxed, written once before any other vCPU runs.
        let boot = self.boot.load(Ordering::Relaxed);
        // SAFETY: null, or the `&'static` that `start` stored.
        unsafe { boot.as_ref() }
    }
}

// SAFETY: device table, clock page and arenas are mapped at fixed addresses for the guest's life,
// and this runtime puts nothing of its own into them.
unsafe impl Platform for Flat {
    fn vcpu_index(&self) -> u32 {
        gate::vcpu_index()
    }

    fn vcpu_count(&self) -> u32 {
        gate::vcpu_count()
    }

    fn call(&self, number: u32, args: [u64; 6]) -> Result<u64, CallError> {
        let (status, value) = gate::call(number, args);
        match Status::from_code(status) {
            Some(Status::Ok) => Ok(value),
            other => Err(CallError {
                status: other.unwrap_or(Status::HostError),
                value,
            }),
        }
    }

    fn fill_scratch(&self, data: &[u8]) -> Option<u64> {
        gate::fill_scratch(data)
    }

    fn notify(&self, doorbell: u32) {
        gate::notify(doorbell);
    }

    fn idle(&self, limit: Option<Duration>) {
        gate::idle(limit.map_or(IDLE_FOREVER, |limit| {
            u64::try_from(limit.as_nanos()).unwrap_or(IDLE_FOREVER)
        }));
    }

    fn take_events(&self, word: usize, mask: u64) -> u64 {
        let Some(pending) = gate::pending(word) else {
            return 0;
        };
        // Ordering: Relaxed, a first look that avoids the locked instruction when nothing is set.
        if pending.load(Ordering::Relaxed) & mask == 0 {
            return 0;
        }
        // Ordering: AcqRel, Acquire pairs with the host's Release of the bit, so that what the event
        // announces is visible; Release orders our earlier stores before the bit is seen cleared.
        pending.fetch_and(!mask, Ordering::AcqRel) & mask
    }

    fn raise_events(&self, word: usize, mask: u64) {
        if let Some(pending) = gate::pending(word) {
            // Ordering: Release, as the host does when it sets a bit.
            pending.fetch_or(mask, Ordering::Release);
        }
    }

    fn device_table(&self) -> DeviceTable {
        let count = self.boot_block().map_or(0, |boot| boot.device_count);
        // SAFETY: the host maps the table here for the guest's life, with `device_count` entries.
        unsafe { DeviceTable::new(const { fixed::<DeviceEntry>(DEVICE_TABLE_BASE) }, count) }
    }

    fn arena(&self, index: u32) -> Option<&'static Arena> {
        let mut arenas = self.arenas.lock();
        let place = arenas.get_mut(index as usize)?;
        if place.is_none() {
            let boot = self.boot_block()?;
            let region = boot
                .memory_map
                .iter()
                .take(boot.memory_map_count as usize)
                .find(|region| region.kind == memory_kind::ARENA && region.owner == index)?;
            let base = NonNull::new(core::ptr::with_exposed_provenance_mut(region.gpa as usize))?;
            // SAFETY: the memory map says that this is an arena, the flat profile maps it one to
            // one, nothing else in the guest uses it, and the table makes this the one allocator.
            let arena = unsafe { Arena::new(index, region.gpa, base, region.len) };
            *place = Some(Box::leak(Box::new(arena)));
        }
        *place
    }

    fn now_ns(&self) -> u64 {
        // SAFETY: RDTSC has no precondition; a flat guest may execute it (CR4.TSD is clear).
        let tsc = || unsafe { core::arch::x86_64::_rdtsc() };
        let ask = || self.call(number::CLOCK, [0; 6]).unwrap_or(0);
        if self.features() & pv_abi::feature::CLOCK_PAGE == 0 {
            return ask();
        }
        self.clock.now_ns(tsc, ask)
    }
}

/// A pointer to a fixed guest-physical address of the ABI, none of which is zero.
#[allow(clippy::panic)] // In the compiler alone: it is called in constants.
const fn fixed<T>(address: u64) -> NonNull<T> {
    let pointer = core::ptr::without_provenance_mut::<T>(address as usize);
    match NonNull::new(pointer) {
        Some(pointer) => pointer,
        None => panic!("no structure of the ABI is at address zero"),
    }
}
