//! Every bound of the ABI, with its reason.

/// vCPUs in one VM. One page each in the vCPU region; more than the hosts this is built for have.
pub const MAX_VCPUS: u32 = 64;
/// Arenas in one VM: one per trust domain, and the map ends below 2^38.
pub const MAX_ARENAS: u32 = 32;
/// Entries in the device table: one for each arena, since a device's backend is a trust domain.
pub const MAX_DEVICES: u32 = 32;
/// Queues of one device; also what fits in one `DEVICE_ACTIVATE` structure in the vCPU's scratch.
pub const MAX_QUEUES: u32 = 32;
/// Entries in one virtqueue (virtio 1.3 §2.7 allows 32,768; no device gains beyond this).
pub const MAX_QUEUE_SIZE: u16 = 1024;
/// Descriptors in one chain, indirect ones included: 1 MiB of 4 KiB pages, header and status.
pub const MAX_CHAIN_LEN: usize = 258;
/// Events, and so doorbells, of one VM: four words of pending bits.
pub const MAX_EVENTS: u32 = 256;
/// Event sources that one vCPU waits for, its own control event included.
pub const MAX_POLL: usize = 65;
/// Entries in the boot block's memory map: room for every segment, stack and arena of the largest VM
/// in the two pages that the boot block has.
pub const MAX_MEMORY_REGIONS: usize = 160;
/// Bytes of command line, so that the boot block stays within two pages.
pub const MAX_CMDLINE: usize = 2048;
/// Bytes of a vCPU's scratch area: a log line, a panic message, or one queue set-up.
pub const SCRATCH_LEN: usize = 2048;
/// Frames in one `MULTICALL`; bounds the time that one call may take.
pub const MAX_MULTICALL: u64 = 64;
/// Bytes of device configuration space in a device table entry: four times the largest that a device
/// here has (block: 60 bytes), and as many as vhost-user frontends ask for.
pub const MAX_CONFIG: usize = 256;
/// Calls in the embedder's range: each has a counter of its own in the statistics, and a program with
/// more of them has arguments to tell them apart.
pub const MAX_EMBEDDER_CALLS: u32 = 256;
