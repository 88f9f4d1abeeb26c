//! Every bound, with its reason.

/// Bytes in a sector; virtio-blk and FAT agree on it here.
pub const SECTOR: usize = 512;
/// Bytes in one request: large enough that its fixed cost vanishes beside the copy.
pub const CHUNK: usize = 128 << 10;
/// Reads in flight while a file is read from front to back.
pub const READ_AHEAD: usize = 8;
/// Chunks in memory: those in flight, and the others for directories and allocation tables. All of
/// them together are an eighth of the least memory that a guest gets.
pub const CACHED_CHUNKS: usize = 64;
/// Bytes that are hashed at a time, and of manifest that are written at a time.
pub const HASH_BUFFER: usize = 64 << 10;
/// Folders within folders: FAT's 260 characters of path allow 130.
pub const MAX_DEPTH: usize = 130;
/// Bytes of a long name in UTF-8: 255 UTF-16 units of three bytes each, in whole directory entries.
pub const LONG_NAME: usize = 20 * 13 * 3;
/// Sectors before the partition, the customary 1 MiB.
pub const PARTITION_START: u64 = 2048;
/// Files open at once: the manifest and one that is hashed, or those that are being served.
pub const OPEN_FILES: usize = 64;
/// Files and folders that an index holds, all of them in memory.
pub const MAX_INDEXED: usize = 100_000;
