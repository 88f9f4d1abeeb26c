//! Every bound, with its reason.

/// Bytes of the largest image: a disk that people have free.
pub const MAX_IMAGE: u64 = 64 << 30;
/// Bytes of the largest file: FAT's lengths have 32 bits.
pub const MAX_FILE: u64 = u32::MAX as u64;
/// Files and folders in one image: the plan and the open entries are held in memory.
pub const MAX_ENTRIES: usize = 200_000;
/// Directory entries in one folder (FAT specification §6.2: 2 MiB of 32 bytes); a name takes one and
/// one more for each 13 characters.
pub const MAX_FOLDER_ENTRIES: usize = 65_536;
/// UTF-16 units of a name: 19 long-name entries. FAT allows 20, but the FAT crate in the guest
/// loses a name that needs the twentieth.
pub const MAX_NAME: usize = 19 * 13;
/// Bytes of a name in UTF-8, which is what the FAT crate on the host accepts.
pub const MAX_NAME_BYTES: usize = 255;
/// Least clusters of the volume: FAT32 has at least 65,525, and readers tell it by that number.
pub const MIN_CLUSTERS: u64 = 66_000;
/// Cluster sizes to choose from, in bytes; the largest that still gives enough clusters is taken.
pub const CLUSTER_SIZES: [u32; 7] = [32768, 16384, 8192, 4096, 2048, 1024, 512];
/// Problems that one message names.
pub const PROBLEMS_SHOWN: usize = 8;
/// Bytes copied at a time while packing.
pub const COPY_BUFFER: usize = 256 << 10;
/// Least guest memory: the runtime, its heap and the cache fit several times over.
pub const MIN_MEMORY: u64 = 64 << 20;
