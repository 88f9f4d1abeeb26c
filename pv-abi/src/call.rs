//! Call numbers and the call frame.

use crate::assert_layout;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// One call: filled by the guest, copied once by the host, answered in place.
///
/// The host takes one copy of the first 64 bytes and validates that copy; it writes `value` first
/// and `status` last.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(64))]
pub struct Frame {
    /// What is called: [`number`].
    pub number: u32,
    /// Zero; anything else is answered with `BadFrame`.
    pub flags: u32,
    /// Arguments; the ones that the call does not use are zero.
    pub args: [u64; 6],
    /// Written by the host: [`crate::status::Status`].
    pub status: u32,
    /// Zero.
    pub reserved: u32,
    /// Written by the host: the call's result.
    pub value: u64,
    /// Zero.
    pub padding: [u64; 7],
}
assert_layout!(Frame, size 128, align 64, number @ 0, flags @ 4, args @ 8, status @ 56,
    reserved @ 60, value @ 64, padding @ 72);

/// Frames in each vCPU page.
pub const FRAMES: usize = 2;

/// Call numbers. Ranges: `0x000` core, `0x100` device, `0x200` memory, `0x300` vCPU,
/// [`EMBEDDER`](number::EMBEDDER) and up for the embedder.
pub mod number {
    /// Does nothing; returns 0. Every argument is zero.
    pub const NOP: u32 = 0x000;
    /// Accepts features. `args[0]` features, a subset of those offered; `args[1]` the guest's ABI,
    /// `major << 16 | minor`. Returns the features in force. Once per VM, `BadState` after that.
    pub const NEGOTIATE: u32 = 0x001;
    /// Emits a log line. `args[0]` level (1 error .. 5 trace), `args[1]` bytes in the scratch area.
    pub const LOG: u32 = 0x002;
    /// Ends the VM as a guest panic. `args[0]` bytes of message in the scratch area.
    pub const PANIC: u32 = 0x003;
    /// Returns nanoseconds since the VM was built, for hosts whose TSC is not stable.
    pub const CLOCK: u32 = 0x004;
    /// Carries out many frames. `args[0]` address of an array of [`Frame`](super::Frame) in an
    /// arena, `args[1]` how many. Returns how many were carried out; those have their status set.
    /// A frame may not itself be a `MULTICALL`, and one that is refused does not stop the rest.
    pub const MULTICALL: u32 = 0x005;
    /// Brings a device up. `args[0]` index, `args[1]` address of a
    /// [`DeviceSetup`](crate::device::DeviceSetup) in the control region or the device's arena,
    /// `args[2]` bytes. Returns the generation that is now active.
    pub const DEVICE_ACTIVATE: u32 = 0x100;
    /// Takes a device out of use; its queues are no longer touched when this returns.
    /// `args[0]` index. Returns the new state.
    pub const DEVICE_RESET: u32 = 0x101;
    /// Writes configuration space. `args[0]` index, `args[1]` offset, `args[2]` width in bytes
    /// (1, 2, 4 or 8), `args[3]` value.
    pub const DEVICE_CONFIG_WRITE: u32 = 0x102;
    /// Starts a vCPU. `args[0]` index, `args[1]` entry point in private RAM, `args[2]` the value
    /// that it gets in RDI. It starts on the stack that the memory map names for it.
    pub const VCPU_START: u32 = 0x300;
    /// First number of the embedder's range.
    pub const EMBEDDER: u32 = 0x8000_0000;
}
