//! A frame on its way: its header, and where its bytes are.

use super::limits::{MAX_FRAME_LEN, MAX_UDP_SEGMENTS, MIN_FRAME_LEN, MIN_TCP_SEGMENT};
use pv_abi::virtio::net::{Header, feature, gso, header_flag};
use std::cell::OnceCell;
use vm_memory::{Bytes, VolatileMemory, VolatileSlice};
use zerocopy::IntoBytes;

/// Bytes at the start of a frame that its way is chosen by: Ethernet with two VLAN tags and IPv6.
pub(crate) const PEEK_LEN: usize = 64;

/// Bytes that say who sent a frame, to whom, and on which VLAN.
const FIRST_LEN: usize = 16;

/// Bytes of an Ethernet header without a VLAN tag.
pub(crate) const ETHERNET_LEN: usize = 14;

/// An Ethernet frame in memory that somebody else may still change, with the virtio header that
/// goes with it, checked.
#[derive(Clone, Debug)]
pub struct Frame<'f> {
    /// Offloads that the frame asks for. `num_buffers` is zero.
    pub header: Header,
    pieces: &'f [VolatileSlice<'f, ()>],
    len: usize,
    /// Addresses, type and VLAN tag, copied when one is first asked for: whoever lets a frame
    /// through or holds it back sees the same bytes.
    first: OnceCell<[u64; FIRST_LEN / 8]>,
}

impl<'f> Frame<'f> {
    /// A frame in these pieces, which are `len` bytes together.
    #[inline]
    pub fn new(header: Header, pieces: &'f [VolatileSlice<'f, ()>], len: usize) -> Frame<'f> {
        Frame {
            header,
            pieces,
            len,
            first: OnceCell::new(),
        }
    }

    /// Bytes, without the virtio header.
    #[expect(clippy::len_without_is_empty, reason = "a frame has a header at least")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Where its bytes are.
    pub fn pieces(&self) -> &'f [VolatileSlice<'f, ()>] {
        self.pieces
    }

    /// Destination address, as it was when the frame was first looked at.
    pub fn destination(&self) -> Mac {
        Mac::at(self.first(), 0)
    }

    /// Source address.
    pub fn source(&self) -> Mac {
        Mac::at(self.first(), 6)
    }

    /// Frames that it stands for, at most: the segments of a large one.
    pub(crate) fn segments(&self) -> u64 {
        if self.header.gso_type == gso::NONE {
            return 1;
        }
        let payload = (self.len).saturating_sub(self.header.csum_start.into());
        let size = usize::from(self.header.gso_size.max(1));
        payload.div_ceil(size).max(1) as u64
    }

    /// Both addresses, to be compared with those of another frame.
    #[inline]
    pub(crate) fn addresses(&self) -> (u64, u32) {
        let [first, second] = *self.words();
        // Four bytes of the second word.
        (first, u64::from_le(second) as u32)
    }

    /// Its first bytes, zeroes after its end.
    pub(crate) fn start(&self) -> [u8; PEEK_LEN] {
        let mut start = [0; PEEK_LEN];
        self.copy_start(&mut start);
        for (to, from) in start.iter_mut().zip(self.first()) {
            *to = *from;
        }
        start
    }

    fn first(&self) -> &[u8; FIRST_LEN] {
        zerocopy::transmute_ref!(self.words())
    }

    #[inline]
    fn words(&self) -> &[u64; FIRST_LEN / 8] {
        self.first.get_or_init(|| self.copy_words())
    }

    #[inline]
    fn copy_words(&self) -> [u64; FIRST_LEN / 8] {
        if let Some(piece) = self.pieces.first()
            && let (Ok(first), Ok(second)) = (piece.get_ref::<u64>(0), piece.get_ref::<u64>(8))
        {
            return [first.load(), second.load()];
        }
        let mut words = [0; FIRST_LEN / 8];
        self.copy_start(words.as_mut_bytes());
        words
    }

    fn copy_start(&self, to: &mut [u8]) {
        let mut rest = to;
        for piece in self.pieces {
            // Reads as much as there is room for.
            let n = piece.read(rest, 0).unwrap_or(0);
            rest = rest.get_mut(n..).unwrap_or_default();
            if rest.is_empty() {
                break;
            }
        }
    }

    /// The VLAN that it is tagged for.
    pub fn vlan(&self) -> Option<u16> {
        match (be16(self.first(), 12), be16(self.first(), 14)) {
            (0x8100, tag) => Some(tag & 0xfff),
            _ => None,
        }
    }

    /// Copies all of it to the start of `to`, and gives the copy.
    pub(crate) fn copy_to<'b>(&self, to: &'b mut Vec<u8>) -> &'b mut [u8] {
        to.resize(self.len, 0);
        let mut at = 0;
        for piece in self.pieces {
            let room = to.get_mut(at..).unwrap_or_default();
            at += piece.read(room, 0).unwrap_or(0);
        }
        to.truncate(at);
        to
    }
}

