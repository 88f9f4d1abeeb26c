//! Offloads completed in software, against a plain definition of each checksum.

use super::frame::{Frame, check_header};
use super::offload::{Offloads, Scratch, complete};
use pv_abi::virtio::net::{Header, feature, gso, header_flag};
use vm_memory::VolatileSlice;

/// The sum of 16-bit words, one after the other, as RFC 1071 has it.
fn plain_sum(bytes: &[u8]) -> u16 {
    let mut total = 0u32;
    for pair in bytes.chunks(2) {
        total += u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |b| u32::from(*b));
        total = (total & 0xffff) + (total >> 16);
    }
    total as u16
}

/// Sum over pseudo header and transport part; all ones if the checksum is right.
fn transport_sum(frame: &[u8], v6: bool, protocol: u8) -> u16 {
    let (from, to, start) = if v6 { (22, 54, 54) } else { (26, 34, 34) };
    let len = (frame.len() - start) as u32;
    let mut bytes = frame[from..to].to_vec();
    bytes.extend(len.to_be_bytes());
    bytes.extend([0, 0, 0, protocol]);
    if v6 && bytes.len() % 2 == 1 {
        bytes.push(0);
    }
    bytes.extend(&frame[start..]);
    plain_sum(&bytes)
}

struct Sample {
    bytes: Vec<u8>,
    header: Header,
    start: usize,
    headers: usize,
}

/// A frame as a driver sends it: the checksum field holds the sum of the pseudo header.
fn sample(v6: bool, udp: bool, payload: usize, segment: u16) -> Sample {
    let start: usize = if v6 { 54 } else { 34 };
    let transport: usize = if udp { 8 } else { 32 };
    let total = transport + payload;
    let mut bytes = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    let protocol = if udp { 17 } else { 6 };
    if v6 {
        bytes.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
        bytes.extend((total as u16).to_be_bytes());
        bytes.extend([protocol, 64]);
        bytes.extend((0..32u8).map(|i| i.wrapping_mul(9)));
    } else {
        bytes.extend([0x08, 0x00, 0x45, 0]);
        bytes.extend(((20 + total) as u16).to_be_bytes());
        bytes.extend([
            0x12, 0xff, 0x40, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
        ]);
    }
    bytes.extend([0x30, 0x39, 0x00, 0x50]);
    let pseudo_from = if v6 { 22 } else { 26 };
    let mut pseudo = bytes[pseudo_from..start].to_vec();
    pseudo.extend((total as u32).to_be_bytes());
    pseudo.extend([0, 0, 0, protocol]);
    let partial = plain_sum(&pseudo).to_be_bytes();
    if udp {
        bytes.extend((total as u16).to_be_bytes());
        bytes.extend(partial);
    } else {
        bytes.extend([0xff, 0xff, 0xff, 0x00, 0, 0, 0, 1, 0x80, 0x99, 1, 2]);
        bytes.extend(partial);
        bytes.extend([0, 0, 1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8]);
    }
    bytes.extend((0..payload).map(|i| (i * 13 + 5) as u8));
    let kind = match (udp, v6) {
        (true, _) => gso::UDP_L4,
        (_, false) => gso::TCPV4,
        (_, true) => gso::TCPV6,
    };
    let header = Header {
        flags: header_flag::NEEDS_CSUM,
        gso_type: if segment > 0 { kind } else { gso::NONE },
        hdr_len: 0,
        gso_size: segment,
        csum_start: start as u16,
        csum_offset: if udp { 6 } else { 16 },
        num_buffers: 0,
    };
    Sample {
        bytes,
        header,
        start,
        headers: start + transport,
    }
}

fn completed(sample: &Sample) -> Vec<Vec<u8>> {
    let mut bytes = sample.bytes.clone();
    let len = bytes.len();
    // In two pieces, of odd lengths.
    let (first, second) = bytes.split_at_mut(37);
    let pieces = [VolatileSlice::from(first), VolatileSlice::from(second)];
    let frame = Frame::new(sample.header, &pieces, len);
    let mut out = Vec::new();
    let done = complete(&frame, &mut Scratch::default(), &mut |plain| {
        assert_eq!(plain.header, Header::default());
        out.push(plain.copy_to(&mut Vec::new()).to_vec());
        true
    });
    assert!(done);
    out
}

