//! Block requests: what the user asks for, and how it looks in the ring.

use super::config::Geometry;
use super::queue::Token;
use super::{Completion, Error};
use crate::device::{Segments, Submission};
use crate::platform::DmaBuf;
use pv_abi::virtio::block::{
    ID_LEN, RANGE_UNMAP, RangeSegment, RequestHeader, SECTOR_SIZE, feature, request, status,
};
use zerocopy::IntoBytes;

/// Segments of a request: head, data, status.
pub(super) const SEGMENTS: usize = 3;

/// Bytes of the head buffer of a request, and where what is in it lies.
pub(super) const HEAD_LEN: usize = 64;
const RANGE_AT: usize = 16;
const ID_AT: usize = 32;
const STATUS_AT: usize = ID_AT + ID_LEN;

/// The status byte before the device has written one.
const STATUS_UNTOUCHED: u8 = 0xff;

/// A block request. Buffers move in, and come back with the completion.
#[derive(Debug)]
#[non_exhaustive]
pub enum Request {
    /// Reads as many sectors as the buffer holds.
    Read {
        /// First sector.
        sector: u64,
        /// Whole sectors.
        buf: DmaBuf,
    },
    /// Writes the whole buffer.
    Write {
        /// First sector.
        sector: u64,
        /// Whole sectors.
        buf: DmaBuf,
    },
    /// Makes every write that has completed durable.
    Flush,
    /// Tells the device that these sectors are not needed any more.
    Discard {
        /// First sector.
        sector: u64,
        /// Sectors.
        count: u32,
    },
    /// Makes these sectors read as zeroes.
    WriteZeroes {
        /// First sector.
        sector: u64,
        /// Sectors.
        count: u32,
        /// Whether the device may give the space back.
        unmap: bool,
    },
    /// Reads the device's identification string.
    GetId,
}

impl Request {
    /// Whether the device can be asked this at all.
    pub(super) fn check(&self, features: u64, geometry: &Geometry) -> Result<(), Error> {
        let offered = |bit: u64| {
            (features & bit != 0)
                .then_some(())
                .ok_or(Error::Unsupported)
        };
        let writable = || {
            (features & feature::RO == 0)
                .then_some(())
                .ok_or(Error::ReadOnly)
        };
        let inside = |sector: u64, sectors: u64| {
            let end = sector.checked_add(sectors);
            end.filter(|&end| end <= geometry.capacity)
                .map(|_| ())
                .ok_or(Error::OutOfRange)
        };
        let transfer = |sector, buf: &DmaBuf| {
            let whole = buf.len().is_multiple_of(SECTOR_SIZE as usize);
            if buf.is_empty() || !whole || buf.len() > geometry.max_bytes {
                return Err(Error::BadLength);
            }
            inside(sector, buf.len() as u64 / SECTOR_SIZE)
        };
        let range = |sector, count: u32, most: u32| {
            if count == 0 || count > most {
                return Err(Error::BadLength);
            }
            inside(sector, u64::from(count))
        };
        match self {
            Request::Read { sector, buf } => transfer(*sector, buf),
            Request::Write { sector, buf } => {
                writable()?;
                transfer(*sector, buf)
            }
            Request::Flush => offered(feature::FLUSH),
            Request::Discard { sector, count } => {
                offered(feature::DISCARD)?;
                writable()?;
                range(*sector, *count, geometry.max_discard_sectors)
            }
            Request::WriteZeroes { sector, count, .. } => {
                offered(feature::WRITE_ZEROES)?;
                writable()?;
                range(*sector, *count, geometry.max_write_zeroes_sectors)
            }
            Request::GetId => Ok(()),
        }
    }
}

/// A request on its way, with the head buffer that it borrows from its queue.
#[derive(Debug)]
pub(super) struct Submitted {
    pub(super) token: Token,
    pub(super) request: Request,
    pub(super) head: DmaBuf,
}

impl Submission for Submitted {
    fn prepare(&mut self, segments: &mut Segments) {
        let (kind, sector) = match &self.request {
            Request::Read { sector, .. } => (request::IN, *sector),
            Request::Write { sector, .. } => (request::OUT, *sector),
            Request::Flush => (request::FLUSH, 0),
            Request::Discard { .. } => (request::DISCARD, 0),
            Request::WriteZeroes { .. } => (request::WRITE_ZEROES, 0),
            Request::GetId => (request::GET_ID, 0),
        };
        let header = RequestHeader {
            kind,
            reserved: 0,
            sector,
        };
        // All of it is written again for each generation: a peer may have changed it.
        let mut head = [0; HEAD_LEN];
        head[..size_of::<RequestHeader>()].copy_from_slice(header.as_bytes());
        head[STATUS_AT] = STATUS_UNTOUCHED;
        let gpa = self.head.gpa();
        segments.push(gpa, size_of::<RequestHeader>() as u32, false);
        let mut range = |sector, count, flags| {
            let range = RangeSegment {
                sector,
                count,
                flags,
            };
            head[RANGE_AT..RANGE_AT + size_of::<RangeSegment>()].copy_from_slice(range.as_bytes());
            segments.push(
                gpa + RANGE_AT as u64,
                size_of::<RangeSegment>() as u32,
                false,
            );
        };
        match &self.request {
            // Lengths were checked against `MAX_BLOCK_BYTES`.
            Request::Read { buf, .. } => segments.push(buf.gpa(), buf.len() as u32, true),
            Request::Write { buf, .. } => segments.push(buf.gpa(), buf.len() as u32, false),
            Request::Flush => {}
            Request::Discard { sector, count } => range(*sector, *count, 0),
            Request::WriteZeroes {
                sector,
                count,
                unmap,
            } => range(*sector, *count, if *unmap { RANGE_UNMAP } else { 0 }),
            Request::GetId => segments.push(gpa + ID_AT as u64, ID_LEN as u32, true),
        }
        segments.push(gpa + STATUS_AT as u64, 1, true);
        self.head.write(0, &head);
    }
}

impl Submitted {
    /// What the device made of it, and the head buffer for the next one.
    pub(super) fn complete(self, written: u32) -> (Completion, DmaBuf) {
        let mut code = [STATUS_UNTOUCHED];
        self.head.read(STATUS_AT, &mut code);
        // Real backends leave the status byte, and what is not data, out of the length. The byte
        // itself says more: it was another one before.
        let due = match &self.request {
            Request::Read { buf, .. } => buf.len() as u64,
            _ => 0,
        };
        let result = match code[0] {
            // The device says that it wrote less than all: some of the buffer would be stale.
            status::OK if u64::from(written) < due => Err(Error::Io),
            status::OK => Ok(()),
            status::UNSUPP => Err(Error::Unsupported),
            _ => Err(Error::Io),
        };
        let id = matches!(self.request, Request::GetId)
            .then(|| {
                let mut id = [0; ID_LEN];
                self.head.read(ID_AT, &mut id);
                id
            })
            .filter(|_| result.is_ok());
        self.finish(result, id)
    }

    /// Ends it with an error, without looking at what the device wrote.
    pub(super) fn fail(self, error: Error) -> (Completion, DmaBuf) {
        self.finish(Err(error), None)
    }

    fn finish(self, result: Result<(), Error>, id: Option<[u8; ID_LEN]>) -> (Completion, DmaBuf) {
        let buf = match self.request {
            Request::Read { buf, .. } | Request::Write { buf, .. } => Some(buf),
            _ => None,
        };
        let completion = Completion {
            token: self.token,
            result,
            buf,
            id,
        };
        (completion, self.head)
    }
}
