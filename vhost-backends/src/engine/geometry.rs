//! The size and shape of a disk, asked of the host.
#![allow(unsafe_code)]
// UNSAFETY: statx and the ioctls of block devices; no safe wrapper is among the dependencies.

use super::buffer::{AlignedBuffer, SAFE_ALIGN};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};

/// The least block that a disk has.
const SECTOR: u32 = 512;
/// The largest block size that is believed.
const MOST_BLOCK: u32 = 1 << 16;
/// `BLKSECDISCARD`, which libc does not name.
const BLKSECDISCARD: libc::c_ulong = 0x127d;
/// `BLKPBSZGET`, `BLKIOMIN`, `BLKIOOPT` and `BLKALIGNOFF`, as above.
const BLKPBSZGET: libc::c_ulong = 0x127b;
const BLKIOMIN: libc::c_ulong = 0x1278;
const BLKIOOPT: libc::c_ulong = 0x1279;
const BLKALIGNOFF: libc::c_ulong = 0x127a;

/// The size and shape of a disk, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes of the disk.
    pub len: u64,
    /// The least that can be written without reading first.
    pub logical_block: u32,
    /// What the medium writes at a time.
    pub physical_block: u32,
    /// Offset of the first physical block.
    pub alignment_offset: u32,
    /// Least I/O that is not slow; zero if not known.
    pub minimum_io: u32,
    /// Best I/O; zero if not known.
    pub optimal_io: u32,
    /// Whether space can be given back.
    pub discard: bool,
    /// Whether ranges can be erased for good.
    pub secure_erase: bool,
    /// How worn the medium is.
    pub lifetime: Lifetime,
}

/// How worn a medium is (virtio 1.3 §5.2.6: `GET_LIFETIME`); zeroes where that is not known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lifetime {
    /// Use of reserved blocks.
    pub pre_eol: u16,
    /// Wear of SLC cells, in steps of 10%.
    pub type_a: u16,
    /// Wear of MLC cells, in steps of 10%.
    pub type_b: u16,
}

impl Geometry {
    /// A disk of so many bytes with nothing special about it.
    pub fn plain(len: u64) -> Geometry {
        Geometry {
            len,
            logical_block: SECTOR,
            physical_block: SECTOR,
            alignment_offset: 0,
            minimum_io: 0,
            optimal_io: 0,
            discard: true,
            secure_erase: false,
            lifetime: Lifetime::default(),
        }
    }
}

/// What O_DIRECT needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DirectAlign {
    /// Of offsets and lengths.
    pub(super) offset: u64,
    /// Of addresses.
    pub(super) memory: u64,
}

impl DirectAlign {
    /// Through the page cache, nothing need be aligned.
    pub(super) const NONE: DirectAlign = DirectAlign {
        offset: 1,
        memory: 1,
    };
}

/// Asks `statx`, and tries where that gives no answer.
pub(super) fn direct_align(file: &File, len: u64) -> DirectAlign {
    let Some(asked) = statx_align(file) else {
        let works = len >= 2 * u64::from(SECTOR) && {
            let mut probe = AlignedBuffer::new(2 * SECTOR as usize);
            // An address and an offset that are multiples of a sector and of nothing greater.
            probe
                .get_mut()
                .get_mut(SECTOR as usize..)
                .is_some_and(|at| file.read_at(at, u64::from(SECTOR)).is_ok())
        };
        let both = if works { SECTOR as usize } else { SAFE_ALIGN } as u64;
        return DirectAlign {
            offset: both,
            memory: both,
        };
    };
    asked
}

fn statx_align(file: &File) -> Option<DirectAlign> {
    // SAFETY: all-zero is a valid statx.
    let mut answer: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path is empty and terminated, and `answer` is valid for writes.
    let code = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            &mut answer,
        )
    };
    let (offset, memory) = (answer.stx_dio_offset_align, answer.stx_dio_mem_align);
    let sound = |v: u32| v.is_power_of_two() && v <= MOST_BLOCK;
    let answered = code == 0 && answer.stx_mask & libc::STATX_DIOALIGN != 0;
    (answered && sound(offset) && sound(memory)).then_some(DirectAlign {
        offset: u64::from(offset),
        memory: u64::from(memory),
    })
}

