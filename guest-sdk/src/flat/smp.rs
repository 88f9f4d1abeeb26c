//! Starting and waking other vCPUs.
#![allow(unsafe_code)]
// UNSAFETY: a function pointer travels to the new vCPU through an integer.

use super::platform::platform;
use crate::platform::{CallError, Platform};
use core::sync::atomic::{AtomicUsize, Ordering};
use pv_abi::call::number;
use pv_abi::limits::MAX_VCPUS;
use pv_abi::status::Status;

/// What a vCPU that is being started shall run.
struct Order {
    entry: AtomicUsize,
    argument: AtomicUsize,
}

static ORDERS: [Order; MAX_VCPUS as usize] = [const {
    Order {
        entry: AtomicUsize::new(0),
        argument: AtomicUsize::new(0),
    }
}; MAX_VCPUS as usize];

/// Starts vCPU `index` in `entry(argument)`, on the stack that the memory map names for it.
///
/// A vCPU can be started once. When `entry` returns, its vCPU idles for the rest of the VM's life.
///
/// # Errors
///
/// What the host answered: `NotFound` for an index that does not exist, `BadState` for a vCPU that
/// runs already, `UnknownCall` where the feature `SMP` is not in force.
pub fn start(index: u32, entry: fn(usize), argument: usize) -> Result<(), CallError> {
    let platform = platform();
    let order = ORDERS
        .get(index as usize)
        .filter(|_| index != 0 && index < platform.vcpu_count())
        .ok_or(CallError {
            status: Status::NotFound,
            value: 0,
        })?;
    // Ordering: Relaxed to claim the place; a second start of the same vCPU is refused here, before
    // it could overwrite an order that the new vCPU has not read yet.
    if order
        .entry
        .compare_exchange(0, entry as usize, Ordering::Relaxed, Ordering::Relaxed)
        .is_err()
    {
        return Err(CallError {
            status: Status::BadState,
            value: 0,
        });
    }
    // Ordering: Release, with the call itself between this and the new vCPU's first load.
    order.argument.store(argument, Ordering::Release);
    let trampoline = trampoline as extern "sysv64" fn(usize, u64) -> ! as usize as u64;
    let started = platform.call(
        number::VCPU_START,
        [u64::from(index), trampoline, u64::from(index), 0, 0, 0],
    );
    if started.is_err() {
        // Ordering: Relaxed, nothing was started; the place is free again.
        order.entry.store(0, Ordering::Relaxed);
    }
    started.map(|_| ())
}

/// Makes the `idle` of vCPU `index` return.
pub fn wake(index: u32) {
    platform().wake(index);
}

/// Where a secondary vCPU starts: RDI is what `VCPU_START` was given, here its index.
extern "sysv64" fn trampoline(index: usize, _vcpu: u64) -> ! {
    if let Some(order) = ORDERS.get(index) {
        // Ordering: Acquire pairs with the Release in `start`.
        let argument = order.argument.load(Ordering::Acquire);
        let entry = order.entry.load(Ordering::Relaxed);
        if entry != 0 {
            // SAFETY: only `start` stores here, and it stores a `fn(usize)`.
            let entry: fn(usize) = unsafe { core::mem::transmute(entry) };
            entry(argument);
        }
    }
    loop {
        // Taking the bits keeps a late event from turning this into a spin.
        for word in 0..pv_abi::vcpu::EVENT_WORDS {
            platform().take_events(word, u64::MAX);
        }
        platform().idle(None);
    }
}
