// What the VMM tells the stub, and what the stub tells back: one structure in a memfd that both
// map. Compiled into both sides; it uses `core` only.

/// Regions that the stub maps: the VMM region's three parts, private RAM's pieces, and arenas.
pub const MAX_MAPS: usize = 160;
/// Bytes of stack for each thread of the stub, until it enters the gate.
pub const THREAD_STACK: usize = 4096;

/// One mapping that the stub makes.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Map {
    pub gpa: u64,
    pub len: u64,
    pub offset: u64,
    /// Descriptor, relative to the first one.
    pub fd: u32,
    /// `PROT_*`.
    pub prot: u32,
}

/// The head of the set-up memfd; thread stacks follow it.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Setup {
    /// Set by the VMM: 0 wait, 1 go.
    pub go: u32,
    /// Set by the stub when it gives up: which step, and the errno.
    pub failed_step: u32,
    pub failed_errno: u32,
    /// Set by the stub: layers in force.
    pub layers: u32,
    pub vcpus: u32,
    pub map_count: u32,
    /// Descriptors up to here are for mapping only, and closed before the guest starts.
    pub event_fds: u32,
    /// 1: take faults by signal handlers on alternate stacks.
    pub self_report: u32,
    pub vcpu_pages: u64,
    pub park: u64,
    pub finish: u64,
    pub filter: u64,
    /// Everything from here to `unmap_end` goes before the guest starts.
    pub unmap_start: u64,
    pub unmap_end: u64,
    pub ready_offset: u64,
    pub fault_handler: u64,
    pub fault_stacks: u64,
    pub fault_stack_len: u64,
    pub maps: [Map; MAX_MAPS],
}

/// Bits of `layers`.
pub const LAYER_NO_NEW_PRIVS: u32 = 1 << 0;
pub const LAYER_USER_NS: u32 = 1 << 1;
pub const LAYER_OTHER_NS: u32 = 1 << 2;
pub const LAYER_LANDLOCK: u32 = 1 << 3;
pub const LAYER_NO_CAPS: u32 = 1 << 4;

/// Steps in which the stub can fail.
pub const STEP_SETUP: u32 = 1;
pub const STEP_MAP: u32 = 2;
pub const STEP_CLONE: u32 = 3;
pub const STEP_GS_BASE: u32 = 4;
pub const STEP_FINISH: u32 = 5;
pub const STEP_SIGNALS: u32 = 6;
/// Exit code of a stub that gave up.
pub const EXIT_FAILED: i32 = 125;

/// Bytes of the set-up memfd for so many vCPUs.
pub const fn setup_len(vcpus: u32) -> usize {
    (core::mem::size_of::<Setup>() + 4095) / 4096 * 4096 + vcpus as usize * THREAD_STACK
}
