//! One mapping: made, advised, sealed, and read or written without references into it.
#![allow(unsafe_code)]
// UNSAFETY: madvise, memfd_create and a mapping with a guard beside it have no safe wrapper; all access
// goes through vm-memory.

use pv_abi::layout::{LARGE_PAGE_SIZE, PAGE_SIZE};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::FromRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, FileOffset, GuestMemoryBackend, GuestMemoryMmap, MmapRegion, VolatileMemory,
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Huge pages of private RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HugePages {
    /// They were asked for.
    pub asked: bool,
    /// Bytes that are on huge pages now, as the host kernel reports it.
    pub bytes: u64,
}

/// What a region uses of the host now.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Usage {
    pub(crate) resident: u64,
    pub(crate) huge: HugePages,
}

/// What is behind a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Backing {
    /// Private anonymous memory.
    Anonymous,
    /// A memfd with this name that cannot be resized; it can be sealed further.
    Memfd(&'static str),
    /// A memfd with this name that cannot be resized, and whose seals are final.
    Arena(&'static str),
}

/// A mapping of guest memory, readable and writable by the VMM.
#[derive(Clone, Debug)]
pub(crate) struct Region {
    map: Arc<Mapped>,
    file: Option<Arc<File>>,
    len: u64,
    /// Where huge pages were asked for.
    huge: Arc<OnceLock<Range<u64>>>,
    prefaulted: Arc<AtomicBool>,
}

/// The bytes, which are there as long as this is.
#[derive(Debug)]
struct Mapped {
    map: MmapRegion,
    _guarded: Option<Guarded>,
}

impl std::ops::Deref for Mapped {
    type Target = MmapRegion;

    fn deref(&self) -> &MmapRegion {
        &self.map
    }
}

/// Anonymous memory with a guard behind it, which nothing can touch.
///
/// Without one the kernel merges neighbours that are alike, and what it says of a region is then what
/// it says of several. It begins on a large page, so that it can be made of them.
#[derive(Debug)]
struct Guarded {
    whole: usize,
    whole_len: usize,
}

impl Guarded {
    /// The guarded memory, and where its usable part of so many bytes begins.
    fn new(len: usize) -> io::Result<(Guarded, *mut u8)> {
        let large = usize::try_from(LARGE_PAGE_SIZE).map_err(io::Error::other)?;
        let whole_len = len.checked_add(large).ok_or(io::ErrorKind::OutOfMemory)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let none = libc::PROT_NONE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), whole_len, none, flags, -1, 0) };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let guarded = Guarded {
            whole: at.expose_provenance(),
            whole_len,
        };
        // At most a large page less one page, so a page at least is left at the end.
        let skipped = guarded.whole.next_multiple_of(large) - guarded.whole;
        let start = at.cast::<u8>().wrapping_add(skipped);
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: inside the mapping just made, which nobody uses yet.
        if unsafe { libc::mprotect(start.cast(), len, prot) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok((guarded, start))
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        let at = std::ptr::with_exposed_provenance_mut(self.whole);
        // SAFETY: the mapping that `new` made, used through one `Mapped` alone, which is gone.
        unsafe { libc::munmap(at, self.whole_len) };
    }
}

impl Region {
    pub(crate) fn new(len: u64, backing: Backing) -> io::Result<Region> {
        let size = usize::try_from(len).map_err(io::Error::other)?;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let builder = MmapRegionBuilder::new(size).with_mmap_prot(prot);
        let (builder, file, guarded) = match backing {
            Backing::Anonymous => {
                let (guarded, start) = Guarded::new(size)?;
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
                let builder = builder.with_mmap_flags(flags);
                // SAFETY: `size` bytes from there are mapped, for as long as `Guarded` lives, which
                // is with the region in one `Mapped`.
                let builder = unsafe { builder.with_raw_mmap_pointer(start) };
                (builder, None, Some(guarded))
            }
            Backing::Memfd(name) | Backing::Arena(name) => {
                let mut seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW;
                if let Backing::Arena(_) = backing {
                    seals |= libc::F_SEAL_SEAL;
                }
                let file = memfd(name, len, seals)?;
                let builder = builder
                    .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
                    .with_file_offset(FileOffset::new(file.try_clone()?, 0));
                (builder, Some(Arc::new(file)), None)
            }
        };
        let map = Mapped {
            map: builder.build().map_err(io::Error::other)?,
            _guarded: guarded,
        };
        let region = Region {
            map: Arc::new(map),
            file,
            len,
            huge: Arc::default(),
            prefaulted: Arc::default(),
        };
        region.advise(0, len, libc::MADV_DONTFORK)?;
        region.advise(0, len, libc::MADV_DONTDUMP)?;
        Ok(region)
    }

