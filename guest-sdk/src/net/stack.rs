//! A queue pair for network stacks that want slices: one copy in each direction, and the checksums
//! that a stack and a device leave to each other.
//!
//! A stack knows checksums that are done or not done, virtio knows ones that are done halfway. So a
//! frame that goes out gets the sum of its pseudo header, where the device does the rest; and a frame
//! that comes in is verified here, unless the device did it or there was no wire on the way.

use super::{
    Checksum, Cut, Error, Nic, Offload, PartialChecksum, Receiver, Segmentation, SendErrorKind,
    Transmitter,
};
use crate::limits::{MAX_DROPS, MAX_FRAME};
use crate::platform::Platform;
use alloc::vec::Vec;
use pv_abi::virtio::net::feature;

const ETHERNET: usize = 14;
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const TCP: u8 = 6;
const UDP: u8 = 17;

/// Both halves of a pair.
pub(super) struct Port<P: Platform> {
    pub(super) inbound: Inbound<P>,
    pub(super) outbound: Outbound<P>,
}

/// The receiving half, with the frame that a token is about.
pub(super) struct Inbound<P: Platform> {
    pub(super) receiver: Receiver<P>,
    pub(super) scratch: Vec<u8>,
    pub(super) error: Option<Error>,
    /// Frames whose checksum is wrong.
    pub(super) bad_checksums: u64,
}

/// The sending half.
pub(super) struct Outbound<P: Platform> {
    pub(super) transmitter: Transmitter<P>,
    scratch: Vec<u8>,
    /// Whether somebody promises to flush.
    pub(super) batching: bool,
    pub(super) error: Option<Error>,
    /// Frames that could not be sent.
    pub(super) unsent: u64,
}

impl<P: Platform> Port<P> {
    pub(super) fn new(receiver: Receiver<P>, transmitter: Transmitter<P>) -> Self {
        Port {
            inbound: Inbound {
                receiver,
                scratch: Vec::new(),
                error: None,
                bad_checksums: 0,
            },
            outbound: Outbound {
                transmitter,
                scratch: Vec::new(),
                batching: false,
                error: None,
                unsent: 0,
            },
        }
    }

    pub(super) fn nic(&self) -> Nic<P> {
        self.inbound.receiver.nic()
    }

    pub(super) fn error(&self) -> Option<Error> {
        self.inbound.error.or(self.outbound.error)
    }
}

impl<P: Platform> Inbound<P> {
    /// Copies the next good frame to `scratch`; whether there was one.
    pub(super) fn next(&mut self) -> bool {
        for _ in 0..MAX_DROPS {
            let frame = match self.receiver.poll() {
                Ok(frame) => frame,
                Err(error) => {
                    self.error = Some(error);
                    return false;
                }
            };
            self.error = None;
            let Some(frame) = frame else {
                return false;
            };
            self.scratch.resize(frame.len(), 0);
            frame.read(0, &mut self.scratch);
            let unverified = frame.checksum() == Checksum::Unverified;
            self.receiver.recycle(frame);
            if !unverified || is_sound(&self.scratch) {
                return true;
            }
            self.bad_checksums += 1;
        }
        false
    }
}

impl<P: Platform> Outbound<P> {
    /// Whether a frame can be sent now.
    #[cfg(feature = "smoltcp")]
    pub(super) fn has_room(&mut self) -> bool {
        if self.transmitter.has_room() && self.error.is_none() {
            return true;
        }
        match self.transmitter.poll() {
            Ok(_) => self.error = None,
            Err(error) => self.error = Some(error),
        }
        self.error.is_none() && self.transmitter.has_room()
    }

    /// Sends the frame that `fill` writes; `cut` is the size of its segments.
    pub(super) fn send<R>(
        &mut self,
        len: usize,
        cut: Option<u16>,
        fill: impl FnOnce(&mut [u8]) -> R,
    ) -> R {
        self.scratch.clear();
        self.scratch.resize(len, 0);
        let out = fill(&mut self.scratch);
        if !self.submit(cut) {
            self.unsent += 1;
        }
        if !self.batching {
            self.transmitter.kick();
        }
        out
    }