/// An Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    fn at(bytes: &[u8], offset: usize) -> Mac {
        let mut mac = [0; 6];
        if let Some(from) = bytes.get(offset..offset + 6) {
            mac.copy_from_slice(from);
        }
        Mac(mac)
    }

    /// To every station, or to a group of them.
    pub fn is_group(self) -> bool {
        self.0[0] & 1 != 0
    }

    /// To every station.
    pub fn is_broadcast(self) -> bool {
        self.0 == [0xff; 6]
    }
}

impl std::fmt::Display for Mac {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl std::str::FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Mac, String> {
        let bad = || format!("{text:?} is not an address such as 52:54:00:12:34:56");
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2);
            let part = part.ok_or_else(bad)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        if parts.next().is_some() {
            return Err(bad());
        }
        if Mac(bytes).is_group() || bytes == [0; 6] {
            return Err(format!("{text} is not the address of one station"));
        }
        Ok(Mac(bytes))
    }
}

/// Why a frame that a driver sends is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BadFrame {
    /// Shorter than an Ethernet header, or longer than any frame.
    Length,
    /// Its header asks for what was not negotiated, or does not fit the frame.
    Header,
}

/// Whether a frame may have this length.
pub(crate) fn check_len(len: u64) -> Result<usize, BadFrame> {
    usize::try_from(len)
        .ok()
        .filter(|len| (MIN_FRAME_LEN..=MAX_FRAME_LEN).contains(len))
        .ok_or(BadFrame::Length)
}

/// Checks what a driver with these features asks for a frame of `len` bytes (virtio 1.3 §5.1.6.2).
/// `num_buffers` is whatever it likes, since drivers leave it as it was.
#[inline]
pub(crate) fn check_header(header: Header, len: usize, features: u64) -> Result<Header, BadFrame> {
    if asks_nothing(header.flags, header.gso_type) {
        return Ok(Header::default());
    }
    check_offloads(header, len, features)
}

/// Whether a header with these asks for nothing.
#[inline]
pub(crate) fn asks_nothing(flags: u8, gso_type: u8) -> bool {
    flags & header_flag::NEEDS_CSUM == 0 && gso_type == gso::NONE
}

fn check_offloads(header: Header, len: usize, features: u64) -> Result<Header, BadFrame> {
    let mut checked = Header::default();
    let (start, offset) = (
        usize::from(header.csum_start),
        usize::from(header.csum_offset),
    );
    if header.flags & header_flag::NEEDS_CSUM != 0 {
        let fits = start >= ETHERNET_LEN && start + offset + 2 <= len;
        if features & feature::CSUM == 0 || !fits {
            return Err(BadFrame::Header);
        }
        checked.flags = header_flag::NEEDS_CSUM;
        checked.csum_start = header.csum_start;
        checked.csum_offset = header.csum_offset;
    }
    if header.gso_type == gso::NONE {
        return Ok(checked);
    }
    let (needs, least) = match header.gso_type & !gso::ECN {
        gso::TCPV4 => (feature::HOST_TSO4, 20),
        gso::TCPV6 => (feature::HOST_TSO6, 20),
        gso::UDP_L4 => (feature::HOST_USO, 8),
        _ => return Err(BadFrame::Header),
    };
    let ecn = header.gso_type & gso::ECN != 0;
    if features & needs == 0
        || (ecn && features & feature::HOST_ECN == 0)
        || checked.flags & header_flag::NEEDS_CSUM == 0
        || start + least > len
    {
        return Err(BadFrame::Header);
    }
    let size = usize::from(header.gso_size);
    let worth = if header.gso_type & !gso::ECN == gso::UDP_L4 {
        size > 0 && (len - start - least).div_ceil(size) <= MAX_UDP_SEGMENTS
    } else {
        size >= MIN_TCP_SEGMENT
    };
    if !worth {
        return Err(BadFrame::Header);
    }
    checked.gso_type = header.gso_type;
    checked.gso_size = header.gso_size;
    // A hint, which receivers may rely on as far as it is inside the frame.
    checked.hdr_len = header.hdr_len.min(u16::try_from(len).unwrap_or(u16::MAX));
    Ok(checked)
}

/// Two bytes in network order; zero after the end.
pub(crate) fn be16(bytes: &[u8], at: usize) -> u16 {
    match bytes.get(at..at + 2) {
        Some([high, low]) => u16::from_be_bytes([*high, *low]),
        _ => 0,
    }
}
