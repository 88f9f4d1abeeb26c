//! Every bound of the library, with its reason. The ABI's own are in [`pv_abi::limits`].

use std::time::Duration;

/// Loadable segments in an image. Linkers make four; more means a crafted file.
pub const MAX_SEGMENTS: usize = 16;
/// Program headers that are looked at.
pub const MAX_PROGRAM_HEADERS: usize = 64;
/// Bytes in an image file: far above any unikernel, far below what would hurt the host.
pub const MAX_IMAGE_LEN: usize = 512 << 20;
/// Least private RAM, in bytes: an image, a stack and something left to allocate from.
pub const MIN_MEMORY: u64 = 4 << 20;
/// Most private RAM, in bytes: what lies below the first arena, less the MMIO hole.
pub const MAX_MEMORY: u64 = pv_abi::layout::RAM_LOW_END - pv_abi::layout::RAM_BASE
    + (pv_abi::layout::RAM_HIGH_END - pv_abi::layout::RAM_HIGH_BASE);
/// Stack of a vCPU when the image's note asks for nothing, in bytes.
pub const DEFAULT_STACK: u64 = 256 << 10;
/// Most stack that a note may ask for, in bytes.
pub const MAX_STACK: u64 = 64 << 20;
/// Least arena, in bytes: one large page.
pub const MIN_ARENA: u64 = pv_abi::layout::LARGE_PAGE_SIZE;
/// Bytes of an arena when the embedder names no size: 32 requests of 128 KiB and the rings.
pub const DEFAULT_ARENA: u64 = 8 << 20;
/// Bytes of the arena that the in-process devices share.
pub const HOST_ARENA: u64 = MIN_ARENA;
/// Entries in a queue of an in-process device.
pub const HOST_QUEUE_SIZE: u16 = 128;
/// How long one conversation with a backend (handshake, activation, reset) may take before the
/// backend counts as lost. A reset waits for the I/O in flight.
pub const BACKEND_DEADLINE: Duration = Duration::from_secs(10);
/// How long `build` waits for a backend's first handshake.
pub const BACKEND_CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Pauses before a lost backend is brought back: first and longest. They double from loss to loss.
pub const RECONNECT_PAUSE: (Duration, Duration) =
    (Duration::from_millis(10), Duration::from_millis(1000));
/// Longest pause where the backend had been in use, so that a guest is not kept waiting.
pub const RECONNECT_PAUSE_IN_USE: Duration = Duration::from_millis(100);
/// A connection that lasted so long starts the pauses from the first again.
pub const STEADY_CONNECTION: Duration = Duration::from_secs(2);
/// How long a killed backend may take to die before the library stops waiting for it.
pub const BACKEND_DEATH: Duration = Duration::from_secs(2);
/// How long a backend that did not shake hands has to end before it is killed or left to itself; one
/// that hangs up as it ends, which says why, is seen to end in far less.
pub const HUNG_UP_END: Duration = Duration::from_secs(1);
/// Bytes of a message that a backend sends unasked; the longest that there is has some 40.
pub const MAX_NOTICE: usize = 4096;
/// Least time between two reads of a configuration that a backend says has changed; what it says
/// meanwhile is one more change.
pub const REFRESH_PAUSE: Duration = Duration::from_millis(100);
/// How long such a read may take. Who resets the device waits for it, and `pause` for them: this is
/// far below [`VCPU_KICK_TIMEOUT`].
pub const REFRESH_DEADLINE: Duration = Duration::from_secs(2);
/// Such messages that are taken before the link looks at anything else.
pub const NOTICES_AT_ONCE: usize = 16;
/// Least and most MTU of a network card: what IPv4 needs, and what fits the field.
pub const MIN_MTU: u16 = 68;
/// Most MTU of a network card.
pub const MAX_MTU: u16 = u16::MAX;
/// Console input that waits for the guest, in bytes; more is refused to the embedder.
pub const MAX_CONSOLE_INPUT: usize = 64 << 10;
/// Console output that one chain may carry, in bytes.
pub const MAX_CONSOLE_CHAIN: usize = 64 << 10;
/// How long the end of a VM waits for a console writer that blocks.
pub const CONSOLE_DRAIN: Duration = Duration::from_millis(500);
/// Random bytes that one chain may ask for.
pub const MAX_RNG_CHAIN: usize = 64 << 10;
/// Chains that an in-process device serves before it looks at its other queues.
pub const DEVICE_BATCH: usize = 64;
/// How long `pause` waits for a vCPU to leave the guest before it gives up and lets the VM go on.
///
/// More than the longest that one call of the guest's keeps it: an activation may wait for the
/// configuration to be read, start the queues, and announce a card.
pub const VCPU_KICK_TIMEOUT: Duration = Duration::from_secs(30);
const _: () = assert!(
    REFRESH_DEADLINE.as_secs() + 2 * BACKEND_DEADLINE.as_secs() < VCPU_KICK_TIMEOUT.as_secs()
);
/// Pause between repeated kicks of a vCPU that has not left the guest yet.
pub const VCPU_KICK_PAUSE: Duration = Duration::from_millis(20);
/// How long the first vCPU's thread looks for `run` before it sleeps: a VM is most often run as soon
/// as it is built, and being woken on an idle CPU costs a good part of this.
pub const RUN_LOOK: Duration = Duration::from_micros(100);
/// How often it is looked whether a guest with a boot deadline has negotiated.
pub const BOOT_LOOK: Duration = Duration::from_millis(50);
/// How often the clock page is updated while the VM runs.
pub const CLOCK_UPDATE: Duration = Duration::from_secs(2);
/// How long the sandboxed process may take to report that it is ready.
pub const STUB_READY_TIMEOUT: Duration = Duration::from_secs(20);
/// Spare processes that one [`Spares`](crate::Spares) keeps; each has a process, a thread and two
/// descriptors. A burst of more VMs than this starts its own.
pub const MAX_SPARES: usize = 64;
/// How long after a VM took a spare process the next one is made: by then the VM runs, and does not
/// share its processors with that.
pub const SPARE_DELAY: Duration = Duration::from_millis(2);
/// Pauses before a spare process is made again that was lost or could not be made: first and longest.
/// They double from loss to loss, until a VM takes one.
pub const SPARE_PAUSE: (Duration, Duration) =
    (Duration::from_millis(10), Duration::from_millis(1000));
