//! Every bound of the drivers, with its reason.

use core::time::Duration;

/// Segments in one chain that a driver here makes: head, data, status, and one to spare.
pub const MAX_SEGMENTS: usize = 4;
/// Bytes of data in one block request: large enough to amortise everything, small enough that one
/// request never holds a backend up; also below every `u32` length in the ring.
pub const MAX_BLOCK_BYTES: usize = 1 << 20;
/// Entries that a block queue gets unless asked otherwise: depth 32 with direct chains of three fits
/// in half of it.
pub const DEFAULT_QUEUE_SIZE: u16 = 256;
/// Bytes of each bounce buffer of the blocking, copying calls.
pub const BOUNCE_BYTES: usize = 64 << 10;
/// Bounce buffers in flight at once; beyond a few the copying is what limits.
pub const BOUNCE_DEPTH: usize = 4;
/// Bytes of each receive and transmit buffer of the console.
pub const CONSOLE_BUFFER: usize = 1024;
/// Buffers that the console keeps posted for input, and at most in flight for output.
pub const CONSOLE_BUFFERS: u16 = 8;
/// Bytes of one entropy request.
pub const RNG_BUFFER: usize = 64;
/// How long a device may take to appear when it is opened.
pub const BRING_UP_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a lost device may stay away before its requests fail; a supervisor restarts a backend in
/// well under a second, an operator within a minute.
pub const LOSS_TIMEOUT: Duration = Duration::from_secs(60);
/// How often a wait looks at the device table on a vCPU that does not get the configuration event.
pub const LOSS_POLL: Duration = Duration::from_millis(50);
/// How often a wait looks again on a vCPU that the queue was not made for: its event goes to the
/// other one, so such a wait is slow, but it ends.
pub const STRAY_POLL: Duration = Duration::from_millis(1);
/// How often a wait looks again while the device is being brought back.
pub const RECOVERY_POLL: Duration = Duration::from_millis(5);
/// Transitions of the device that one look follows before it lets its caller go on.
pub const MAX_RECOVERY_STEPS: usize = 8;

/// How long a wait looks for completions before the vCPU idles where a trip to the host costs nothing,
/// in nanoseconds: about what a sleep and a wake of a host thread cost.
pub const LOOK_NS: u64 = 20_000;
/// Trips to the host that a look can save, each of which makes it worth so much longer: the idle, and
/// the doorbell of the next request, as a device that hears nothing for long sleeps too.
pub const LOOK_TRIPS: u64 = 2;
/// Longest look, whatever a trip seems to cost: a vCPU that was preempted measures nonsense.
pub const LONGEST_LOOK_NS: u64 = 100_000;
/// A queue for which looking did not help tries it again every so many waits.
pub const LOOK_AGAIN: u32 = 64;
/// Looks between two glances at the clock: a look costs some ten nanoseconds, a glance more.
pub const LOOKS_PER_ROUND: u32 = 64;
/// Glances in one wait; with the looks between them more than [`LONGEST_LOOK_NS`] takes.
pub const LOOK_ROUNDS: u32 = 256;

/// Bytes of the largest frame: a segment of 64 KiB with its headers (virtio 1.3 §5.1.6.3.1), which
/// is what every receive path must take.
pub const MAX_FRAME: usize = 65_550;
/// Bytes of the smallest frame that is delivered: an Ethernet header.
pub const MIN_FRAME: usize = 14;
/// Bytes of a receive buffer unless asked otherwise: a full frame with its header fits in one, and
/// two fit in a page.
pub const RECEIVE_BUFFER: usize = 2048;
/// Least bytes of a receive buffer: below, most frames take several.
pub const MIN_RECEIVE_BUFFER: usize = 256;
/// Entries of a transmit and of a receive queue unless asked otherwise.
pub const NET_QUEUE_SIZE: u16 = 256;
/// Entries of the control queue: everything that is set fits in it at once, for a device that
/// comes back.
pub const CONTROL_QUEUE_SIZE: u16 = 256;
/// How long the control queue's device may take to answer while it is there; beside that, it may stay
/// away. The host side of a command is a few system calls.
pub const CONTROL_TIMEOUT: Duration = Duration::from_secs(10);
/// VLANs that a card is told to take; each is a command of its own when a device comes back.
pub const MAX_VLANS: usize = 48;
/// Addresses in each of the two tables of the MAC filter: what the usual device takes.
pub const MAX_FILTER: usize = 64;
/// Frames that one poll drops before it lets its caller go on.
pub const MAX_DROPS: usize = 64;
