//! Headers and frames, copied into receive buffers.

use super::is_plain;
use pv_abi::virtio::net::{HashReport, Header};
use vm_memory::{VolatileMemory, VolatileSlice};
use zerocopy::IntoBytes;

/// Writes the first `len` bytes of a header, with this in the place of its count of buffers; all
/// but the shortest in two steps.
#[inline]
pub(super) fn put_header(to: &VolatileSlice<'_, ()>, header: &Header, buffers: u16, len: usize) {
    let header = Header {
        num_buffers: buffers,
        ..*header
    };
    if len == size_of::<Header>()
        && let (Ok(low), Ok(high)) = (to.get_ref::<u64>(0), to.get_ref::<u32>(8))
        && is_plain(&header)
    {
        // Zero but for the count, and not read back from where it was put together: that would
        // wait for the memory of the buffers before.
        low.store(0);
        high.store((u32::from(buffers) << 16).to_le());
        return;
    }
    to.copy_from(header.as_bytes().get(..len).unwrap_or_default());
}

/// Longest header: with a hash report.
const MOST_HEADER: usize = size_of::<Header>() + size_of::<HashReport>();

/// Bytes of a header and a frame, taken from the front.
#[derive(Debug)]
pub(super) struct Source<'s> {
    header: [u8; MOST_HEADER],
    /// What is left of the header.
    head: std::ops::Range<usize>,
    pieces: &'s [VolatileSlice<'s, ()>],
    offset: usize,
}

impl<'s> Source<'s> {
    pub(super) fn new(pieces: &'s [VolatileSlice<'s, ()>], hash: Option<HashReport>) -> Source<'s> {
        let mut header = [0; MOST_HEADER];
        if let (Some(hash), Some(to)) =
            (hash, header.last_chunk_mut::<{ size_of::<HashReport>() }>())
        {
            to.copy_from_slice(hash.as_bytes());
        }
        Source {
            header,
            head: 0..0,
            pieces,
            offset: 0,
        }
    }

    /// A header comes next.
    pub(super) fn head(&mut self, header: Header, len: usize) {
        for (to, from) in self.header.iter_mut().zip(header.as_bytes()) {
            *to = *from;
        }
        self.head = 0..len;
    }

    /// Fills `to`, or as much of it as there are bytes for.
    pub(super) fn copy_into(&mut self, to: &VolatileSlice<'_, ()>) {
        let mut at = 0;
        if let Some(left) = self.header.get(self.head.clone()) {
            at = left.len().min(to.len());
            to.copy_from(left.get(..at).unwrap_or_default());
            self.head.start += at;
        }
        while at < to.len() {
            let Some(piece) = self.pieces.first() else {
                return;
            };
            let take = (piece.len() - self.offset).min(to.len() - at);
            // Both ranges are inside their slices.
            if let (Ok(from), Ok(to)) = (piece.subslice(self.offset, take), to.offset(at)) {
                from.copy_to_volatile_slice(to);
            }
            at += take;
            self.offset += take;
            if self.offset == piece.len() {
                self.pieces = self.pieces.get(1..).unwrap_or_default();
                self.offset = 0;
            }
        }
    }
}
