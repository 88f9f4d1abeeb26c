//! A disk in this process's memory: as fast as copying, gone with the process.
#![allow(unsafe_code)]
// UNSAFETY: pages are given back with madvise, which no safe wrapper among the dependencies does.

use super::buffer::SAFE_ALIGN;
use super::inline::Inline;
use super::sleep::Sleeper;
use super::transfer::chain_error;
use super::{Engine, Geometry, Operation, Store, WakeSources};
use std::io;
use std::sync::Arc;
use vm_memory::mmap::MmapRegion;
use vm_memory::{GuestMemoryMmap, VolatileMemory, VolatileSlice};

/// Bytes in memory, zero at first.
#[derive(Debug)]
pub struct MemoryStore {
    bytes: MmapRegion,
}

impl MemoryStore {
    /// A disk of so many bytes; memory is taken as they are written.
    pub fn new(len: u64) -> io::Result<MemoryStore> {
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let bytes = MmapRegion::new(len).map_err(io::Error::other)?;
        Ok(MemoryStore { bytes })
    }

    fn slice(&self, offset: u64, len: u64) -> io::Result<VolatileSlice<'_, ()>> {
        let past_end = |_| io::Error::from(io::ErrorKind::UnexpectedEof);
        let offset = usize::try_from(offset).map_err(|_| io::ErrorKind::UnexpectedEof)?;
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::UnexpectedEof)?;
        self.bytes.get_slice(offset, len).map_err(past_end)
    }

    /// Copies between the disk and buffers that come one after the other.
    fn copy(
        &self,
        offset: u64,
        mut visit: impl FnMut(&mut dyn FnMut(VolatileSlice<'_, ()>)) -> io::Result<()>,
        to_guest: bool,
    ) -> io::Result<()> {
        let mut at = offset;
        let mut failed = None;
        visit(&mut |guest| match self.slice(at, guest.len() as u64) {
            Ok(disk) if to_guest => {
                disk.copy_to_volatile_slice(guest);
                at += guest.len() as u64;
            }
            Ok(disk) => {
                guest.copy_to_volatile_slice(disk);
                at += guest.len() as u64;
            }
            Err(error) => failed = Some(error),
        })?;
        failed.map_or(Ok(()), Err)
    }

    /// Whole pages are given back; the rest is written.
    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        let whole = self.slice(offset, len)?;
        let end = offset + len;
        let page = SAFE_ALIGN as u64;
        let (first, last) = (offset.next_multiple_of(page).min(end), end - end % page);
        if first >= last {
            return write_zeroes(whole);
        }
        let pages = self.slice(first, last - first)?;
        // SAFETY: the range is whole pages of a private anonymous mapping that this owns, and no
        // Rust reference into it exists; it reads as zeroes afterwards.
        let code = unsafe {
            libc::madvise(
                pages.ptr_guard_mut().as_ptr().cast(),
                pages.len(),
                libc::MADV_DONTNEED,
            )
        };
        if code != 0 {
            return write_zeroes(whole);
        }
        write_zeroes(self.slice(offset, first - offset)?)?;
        write_zeroes(self.slice(last, end - last)?)
    }
}

fn write_zeroes(slice: VolatileSlice<'_, ()>) -> io::Result<()> {
    let zeroes = [0u8; SAFE_ALIGN];
    let mut at = 0;
    while at < slice.len() {
        let now = (slice.len() - at).min(zeroes.len());
        let part = slice.subslice(at, now).map_err(io::Error::other)?;
        part.copy_from(zeroes.get(..now).unwrap_or(&zeroes));
        at += now;
    }
    Ok(())
}

impl Store for MemoryStore {
    fn geometry(&self) -> Geometry {
        Geometry {
            secure_erase: true,
            ..Geometry::plain(self.bytes.size() as u64)
        }
    }

    fn open_engine(
        self: Arc<Self>,
        memory: Arc<GuestMemoryMmap>,
        wake: WakeSources<'_>,
    ) -> io::Result<Box<dyn Engine>> {
        Ok(Box::new(MemoryEngine {
            sleeper: Sleeper::new(wake)?,
            store: self,
            memory,
        }))
    }
}

#[derive(Debug)]
struct MemoryEngine {
    store: Arc<MemoryStore>,
    memory: Arc<GuestMemoryMmap>,
    sleeper: Sleeper,
}

impl Inline for MemoryEngine {
    fn run(&mut self, operation: Operation<'_>) -> io::Result<()> {
        let memory = &*self.memory;
        match operation {
            Operation::Flush => Ok(()),
            Operation::Discard { offset, len }
            | Operation::SecureErase { offset, len }
            | Operation::WriteZeroes { offset, len, .. } => self.store.zero(offset, len),
            Operation::Read { chain, offset, len } => self.store.copy(
                offset,
                |each| {
                    chain
                        .writable_slices(memory, 0, len, each)
                        .map_err(chain_error)
                },
                true,
            ),
            Operation::Write {
                chain,
                from,
                offset,
                len,
            } => self.store.copy(
                offset,
                |each| {
                    chain
                        .readable_slices(memory, from, len, each)
                        .map_err(chain_error)
                },
                false,
            ),
        }
    }

    fn sleeper(&mut self) -> io::Result<&mut Sleeper> {
        Ok(&mut self.sleeper)
    }
}
