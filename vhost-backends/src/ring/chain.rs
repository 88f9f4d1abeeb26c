//! One descriptor chain as an owned value.

use super::Retire;
use super::place::view_in;
use pv_abi::limits::MAX_CHAIN_LEN;
use pv_abi::virtio::Desc;
use smallvec::SmallVec;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, VolatileSlice,
};

/// A buffer of the guest, checked to lie in memory when the chain was walked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First byte.
    pub addr: GuestAddress,
    /// Bytes, never zero.
    pub len: u32,
}

/// A helper was asked for bytes that the chain or memory does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// Past the end of the readable or writable part.
    #[error("{len} bytes at offset {offset} do not fit in {total} bytes")]
    OutOfRange {
        /// First byte asked for.
        offset: u64,
        /// Bytes asked for.
        len: u64,
        /// Bytes there are.
        total: u64,
    },
    /// The memory table given is not the one that the chain was walked in.
    #[error("the buffer is not in this memory")]
    NotInMemory,
}

/// One descriptor chain: readable segments, then writable ones. Offsets count bytes from the
/// first readable or the first writable byte, so how a driver frames a request does not matter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnedChain {
    head: u16,
    segments: SmallVec<[Segment; 4]>,
    /// How many of `segments` are readable.
    split: usize,
    readable: u64,
    writable: u64,
}

impl OwnedChain {
    /// A chain without buffers, for [`DeviceRing::pop_into`](super::DeviceRing::pop_into).
    pub fn empty() -> OwnedChain {
        OwnedChain {
            head: 0,
            segments: SmallVec::new(),
            split: 0,
            readable: 0,
            writable: 0,
        }
    }

    /// Begins another chain in the same place.
    #[inline]
    pub(super) fn restart(&mut self, head: u16) {
        self.head = head;
        self.segments.clear();
        (self.split, self.readable, self.writable) = (0, 0, 0);
    }

    /// Adds a buffer that a descriptor names; one without bytes is left out.
    #[inline]
    pub(super) fn take(
        &mut self,
        (mem, near): (&GuestMemoryMmap, &mut Near),
        addr: u64,
        len: u32,
        writable: bool,
    ) -> Result<(), Retire> {
        let head = self.head;
        if !writable && self.writable > 0 {
            return Err(Retire::ReadableAfterWritable { head });
        }
        if len == 0 {
            return Ok(());
        }
        if !near.has(addr, len) {
            check_buffer(mem, near, addr, len)?;
        }
        let bytes = self.readable + self.writable + u64::from(len);
        if bytes > u64::from(u32::MAX) {
            return Err(Retire::TooManyBytes { head });
        }
        let addr = GuestAddress(addr);
        self.push(Segment { addr, len }, writable);
        Ok(())
    }

    #[inline]
    fn push(&mut self, segment: Segment, writable: bool) {
        self.segments.push(segment);
        if writable {
            self.writable += u64::from(segment.len);
        } else {
            self.split = self.segments.len();
            self.readable += u64::from(segment.len);
        }
    }

    /// Index of the first descriptor: what a completion names.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Segments that the device reads.
    pub fn readable(&self) -> &[Segment] {
        &self.segments[..self.split]
    }

    /// Segments that the device writes.
    pub fn writable(&self) -> &[Segment] {
        &self.segments[self.split..]
    }

    /// Bytes that the device may read.
    pub fn readable_len(&self) -> u64 {
        self.readable
    }

    /// Bytes that the device may write.
    pub fn writable_len(&self) -> u64 {
        self.writable
    }

    /// Copies readable bytes from `offset` on into the whole of `buf`.
    pub fn read_at(
        &self,
        mem: &GuestMemoryMmap,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<(), ChainError> {
        let mut rest = buf;
        for_each(
            self.readable(),
            self.readable,
            offset,
            rest.len() as u64,
            |segment| {
                let (now, later) = std::mem::take(&mut rest).split_at_mut(segment.len as usize);
                rest = later;
                mem.read_slice(now, segment.addr)
                    .map_err(|_| ChainError::NotInMemory)
            },
        )
    }

    /// Copies the whole of `buf` to the writable bytes from `offset` on.
    pub fn write_at(
        &self,
        mem: &GuestMemoryMmap,
        offset: u64,
        buf: &[u8],
    ) -> Result<(), ChainError> {
        let mut rest = buf;
        for_each(
            self.writable(),
            self.writable,
            offset,
            buf.len() as u64,
            |segment| {
                let (now, later) = rest.split_at(segment.len as usize);
                rest = later;
                mem.write_slice(now, segment.addr)
                    .map_err(|_| ChainError::NotInMemory)
            },
        )
    }

    /// The readable bytes `offset..offset + len` as views of host memory, for zero-copy I/O.
    pub fn readable_slices<'m>(
        &self,
        mem: &'m GuestMemoryMmap,
        offset: u64,
        len: u64,
        each: impl FnMut(VolatileSlice<'m, ()>),
    ) -> Result<(), ChainError> {
        slices(self.readable(), self.readable, mem, offset, len, each)
    }

    /// The writable bytes `offset..offset + len` as views of host memory, for zero-copy I/O.
    pub fn writable_slices<'m>(
        &self,
        mem: &'m GuestMemoryMmap,
        offset: u64,
        len: u64,
        each: impl FnMut(VolatileSlice<'m, ()>),
    ) -> Result<(), ChainError> {
        slices(self.writable(), self.writable, mem, offset, len, each)
    }
}

/// Regions among which the one of the last buffer is remembered; others are searched for.
const REMEMBERED: usize = 8;

/// Finds buffers of chains in memory: first in the region where the last one was.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Finder {
    region: usize,
}

