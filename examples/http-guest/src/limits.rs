//! Every bound, with its reason.

use std::time::Duration;

/// Connections that are forwarded at once: fewer than the guest has sockets, so that it has one left
/// while others still say good-bye.
pub const MAX_CONNECTIONS: usize = 48;
/// Bytes of a connection that wait on their way, in each direction.
pub const CONNECTION_BUFFER: usize = 64 << 10;
/// Bytes of frames that wait for the backend to read them.
pub const MAX_BACKLOG: usize = 1 << 20;
/// Frames that were read and are not used yet.
pub const MAX_FRAMES: usize = 1024;
/// Bytes of a frame on the stream socket: what pv-netd and the guest's driver take at most.
pub const MAX_FRAME: usize = 65_550;
/// How long a connection may go without an answer of the guest.
pub const SILENCE: Duration = Duration::from_secs(60);
/// How long the guest may take until it serves.
pub const READY_DEADLINE: Duration = Duration::from_secs(30);
/// How long Ctrl-C may go unheard: less than anybody notices, and no load.
pub const INTERRUPT_CHECK: Duration = Duration::from_millis(50);
/// Connections that fetch at once, and requests on each before it is made anew.
pub const FETCHERS: usize = 8;
/// See [`FETCHERS`].
pub const REQUESTS_PER_CONNECTION: u64 = 100;
/// How long one fetch may take.
pub const FETCH_TIMEOUT: Duration = Duration::from_secs(30);
/// Bytes of the head of a response.
pub const MAX_HEAD: usize = 8 << 10;
/// Most seconds of a measurement.
pub const MAX_SECONDS: u64 = 3600;
