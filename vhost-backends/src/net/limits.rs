//! Bounds of the network device, with their reasons.

/// Bytes of the longest frame: what drivers without mergeable buffers make room for behind the
/// header of 12 bytes (virtio 1.3 §5.1.6.3.1).
pub const MAX_FRAME_LEN: usize = 65_562 - 12;
/// Bytes of the shortest frame: an Ethernet header, and nothing in it.
pub const MIN_FRAME_LEN: usize = 14;
/// Bytes of the shortest TCP segment that a large frame is cut into: Linux' least
/// (`TCP_MIN_SND_MSS`). One frame makes 1,365 of them at most.
pub const MIN_TCP_SEGMENT: usize = 48;
/// Segments that a large UDP frame is cut into: Linux' most (`UDP_MAX_SEGMENTS`).
pub const MAX_UDP_SEGMENTS: usize = 128;
/// Frames that are taken, sent and given back together: enough to share the cost of a lock and of
/// a signal, and few enough that the first does not wait for long.
pub const MAX_BATCH: usize = 64;
/// Pairs of queues: with the control queue they stay within [`crate::limits::MAX_QUEUES`].
pub const MAX_QUEUE_PAIRS: u16 = 15;
/// Unicast, and multicast, addresses in a receive filter; more than that and all are let through,
/// as the specification has it for tables that overflow.
pub const MAX_FILTER_ADDRESSES: usize = 64;
/// Bytes of one control command; the longest is a MAC table of both kinds.
pub const MAX_CONTROL_BYTES: u64 = 4096;
/// Changes of offloads and of pairs in use per second: each stops the host's network for a moment.
pub const MAX_CHANGE_RATE: u64 = 20;
/// Such changes at once: more than a driver's start takes.
pub const MAX_CHANGE_BURST: u64 = 8;
/// Microseconds that a call to the driver can be held back at most: a driver that asks for more
/// waits that long, and nothing else does.
pub const MAX_COALESCE_MICROS: u32 = 10_000;
/// Stations that a switch knows: what is not known is flooded.
pub const MAX_STATIONS: usize = 4096;
/// Stations behind one port of a switch, as long as the table has room; where it is full, a port
/// with fewer than its share takes the place of the port with most.
pub const MAX_STATIONS_PER_PORT: usize = 512;
/// What one learned station that takes another's place counts as, of [`MAX_LEARN_RATE`]: the oldest
/// one is looked for in the whole table.
pub const EVICTION_COST: u64 = 8;
/// Seconds after which a switch forgets a station that sent nothing (IEEE 802.1D's default).
pub const STATION_SECS: u64 = 300;
/// Ports of one switch: a flooded frame is copied so many times at most.
pub const MAX_SWITCH_PORTS: usize = 64;
/// Frames per second that one port may have flooded to all the others; a large one counts as what
/// it can be cut into.
pub const MAX_FLOOD_RATE: u64 = 20_000;
/// Bytes per second of them: as many frames of the common size.
pub const MAX_FLOOD_BYTES: u64 = 32 << 20;
/// Times per second that one port may have stations learned: each stops every port for a moment.
pub const MAX_LEARN_RATE: u64 = 100;
/// Bytes that wait for a stream's peer to read: beyond, frames are dropped.
pub const MAX_STREAM_BACKLOG: usize = 256 << 10;
/// Milliseconds between attempts to reach a stream's peer.
pub const STREAM_RETRY_MILLIS: u64 = 200;
/// Buffers that one frame is spread over, so that a driver with tiny ones cannot make one frame
/// cost a whole ring of them: 64 KiB in buffers of 512 bytes.
pub const MAX_MERGED: usize = 130;
/// Bytes of an RSS key: as many as an IPv6 packet with ports needs (virtio 1.3 §5.1.6.5.7.1).
pub const MAX_RSS_KEY: usize = 40;
/// Entries of an RSS indirection table; what drivers use.
pub const MAX_RSS_TABLE: usize = 128;
/// Bytes of a frame that a capture keeps: all, for the longest.
pub const CAPTURE_SNAP: usize = 1 << 17;
/// Bytes of a capture that wait for its reader: beyond, frames are left out.
pub const MAX_CAPTURE_BACKLOG: usize = 1 << 20;
