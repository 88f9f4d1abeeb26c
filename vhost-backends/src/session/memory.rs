//! The memory table: regions of the frontend, mapped here.
//!
//! The `userspace_addr` of a region is a number that ring addresses are given in, nothing more:
//! some frontends send their own pointers, ours sends guest-physical addresses.
//!
//! A region is mapped only if its file is long enough at that moment. A frontend that seals its
//! memfds against shrinking (ours does) can then not hurt this process; one that truncates an
//! unsealed file while a ring is in it ends this process with SIGBUS, and nobody else's. A device
//! whose process others depend on takes sealed files alone.

use crate::limits::MAX_MEM_SLOTS;
use crate::session::memfd;
use crate::session::wire::Region;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

/// Why a region cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// It has no bytes, or runs over the end of an address space.
    #[error("{size:#x} bytes at {addr:#x} are not a range")]
    BadRange {
        /// First byte.
        addr: u64,
        /// Bytes.
        size: u64,
    },
    /// It overlaps another one.
    #[error("it overlaps another region")]
    Overlap,
    /// There are [`MAX_MEM_SLOTS`] already.
    #[error("too many regions")]
    TooMany,
    /// There is no such region.
    #[error("no such region")]
    NotFound,
    /// What came with it is not a file that memory can be in.
    #[error("its descriptor is not a regular file")]
    NotAFile,
    /// The file ends before the region does.
    #[error("its file has {file} bytes, the region ends at {end}")]
    FileTooShort {
        /// Bytes of the file.
        file: u64,
        /// Where the region ends in the file.
        end: u64,
    },
    /// Its file can become shorter, and this device must not be hurt by that.
    #[error("its file is not sealed against shrinking (F_SEAL_SHRINK)")]
    NotSealed,
    /// The kernel did not map it.
    #[error("mapping failed: {0}")]
    Map(String),
    /// The file could not be looked at.
    #[error("its file cannot be read: {0}")]
    File(#[from] std::io::Error),
}

#[derive(Clone, Debug)]
struct Slot {
    region: Region,
    mapping: Arc<GuestRegionMmap>,
}

/// The regions of one session.
#[derive(Clone, Debug, Default)]
pub(crate) struct MemoryTable {
    slots: Vec<Slot>,
    /// All slots as one memory; `None` while there is none.
    memory: Option<Arc<GuestMemoryMmap>>,
}

impl MemoryTable {
    /// A table of these regions; the ones that were mapped are unmapped again if one fails.
    /// `sealed`: their files must be sealed against shrinking.
    pub(crate) fn from_regions(
        regions: Vec<(Region, OwnedFd)>,
        sealed: bool,
    ) -> Result<Self, MemoryError> {
        let slots = regions
            .into_iter()
            .map(|(region, fd)| map(region, fd, sealed))
            .collect::<Result<Vec<_>, _>>()?;
        MemoryTable::from_slots(slots)
    }

    /// This table and one more region.
    pub(crate) fn with(
        &self,
        region: Region,
        fd: OwnedFd,
        sealed: bool,
    ) -> Result<Self, MemoryError> {
        if self.slots.len() >= MAX_MEM_SLOTS {
            return Err(MemoryError::TooMany);
        }
        let mut slots = self.slots.clone();
        slots.push(map(region, fd, sealed)?);
        MemoryTable::from_slots(slots)
    }

    /// This table without one region; its offset in the file does not count.
    pub(crate) fn without(&self, region: Region) -> Result<Self, MemoryError> {
        let key = |r: &Region| (r.guest_addr, r.size, r.user_addr);
        let mut slots = self.slots.clone();
        let index = slots
            .iter()
            .position(|slot| key(&slot.region) == key(&region))
            .ok_or(MemoryError::NotFound)?;
        slots.remove(index);
        MemoryTable::from_slots(slots)
    }

    /// All regions as one memory.
    pub(crate) fn memory(&self) -> Option<&Arc<GuestMemoryMmap>> {
        self.memory.as_ref()
    }

    /// Every region, and its file once more.
    pub(crate) fn regions(&self) -> impl Iterator<Item = (Region, std::io::Result<OwnedFd>)> {
        self.slots.iter().map(|slot| {
            let file = slot.mapping.file_offset().map(FileOffset::file);
            let file = file.ok_or(std::io::ErrorKind::NotFound.into());
            (
                slot.region,
                file.and_then(File::try_clone).map(OwnedFd::from),
            )
        })
    }

    /// The guest-physical address that a `userspace_addr` stands for.
    pub(crate) fn translate(&self, user: u64) -> Option<GuestAddress> {
        self.slots.iter().find_map(|slot| {
            let offset = user.checked_sub(slot.region.user_addr)?;
            (offset < slot.region.size).then(|| GuestAddress(slot.region.guest_addr + offset))
        })
    }

    fn from_slots(mut slots: Vec<Slot>) -> Result<Self, MemoryError> {
        slots.sort_by_key(|slot| slot.region.guest_addr);
        let memory = if slots.is_empty() {
            None
        } else {
            let mappings = slots.iter().map(|s| Arc::clone(&s.mapping)).collect();
            let memory =
                GuestMemoryMmap::from_arc_regions(mappings).map_err(|_| MemoryError::Overlap)?;
            Some(Arc::new(memory))
        };
        Ok(MemoryTable { slots, memory })
    }
}

fn map(region: Region, fd: OwnedFd, sealed: bool) -> Result<Slot, MemoryError> {
    let bad = |addr| MemoryError::BadRange {
        addr,
        size: region.size,
    };
    let size = usize::try_from(region.size).map_err(|_| bad(region.guest_addr))?;
    // The last byte, so that a region may end with the address space.
    let last = region.size.checked_sub(1).ok_or(bad(region.guest_addr))?;
    for addr in [region.guest_addr, region.user_addr] {
        addr.checked_add(last).ok_or(bad(addr))?;
    }
    let end = region
        .mmap_offset
        .checked_add(region.size)
        .ok_or(bad(region.mmap_offset))?;
    let file = File::from(fd);
    if !file.metadata()?.is_file() {
        return Err(MemoryError::NotAFile);
    }
    if sealed && !memfd::keeps_its_length(&file) {
        return Err(MemoryError::NotSealed);
    }
    // Looked at after the seal, which can be as young as this.
    let len = file.metadata()?.len();
    if len < end {
        return Err(MemoryError::FileTooShort { file: len, end });
    }
    let mapping = memfd::map(file, region.mmap_offset, size)
        .map_err(|error| MemoryError::Map(error.to_string()))?;
    let mapping = GuestRegionMmap::new(mapping, GuestAddress(region.guest_addr))
        .ok_or(bad(region.guest_addr))?;
    Ok(Slot {
        region,
        mapping: Arc::new(mapping),
    })
}