    fn submit(&mut self, cut: Option<u16>) -> bool {
        let features = self.transmitter.nic().features();
        let offload = match features & feature::CSUM {
            0 => Offload::default(),
            _ => leave_checksum(&mut self.scratch, cut),
        };
        let len = self.scratch.len();
        if len > MAX_FRAME {
            return false;
        }
        let Ok(mut packet) = self.transmitter.packet(len) else {
            return false;
        };
        packet.set_len(len);
        packet.write(0, &self.scratch);
        match self.transmitter.submit(packet, offload) {
            Ok(()) => true,
            Err(refused) => {
                if let SendErrorKind::Broken(broken) = refused.kind {
                    self.error = Some(Error::Broken(broken));
                }
                false
            }
        }
    }
}

/// A TCP or UDP segment in a frame.
struct Segment {
    /// Where it begins and ends; behind the end there may be padding.
    start: usize,
    end: usize,
    protocol: u8,
    ipv6: bool,
}

impl Segment {
    /// Finds it: not in a fragment, and not behind IPv6 extension headers.
    fn find(frame: &[u8]) -> Option<Segment> {
        let word = |at: usize| Some(u16::from_be_bytes([*frame.get(at)?, *frame.get(at + 1)?]));
        let ip = ETHERNET;
        let (start, end, protocol, ipv6) = match word(12)? {
            IPV4 => {
                let version = *frame.get(ip)?;
                let fragment = word(ip + 6)? & 0x3fff;
                if version >> 4 != 4 || fragment != 0 {
                    return None;
                }
                let start = ip + 4 * usize::from(version & 0xf);
                let end = ip + usize::from(word(ip + 2)?);
                (start, end, *frame.get(ip + 9)?, false)
            }
            IPV6 => {
                let start = ip + 40;
                let end = start + usize::from(word(ip + 4)?);
                (start, end, *frame.get(ip + 6)?, true)
            }
            _ => return None,
        };
        let segment = Segment {
            start,
            end,
            protocol,
            ipv6,
        };
        let least = match protocol {
            TCP => 20,
            UDP => 8,
            _ => return None,
        };
        (start >= ip + 20 && start + least <= end && end <= frame.len()).then_some(segment)
    }

    /// From its start to its checksum.
    fn checksum_offset(&self) -> usize {
        if self.protocol == TCP { 16 } else { 6 }
    }

    /// How it is cut into pieces of `size` bytes; not at all, if it fits in one.
    fn cut(&self, frame: &[u8], size: u16) -> Option<Segmentation> {
        if self.protocol != TCP {
            return None;
        }
        let header = self.start + 4 * usize::from(frame.get(self.start + 12)? >> 4);
        (self.end > header + usize::from(size)).then_some(Segmentation {
            cut: if self.ipv6 { Cut::Tcp6 } else { Cut::Tcp4 },
            size,
            header_len: header as u16,
            ecn: false,
        })
    }

    /// The sum over addresses, protocol and length.
    fn pseudo_header(&self, frame: &[u8]) -> u32 {
        let addresses = if self.ipv6 { 22..54 } else { 26..34 };
        // At most 65,535, as both IP versions count in 16 bits.
        let len = (self.end - self.start) as u32;
        sum(&frame[addresses]) + u32::from(self.protocol) + len
    }
}

/// Writes the sum of the pseudo header where the checksum goes, and says what is left to do.
fn leave_checksum(frame: &mut [u8], cut: Option<u16>) -> Offload {
    let Some(segment) = Segment::find(frame) else {
        return Offload::default();
    };
    let at = segment.start + segment.checksum_offset();
    let partial = fold(segment.pseudo_header(frame));
    frame[at..at + 2].copy_from_slice(&partial.to_be_bytes());
    // Both are below the length of the largest header.
    let checksum = PartialChecksum {
        start: segment.start as u16,
        offset: segment.checksum_offset() as u16,
    };
    Offload {
        checksum: Some(checksum),
        segmentation: cut.and_then(|size| segment.cut(frame, size)),
    }
}

