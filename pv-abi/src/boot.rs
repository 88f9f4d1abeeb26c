//! The boot block: what a guest knows when it starts.
//!
//! At its entry point a guest has RDI = the boot block's address, RSI = its vCPU index (0), RSP at
//! the top of its stack with a zero return address pushed, GS base = its vCPU page, DF = 0, and
//! MXCSR and the x87 control word at their reset-for-SysV values. A secondary vCPU has RDI = the
//! argument of `VCPU_START` instead.

use crate::assert_layout;
use crate::limits::{MAX_CMDLINE, MAX_MEMORY_REGIONS};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The first eight bytes of a boot block.
pub const MAGIC: u64 = u64::from_le_bytes(*b"PARAVANE");

/// Which accel runs this guest; for reports only, nothing else may depend on it.
pub mod accel {
    /// `/dev/kvm`.
    pub const KVM: u32 = 1;
    /// A confined process.
    pub const PROCESS: u32 = 2;
}

/// What a region of the memory map is for.
pub mod memory_kind {
    /// Segments of the image. `owner` is the segment's `p_flags`.
    pub const IMAGE: u32 = 1;
    /// The stack of vCPU `owner`; the page below it is not mapped.
    pub const STACK: u32 = 2;
    /// Free private RAM.
    pub const USABLE: u32 = 3;
    /// The arena with index `owner`.
    pub const ARENA: u32 = 4;
}

/// One region of the memory map.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct MemoryRegion {
    /// First byte, a multiple of the page size.
    pub gpa: u64,
    /// Bytes, a multiple of the page size.
    pub len: u64,
    /// [`memory_kind`].
    pub kind: u32,
    /// Depends on the kind.
    pub owner: u32,
}
assert_layout!(MemoryRegion, size 24, align 8, gpa @ 0, len @ 8, kind @ 16, owner @ 20);

/// What a guest knows when it starts. Read-only for the guest.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct BootBlock {
    /// [`MAGIC`].
    pub magic: u64,
    /// The host's [`crate::ABI_MAJOR`].
    pub abi_major: u16,
    /// The host's [`crate::ABI_MINOR`].
    pub abi_minor: u16,
    /// Bytes in this structure.
    pub size: u32,
    /// [`accel`].
    pub accel: u32,
    /// vCPUs that exist, started or not.
    pub vcpu_count: u32,
    /// [`crate::feature`] bits that the host offers.
    pub features: u64,
    /// The host's [`crate::baseline`]; at least what the guest's note asked for.
    pub baseline: u32,
    /// Entries of the device table in use.
    pub device_count: u32,
    /// Entries of `memory_map` in use.
    pub memory_map_count: u32,
    /// Bytes of `cmdline` in use; UTF-8.
    pub cmdline_len: u32,
    /// The memory map, in ascending order of addresses.
    pub memory_map: [MemoryRegion; MAX_MEMORY_REGIONS],
    /// The command line.
    pub cmdline: [u8; MAX_CMDLINE],
}
assert_layout!(BootBlock, size 48 + 24 * MAX_MEMORY_REGIONS + MAX_CMDLINE, align 8, magic @ 0,
    abi_major @ 8, abi_minor @ 10, size @ 12, accel @ 16, vcpu_count @ 20, features @ 24,
    baseline @ 32, device_count @ 36, memory_map_count @ 40, cmdline_len @ 44, memory_map @ 48,
    cmdline @ 48 + 24 * MAX_MEMORY_REGIONS);

const _: () = assert!(
    crate::layout::BOOT_BLOCK_BASE + size_of::<BootBlock>() as u64
        <= crate::layout::DEVICE_TABLE_BASE
);
