// What the VMM tells the stub, and what the stub tells back: messages on the stub's socket.
// Compiled into both sides; it uses `core` only.
//
// Each message is a `Head`; `SETUP` has a `Setup` behind it, without the maps that there are none of.

/// Regions that the stub maps: the VMM region's three parts, private RAM's pieces, and arenas.
pub const MAX_MAPS: usize = 160;
/// Bytes of stack for each thread of the stub, until it enters the gate.
pub const THREAD_STACK: usize = 4096;
/// The stub's end of the socket; all that it has open when it starts.
pub const SOCKET: usize = 0;
/// The number of the first descriptor that it is sent; the others follow in their order.
pub const FIRST_FD: usize = 1;
/// Descriptors in one message; the kernel takes 253.
pub const FDS_AT_ONCE: usize = 250;
/// Words of the set of doorbells that do not exist: as many bits as a VM has events.
pub const HOLE_WORDS: usize = 4;

/// What a message is, and one word.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Head {
    pub kind: u32,
    pub value: u32,
}

/// To the stub: its supervisor is there. 1: take faults by signal handlers on alternate stacks.
pub const WATCHED: u32 = 1;
/// To the stub: what to become; so many descriptors come with this message and those after it.
pub const SETUP: u32 = 2;
/// To the stub: more descriptors.
pub const MORE: u32 = 3;
/// From the stub: it has confined itself; the layers in force.
pub const CONFINED: u32 = 4;
/// From the stub: it gives up; the step, and the errno in the upper half.
pub const FAILED: u32 = 5;

/// One mapping that the stub makes.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Map {
    pub gpa: u64,
    pub len: u64,
    pub offset: u64,
    /// Descriptor, relative to the first one.
    pub fd: u16,
    /// All of its pages are made present before the guest starts.
    pub populate: u16,
    /// `PROT_*`.
    pub prot: u32,
}

/// What the stub is to become.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Setup {
    pub vcpus: u32,
    pub map_count: u32,
    /// So many descriptors are for mapping only, and closed before the guest starts.
    pub event_fds: u32,
    /// Relative number of the first doorbell's descriptor.
    pub kicks: u32,
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
    /// Where huge pages are asked for: start and length, or nothing.
    pub huge: [[u64; 2]; 2],
    /// Doorbells whose number is to be closed: what was sent for them only fills their place.
    pub holes: [u64; HOLE_WORDS],
    pub maps: [Map; MAX_MAPS],
}

/// Bits of `CONFINED`.
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
pub const STEP_SIGNALS: u32 = 5;
/// Exit code of a stub that gave up.
pub const EXIT_FAILED: i32 = 125;
