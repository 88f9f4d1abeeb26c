//! The gate and the vCPU page: the only code that touches either.
#![allow(unsafe_code)]
// UNSAFETY: reads the GS base's page, calls addresses that the host made executable.

use core::mem::offset_of;
use core::sync::atomic::{AtomicU64, Ordering, compiler_fence};
use pv_abi::call::Frame;
use pv_abi::gate::{CALL, EXIT, IDLE, NOTIFY, slot};
use pv_abi::limits::SCRATCH_LEN;
use pv_abi::vcpu::{EVENT_WORDS, VcpuPage};

use super::entry::ExitCode;

/// The frame of normal calls; frame 1 is for calls inside an upcall, which this runtime does not use.
const NORMAL_FRAME: u32 = 0;

/// This vCPU's page. Valid from the entry point on, in a guest; nowhere else.
fn page() -> *mut VcpuPage {
    let address: usize;
    // SAFETY: in a flat guest GS base always points at the vCPU's page, whose first word is its own
    // address. `Flat` cannot be had outside one.
    unsafe {
        core::arch::asm!("mov {}, gs:[0]", out(reg) address,
            options(nostack, preserves_flags, readonly));
    }
    core::ptr::with_exposed_provenance_mut(address)
}

/// The index of the vCPU that runs this.
///
/// Only in a running flat guest, as everything in this module.
pub fn vcpu_index() -> u32 {
    let page = page();
    // SAFETY: the page is mapped and the field aligned; the host wrote it before the start.
    unsafe { core::ptr::read_volatile(&raw const (*page).index) }
}

/// vCPUs that exist.
pub(super) fn vcpu_count() -> u32 {
    let page = page();
    // SAFETY: as in `vcpu_index`.
    unsafe { core::ptr::read_volatile(&raw const (*page).count) }
}

/// Fills frame 0, makes the call, returns raw status and value.
pub(super) fn call(number: u32, args: [u64; 6]) -> (u32, u64) {
    let page = page();
    // SAFETY: the frame is this vCPU's own and no call is in progress on it, since calls block and
    // nothing interrupts them; the slot is code that the host wrote, with this signature.
    unsafe {
        let frame = &raw mut (*page).frames[NORMAL_FRAME as usize];
        core::ptr::write_volatile(
            frame,
            Frame {
                number,
                args,
                status: u32::MAX,
                ..Default::default()
            },
        );
        let gate: extern "sysv64" fn(u32) = core::mem::transmute(slot_pointer(CALL));
        gate(NORMAL_FRAME);
        let status = core::ptr::read_volatile(&raw const (*frame).status);
        let value = core::ptr::read_volatile(&raw const (*frame).value);
        (status, value)
    }
}

/// Rings a doorbell.
pub(super) fn notify(doorbell: u32) {
    // SAFETY: the slot is code that the host wrote, with this signature.
    unsafe {
        let gate: extern "sysv64" fn(u32) = core::mem::transmute(slot_pointer(NOTIFY));
        gate(doorbell);
    }
}

/// Waits for an event of this vCPU.
pub(super) fn idle(nanoseconds: u64) {
    // SAFETY: the slot is code that the host wrote, with this signature.
    unsafe {
        let gate: extern "sysv64" fn(u64) = core::mem::transmute(slot_pointer(IDLE));
        gate(nanoseconds);
    }
}

/// Ends the VM with this code.
pub fn exit(code: ExitCode) -> ! {
    // SAFETY: the slot is code that the host wrote, with this signature; it does not return.
    unsafe {
        let gate: extern "sysv64" fn(u32) -> ! = core::mem::transmute(slot_pointer(EXIT));
        gate(code.0)
    }
}

/// Copies `data` to the scratch area; its address, or `None` if it does not fit.
pub(super) fn fill_scratch(data: &[u8]) -> Option<u64> {
    if data.len() > SCRATCH_LEN {
        return None;
    }
    let scratch = page()
        .cast::<u8>()
        .wrapping_add(offset_of!(VcpuPage, scratch));
    // SAFETY: `data` fits, the area is this vCPU's own, and `data` is not in it (nobody holds a
    // reference to it).
    unsafe { core::ptr::copy_nonoverlapping(data.as_ptr(), scratch, data.len()) };
    // Ordering: a compiler fence; the host reads the area in a call of this same vCPU.
    compiler_fence(Ordering::Release);
    Some(scratch.addr() as u64)
}

/// A word of this vCPU's pending bits.
pub(super) fn pending(word: usize) -> Option<&'static AtomicU64> {
    if word >= EVENT_WORDS {
        return None;
    }
    let page = page();
    // SAFETY: in bounds, aligned, mapped for the program's life; host and guest use atomics on it.
    Some(unsafe { AtomicU64::from_ptr((&raw mut (*page).pending).cast::<u64>().add(word)) })
}

fn slot_pointer(index: u64) -> *const () {
    core::ptr::with_exposed_provenance(slot(index) as usize)
}