const KINDS: [(bool, bool); 4] = [(false, false), (true, false), (false, true), (true, true)];

#[test]
fn checksums_are_completed() {
    for (v6, udp) in KINDS {
        for payload in [0, 1, 2, 7, 8, 9, 1000, 1459] {
            let sample = sample(v6, udp, payload, 0);
            let out = completed(&sample);
            assert_eq!(out.len(), 1);
            let protocol = if udp { 17 } else { 6 };
            assert_eq!(
                transport_sum(&out[0], v6, protocol),
                0xffff,
                "{v6} {udp} {payload}"
            );
            assert_eq!(out[0][sample.headers..], sample.bytes[sample.headers..]);
        }
    }
}

#[test]
fn large_frames_are_cut() {
    for (v6, udp) in KINDS {
        for (payload, size) in [
            (1, 1000),
            (1000, 1000),
            (1001, 1000),
            (65_000, 1448),
            (5000, 7),
        ] {
            let sample = sample(v6, udp, payload, size);
            let out = completed(&sample);
            assert_eq!(out.len(), payload.div_ceil(usize::from(size)));
            let mut joined: Vec<u8> = Vec::new();
            for (index, segment) in out.iter().enumerate() {
                let protocol = if udp { 17 } else { 6 };
                assert_eq!(transport_sum(segment, v6, protocol), 0xffff);
                let len = segment.len() - if v6 { 54 } else { 14 };
                let at = if v6 { 18 } else { 16 };
                assert_eq!(segment[at..at + 2], (len as u16).to_be_bytes());
                if !v6 {
                    assert_eq!(plain_sum(&segment[14..34]), 0xffff, "the IP header's");
                    let id = 0x12ffu16.wrapping_add(index as u16);
                    assert_eq!(segment[18..20], id.to_be_bytes());
                }
                let t = sample.start;
                if udp {
                    assert_eq!(
                        segment[t + 4..t + 6],
                        ((segment.len() - t) as u16).to_be_bytes()
                    );
                } else {
                    let number = 0xffff_ff00u32.wrapping_add((index * usize::from(size)) as u32);
                    assert_eq!(segment[t + 4..t + 8], number.to_be_bytes());
                    let (first, last) = (index == 0, index + 1 == out.len());
                    let flags = 0x10 | if first { 0x80 } else { 0 } | if last { 0x09 } else { 0 };
                    assert_eq!(segment[t + 13], flags);
                }
                joined.extend(&segment[sample.headers..]);
            }
            assert!(
                joined == sample.bytes[sample.headers..],
                "{v6} {udp} {payload}"
            );
        }
    }
}

#[test]
fn frames_that_are_not_what_their_header_says() {
    let features = feature::CSUM
        | feature::HOST_TSO4
        | feature::HOST_TSO6
        | feature::HOST_USO
        | feature::HOST_ECN;
    // Every header, over frames that are cut, or are something else, at every place: nothing but
    // an end without frames, or frames.
    let mut random = 1u64;
    for round in 0..20_000u32 {
        let (v6, udp) = KINDS[round as usize % 4];
        let mut sample = sample(v6, udp, (round % 97) as usize * 3, (round % 50) as u16 + 20);
        let mut next = || {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (random >> 33) as usize
        };
        for _ in 0..3 {
            let at = next() % sample.bytes.len();
            sample.bytes[at] = next() as u8;
        }
        let cut = 38 + next() % (sample.bytes.len() - 38).max(1);
        sample.bytes.truncate(cut);
        if round % 3 == 0 {
            sample.header.csum_start = (next() % 80) as u16;
            sample.header.csum_offset = (next() % 80) as u16;
        }
        let len = sample.bytes.len();
        let Ok(header) = check_header(sample.header, len, features) else {
            continue;
        };
        let pieces = [VolatileSlice::from(&mut sample.bytes[..])];
        let frame = Frame::new(header, &pieces, len);
        let mut bytes = 0;
        complete(&frame, &mut Scratch::default(), &mut |plain| {
            bytes += plain.len();
            true
        });
        assert!(bytes <= len * 100);
        Offloads::default().take(&frame);
    }
}