/// The geometry of an open file or block device.
pub(super) fn of_file(file: &File, align: DirectAlign) -> io::Result<Geometry> {
    let metadata = file.metadata()?;
    let len = file_len(file)?;
    let mut geometry = Geometry::plain(len);
    let logical = if metadata.file_type().is_block_device() {
        let get = |request| get_int(file, request);
        geometry.physical_block = block(get(BLKPBSZGET)).unwrap_or(SECTOR);
        // Negative: the kernel does not know.
        geometry.alignment_offset = get(BLKALIGNOFF).map_or(0, |n| u32::try_from(n).unwrap_or(0));
        geometry.minimum_io = get(BLKIOMIN).map_or(0, |n| u32::try_from(n).unwrap_or(0));
        geometry.optimal_io = get(BLKIOOPT).map_or(0, |n| u32::try_from(n).unwrap_or(0));
        geometry.secure_erase = can_secure_erase(file);
        geometry.lifetime = lifetime(metadata.rdev()).unwrap_or_default();
        block(get(libc::BLKSSZGET as libc::c_ulong)).unwrap_or(SECTOR)
    } else {
        // What the file system allocates and writes.
        let block = u32::try_from(metadata.blksize()).unwrap_or(SECTOR);
        geometry.physical_block = if block.is_power_of_two() && block <= MOST_BLOCK {
            block
        } else {
            SECTOR
        };
        SECTOR
    };
    let direct = u32::try_from(align.offset).unwrap_or(SECTOR);
    geometry.logical_block = logical.max(direct).max(SECTOR);
    geometry.physical_block = geometry.physical_block.max(geometry.logical_block);
    Ok(geometry)
}

/// Bytes of a file or block device.
pub(super) fn file_len(mut file: &File) -> io::Result<u64> {
    use std::io::{Seek, SeekFrom};
    file.seek(SeekFrom::End(0))
}

fn block(value: Option<libc::c_int>) -> Option<u32> {
    let value = u32::try_from(value?).ok()?;
    (value.is_power_of_two() && value <= MOST_BLOCK).then_some(value)
}

fn get_int(file: &File, request: libc::c_ulong) -> Option<libc::c_int> {
    let mut value: libc::c_int = 0;
    // SAFETY: each of the requests used here writes one int.
    let code = unsafe { libc::ioctl(file.as_raw_fd(), request, &mut value) };
    (code == 0).then_some(value)
}

/// Asks for a range that is refused as misaligned where erasing is supported, so that nothing is
/// ever erased by asking.
fn can_secure_erase(file: &File) -> bool {
    matches!(secure_erase(file, 1, 1), Err(error) if error.raw_os_error() == Some(libc::EINVAL))
}

pub(super) fn secure_erase(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let range = [offset, len];
    // SAFETY: the request reads two u64.
    match unsafe { libc::ioctl(file.as_raw_fd(), BLKSECDISCARD, range.as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// What an eMMC or UFS device says of its wear.
fn lifetime(device: u64) -> Option<Lifetime> {
    let (major, minor) = (libc::major(device), libc::minor(device));
    let dir = format!("/sys/dev/block/{major}:{minor}/device");
    let life = std::fs::read_to_string(format!("{dir}/life_time")).ok()?;
    let number = |text: &str| u16::from_str_radix(text.trim().trim_start_matches("0x"), 16).ok();
    let mut cells = life.split_whitespace().map(number);
    let pre_eol = std::fs::read_to_string(format!("{dir}/pre_eol_info")).unwrap_or_default();
    Some(Lifetime {
        type_a: cells.next()??,
        type_b: cells.next()??,
        pre_eol: number(&pre_eol).unwrap_or(0),
    })
}
