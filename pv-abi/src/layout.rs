//! The guest-physical map: where everything lies, on every accel.
//!
//! The flat profile maps guest-virtual to guest-physical one to one, so these are the guest's
//! pointers as well. Nothing lies below 2 MiB; 3-4 GiB is left free for MMIO.
//!
//! | from | what | the guest may |
//! |---|---|---|
//! | `0x20_0000` | monitor: GDT, IDT, TSS, exception stubs | nothing |
//! | `0x40_0000` | page tables | nothing |
//! | `0x80_0000` | gate | execute |
//! | `0x90_0000` | boot block, device table, clock page | read |
//! | `0xa0_0000` | vCPU pages | read, write |
//! | `0x100_0000` | private RAM, up to 3 GiB, continued at 4 GiB | as the image's segments say |
//! | `0x10_0000_0000` | arenas, one every 4 GiB | read, write |

/// Bytes in a page, the unit of protection.
pub const PAGE_SIZE: u64 = 4096;
/// Bytes in a large page.
pub const LARGE_PAGE_SIZE: u64 = 2 << 20;

/// First byte of the region that the VMM keeps for itself and for the control structures.
pub const VMM_BASE: u64 = MONITOR_BASE;
/// Bytes from [`VMM_BASE`] to the first byte of private RAM.
pub const VMM_LEN: u64 = RAM_BASE - VMM_BASE;

/// The monitor: GDT, IDT, TSSs, exception stubs and their stacks (kvm only).
pub const MONITOR_BASE: u64 = 0x20_0000;
/// Bytes in the monitor.
pub const MONITOR_LEN: u64 = 0x20_0000;
/// The page tables (kvm only).
pub const PAGE_TABLES_BASE: u64 = 0x40_0000;
/// Bytes of page tables: 1,024 tables.
pub const PAGE_TABLES_LEN: u64 = 0x40_0000;
/// The gate: [`crate::gate`].
pub const GATE_BASE: u64 = 0x80_0000;
/// Bytes in the gate region.
pub const GATE_LEN: u64 = 0x1_0000;
/// The boot block: [`crate::boot::BootBlock`].
pub const BOOT_BLOCK_BASE: u64 = 0x90_0000;
/// The device table: [`crate::device::DeviceEntry`].
pub const DEVICE_TABLE_BASE: u64 = 0x91_0000;
/// The clock page: [`crate::clock::ClockPage`].
pub const CLOCK_PAGE_BASE: u64 = 0x92_0000;
/// First byte of what the guest may read and not write.
pub const CONTROL_RO_BASE: u64 = BOOT_BLOCK_BASE;
/// Bytes of what the guest may read and not write.
pub const CONTROL_RO_LEN: u64 = 0x3_0000;
/// The vCPU pages: [`crate::vcpu::VcpuPage`], one 4 KiB page each.
pub const VCPU_PAGES_BASE: u64 = 0xa0_0000;
/// Bytes reserved for vCPU pages.
pub const VCPU_PAGES_LEN: u64 = crate::limits::MAX_VCPUS as u64 * PAGE_SIZE;

/// First byte of private RAM; images are linked at or above it.
pub const RAM_BASE: u64 = 0x100_0000;
/// First byte past the low part of private RAM.
pub const RAM_LOW_END: u64 = 0xc000_0000;
/// Where private RAM goes on when it does not fit below [`RAM_LOW_END`].
pub const RAM_HIGH_BASE: u64 = 0x1_0000_0000;
/// First byte past the high part of private RAM.
pub const RAM_HIGH_END: u64 = ARENA_BASE;

/// The first arena.
pub const ARENA_BASE: u64 = 0x10_0000_0000;
/// Distance from one arena to the next; also the most that one arena may hold.
pub const ARENA_STRIDE: u64 = 0x1_0000_0000;
/// First byte past the last arena.
pub const GUEST_PHYS_END: u64 = ARENA_BASE + crate::limits::MAX_ARENAS as u64 * ARENA_STRIDE;

/// The guest-physical address of a vCPU's page.
///
/// `index` is below [`MAX_VCPUS`](crate::limits::MAX_VCPUS); the result is meaningless otherwise.
pub const fn vcpu_page(index: u32) -> u64 {
    VCPU_PAGES_BASE + index as u64 * PAGE_SIZE
}

/// The guest-physical address of an arena's first byte.
pub const fn arena(index: u32) -> u64 {
    ARENA_BASE + index as u64 * ARENA_STRIDE
}

const _: () = {
    assert!(MONITOR_BASE >= 2 << 20);
    assert!(MONITOR_BASE + MONITOR_LEN <= PAGE_TABLES_BASE);
    assert!(PAGE_TABLES_BASE + PAGE_TABLES_LEN <= GATE_BASE);
    assert!(GATE_BASE + GATE_LEN <= CONTROL_RO_BASE);
    assert!(CONTROL_RO_BASE + CONTROL_RO_LEN <= VCPU_PAGES_BASE);
    assert!(VCPU_PAGES_BASE + VCPU_PAGES_LEN <= RAM_BASE);
    assert!(RAM_LOW_END <= 3 << 30);
    // 38 bits: the narrowest physical address width of CPUs that have hardware virtualization.
    assert!(GUEST_PHYS_END <= 1 << 38);
};