impl Finder {
    /// The whole of a buffer as one view; `None` if it takes several.
    #[inline]
    pub(crate) fn view<'m>(
        &mut self,
        memory: &'m GuestMemoryMmap,
        segment: Segment,
    ) -> Option<VolatileSlice<'m, ()>> {
        if let Some(region) = memory.iter().nth(self.region)
            && let Some(view) = view_in(region, segment.addr, segment.len as usize)
        {
            return Some(view);
        }
        self.search(memory, segment)
    }

    #[cold]
    fn search<'m>(
        &mut self,
        memory: &'m GuestMemoryMmap,
        segment: Segment,
    ) -> Option<VolatileSlice<'m, ()>> {
        let region = memory.find_region(segment.addr)?;
        let mut remembered = memory.iter().take(REMEMBERED);
        let index = remembered.position(|other| std::ptr::eq(other, region));
        self.region = index.unwrap_or(self.region);
        view_in(region, segment.addr, segment.len as usize)
    }
}

/// The region in which the last buffer was: nearly always that of the next one.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Near {
    first: u64,
    /// One behind the last byte, but for a region that ends with the addresses.
    end: u64,
}

impl Near {
    #[inline]
    fn has(&self, addr: u64, len: u32) -> bool {
        let end = addr.checked_add(u64::from(len));
        addr >= self.first && end.is_some_and(|end| end <= self.end)
    }
}

/// Whether a buffer lies in memory.
fn check_buffer(mem: &GuestMemoryMmap, near: &mut Near, addr: u64, len: u32) -> Result<(), Retire> {
    let start = GuestAddress(addr);
    if let Some(region) = mem.find_region(start) {
        *near = Near {
            first: region.start_addr().0,
            end: region.last_addr().0.saturating_add(1),
        };
        if near.has(addr, len) {
            return Ok(());
        }
    }
    let inside = addr
        .checked_add(u64::from(len))
        .is_some_and(|_| GuestMemoryBackend::check_range(mem, start, len as usize));
    if inside {
        Ok(())
    } else {
        Err(Retire::BadAddress { addr, len })
    }
}

/// Entries of the indirect table that a descriptor names, if the driver may name one here and it is
/// of a length that a chain may have (virtio 1.3 §2.7.5.3, §2.8.7).
pub(super) fn indirect_entries(
    mem: &GuestMemoryMmap,
    negotiated: bool,
    (addr, len): (u64, u32),
    has_next: bool,
) -> Result<u16, Retire> {
    const ENTRY: u32 = size_of::<Desc>() as u32;
    if !negotiated {
        return Err(Retire::IndirectNotNegotiated);
    }
    if has_next {
        return Err(Retire::IndirectWithNext);
    }
    // Before the table is touched: a table may claim 2^28 entries.
    let bad = Retire::BadIndirectLen { len };
    let count = u16::try_from(len / ENTRY).map_err(|_| bad)?;
    if len == 0 || !len.is_multiple_of(ENTRY) || usize::from(count) > MAX_CHAIN_LEN {
        return Err(bad);
    }
    check_buffer(mem, &mut Near::default(), addr, len)?;
    Ok(count)
}

fn slices<'m>(
    segments: &[Segment],
    total: u64,
    mem: &'m GuestMemoryMmap,
    offset: u64,
    len: u64,
    mut each: impl FnMut(VolatileSlice<'m, ()>),
) -> Result<(), ChainError> {
    for_each(segments, total, offset, len, |segment| {
        if let Ok(whole) = mem.get_slice(segment.addr, segment.len as usize) {
            each(whole);
            return Ok(());
        }
        // Two adjacent regions may lie apart in the host: one segment can be several slices.
        let pieces = GuestMemoryBackend::get_slices(mem, segment.addr, segment.len as usize);
        for piece in pieces {
            each(piece.map_err(|_| ChainError::NotInMemory)?);
        }
        Ok(())
    })
}

/// Calls `each` with the pieces of `segments` that make up the bytes `offset..offset + len`.
fn for_each(
    segments: &[Segment],
    total: u64,
    offset: u64,
    len: u64,
    mut each: impl FnMut(Segment) -> Result<(), ChainError>,
) -> Result<(), ChainError> {
    if offset.checked_add(len).is_none_or(|end| end > total) {
        return Err(ChainError::OutOfRange { offset, len, total });
    }
    let (mut skip, mut left) = (offset, len);
    for segment in segments {
        if left == 0 {
            break;
        }
        let size = u64::from(segment.len);
        if skip >= size {
            skip -= size;
            continue;
        }
        let take = left.min(size - skip);
        each(Segment {
            addr: GuestAddress(segment.addr.0 + skip),
            // `take` is at most `segment.len`.
            len: take as u32,
        })?;
        skip = 0;
        left -= take;
    }
    Ok(())
}