/// Whether a frame's TCP or UDP checksum is right, as far as it has one.
fn is_sound(frame: &[u8]) -> bool {
    let Some(segment) = Segment::find(frame) else {
        return true;
    };
    let at = segment.start + segment.checksum_offset();
    let none = segment.protocol == UDP && frame[at..at + 2] == [0, 0];
    if none {
        // RFC 768 allows it, and RFC 8200 §8.1 does not.
        return !segment.ipv6;
    }
    let total = segment.pseudo_header(frame) + sum(&frame[segment.start..segment.end]);
    fold(total) == 0xffff
}

/// The sum of big-endian words; a last odd byte is the first of one. Never overflows: there are at
/// most 2^15 words.
fn sum(bytes: &[u8]) -> u32 {
    let words = bytes.chunks_exact(2);
    let odd = words
        .remainder()
        .first()
        .map_or(0, |&byte| u32::from(byte) << 8);
    let total: u32 = words
        .map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])))
        .sum();
    total + odd
}

fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A UDP datagram of `payload` bytes over either IP version, its checksum complete.
    fn datagram(payload: usize, ipv6: bool) -> Vec<u8> {
        let mut frame = alloc::vec![0; ETHERNET];
        let length = (8 + payload) as u16;
        if ipv6 {
            frame[12..14].copy_from_slice(&IPV6.to_be_bytes());
            frame.extend_from_slice(&[0x60, 0, 0, 0]);
            frame.extend_from_slice(&length.to_be_bytes());
            frame.extend_from_slice(&[UDP, 64]);
            frame.extend((0..32u8).map(|i| i * 7 + 1));
        } else {
            frame[12..14].copy_from_slice(&IPV4.to_be_bytes());
            frame.extend_from_slice(&[0x45, 0]);
            frame.extend_from_slice(&(20 + length).to_be_bytes());
            frame.extend_from_slice(&[0, 0, 0, 0, 64, UDP, 0, 0, 10, 0, 2, 15, 192, 168, 255, 1]);
        }
        frame.extend_from_slice(&[0x12, 0x34, 0, 80]);
        frame.extend_from_slice(&length.to_be_bytes());
        frame.extend_from_slice(&[0, 0]);
        frame.extend((0..payload).map(|i| (i * 31) as u8));
        let offload = leave_checksum(&mut frame, None);
        complete(&mut frame, offload.checksum.expect("udp has one"));
        frame
    }

    /// What a device does.
    fn complete(frame: &mut [u8], checksum: PartialChecksum) {
        let start = usize::from(checksum.start);
        let at = start + usize::from(checksum.offset);
        let done = !fold(sum(&frame[start..]));
        frame[at..at + 2].copy_from_slice(&done.to_be_bytes());
    }

    #[test]
    fn what_is_left_to_the_device_adds_up() {
        for ipv6 in [false, true] {
            for payload in [0, 1, 2, 99, 1400] {
                let frame = datagram(payload, ipv6);
                assert!(is_sound(&frame), "{payload} {ipv6}");
                for byte in (ETHERNET + 12..frame.len()).step_by(7) {
                    let mut bad = frame.clone();
                    bad[byte] ^= 0x10;
                    // A header that is none any more has no checksum to be wrong.
                    assert!(!is_sound(&bad) || Segment::find(&bad).is_none(), "{byte}");
                }
                let mut padded = frame.clone();
                padded.resize(frame.len() + 20, 0xee);
                assert!(is_sound(&padded), "padding is not summed");
            }
        }
    }

    #[test]
    fn every_cut_of_a_frame_is_harmless() {
        for ipv6 in [false, true] {
            let whole = datagram(60, ipv6);
            for len in 0..whole.len() {
                let mut cut = whole[..len].to_vec();
                assert!(is_sound(&cut), "{len}: it has no segment to be wrong");
                assert_eq!(leave_checksum(&mut cut, Some(10)), Offload::default());
            }
        }
    }
}
