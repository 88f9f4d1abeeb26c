//! What a driver needs of the ground it runs on, and the promises behind it.
//!
//! Drivers are generic over [`Platform`] and know nothing of profiles: the flat runtime implements it
//! over the gate, a kernel over its own means, the tests over plain memory.
//!
//! **Event bits are hints.** The truth about a queue is its used ring, the truth about a device is
//! its entry in the device table. A bit only makes `idle` return; no driver decides anything on it.
//! Whoever consumes a bit that was meant for another puts it back with [`Platform::raise_events`],
//! because the other may be waiting on the same vCPU ([`Waiter`] does that).
#![allow(unsafe_code)]
// UNSAFETY: `Platform` is an unsafe trait: drivers hand the addresses it gives out to a device.

mod arena;
mod executor;
mod table;
mod waiter;

pub use arena::{Arena, DmaBuf, OutOfArena};
pub use executor::block_on;
pub use table::{DeviceInfo, DeviceTable};
pub use waiter::Waiter;

use core::time::Duration;
use pv_abi::call::number;
use pv_abi::status::Status;

/// A call that the host refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallError {
    /// Why.
    pub status: Status,
    /// The embedder's own code where `status` is `Refused`; zero otherwise.
    pub value: u64,
}

impl core::fmt::Display for CallError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self.status {
            Status::Refused => write!(f, "{} with code {:#x}", self.status, self.value),
            status => status.fmt(f),
        }
    }
}

impl core::error::Error for CallError {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        Some(&self.status)
    }
}

/// The ground that drivers stand on.
///
/// # Safety
///
/// Memory safety of the drivers rests on [`device_table`](Self::device_table) and
/// [`arena`](Self::arena): the pointers behind them must be valid for reads (arenas: and writes) as
/// long as the program runs, and nothing else in the guest may hold references into that memory.
/// The duties of the other methods are for correctness; each says which.
pub unsafe trait Platform: Sync + 'static {
    /// The index of the vCPU that runs this code, below [`vcpu_count`](Self::vcpu_count).
    fn vcpu_index(&self) -> u32;

    /// vCPUs that exist, started or not. Never changes.
    fn vcpu_count(&self) -> u32;

    /// Makes a call and returns its value. Blocks until the host has answered.
    ///
    /// Everything written before the call is visible to the host. A status number that this version
    /// does not know is reported as [`Status::HostError`].
    ///
    /// # Errors
    ///
    /// Whatever status other than `Ok` the host answered with.
    fn call(&self, number: u32, args: [u64; 6]) -> Result<u64, CallError>;

    /// Copies `data` to this vCPU's scratch area and returns the area's address.
    ///
    /// The bytes stay until the next use of the area on this vCPU; the caller makes its call before
    /// it does anything else. `None` if `data` is longer than
    /// [`SCRATCH_LEN`](pv_abi::limits::SCRATCH_LEN).
    fn fill_scratch(&self, data: &[u8]) -> Option<u64>;

    /// Rings a doorbell: a queue's (the number of its event) or a vCPU's.
    ///
    /// Never blocks. Ring memory written before is visible to whoever the doorbell wakes.
    fn notify(&self, doorbell: u32);

    /// Waits for an event of this vCPU, at most `limit`; `None` waits without a limit.
    ///
    /// Returns at once if a bit of this vCPU is pending; may return spuriously. An event that fires
    /// between the caller's last look at memory and this call must not be lost: it sets a bit, and a
    /// set bit ends the wait.
    fn idle(&self, limit: Option<Duration>);

    /// Takes pending bits of this vCPU: clears those of `mask` in `word` and returns which were set.
    ///
    /// Bit `b` of word `w` is event `64 * w + b`. What the event's source wrote before is visible
    /// after. Words past the last are empty.
    fn take_events(&self, word: usize, mask: u64) -> u64;

    /// Makes bits pending again on this vCPU, as if their events had fired now.
    fn raise_events(&self, word: usize, mask: u64);

    /// The device table.
    fn device_table(&self) -> DeviceTable;

    /// The allocator over the arena with this index; the same one at every call.
    ///
    /// `None` if the memory map has no such arena.
    fn arena(&self, index: u32) -> Option<&'static Arena>;

    /// Nanoseconds since the VM was built. Never goes back, on any vCPU.
    fn now_ns(&self) -> u64;

    /// Consumes one event of this vCPU: whether it was pending.
    fn take_event(&self, event: u32) -> bool {
        self.take_events(event as usize / 64, 1 << (event % 64)) != 0
    }

    /// Makes the `idle` of another vCPU return.
    fn wake(&self, vcpu: u32) {
        self.notify(pv_abi::gate::WAKE_DOORBELL.wrapping_add(vcpu));
    }

    /// Makes a call that has no arguments; for tests of the path.
    ///
    /// # Errors
    ///
    /// As [`call`](Self::call).
    fn nop(&self) -> Result<u64, CallError> {
        self.call(number::NOP, [0; 6])
    }
}
