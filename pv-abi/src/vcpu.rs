//! The page that each vCPU owns. GS base points at it; the host sets it and the guest never writes
//! the GS base.
//!
//! The page is writable by the guest as a whole: the host believes nothing in it, copies what it
//! needs once and checks the copy. What the guest breaks here is its own.

use crate::assert_layout;
use crate::call::{FRAMES, Frame};
use crate::limits::{MAX_EVENTS, MAX_POLL, SCRATCH_LEN};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Words of pending bits.
pub const EVENT_WORDS: usize = MAX_EVENTS as usize / 64;

/// One entry of the poll set; the layout is that of `struct pollfd`.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PollEntry {
    /// Private to the accel.
    pub fd: i32,
    /// Private to the accel.
    pub events: i16,
    /// Private to the accel.
    pub revents: i16,
}
assert_layout!(PollEntry, size 8, align 4, fd @ 0, events @ 4, revents @ 6);

/// One vCPU's page.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(64))]
pub struct VcpuPage {
    /// The address of this page: `mov rax, gs:[0]` finds it.
    pub self_gpa: u64,
    /// This vCPU's index.
    pub index: u32,
    /// vCPUs that exist.
    pub count: u32,
    /// The guest's FS base (thread-local storage), kept here for checkpoints.
    pub fs_base: u64,
    /// Argument of the `idle` call in progress.
    pub idle_ns: u64,
    /// Times the `notify` slot was used; counted by the gate.
    pub kicks: u64,
    /// Times the `idle` slot was used; counted by the gate.
    pub idles: u64,
    /// Private to the gate: hand-off word.
    pub handoff: u32,
    /// Private to the gate: which frame, or the exit code.
    pub handoff_arg: u32,
    /// Private to the gate.
    pub gate_private: [u64; 9],
    /// Call frames: 0 for normal calls, 1 for calls inside an upcall.
    pub frames: [Frame; FRAMES],
    /// Pending event bits, set by the host or the gate, taken by the guest with atomic swaps.
    pub pending: [u64; EVENT_WORDS],
    /// Events of queues and configurations that `idle` found; counted by the gate or the host.
    pub events: u64,
    /// Zero; reserved for upcall masks.
    pub reserved0: [u64; 2],
    /// Private to the gate: entries of `poll` in use.
    pub poll_count: u32,
    /// Zero.
    pub reserved1: u32,
    /// Private to the gate: the poll set.
    pub poll: [PollEntry; MAX_POLL],
    /// Private to the gate: the event of each poll entry, `u16::MAX` for none.
    pub poll_event: [u16; MAX_POLL],
    /// Zero.
    pub reserved2: [u8; 6],
    /// Private to the gate: where `checkpoint` saves registers.
    pub save_area: [u64; 32],
    /// Zero.
    pub reserved3: [u8; 2048 - 0x1c0 - 8 * MAX_POLL - 2 * MAX_POLL - 6 - 256],
    /// Log lines, panic messages and device set-up structures.
    pub scratch: [u8; SCRATCH_LEN],
}
assert_layout!(VcpuPage, size 4096, align 64, self_gpa @ 0, index @ 8, count @ 12, fs_base @ 0x10,
    idle_ns @ 0x18, kicks @ 0x20, idles @ 0x28, handoff @ 0x30, handoff_arg @ 0x34,
    gate_private @ 0x38, frames @ 0x80, pending @ 0x180, events @ 0x1a0, reserved0 @ 0x1a8,
    poll_count @ 0x1b8,
    reserved1 @ 0x1bc, poll @ 0x1c0, poll_event @ 0x1c0 + 8 * MAX_POLL,
    reserved2 @ 0x1c0 + 10 * MAX_POLL, save_area @ 0x1c0 + 10 * MAX_POLL + 6,
    reserved3 @ 0x1c0 + 10 * MAX_POLL + 262, scratch @ 2048);
