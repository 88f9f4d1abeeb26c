//! Hashes of packets (virtio 1.3 §5.1.6.4.3): which queue they go to, and what is reported.

use super::frame::{Frame, PEEK_LEN, be16};
use super::limits::{MAX_RSS_KEY, MAX_RSS_TABLE};
use super::offload::Layers;
use pv_abi::virtio::net::{HashReport, hash_type};

/// Kinds of hashes that are served: without IPv6 extension headers.
pub(super) const HASH_TYPES: u32 = hash_type::IPV4
    | hash_type::TCPV4
    | hash_type::UDPV4
    | hash_type::IPV6
    | hash_type::TCPV6
    | hash_type::UDPV6;

/// Bytes that the longest hash covers: two IPv6 addresses and two ports.
const MOST_INPUT: usize = 36;

/// What a driver configured.
#[derive(Debug)]
pub(super) struct Hashing {
    types: u32,
    /// The Toeplitz hash, byte by byte: what each value at each place adds.
    places: Vec<[u32; 256]>,
    /// Pairs of queues; none if hashes are only reported.
    table: Vec<u16>,
    unclassified: u16,
}

impl Hashing {
    /// Parses `MQ_RSS_CONFIG`; pairs are below `pairs`.
    pub(super) fn parse_rss(body: &[u8], pairs: u16) -> Option<Hashing> {
        let (types, rest) = le32(body)?;
        let (mask, rest) = le16(rest)?;
        let (unclassified, rest) = le16(rest)?;
        let len = usize::from(mask) + 1;
        if !len.is_power_of_two() || len > MAX_RSS_TABLE {
            return None;
        }
        let (table, rest) = rest.split_at_checked(2 * len)?;
        let (_max_tx, rest) = le16(rest)?;
        let (pairs_of_table, _) = table.as_chunks::<2>();
        let table: Vec<u16> = pairs_of_table
            .iter()
            .map(|e| u16::from_le_bytes(*e))
            .collect();
        if unclassified >= pairs || table.iter().any(|pair| *pair >= pairs) {
            return None;
        }
        Hashing::with_key(types, rest, table, unclassified)
    }

    /// Parses `MQ_HASH_CONFIG`.
    pub(super) fn parse_report(body: &[u8]) -> Option<Hashing> {
        let (types, rest) = le32(body)?;
        let (_reserved, rest) = rest.split_at_checked(8)?;
        Hashing::with_key(types, rest, Vec::new(), 0)
    }

    fn with_key(types: u32, rest: &[u8], table: Vec<u16>, unclassified: u16) -> Option<Hashing> {
        let (len, key) = rest.split_first()?;
        let fits = usize::from(*len) == key.len() && key.len() <= MAX_RSS_KEY;
        if !fits || types & !HASH_TYPES != 0 {
            return None;
        }
        Some(Hashing {
            types,
            places: places(key),
            table,
            unclassified,
        })
    }

    /// The pair that a frame goes to; `None` if that is not decided here.
    pub(super) fn pair(&self, frame: &Frame<'_>) -> Option<u16> {
        let last = self.table.len().checked_sub(1)?;
        Some(match self.hash(&frame.start()) {
            Some((value, _)) => *self.table.get(value as usize & last)?,
            None => self.unclassified,
        })
    }

    /// Whether it decides on queues.
    pub(super) fn spreads(&self) -> bool {
        !self.table.is_empty()
    }

    /// What a driver is told about a frame.
    pub(super) fn report(&self, frame: &Frame<'_>) -> HashReport {
        let (value, kind) = self.hash(&frame.start()).unwrap_or((0, 0));
        // One plus the position of the kind's bit; zero for none.
        let report = if kind == 0 {
            0
        } else {
            kind.trailing_zeros() as u16 + 1
        };
        HashReport {
            value: value.to_le(),
            report: report.to_le(),
            reserved: 0,
        }
    }

    /// The hash, and its kind.
    fn hash(&self, start: &[u8; PEEK_LEN]) -> Option<(u32, u32)> {
        let layers = Layers::of(start)?;
        let at = layers.network;
        let (addresses, protocol, transport) = if layers.v6 {
            (at + 8..at + 40, *start.get(at + 6)?, at + 40)
        } else {
            let words = usize::from(*start.get(at)? & 0xf);
            // Of a fragment, only the first has ports.
            let whole = be16(start, at + 6) & 0x3fff == 0;
            let protocol = if whole { *start.get(at + 9)? } else { 0 };
            (at + 12..at + 20, protocol, at + 4 * words)
        };
        let (tcp, udp, ip) = if layers.v6 {
            (hash_type::TCPV6, hash_type::UDPV6, hash_type::IPV6)
        } else {
            (hash_type::TCPV4, hash_type::UDPV4, hash_type::IPV4)
        };
        let ports = start.get(transport..transport + 4);
        let (kind, ports) = match (protocol, ports) {
            (6, Some(ports)) if self.types & tcp != 0 => (tcp, ports),
            (17, Some(ports)) if self.types & udp != 0 => (udp, ports),
            _ if self.types & ip != 0 => (ip, &[][..]),
            _ => return None,
        };
        let bytes = start.get(addresses)?.iter().chain(ports);
        let value = self
            .places
            .iter()
            .zip(bytes)
            .filter_map(|(place, byte)| place.get(usize::from(*byte)))
            .fold(0, |sum, value| sum ^ value);
        Some((value, kind))
    }
}

