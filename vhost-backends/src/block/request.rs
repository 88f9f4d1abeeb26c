//! Chains to requests: parsed once, checked against the disk, then never looked at again.

use super::Disk;
use crate::limits::{MAX_RANGE_SECTORS, MAX_RANGES, MAX_REQUEST_BYTES};
use crate::ring::OwnedChain;
use crate::stats::Kind;
use pv_abi::virtio::block::{
    ID_LEN, RANGE_UNMAP, RangeSegment, RequestHeader, SECTOR_SIZE, request, status,
};
use vm_memory::GuestMemoryMmap;
use zerocopy::IntoBytes;

/// Request types of virtio 1.3 §5.2.6 that the ABI does not use.
pub(super) const GET_LIFETIME: u32 = 10;
pub(super) const SECURE_ERASE: u32 = 14;
/// Bytes of the answer to `GET_LIFETIME`.
pub(super) const LIFETIME_LEN: usize = 6;

/// Bytes of a request's head.
pub(super) const HEADER_LEN: u64 = size_of::<RequestHeader>() as u64;

/// A request within the disk's bounds. Offsets and lengths in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Read into the chain's writable bytes.
    Read {
        /// First byte on the disk.
        offset: u64,
        /// Bytes; the writable ones before the status byte.
        len: u64,
    },
    /// Write the chain's readable bytes after the header.
    Write {
        /// First byte on the disk.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Make what was written before safe.
    Flush,
    /// The device's name, into the chain's first writable bytes.
    GetId,
    /// How worn the medium is, into the chain's first writable bytes.
    GetLifetime,
    /// Make a range unreadable for good.
    SecureErase {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Forget a range.
    Discard {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Zero a range.
    WriteZeroes {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// The space may be given back.
        unmap: bool,
    },
}

impl Request {
    /// What it counts as, in statistics and against limits.
    pub(super) fn measure(&self) -> (Kind, u64) {
        match *self {
            Request::Read { len, .. } => (Kind::Read, len),
            Request::Write { len, .. } => (Kind::Write, len),
            Request::Flush => (Kind::Flush, 0),
            Request::GetId | Request::GetLifetime => (Kind::Other, 0),
            Request::SecureErase { len, .. } => (Kind::Other, len),
            Request::Discard { len, .. } => (Kind::Discard, len),
            Request::WriteZeroes { len, .. } => (Kind::WriteZeroes, len),
        }
    }
}

/// Why a chain is not a request, and what the driver is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RefusedRequest {
    /// No writable byte: there is nowhere to put a status.
    #[error("no room for a status")]
    NoStatus,
    /// Fewer readable bytes than a header.
    #[error("no header")]
    NoHeader,
    /// The chain's memory is gone.
    #[error("memory is not accessible")]
    NoMemory,
    /// A data length that is not a multiple of a sector, or over the limit.
    #[error("{0} bytes of data")]
    BadLength(u64),
    /// Past the end of the disk.
    #[error("{sectors} sectors at {sector} are past the end")]
    PastEnd {
        /// First sector.
        sector: u64,
        /// Sectors.
        sectors: u64,
    },
    /// A change of a read-only disk.
    #[error("the disk is read-only")]
    ReadOnly,
    /// A type or flag that is not served.
    #[error("request type {0} is not supported")]
    Unsupported(u32),
}

impl RefusedRequest {
    /// The status byte for it.
    pub fn status(self) -> u8 {
        match self {
            RefusedRequest::Unsupported(_) => status::UNSUPP,
            _ => status::IOERR,
        }
    }
}

/// Parses a chain.
pub fn parse(
    chain: &OwnedChain,
    memory: &GuestMemoryMmap,
    capacity: u64,
    read_only: bool,
) -> Result<Request, RefusedRequest> {
    let room = chain
        .writable_len()
        .checked_sub(1)
        .ok_or(RefusedRequest::NoStatus)?;
    let data = chain
        .readable_len()
        .checked_sub(HEADER_LEN)
        .ok_or(RefusedRequest::NoHeader)?;
    let mut header = RequestHeader::default();
    chain
        .read_at(memory, 0, header.as_mut_bytes())
        .map_err(|_| RefusedRequest::NoMemory)?;
    let kind = u32::from_le(header.kind);
    let sector = u64::from_le(header.sector);
    let range = |len: u64| {
        if !len.is_multiple_of(SECTOR_SIZE) || len > MAX_REQUEST_BYTES {
            return Err(RefusedRequest::BadLength(len));
        }
        Ok((byte_offset(sector, len / SECTOR_SIZE, capacity)?, len))
    };
    match kind {
        request::IN => {
            let (offset, len) = range(room)?;
            Ok(Request::Read { offset, len })
        }
        request::OUT if read_only => Err(RefusedRequest::ReadOnly),
        request::OUT => {
            let (offset, len) = range(data)?;
            Ok(Request::Write { offset, len })
        }
        request::FLUSH => Ok(Request::Flush),
        request::GET_ID if room < ID_LEN as u64 => Err(RefusedRequest::BadLength(room)),
        request::GET_ID => Ok(Request::GetId),
        GET_LIFETIME if room < LIFETIME_LEN as u64 => Err(RefusedRequest::BadLength(room)),
        GET_LIFETIME => Ok(Request::GetLifetime),
        request::DISCARD | request::WRITE_ZEROES | SECURE_ERASE if read_only => {
            Err(RefusedRequest::ReadOnly)
        }
        request::DISCARD | request::WRITE_ZEROES | SECURE_ERASE => {
            let range = parse_range(chain, memory, data)?;
            parse_change(kind, range, capacity)
        }
        other => Err(RefusedRequest::Unsupported(other)),
    }
}

fn parse_range(
    chain: &OwnedChain,
    memory: &GuestMemoryMmap,
    data: u64,
) -> Result<RangeSegment, RefusedRequest> {
    const _: () = assert!(MAX_RANGES == 1);
    if data != size_of::<RangeSegment>() as u64 {
        return Err(RefusedRequest::BadLength(data));
    }
    let mut range = RangeSegment::default();
    chain
        .read_at(memory, HEADER_LEN, range.as_mut_bytes())
        .map_err(|_| RefusedRequest::NoMemory)?;
    Ok(range)
}

fn parse_change(kind: u32, range: RangeSegment, capacity: u64) -> Result<Request, RefusedRequest> {
    let flags = u32::from_le(range.flags);
    let unmap = flags & RANGE_UNMAP != 0;
    // virtio 1.3 §5.2.6.2: unknown flags, and unmap on a discard, are unsupported.
    if flags & !RANGE_UNMAP != 0 || (kind != request::WRITE_ZEROES && unmap) {
        return Err(RefusedRequest::Unsupported(kind));
    }
    let count = u32::from_le(range.count);
    let len = u64::from(count) * SECTOR_SIZE;
    if count == 0 || count > MAX_RANGE_SECTORS {
        return Err(RefusedRequest::BadLength(len));
    }
    let offset = byte_offset(u64::from_le(range.sector), u64::from(count), capacity)?;
    Ok(match kind {
        request::DISCARD => Request::Discard { offset, len },
        SECURE_ERASE => Request::SecureErase { offset, len },
        _ => Request::WriteZeroes { offset, len, unmap },
    })
}

/// The first byte of a range of sectors that ends within the disk.
fn byte_offset(sector: u64, sectors: u64, capacity: u64) -> Result<u64, RefusedRequest> {
    let past_end = RefusedRequest::PastEnd { sector, sectors };
    match sector.checked_add(sectors) {
        Some(end) if end <= capacity => sector.checked_mul(SECTOR_SIZE).ok_or(past_end),
        _ => Err(past_end),
    }
}

impl Disk {
    pub(super) fn parse(
        &self,
        chain: &OwnedChain,
        memory: &GuestMemoryMmap,
    ) -> Result<Request, RefusedRequest> {
        match parse(chain, memory, self.capacity(), self.read_only)? {
            // Not offered.
            Request::SecureErase { .. } if !self.geometry.secure_erase => {
                Err(RefusedRequest::Unsupported(SECURE_ERASE))
            }
            request => Ok(request),
        }
    }
}
