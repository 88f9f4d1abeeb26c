//! Every bound of this crate, with its reason. Bounds of the ABI are in [`pv_abi::limits`].

/// Regions in one `SET_MEM_TABLE` (vhost-user: `VHOST_MEMORY_BASELINE_NREGIONS`), and so
/// descriptors that one message may carry.
pub const MAX_TABLE_REGIONS: usize = 8;
/// Memory slots with `CONFIGURE_MEM_SLOTS`; each costs one mapping and one descriptor.
pub const MAX_MEM_SLOTS: usize = 64;
/// Descriptors taken from one message before it is malformed; the kernel closes what does not fit.
pub const MAX_MESSAGE_FDS: usize = 32;
/// Bytes of payload in one message; the largest real one is `SET_MEM_TABLE` with 8 regions.
pub const MAX_PAYLOAD: usize = 0x1000;
/// Seconds that the rest of a message may take once its first byte is there.
pub const MESSAGE_TIMEOUT_SECS: u64 = 10;
/// Bytes of configuration space that a device may have (vhost-user: `VHOST_USER_MAX_CONFIG_SIZE`).
pub const MAX_CONFIG_LEN: usize = 256;
/// Entries in one virtqueue: what Linux and QEMU offer at most; rings of foreign frontends may be
/// larger than the ABI's own [`pv_abi::limits::MAX_QUEUE_SIZE`], but not than this.
pub const MAX_RING_SIZE: u16 = 1024;
/// Queues of one device: as many as a card of the VMM has ([`pv_abi::limits::MAX_QUEUES`]). Each
/// costs a thread and [`QUEUE_DESCRIPTORS`]; a daemon that may not have these does not start.
pub const MAX_QUEUES: u16 = 32;
/// Requests that one queue works on at a time; as many as a ring has entries gain nothing more.
pub const MAX_IN_FLIGHT: usize = 256;
/// Times that a poll of the kick is begun anew after it ended without a request in between; a driver
/// that kicks only where it was asked to never ends one, so this bounds what any other can burn.
pub const MAX_POLLS: u32 = 1 << 16;
/// Bytes of guest data in one block request: the longest chain of 64 KiB segments; bounds the
/// bounce buffer of a misaligned direct request.
pub const MAX_REQUEST_BYTES: u64 = 16 << 20;
/// Ranges in one discard or write-zeroes request; one range per request is what drivers send.
pub const MAX_RANGES: usize = 1;
/// Sectors in one discard or write-zeroes range: bounds the time that one request may take.
pub const MAX_RANGE_SECTORS: u32 = 1 << 22;
/// Completions that are published together: later ones should not hold back earlier ones.
pub const MAX_BATCH: usize = 32;
/// Bytes of requests that were over at once and wait for the rest of their batch: about as long
/// to copy as a driver takes to wake, so that both sides work at the same time.
pub const MAX_UNPUBLISHED_BYTES: u64 = 32 << 10;
/// Lines in the log about what frontends and guests do, in [`PEER_LINES_SECS`], for the whole
/// process: they can cause them at will, and a log has room for less.
pub const MAX_PEER_LINES: u32 = 64;
/// Seconds after which as many lines may be said again.
pub const PEER_LINES_SECS: u64 = 60;
/// Descriptors of one queue that is served: its three events, twice while they are exchanged, and
/// what its thread waits with.
pub const QUEUE_DESCRIPTORS: u64 = 9;
/// Descriptors of one device besides: its socket, a connection and the way back, two logs, and a
/// table of memory.
pub const DEVICE_DESCRIPTORS: u64 = 5 + MAX_TABLE_REGIONS as u64;
/// Milliseconds before a connection is taken again where the process has no room for one.
pub const ACCEPT_RETRY_MILLIS: u64 = 50;
/// Seconds that a frontend may take to confirm what a device tells it: whoever asked for the change
/// waits as long, and a take-over that is asked for meanwhile.
pub const BACKEND_ACK_TIMEOUT_SECS: u64 = 1;
/// Requests or bytes per second that a limit can be set to: far beyond any disk, and small enough
/// that a burst's time is exact in nanoseconds.
pub const MAX_RATE: u64 = 1 << 50;
/// Requests or bytes that a burst can have.
pub const MAX_RATE_BURST: u64 = 1 << 50;
/// Milliseconds after which a queue that is held back looks again: limits may have changed.
pub const MAX_HOLD_MILLIS: u64 = 100;
/// Sockets that a service manager may pass: one for each disk.
pub const MAX_PASSED: i32 = MAX_DISKS as i32;
/// Network ports of one daemon; each costs a thread, its queues' threads and what its frontend
/// sends.
pub const MAX_PORTS: usize = 64;
/// Disks of one daemon; each costs a thread, its queues' threads and what its frontend sends.
pub const MAX_DISKS: usize = 64;
/// Bytes of one request to the statistics or control socket, with its head.
pub const MAX_ADMIN_REQUEST: usize = 4096;
/// Seconds that a client of these sockets has to ask, and to take the answer.
pub const ADMIN_TIMEOUT_SECS: u64 = 2;
/// Clients of one of these sockets at a time; one more ends the one that came first. Each costs a
/// descriptor and the bytes of a request or of an answer.
pub const MAX_ADMIN_CLIENTS: usize = 16;
/// Seconds that a hot upgrade may keep queues stopped before the old daemon goes on.
pub const HANDOVER_SECS: u64 = 10;
/// Seconds of these that a device may take to stop, before all of them go on: more than
/// [`NBD_STOP_SECS`], so that what can be left in the in-flight log is.
pub const HANDOVER_STOP_SECS: u64 = 3;
/// Frames of what one daemon hands to another: for each disk its regions, its queues' seven
/// messages each, and a few more.
pub const MAX_HANDOVER_FRAMES: usize = MAX_DISKS * (MAX_MEM_SLOTS + 7 * MAX_QUEUES as usize + 16);
/// Threads that make a blocking disk's calls, for each queue: enough to overlap its waits.
pub const POOL_THREADS: usize = 4;
/// Bytes of guest data that one queue's threads hold copies of; beyond that the queue waits.
pub const MAX_POOL_BYTES: u64 = 64 << 20;
/// Images in a chain of backing files: ends one that comes back to itself.
pub const MAX_BACKING_DEPTH: u32 = 16;
/// Bytes of one NBD request where the server does not name its own limit.
pub const MAX_NBD_REQUEST: u32 = 32 << 20;
/// Bytes of one option reply of an NBD server; the longest that is of use is an error text.
pub const MAX_NBD_OPTION: u32 = 4096;
/// Seconds that a peer whose queue of connections is full is waited for: one that works takes them at
/// once.
pub const CONNECT_SECS: u64 = 3;
/// Milliseconds between two attempts meanwhile.
pub const CONNECT_RETRY_MILLIS: u64 = 20;
/// Seconds that an NBD server may take for the handshake, on all connections together.
pub const NBD_HANDSHAKE_SECS: u64 = 10;
/// Seconds that requests wait for an NBD server to come back, unless the command line says how many.
pub const NBD_RETRY_SECS: u64 = 60;
/// Milliseconds between two attempts to reach it.
pub const NBD_REDIAL_MILLIS: u64 = 200;
/// Seconds that a server may be silent before what it was asked is left in the in-flight log, where the
/// connection or the process ends.
pub const NBD_STOP_SECS: u64 = 2;
/// Seconds that an NBD server may be silent while it owes a reply, before it is given up.
pub const NBD_SILENCE_SECS: u64 = 30;
/// Milliseconds to wait for an image that another process has locked: one that was just killed
/// may not be gone.
pub const LOCK_WAIT_MILLIS: u64 = 3000;
/// Milliseconds to wait for a folder that another process has locked: one of this crate needs a few.
pub const FOLDER_LOCK_MILLIS: u64 = 3000;
/// Milliseconds between two looks at such a lock.
pub const LOCK_RETRY_MILLIS: u64 = 20;
