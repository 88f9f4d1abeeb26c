//! The gate: executable slots that the host writes and the guest calls.
//!
//! The guest does `call GATE_BASE + slot * SLOT_SIZE` and nothing else to reach the host; how a slot
//! gets there is the accel's business. Slots follow the SysV AMD64 clobber rules with DF = 0.
//! A slot that no function is assigned to raises an invalid-opcode fault.

/// Bytes from one slot's entry point to the next.
pub const SLOT_SIZE: u64 = 64;
/// Slots in the gate.
pub const SLOT_COUNT: u64 = 16;

/// `extern "sysv64" fn(frame: u32)`: makes the call in this vCPU's frame `frame` (0 or 1).
///
/// Frame 1 is for calls made inside an upcall. Any other value ends the guest.
pub const CALL: u64 = 0;
/// `extern "sysv64" fn(doorbell: u32)`: rings a queue's doorbell, or wakes a vCPU.
///
/// Queue doorbells have the number of the queue's event; vCPU doorbells start at
/// [`WAKE_DOORBELL`]. One that does not exist is counted and otherwise ignored.
pub const NOTIFY: u64 = 1;
/// `extern "sysv64" fn(nanoseconds: u64)`: waits for an event of this vCPU, at most so long.
///
/// [`IDLE_FOREVER`] waits without a limit. Returns at once if a pending bit is set. Sets pending
/// bits in the vCPU page. Spurious returns are legal.
pub const IDLE: u64 = 2;
/// `extern "sysv64" fn(code: u32) -> !`: ends the VM with this exit code.
pub const EXIT: u64 = 3;
/// Reserved for checkpoints: returns [`CHECKPOINT_UNSUPPORTED`] where they are not offered.
pub const CHECKPOINT: u64 = 4;

/// What the `checkpoint` slot returns when the host does not offer checkpoints.
pub const CHECKPOINT_UNSUPPORTED: u64 = u64::MAX;
/// The `idle` argument that means no time limit.
pub const IDLE_FOREVER: u64 = u64::MAX;
/// Doorbell of vCPU 0; vCPU `n` has `WAKE_DOORBELL + n`. Makes that vCPU's `idle` return.
pub const WAKE_DOORBELL: u32 = 0x1000;

/// The guest-physical address of a slot's entry point.
pub const fn slot(index: u64) -> u64 {
    crate::layout::GATE_BASE + index * SLOT_SIZE
}

const _: () = assert!(SLOT_SIZE * SLOT_COUNT <= crate::layout::GATE_LEN);
