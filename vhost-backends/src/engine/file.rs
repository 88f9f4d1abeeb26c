//! A raw file or block device as a disk.

use super::buffer::AlignedBuffer;
use super::geometry::{self, DirectAlign, Geometry, direct_align, file_len};
use super::transfer::chain_error;
use super::{Engine, Store, SyncEngine, UringEngine, WakeSources};
use crate::ring::OwnedChain;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::fallocate::{FallocateMode, fallocate};

/// Bytes written at a time where a range cannot be zeroed in place.
pub(super) const ZERO_CHUNK: usize = 64 << 10;

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
    file: File,
    options: FileOptions,
    geometry: Geometry,
    align: DirectAlign,
    /// Held while a part of a block is exchanged: two parts of one block must not meet.
    partial: Mutex<()>,
    /// What stays open as long as anything is in flight.
    held: Mutex<Vec<OwnedFd>>,
}

impl RawFile {
    /// Opens an existing file or block device.
    pub fn open(path: &Path, options: FileOptions) -> io::Result<RawFile> {
        check_kind(path)?;
        let file = OpenOptions::new()
            .read(true)
            .write(!options.read_only)
            .custom_flags(if options.direct { libc::O_DIRECT } else { 0 })
            .open(path)?;
        let align = if options.direct {
            direct_align(&file, file_len(&file)?)
        } else {
            DirectAlign::NONE
        };
        Ok(RawFile {
            geometry: geometry::of_file(&file, align)?,
            file,
            options,
            align,
            partial: Mutex::new(()),
            held: Mutex::default(),
        })
    }

    /// Keeps a descriptor open until the host is done with all that engines opened from now on begin,
    /// also where this process is killed. The host finishes what it was given for such a process in
    /// its own time: a lock that goes with this description is free only when no write, and no read
    /// to memory that others use by then, can come after it.
    pub fn hold(&self, fd: OwnedFd) {
        self.held().push(fd);
    }

    pub(crate) fn held(&self) -> MutexGuard<'_, Vec<OwnedFd>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes now.
    pub fn len(&self) -> u64 {
        file_len(&self.file).unwrap_or(self.geometry.len)
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How it was opened.
    pub fn options(&self) -> FileOptions {
        self.options
    }

    pub(super) fn align(&self) -> DirectAlign {
        self.align
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
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
        let zeroes = AlignedBuffer::new(ZERO_CHUNK);
        let mut done = 0;
        while done < len {
            // At most ZERO_CHUNK.
            let now = (len - done).min(ZERO_CHUNK as u64) as usize;
            let part = zeroes.get().get(..now).unwrap_or_default();
            self.write_any(part, offset + done)?;
            done += now as u64;
        }
        Ok(())
    }

    pub(super) fn secure_erase(&self, offset: u64, len: u64) -> io::Result<()> {
        geometry::secure_erase(&self.file, offset, len)
    }

    fn fallocate(&self, mode: FallocateMode, offset: u64, len: u64) -> io::Result<()> {
        // The file keeps its size.
        fallocate(&self.file, mode, true, offset, len)
            .map_err(|error| io::Error::from_raw_os_error(error.errno()))
    }

    /// The blocks that a range touches: the first byte of the first, and their bytes.
    pub(super) fn around(&self, offset: u64, len: u64) -> (u64, u64) {
        let align = self.align.offset;
        let start = offset - offset % align;
        // The range lies within the disk, so this does not wrap.
        (start, (offset + len).next_multiple_of(align) - start)
    }

    /// Writes guest bytes that do not begin and end with a block.
    pub(super) fn write_partial(
        &self,
        memory: &GuestMemoryMmap,
        chain: &OwnedChain,
        from: u64,
        offset: u64,
        len: u64,
    ) -> io::Result<()> {
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut bytes = vec![0; len];
        chain
            .read_at(memory, from, &mut bytes)
            .map_err(chain_error)?;
        self.write_any(&bytes, offset)
    }

    /// Writes, whatever the alignment: blocks that are written in part are read first.
    fn write_any(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        if self.align == DirectAlign::NONE {
            return self.file.write_all_at(bytes, offset);
        }
        let (start, size) = self.around(offset, bytes.len() as u64);
        let mut buffer =
            AlignedBuffer::new(usize::try_from(size).map_err(|_| io::ErrorKind::InvalidInput)?);
        let _guard = self.partial.lock().unwrap_or_else(PoisonError::into_inner);
        let len = file_len(&self.file)?;
        let blocks = buffer.get_mut();
        let skip = usize::try_from(offset - start).map_err(|_| io::ErrorKind::InvalidInput)?;
        if size != bytes.len() as u64 {
            read_what_there_is(&self.file, blocks, start)?;
        }
        blocks
            .get_mut(skip..skip + bytes.len())
            .ok_or(io::ErrorKind::InvalidInput)?
            .copy_from_slice(bytes);
        self.file.write_all_at(blocks, start)?;
        if start + size > len && offset + bytes.len() as u64 <= len {
            // The last block reached past the end of the file, which stays where it was.
            self.file.set_len(len)?;
        }
        Ok(())
    }
}

/// A pipe or a terminal would be waited for; a device may act on being opened.
pub(super) fn check_kind(path: &Path) -> io::Result<()> {
    let kind = std::fs::metadata(path)?.file_type();
    if kind.is_file() || kind.is_block_device() {
        Ok(())
    } else {
        Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "neither a regular file nor a block device",
        ))
    }
}

/// Reads up to the end of the file; the rest stays zero.
fn read_what_there_is(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    let mut done = 0;
    while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, offset + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // What follows a short read need not be aligned, and is past the end.
            Err(error) if done > 0 && error.raw_os_error() == Some(libc::EINVAL) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

impl Store for RawFile {
    fn geometry(&self) -> Geometry {
        Geometry {
            len: self.len(),
            ..self.geometry
        }
    }

    fn read_only(&self) -> bool {
        self.options.read_only
    }

    fn open_engine(
        self: Arc<Self>,
        memory: Arc<GuestMemoryMmap>,
        wake: WakeSources<'_>,
    ) -> io::Result<Box<dyn Engine>> {
        match UringEngine::new(Arc::clone(&self), Arc::clone(&memory), wake) {
            Ok(engine) => Ok(Box::new(engine)),
            // Refused by a sysctl, a seccomp filter, or a memory limit.
            Err(_) => Ok(Box::new(SyncEngine::new(self, memory, wake)?)),
        }
    }
}

pub(super) fn is_unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV | libc::EINVAL)
    )
}
