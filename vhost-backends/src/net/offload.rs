//! What a receiver cannot do itself: checksums completed and large frames cut, in software.
//!
//! In comes a frame with the offloads that its sender asked for, and the ones that its receiver
//! takes; out go frames that need no more than that. Everything is done on a copy, so that a
//! sender that changes its frame meanwhile changes nothing here.

use super::frame::{ETHERNET_LEN, Frame, be16};
use pv_abi::virtio::net::{Header, feature, gso, header_flag};
use vm_memory::VolatileSlice;

/// What a receiver of frames takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Partial checksums.
    pub checksum: bool,
    /// TCP on IPv4 in large frames.
    pub tso4: bool,
    /// TCP on IPv6 in large frames.
    pub tso6: bool,
    /// Those with ECN.
    pub ecn: bool,
    /// UDP on IPv4 in large frames.
    pub uso4: bool,
    /// UDP on IPv6 in large frames.
    pub uso6: bool,
}

impl Offloads {
    /// Every one.
    pub const ALL: Offloads = Offloads {
        checksum: true,
        tso4: true,
        tso6: true,
        ecn: true,
        uso4: true,
        uso6: true,
    };

    /// What a driver with these features takes (virtio 1.3 §5.1.3.1).
    pub fn of_guest(features: u64) -> Offloads {
        let has = |bit| features & bit != 0;
        Offloads {
            checksum: has(feature::GUEST_CSUM),
            tso4: has(feature::GUEST_TSO4),
            tso6: has(feature::GUEST_TSO6),
            ecn: has(feature::GUEST_ECN),
            uso4: has(feature::GUEST_USO4),
            uso6: has(feature::GUEST_USO6),
        }
    }

    /// Whether large frames of any kind are taken.
    pub fn any_large(self) -> bool {
        self.tso4 || self.tso6 || self.uso4 || self.uso6
    }

    /// Whether this frame can be received as it is.
    pub(crate) fn take(self, frame: &Frame<'_>) -> bool {
        let header = &frame.header;
        if header.gso_type == gso::NONE {
            return self.checksum || header.flags & header_flag::NEEDS_CSUM == 0;
        }
        let large = match header.gso_type & !gso::ECN {
            gso::TCPV4 => self.tso4,
            gso::TCPV6 => self.tso6,
            _ if Layers::of(&frame.start()).is_some_and(|layers| layers.v6) => self.uso6,
            _ => self.uso4,
        };
        self.checksum && large && (self.ecn || header.gso_type & gso::ECN == 0)
    }
}

/// Room for copies, kept from frame to frame.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    whole: Vec<u8>,
    part: Vec<u8>,
}