/// For each place and each value of its byte: the key's windows at its bits that are set.
fn places(key: &[u8]) -> Vec<[u32; 256]> {
    let bit = |index: usize| -> u32 {
        let byte = key.get(index / 8).copied().unwrap_or(0);
        u32::from(byte >> (7 - index % 8) & 1)
    };
    let window = |from: usize| (0..32).fold(0, |word, i| word << 1 | bit(from + i));
    let place = |index: usize| {
        let windows: [u32; 8] = std::array::from_fn(|i| window(8 * index + i));
        std::array::from_fn(|byte| {
            let set = windows
                .iter()
                .enumerate()
                .filter(|(i, _)| byte >> (7 - i) & 1 == 1);
            set.fold(0, |sum, (_, window)| sum ^ window)
        })
    };
    (0..MOST_INPUT).map(place).collect()
}

fn le32(bytes: &[u8]) -> Option<(u32, &[u8])> {
    let (four, rest) = bytes.split_first_chunk::<4>()?;
    Some((u32::from_le_bytes(*four), rest))
}

fn le16(bytes: &[u8]) -> Option<(u16, &[u8])> {
    let (two, rest) = bytes.split_first_chunk::<2>()?;
    Some((u16::from_le_bytes(*two), rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The key and the packets that implementations are compared by.
    const KEY: [u8; 40] = [
        0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f,
        0xb0, 0xd0, 0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30,
        0xf2, 0x0c, 0x6a, 0x42, 0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
    ];

    fn hashing(types: u32) -> Hashing {
        let mut body = types.to_le_bytes().to_vec();
        body.extend([0; 8]);
        body.push(40);
        body.extend(KEY);
        Hashing::parse_report(&body).unwrap()
    }

    fn v4(protocol: u8, fragment: u8) -> [u8; PEEK_LEN] {
        let mut bytes = [0; PEEK_LEN];
        bytes[12..16].copy_from_slice(&[0x08, 0, 0x45, 0]);
        bytes[20] = fragment;
        bytes[23] = protocol;
        bytes[26..34].copy_from_slice(&[66, 9, 149, 187, 161, 142, 100, 80]);
        bytes[34..36].copy_from_slice(&2794u16.to_be_bytes());
        bytes[36..38].copy_from_slice(&1766u16.to_be_bytes());
        bytes
    }

    fn v6(protocol: u8) -> [u8; PEEK_LEN] {
        let mut bytes = [0; PEEK_LEN];
        bytes[12..15].copy_from_slice(&[0x86, 0xdd, 0x60]);
        bytes[20] = protocol;
        let (from, to) = ("3ffe:2501:200:1fff::7", "3ffe:2501:200:3::1");
        for (at, text) in [(22, from), (38, to)] {
            let address: std::net::Ipv6Addr = text.parse().unwrap();
            bytes[at..at + 16].copy_from_slice(&address.octets());
        }
        bytes[54..56].copy_from_slice(&2794u16.to_be_bytes());
        bytes[56..58].copy_from_slice(&1766u16.to_be_bytes());
        bytes
    }

    #[test]
    fn known_hashes() {
        let all = hashing(HASH_TYPES);
        assert_eq!(all.hash(&v4(6, 0)), Some((0x51cc_c178, hash_type::TCPV4)));
        assert_eq!(all.hash(&v4(17, 0)), Some((0x51cc_c178, hash_type::UDPV4)));
        assert_eq!(all.hash(&v4(1, 0)), Some((0x323e_8fc2, hash_type::IPV4)));
        assert_eq!(
            all.hash(&v4(6, 0x20)),
            Some((0x323e_8fc2, hash_type::IPV4)),
            "a fragment"
        );
        assert_eq!(all.hash(&v6(6)), Some((0x4020_7d3d, hash_type::TCPV6)));
        assert_eq!(all.hash(&v6(58)), Some((0x2cc1_8cd5, hash_type::IPV6)));
        let ports = hashing(hash_type::TCPV4);
        assert_eq!(ports.hash(&v4(17, 0)), None);
        assert_eq!(ports.hash(&v6(6)), None);
        assert_eq!(all.hash(&[0; PEEK_LEN]), None, "not IP");
    }

    #[test]
    fn tables_are_checked() {
        let body = |mask: u16, unclassified: u16, table: &[u16], key: usize| {
            let mut body = HASH_TYPES.to_le_bytes().to_vec();
            body.extend(mask.to_le_bytes());
            body.extend(unclassified.to_le_bytes());
            table
                .iter()
                .for_each(|pair| body.extend(pair.to_le_bytes()));
            body.extend(4u16.to_le_bytes());
            body.push(key as u8);
            body.extend(KEY.iter().cycle().take(key));
            body
        };
        let parse = |body: &[u8]| Hashing::parse_rss(body, 4);
        assert!(parse(&body(3, 0, &[0, 1, 2, 3], 40)).is_some());
        for bad in [
            body(2, 0, &[0, 1, 2], 40),
            body(3, 4, &[0, 1, 2, 3], 40),
            body(3, 0, &[0, 1, 2, 4], 40),
            body(3, 0, &[0, 1, 2], 40),
            body(255, 0, &[0; 256], 40),
            body(3, 0, &[0, 1, 2, 3], 41),
        ] {
            assert!(parse(&bad).is_none());
        }
        let good = body(3, 0, &[0, 1, 2, 3], 40);
        for cut in 0..good.len() {
            assert!(parse(&good[..cut]).is_none(), "cut at {cut}");
        }
    }
}
