//! What stands before a frame: checksums and segmentation that the other side leaves undone.

use super::SendErrorKind;
use crate::limits::{MAX_FRAME, MIN_FRAME};
use pv_abi::virtio::net::{Header, feature, gso, header_flag};

/// Bytes of the header, in both directions (with `VERSION_1`, virtio 1.3 §5.1.6).
pub(super) const HEADER_LEN: usize = size_of::<Header>();

/// A checksum that is not complete: the place holds the sum over the pseudo header only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PartialChecksum {
    /// Where in the frame the bytes that are summed begin; they go to its end.
    pub start: u16,
    /// From there to the two bytes of the checksum.
    pub offset: u16,
}

/// What is known of a received frame's checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checksum {
    /// Nothing: verify it.
    Unverified,
    /// The device has verified it (`DATA_VALID`).
    Verified,
    /// It comes from a neighbour that left it undone, so there was no wire (`NEEDS_CSUM`).
    Partial(PartialChecksum),
}

/// How a frame of more than the MTU is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// TCP over IPv4.
    Tcp4,
    /// TCP over IPv6.
    Tcp6,
    /// UDP, one datagram for each piece.
    Udp,
}

/// Segmentation that is left to the other side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segmentation {
    /// Of which kind.
    pub cut: Cut,
    /// Bytes of payload in each piece; not zero.
    pub size: u16,
    /// Bytes of all headers; a hint.
    pub header_len: u16,
    /// Whether the ECN bit is set (TCP only).
    pub ecn: bool,
}

/// What a frame that is sent leaves to the device; nothing by default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offload {
    /// A checksum to complete.
    pub checksum: Option<PartialChecksum>,
    /// Segmentation, which needs a checksum to complete.
    pub segmentation: Option<Segmentation>,
}

impl Offload {
    /// Whether a device with these features can be asked this for a frame of this length.
    pub(super) fn check(&self, len: usize, features: u64) -> Result<(), SendErrorKind> {
        if !(MIN_FRAME..=MAX_FRAME).contains(&len) {
            return Err(SendErrorKind::BadLength);
        }
        let has = |bit: u64| {
            (features & bit == bit)
                .then_some(())
                .ok_or(SendErrorKind::Unsupported)
        };
        if let Some(checksum) = self.checksum {
            has(feature::CSUM)?;
            if !checksum.fits(len) {
                return Err(SendErrorKind::BadOffload);
            }
        }
        let Some(cut) = self.segmentation else {
            return Ok(());
        };
        has(match cut.cut {
            Cut::Tcp4 => feature::HOST_TSO4,
            Cut::Tcp6 => feature::HOST_TSO6,
            Cut::Udp => feature::HOST_USO,
        })?;
        if cut.ecn {
            has(feature::HOST_ECN)?;
        }
        let tcp = cut.cut != Cut::Udp;
        if self.checksum.is_none()
            || cut.size == 0
            || usize::from(cut.header_len) > len
            || (cut.ecn && !tcp)
        {
            return Err(SendErrorKind::BadOffload);
        }
        Ok(())
    }

    /// The header that says so.
    pub(super) fn header(&self) -> Header {
        let mut header = Header::default();
        if let Some(checksum) = self.checksum {
            header.flags = header_flag::NEEDS_CSUM;
            header.csum_start = checksum.start;
            header.csum_offset = checksum.offset;
        }
        if let Some(cut) = self.segmentation {
            let kind = match cut.cut {
                Cut::Tcp4 => gso::TCPV4,
                Cut::Tcp6 => gso::TCPV6,
                Cut::Udp => gso::UDP_L4,
            };
            header.gso_type = kind | if cut.ecn { gso::ECN } else { 0 };
            header.gso_size = cut.size;
            header.hdr_len = cut.header_len;
        }
        header
    }
}

impl PartialChecksum {
    /// Whether the two bytes lie inside of a frame of this length.
    fn fits(self, len: usize) -> bool {
        usize::from(self.start) + usize::from(self.offset) + 2 <= len
    }
}

/// What a received frame's header says, if it can be true of a frame of this length from a device
/// with these features.
pub(super) fn parse(
    header: Header,
    len: usize,
    features: u64,
) -> Option<(Checksum, Option<Segmentation>)> {
    let partial = PartialChecksum {
        start: header.csum_start,
        offset: header.csum_offset,
    };
    let checksum = match header.flags & (header_flag::NEEDS_CSUM | header_flag::DATA_VALID) {
        0 => Checksum::Unverified,
        header_flag::DATA_VALID => Checksum::Verified,
        _ => Checksum::Partial(partial),
    };
    if checksum != Checksum::Unverified && features & feature::GUEST_CSUM == 0 {
        return None;
    }
    if matches!(checksum, Checksum::Partial(_)) && !partial.fits(len) {
        return None;
    }
    let ecn = header.gso_type & gso::ECN != 0;
    let (cut, needed) = match header.gso_type & !gso::ECN {
        gso::NONE if ecn => return None,
        gso::NONE => return Some((checksum, None)),
        gso::TCPV4 => (Cut::Tcp4, feature::GUEST_TSO4),
        gso::TCPV6 => (Cut::Tcp6, feature::GUEST_TSO6),
        // Which IP version it is stands in the frame; either feature lets it through here.
        gso::UDP_L4 => (Cut::Udp, feature::GUEST_USO4 | feature::GUEST_USO6),
        _ => return None,
    };
    let segmentation = Segmentation {
        cut,
        size: header.gso_size,
        header_len: header.hdr_len,
        ecn,
    };
    let possible = features & needed != 0
        && header.gso_size != 0
        && !(ecn && (cut == Cut::Udp || features & feature::GUEST_ECN == 0));
    possible.then_some((checksum, Some(segmentation)))
}