/// Calls `each` with frames that ask for nothing, made from `frame`, until it says that there is
/// no use in more. `false`: the frame is not what its header says, and none came of it.
pub(crate) fn complete(
    frame: &Frame<'_>,
    scratch: &mut Scratch,
    each: &mut dyn FnMut(&Frame<'_>) -> bool,
) -> bool {
    let header = frame.header;
    let bytes = frame.copy_to(&mut scratch.whole);
    if header.gso_type != gso::NONE {
        return segment(bytes, header, &mut scratch.part, each);
    }
    if header.flags & header_flag::NEEDS_CSUM != 0 {
        let start = usize::from(header.csum_start);
        let at = start + usize::from(header.csum_offset);
        let Some(covered) = bytes.get(start..) else {
            return false;
        };
        let value = finish(sum(covered));
        // UDP has no zero (RFC 768), and for TCP both zeroes are the same.
        let value = if value == 0 { 0xffff } else { value };
        if !put16(bytes, at, value) {
            return false;
        }
    }
    give(bytes, each);
    true
}

fn give(bytes: &mut [u8], each: &mut dyn FnMut(&Frame<'_>) -> bool) -> bool {
    let len = bytes.len();
    let pieces = [VolatileSlice::from(bytes)];
    each(&Frame::new(Header::default(), &pieces, len))
}

/// Where the layers of a frame begin.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layers {
    /// Of the IP header.
    pub(super) network: usize,
    pub(super) v6: bool,
}

impl Layers {
    /// `None`: not IP. Two VLAN tags are looked behind.
    pub(super) fn of(bytes: &[u8]) -> Option<Layers> {
        let mut at = ETHERNET_LEN - 2;
        for _ in 0..2 {
            if matches!(be16(bytes, at), 0x8100 | 0x88a8) {
                at += 4;
            }
        }
        let network = at + 2;
        match (be16(bytes, at), bytes.get(network)? >> 4) {
            (0x0800, 4) => Some(Layers { network, v6: false }),
            (0x86dd, 6) => Some(Layers { network, v6: true }),
            _ => None,
        }
    }
}

/// TCP flags that only the first, or only the last, segment has.
const FIN_PSH: u8 = 0x09;
const CWR: u8 = 0x80;

/// Cuts a large frame. Each segment has its own lengths, numbers and checksums.
fn segment(
    bytes: &[u8],
    header: Header,
    part: &mut Vec<u8>,
    each: &mut dyn FnMut(&Frame<'_>) -> bool,
) -> bool {
    let transport = usize::from(header.csum_start);
    let udp = header.gso_type & !gso::ECN == gso::UDP_L4;
    let Some(layers) = Layers::of(bytes).filter(|l| transport >= l.least_transport()) else {
        return false;
    };
    let header_len = if udp {
        8
    } else {
        usize::from(bytes.get(transport + 12).copied().unwrap_or(0) >> 4) * 4
    };
    let start = transport + header_len;
    if header_len < 8 || (!udp && header_len < 20) {
        return false;
    }
    let (Some(headers), Some(payload)) = (bytes.get(..start), bytes.get(start..)) else {
        return false;
    };
    let size = usize::from(header.gso_size.max(1));
    let count = payload.len().div_ceil(size).max(1);
    let first_id = be16(bytes, layers.network + 4);
    let sequence = be32(bytes, transport + 4);
    let flags = bytes.get(transport + 13).copied().unwrap_or(0);
    for index in 0..count {
        let from = index * size;
        let data = payload
            .get(from..payload.len().min(from + size))
            .unwrap_or_default();
        part.clear();
        part.extend_from_slice(headers);
        part.extend_from_slice(data);
        // All of these lie in the headers, which are at least as long.
        let ip_len = part.len() - layers.network;
        layers.set_len(part, ip_len, first_id.wrapping_add(index as u16));
        let checksum_at = if udp {
            put16(part, transport + 4, (8 + data.len()) as u16);
            transport + 6
        } else {
            let number = sequence.wrapping_add(from as u32).to_be_bytes();
            if let Some(to) = part.get_mut(transport + 4..transport + 8) {
                to.copy_from_slice(&number);
            }
            let mut now = flags;
            if index + 1 < count {
                now &= !FIN_PSH;
            }
            if index > 0 {
                now &= !CWR;
            }
            if let Some(to) = part.get_mut(transport + 13) {
                *to = now;
            }
            transport + 16
        };
        put16(part, checksum_at, 0);
        let protocol = if udp { 17 } else { 6 };
        let value = finish(
            layers.pseudo(part, protocol, part.len() - transport)
                + sum(part.get(transport..).unwrap_or_default()),
        );
        put16(
            part,
            checksum_at,
            if udp && value == 0 { 0xffff } else { value },
        );
        if !give(part, each) {
            break;
        }
    }
    true
}

impl Layers {
    /// The transport header cannot begin before this.
    fn least_transport(self) -> usize {
        self.network + if self.v6 { 40 } else { 20 }
    }

    /// Writes the lengths, and what else in an IPv4 header differs between segments.
    fn set_len(self, bytes: &mut [u8], len: usize, id: u16) {
        if self.v6 {
            put16(bytes, self.network + 4, len.saturating_sub(40) as u16);
            return;
        }
        put16(bytes, self.network + 2, len as u16);
        put16(bytes, self.network + 4, id);
        put16(bytes, self.network + 10, 0);
        let words = bytes.get(self.network).copied().unwrap_or(0) & 0xf;
        let end = self.network + usize::from(words.max(5)) * 4;
        let value = finish(sum(bytes.get(self.network..end).unwrap_or_default()));
        put16(bytes, self.network + 10, value);
    }

    /// The sum of the pseudo header (RFC 9293 §3.1, RFC 8200 §8.1).
    fn pseudo(self, bytes: &[u8], protocol: u8, len: usize) -> u64 {
        let (from, to) = if self.v6 { (8, 40) } else { (12, 20) };
        let addresses = bytes.get(self.network + from..self.network + to);
        sum(addresses.unwrap_or_default()) + u64::from(protocol) + len as u64
    }
}

/// Sum of 16-bit words in network order, an odd byte padded with zero (RFC 1071).
pub(super) fn sum(bytes: &[u8]) -> u64 {
    let mut total = 0u64;
    let chunks = bytes.chunks_exact(8);
    let rest = chunks.remainder();
    for chunk in chunks {
        let mut eight = [0; 8];
        eight.copy_from_slice(chunk);
        let value = u64::from_be_bytes(eight);
        total += (value >> 32) + (value & 0xffff_ffff);
    }
    for pair in rest.chunks(2) {
        let low = pair.get(1).copied().unwrap_or(0);
        total += u64::from(u16::from_be_bytes([pair[0], low]));
    }
    total
}

/// Folds a sum and takes its complement.
pub(super) fn finish(total: u64) -> u16 {
    let mut folded = total;
    while folded > 0xffff {
        folded = (folded & 0xffff) + (folded >> 16);
    }
    !(folded as u16)
}

fn put16(bytes: &mut [u8], at: usize, value: u16) -> bool {
    match bytes.get_mut(at..at + 2) {
        Some(to) => {
            to.copy_from_slice(&value.to_be_bytes());
            true
        }
        None => false,
    }
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from(be16(bytes, at)) << 16 | u32::from(be16(bytes, at + 2))
}