    fn advise(&self, from: u64, to: u64, advice: libc::c_int) -> io::Result<()> {
        let to = Self::at(to).min(self.map.size());
        let from = Self::at(from).min(to);
        // SAFETY: the range lies in a mapping that `self.map` owns, and none of the advices used
        // here changes what its bytes are.
        let r = unsafe { libc::madvise(self.map.as_ptr().add(from).cast(), to - from, advice) };
        if r == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// Asks for huge pages from this offset on. A host that has none is not an error.
    ///
    /// The last one is left out: allocators mark the end of their memory, and that one word would
    /// cost every guest 2 MiB and the time to clear them.
    pub(crate) fn ask_huge(&self, from: u64) {
        let from = from.next_multiple_of(LARGE_PAGE_SIZE);
        let to = self.len.saturating_sub(LARGE_PAGE_SIZE);
        if from < to && self.advise(from, to, libc::MADV_HUGEPAGE).is_ok() {
            let _ = self.huge.set(from..to);
        }
    }

    /// Where huge pages were asked for, for other mappings of the same memory.
    pub(crate) fn huge_range(&self) -> Option<Range<u64>> {
        self.huge.get().cloned()
    }

    /// Makes all pages present and writable.
    pub(crate) fn prefault(&self) -> io::Result<()> {
        self.advise(0, self.len, libc::MADV_POPULATE_WRITE)?;
        self.prefaulted.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Whether all pages were made present.
    pub(crate) fn is_prefaulted(&self) -> bool {
        self.prefaulted.load(Ordering::Relaxed)
    }

    /// Makes pages present that are about to be written: one call is cheaper than their faults.
    /// Where it fails, they fault.
    pub(crate) fn populate(&self, offset: u64, len: u64) {
        let from = offset & !(PAGE_SIZE - 1);
        let to = offset.saturating_add(len).div_ceil(PAGE_SIZE) * PAGE_SIZE;
        let _ = self.advise(from, to, libc::MADV_POPULATE_WRITE);
    }

    /// Writes bytes where nothing has been touched yet.
    ///
    /// Through the file where there is one: that takes no lock of the address space, so a thread of
    /// ours that is just starting, which maps its signal stack, does not wait for it.
    pub(crate) fn fill(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if let Some(file) = &self.file {
            return file.write_all_at(bytes, offset);
        }
        self.populate(offset, bytes.len() as u64);
        self.write_bytes(offset, bytes)
    }

    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// The memfd, for regions that have one.
    pub(crate) fn file(&self) -> Option<&File> {
        self.file.as_deref()
    }

    /// The shared file handle, for mappings that outlive this one.
    pub(crate) fn file_arc(&self) -> Option<Arc<File>> {
        self.file.clone()
    }

    /// Address in the VMM; for the memory slots of kvm and for futexes.
    pub(crate) fn host_address(&self) -> u64 {
        self.map.as_ptr() as u64
    }

    fn at(offset: u64) -> usize {
        usize::try_from(offset).unwrap_or(usize::MAX)
    }

    pub(crate) fn read_bytes(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let whole = self.map.as_volatile_slice();
        whole
            .read_slice(buffer, Self::at(offset))
            .map_err(io::Error::other)
    }

    pub(crate) fn write_bytes(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let whole = self.map.as_volatile_slice();
        whole
            .write_slice(bytes, Self::at(offset))
            .map_err(io::Error::other)
    }

    /// One copy of a structure.
    pub(crate) fn read<T: FromBytes + IntoBytes>(&self, offset: u64) -> io::Result<T> {
        let mut value = T::new_zeroed();
        self.read_bytes(offset, value.as_mut_bytes())?;
        Ok(value)
    }

    pub(crate) fn write<T: IntoBytes + Immutable>(&self, offset: u64, value: &T) -> io::Result<()> {
        self.write_bytes(offset, value.as_bytes())
    }

    /// A shared word. Whoever else maps the region may change it at any time.
    pub(crate) fn word32(&self, offset: u64) -> io::Result<&AtomicU32> {
        self.map
            .get_atomic_ref(Self::at(offset))
            .map_err(io::Error::other)
    }

    /// A shared word. Whoever else maps the region may change it at any time.
    pub(crate) fn word64(&self, offset: u64) -> io::Result<&AtomicU64> {
        self.map
            .get_atomic_ref(Self::at(offset))
            .map_err(io::Error::other)
    }

    /// What the kernel says of this mapping in `smaps`; zeroes where it does not say. Of a memfd, what
    /// is there of the file: another process may have touched pages that this one has not.
    pub(crate) fn usage(&self) -> Usage {
        let asked = self.huge.get().is_some();
        let mut usage = Usage {
            resident: 0,
            huge: HugePages { asked, bytes: 0 },
        };
        let Ok(smaps) = std::fs::read_to_string("/proc/self/smaps") else {
            return usage;
        };
        let (start, end) = (self.host_address(), self.host_address() + self.len);
        let mut ours = false;
        for line in smaps.lines() {
            let mut words = line.split_ascii_whitespace();
            let (Some(key), Some(value)) = (words.next(), words.next()) else {
                continue;
            };
            if let Some((from, _)) = key.split_once('-')
                && let Ok(from) = u64::from_str_radix(from, 16)
            {
                ours = (start..end).contains(&from);
            } else if ours && let Ok(kib) = value.parse::<u64>() {
                match key {
                    "Rss:" => usage.resident += kib << 10,
                    "AnonHugePages:" | "ShmemPmdMapped:" | "FilePmdMapped:" => {
                        usage.huge.bytes += kib << 10;
                    }
                    _ => {}
                }
            }
        }
        if let Some(file) = self.file().and_then(|file| file.metadata().ok()) {
            usage.resident = file.blocks() * 512;
        }
        usage
    }
}

/// Keeps a second view of an arena out of forked children and core dumps, as the first one is.
pub(crate) fn keep_private(memory: &GuestMemoryMmap) -> io::Result<()> {
    for region in memory.iter() {
        for advice in [libc::MADV_DONTFORK, libc::MADV_DONTDUMP] {
            // SAFETY: the range is the region's own mapping; the advice changes no byte of it.
            let r = unsafe { libc::madvise(region.as_ptr().cast(), region.size(), advice) };
            if r < 0 {
                return Err(io::Error::last_os_error());
            }
        }
    }
    Ok(())
}

/// A memfd of this size with these seals.
fn memfd(name: &str, len: u64, seals: libc::c_int) -> io::Result<File> {
    let name = std::ffi::CString::new(name)?;
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: the name is a valid C string. MFD_NOEXEC_SEAL is not asked for: kernels older than
    // 6.3 refuse it, and the seals below include everything that matters here.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a fresh descriptor that nothing else owns.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len)?;
    // SAFETY: adding seals touches no memory.
    if unsafe { libc::fcntl(fd, libc::F_ADD_SEALS, seals) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever the host does by itself.
    fn small_pages(region: &Region) {
        let _ = region.advise(0, region.len(), libc::MADV_NOHUGEPAGE);
    }

    #[test]
    fn neighbours_are_counted_apart() {
        let regions: Vec<Region> = (0..8)
            .map(|_| Region::new(2 << 20, Backing::Anonymous).unwrap())
            .collect();
        for (index, region) in regions.iter().enumerate() {
            small_pages(region);
            assert!(region.host_address().is_multiple_of(LARGE_PAGE_SIZE));
            for page in 0..index as u64 {
                region.write(page * PAGE_SIZE, &1u8).unwrap();
            }
        }
        for (index, region) in regions.iter().enumerate() {
            assert_eq!(region.usage().resident, index as u64 * PAGE_SIZE);
        }
        let kept = regions[3].clone();
        drop(regions);
        assert_eq!(kept.read::<u8>(0).unwrap(), 1);
    }

    #[test]
    fn pages_that_another_process_has_touched_are_resident() {
        let region = Region::new(4 << 20, Backing::Memfd("pv-test")).unwrap();
        assert_eq!(region.usage().resident, 0);
        // Through the file: nothing is mapped here, as when a guest's own process touches them.
        let file = region.file().unwrap();
        for page in 0..10 {
            file.write_all_at(b"x", page * PAGE_SIZE).unwrap();
        }
        assert_eq!(region.usage().resident, 10 * PAGE_SIZE);
        let mut seen = [0; 2];
        region.fill(PAGE_SIZE * 20 - 1, b"ab").unwrap();
        region.read_bytes(PAGE_SIZE * 20 - 1, &mut seen).unwrap();
        assert_eq!((seen, region.usage().resident), (*b"ab", 12 * PAGE_SIZE));
        assert!(region.fill(region.len() - 1, b"ab").is_err());
        let anonymous = Region::new(4 << 20, Backing::Anonymous).unwrap();
        small_pages(&anonymous);
        anonymous.fill(0, &[1; 3 * PAGE_SIZE as usize]).unwrap();
        assert_eq!(anonymous.usage().resident, 3 * PAGE_SIZE);
        assert!(anonymous.fill(anonymous.len() - 1, b"ab").is_err());
    }
}
