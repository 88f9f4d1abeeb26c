//! A raw file or block device as a disk.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;
use vmm_sys_util::fallocate::{FallocateMode, fallocate};

/// Bytes written at a time where a range cannot be zeroed in place.
const ZERO_CHUNK: usize = 64 << 10;
/// Alignment that O_DIRECT takes on every file system and disk of a PC.
const DIRECT_ALIGN_SAFE: u64 = 4096;
/// The least that O_DIRECT can need.
const DIRECT_ALIGN_LEAST: u64 = 512;

/// How to open a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FileOptions {
    /// Never write.
    pub read_only: bool,
    /// Past the page cache.
    pub direct: bool,
}

/// A raw file or block device, opened.
#[derive(Debug)]
pub struct RawFile {
    main: File,
    /// Through the page cache; for requests that O_DIRECT cannot do.
    cached: File,
    options: FileOptions,
    len: u64,
    align: u64,
}

impl RawFile {
    /// Opens an existing file or block device.
    pub fn open(path: &Path, options: FileOptions) -> io::Result<RawFile> {
        let open = |flags| {
            OpenOptions::new()
                .read(true)
                .write(!options.read_only)
                .custom_flags(flags)
                .open(path)
        };
        let mut cached = open(0)?;
        let kind = cached.metadata()?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "neither a regular file nor a block device",
            ));
        }
        let len = cached.seek(SeekFrom::End(0))?;
        let main = if options.direct {
            open(libc::O_DIRECT)?
        } else {
            cached.try_clone()?
        };
        let align = if options.direct {
            direct_align(&main, len)
        } else {
            1
        };
        Ok(RawFile {
            main,
            cached,
            options,
            len,
            align,
        })
    }

    /// Bytes when it was opened.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How it was opened.
    pub fn options(&self) -> FileOptions {
        self.options
    }

    /// What offsets, lengths and addresses must be multiples of for O_DIRECT.
    pub fn align(&self) -> u64 {
        self.align
    }

    pub(super) fn main(&self) -> &File {
        &self.main
    }

    pub(super) fn cached(&self) -> &File {
        &self.cached
    }

    pub(super) fn flush(&self) -> io::Result<()> {
        self.main.sync_data()
    }

    /// A hint: where the file system cannot do it, nothing happens.
    pub(super) fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        match self.fallocate(FallocateMode::PunchHole, offset, len) {
            Err(error) if is_unsupported(&error) => Ok(()),
            result => result,
        }
    }

    pub(super) fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let first = if unmap {
            FallocateMode::PunchHole
        } else {
            FallocateMode::ZeroRange
        };
        match self.fallocate(first, offset, len) {
            Err(error) if is_unsupported(&error) => {}
            result => return result,
        }
        let zeroes = [0; ZERO_CHUNK];
        let mut done = 0;
        while done < len {
            // At most ZERO_CHUNK.
            let now = (len - done).min(ZERO_CHUNK as u64) as usize;
            self.cached
                .write_all_at(zeroes.get(..now).unwrap_or(&zeroes), offset + done)?;
            done += now as u64;
        }
        Ok(())
    }

    fn fallocate(&self, mode: FallocateMode, offset: u64, len: u64) -> io::Result<()> {
        // The file keeps its size.
        fallocate(&self.cached, mode, true, offset, len)
            .map_err(|error| io::Error::from_raw_os_error(error.errno()))
    }
}

/// Finds the alignment by trying: what a file system and its disk need together is not in one
/// place on older kernels.
fn direct_align(file: &File, len: u64) -> u64 {
    if len < 2 * DIRECT_ALIGN_SAFE {
        return DIRECT_ALIGN_SAFE;
    }
    let mut buffer = vec![0u8; 3 * DIRECT_ALIGN_SAFE as usize];
    let base = buffer.as_ptr() as usize as u64;
    let least = DIRECT_ALIGN_LEAST;
    // An address and an offset that are multiples of the least alignment and of nothing greater.
    let start = (base.next_multiple_of(DIRECT_ALIGN_SAFE) - base + least) as usize;
    let works = buffer
        .get_mut(start..start + least as usize)
        .is_some_and(|probe| file.read_at(probe, least).is_ok());
    if works { least } else { DIRECT_ALIGN_SAFE }
}

fn is_unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV | libc::EINVAL)
    )
}
