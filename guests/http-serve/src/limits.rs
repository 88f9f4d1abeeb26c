//! Every bound, with its reason.

/// Bytes of a request's head: what browsers and tools send fits several times over.
pub const MAX_HEAD: usize = 8 << 10;
/// Bytes of a file that is kept in memory once it was read.
pub const CACHED_FILE: usize = 256 << 10;
/// Bytes of all of them; a quarter of the least memory that the guest gets.
pub const CACHED_BYTES: usize = 16 << 20;
/// Bytes of the list of files; what is beyond is left out, and said to be.
pub const MAX_LIST: usize = 1 << 20;
/// Bytes read from a file at a time.
pub const READ: usize = 32 << 10;
