//! Tests of the parser: limits, lies and framing.

use super::*;
use crate::engine::{MemoryStore, RawFile};
use crate::limits::{MAX_QUEUES, MAX_RANGE_SECTORS, MAX_REQUEST_BYTES};
use crate::ring::{DeviceRing, OwnedChain, RingConfig, SplitRing};
use pv_abi::virtio::block::{RequestHeader, feature, request, status};
use pv_abi::virtio::desc_flag::{NEXT, WRITE};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use zerocopy::IntoBytes;

const DATA: u64 = 0x1_0000;

fn memory() -> Arc<GuestMemoryMmap> {
    let ranges = [(GuestAddress(0), 2 * MAX_REQUEST_BYTES as usize)];
    Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap())
}

/// A chain with these readable bytes and this much room, through a real ring.
fn chain(mem: &Arc<GuestMemoryMmap>, readable: &[u8], piece: usize, writable: u32) -> OwnedChain {
    mem.write_slice(readable, GuestAddress(DATA)).unwrap();
    let mut bufs: Vec<(u64, u32, u16)> = readable
        .chunks(piece)
        .scan(DATA, |at, c| {
            let this = *at;
            *at += c.len() as u64;
            Some((this, c.len() as u32, 0))
        })
        .collect();
    if writable > 0 {
        bufs.push((DATA, writable, WRITE));
    }
    bufs.push((DATA, 0, WRITE));
    for (i, (addr, len, flags)) in bufs.iter().enumerate() {
        let at = GuestAddress(16 * i as u64);
        let more = if i + 1 < bufs.len() { NEXT } else { 0 };
        mem.write_obj(*addr, at).unwrap();
        mem.write_obj(*len, GuestAddress(at.0 + 8)).unwrap();
        mem.write_obj(flags | more, GuestAddress(at.0 + 12))
            .unwrap();
        mem.write_obj(i as u16 + 1, GuestAddress(at.0 + 14))
            .unwrap();
    }
    mem.write_obj(0u16, GuestAddress(0x8004)).unwrap();
    mem.write_obj(1u16, GuestAddress(0x8002)).unwrap();
    let config = RingConfig {
        size: 256,
        desc: GuestAddress(0),
        avail: GuestAddress(0x8000),
        used: GuestAddress(0x9000),
        event_idx: false,
        indirect: false,
        in_order: false,
    };
    let mut ring = SplitRing::new(config, mem.clone()).unwrap();
    ring.pop().unwrap().unwrap()
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let header = RequestHeader {
        kind,
        reserved: 0,
        sector,
    };
    header.as_bytes().to_vec()
}

fn range(kind: u32, sector: u64, count: u32, flags: u32) -> Vec<u8> {
    let mut bytes = header(kind, 0);
    bytes.extend(sector.to_le_bytes());
    bytes.extend(count.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

#[test]
fn requests_and_refusals() {
    use RefusedRequest as No;
    const MAX: u64 = MAX_REQUEST_BYTES;
    const CAPACITY: u64 = 1 << 20;
    let mem = memory();
    let past_end = |sector, sectors| Err(No::PastEnd { sector, sectors });
    let with_data = |kind, sector, len: usize| [header(kind, sector), vec![7; len]].concat();
    let (w0, d) = (request::WRITE_ZEROES, request::DISCARD);
    let (request_lifetime, erase) = (super::request::GET_LIFETIME, super::request::SECURE_ERASE);
    type Case = (&'static str, Vec<u8>, u32, Result<Request, No>);
    let cases: Vec<Case> = vec![
        (
            "read",
            header(request::IN, 3),
            4097,
            Ok(Request::Read {
                offset: 1536,
                len: 4096,
            }),
        ),
        (
            "read of nothing",
            header(request::IN, 3),
            1,
            Ok(Request::Read {
                offset: 1536,
                len: 0,
            }),
        ),
        (
            "last sector",
            header(request::IN, CAPACITY - 1),
            513,
            Ok(Request::Read {
                offset: (CAPACITY - 1) * 512,
                len: 512,
            }),
        ),
        (
            "one past",
            header(request::IN, CAPACITY),
            513,
            past_end(CAPACITY, 1),
        ),
        (
            "over the end",
            header(request::IN, CAPACITY - 1),
            1025,
            past_end(CAPACITY - 1, 2),
        ),
        (
            "sector wraps",
            header(request::IN, u64::MAX),
            513,
            past_end(u64::MAX, 1),
        ),
        (
            "byte offset wraps",
            header(request::IN, 1 << 55),
            513,
            past_end(1 << 55, 1),
        ),
        (
            "odd length",
            header(request::IN, 0),
            512,
            Err(No::BadLength(511)),
        ),
        (
            "longest",
            header(request::IN, 0),
            MAX as u32 + 1,
            Ok(Request::Read {
                offset: 0,
                len: MAX,
            }),
        ),
        (
            "too long",
            header(request::IN, 0),
            MAX as u32 + 513,
            Err(No::BadLength(MAX + 512)),
        ),
        ("no status", header(request::FLUSH, 0), 0, Err(No::NoStatus)),
        ("no header", vec![0; 15], 1, Err(No::NoHeader)),
        ("nothing readable", vec![], 1, Err(No::NoHeader)),
        (
            "write",
            with_data(request::OUT, 2, 1024),
            1,
            Ok(Request::Write {
                offset: 1024,
                len: 1024,
            }),
        ),
        (
            "odd write",
            with_data(request::OUT, 2, 1000),
            1,
            Err(No::BadLength(1000)),
        ),
        ("flush", header(request::FLUSH, 0), 1, Ok(Request::Flush)),
        ("id", header(request::GET_ID, 0), 21, Ok(Request::GetId)),
        (
            "id without room",
            header(request::GET_ID, 0),
            20,
            Err(No::BadLength(19)),
        ),
        (
            "discard",
            range(d, 8, 2, 0),
            1,
            Ok(Request::Discard {
                offset: 4096,
                len: 1024,
            }),
        ),
        (
            "lifetime",
            header(request_lifetime, 0),
            7,
            Ok(Request::GetLifetime),
        ),
        (
            "lifetime without room",
            header(request_lifetime, 0),
            6,
            Err(No::BadLength(5)),
        ),
        (
            "secure erase",
            range(erase, 8, 2, 0),
            1,
            Ok(Request::SecureErase {
                offset: 4096,
                len: 1024,
            }),
        ),
        (
            "secure erase with unmap",
            range(erase, 8, 2, 1),
            1,
            Err(No::Unsupported(erase)),
        ),
        (
            "discard with unmap",
            range(d, 8, 2, 1),
            1,
            Err(No::Unsupported(d)),
        ),
        (
            "zeroes",
            range(w0, 8, 2, 1),
            1,
            Ok(Request::WriteZeroes {
                offset: 4096,
                len: 1024,
                unmap: true,
            }),
        ),
        (
            "zeroes with other flags",
            range(w0, 8, 2, 2),
            1,
            Err(No::Unsupported(w0)),
        ),
        ("no sectors", range(w0, 8, 0, 0), 1, Err(No::BadLength(0))),
        (
            "past the end",
            range(w0, CAPACITY - 1, 2, 0),
            1,
            past_end(CAPACITY - 1, 2),
        ),
        (
            "half a range",
            with_data(w0, 0, 8),
            1,
            Err(No::BadLength(8)),
        ),
        (
            "two ranges",
            with_data(w0, 0, 32),
            1,
            Err(No::BadLength(32)),
        ),
        ("unknown", header(99, 0), 1, Err(No::Unsupported(99))),
    ];
    for (name, readable, writable, expected) in cases {
        // However the driver cuts its buffers.
        for piece in [1usize, 7, 16, 4096] {
            let piece = piece.max(readable.len().div_ceil(200)).max(1);
            let chain = chain(&mem, &readable, piece, writable);
            assert_eq!(parse(&chain, &mem, CAPACITY, false), expected, "{name}");
        }
    }
    for readable in [
        with_data(request::OUT, 0, 512),
        range(d, 0, 1, 0),
        range(w0, 0, 1, 0),
    ] {
        let chain = chain(&mem, &readable, 4096, 1);
        assert_eq!(parse(&chain, &mem, CAPACITY, true), Err(No::ReadOnly));
    }
    assert_eq!(No::Unsupported(9).status(), status::UNSUPP);
    assert_eq!(No::ReadOnly.status(), status::IOERR);
}

#[test]
fn range_length_at_the_limit_and_one_past_it() {
    let mem = memory();
    for (count, fits) in [(MAX_RANGE_SECTORS, true), (MAX_RANGE_SECTORS + 1, false)] {
        let chain = chain(&mem, &range(request::DISCARD, 0, count, 0), 4096, 1);
        assert_eq!(parse(&chain, &mem, u64::MAX, false).is_ok(), fits);
    }
}

#[test]
fn offers_follow_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    // A tail that is no whole sector is not part of the disk.
    std::fs::write(&path, vec![0; 512 * 5 + 100]).unwrap();
    let open = |read_only| {
        let options = crate::engine::FileOptions {
            read_only,
            direct: false,
        };
        RawFile::open(&path, options).unwrap()
    };
    let device = BlockDevice::new(open(false), BlockOptions::with_queues(4));
    assert_eq!(device.config()[..8], 5u64.to_le_bytes());
    assert_eq!(device.config()[34..36], 4u16.to_le_bytes());
    assert_eq!(device.queue_count(), 4);
    assert!(device.features() & feature::MQ != 0);
    assert!(device.features() & feature::RO == 0);
    let device = BlockDevice::new(open(true), BlockOptions::with_queues(0));
    assert_eq!(device.queue_count(), 1);
    assert!(device.features() & feature::MQ == 0);
    assert!(device.features() & feature::RO != 0);
    assert!(device.features() & (feature::DISCARD | feature::WRITE_ZEROES) == 0);
    assert_eq!(BlockOptions::with_queues(u16::MAX).queues, MAX_QUEUES);
}

#[test]
fn configuration_space_says_what_the_disk_is() {
    let memory = MemoryStore::new(1 << 20).unwrap();
    let device = BlockDevice::new(memory, BlockOptions::with_queues(2));
    let config = device.config();
    let u32_at = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    // virtio 1.3 §5.2.4, by offset.
    assert_eq!(config.len(), 72);
    assert_eq!(u32_at(0), 2048);
    assert_eq!(u32_at(8), MAX_REQUEST_BYTES as u32);
    assert_eq!(u32_at(20), 512);
    assert_eq!(config[32], 1, "write-back");
    for at in [36, 48, 60] {
        assert_eq!(u32_at(at), MAX_RANGE_SECTORS, "{at}");
        assert_eq!(u32_at(at + 4), 1, "{at}");
    }
    let secure_erase = 1 << 16;
    assert!(device.features() & secure_erase != 0);
}

#[test]
fn only_the_write_cache_can_be_configured() {
    let memory = MemoryStore::new(1 << 20).unwrap();
    let device = BlockDevice::new(memory, BlockOptions::with_queues(1));
    assert!(device.features() & feature::CONFIG_WCE != 0);
    for (offset, data, fits) in [
        (32, &[0u8][..], true),
        (32, &[1], true),
        (32, &[2], false),
        (32, &[], false),
        (32, &[0, 0], false),
        (31, &[0], false),
        (0, &[0; 8], false),
        (u32::MAX, &[0], false),
    ] {
        assert_eq!(device.write_config(offset, data).is_ok(), fits, "{offset}");
    }
    device.write_config(32, &[0]).unwrap();
    assert_eq!(device.config()[32], 0);
    device.reset();
    assert_eq!(device.config()[32], 1);
}

#[test]
fn capacity_follows_the_file_when_asked_to() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::write(&path, vec![0; 4096]).unwrap();
    let file = RawFile::open(&path, crate::engine::FileOptions::default()).unwrap();
    let device = BlockDevice::new(file, BlockOptions::with_queues(1));
    let look = |device: &BlockDevice| device.resize().map(|r| (r.before, r.now, r.told.is_ok()));
    assert_eq!(look(&device), Ok((8, 8, true)));
    std::fs::write(&path, vec![0; 8192]).unwrap();
    assert_eq!(device.config()[0], 8);
    assert_eq!(look(&device), Ok((8, 16, false)), "nobody to tell");
    assert_eq!(device.config()[0], 16);
    // The next process goes on with what this one told.
    let told = device.config();
    std::fs::write(&path, vec![0; 16384]).unwrap();
    let open = || RawFile::open(&path, crate::engine::FileOptions::default()).unwrap();
    let next = BlockDevice::new(open(), BlockOptions::with_queues(1));
    assert_eq!(next.config()[0], 32);
    assert!(next.resume_config(&told));
    assert_eq!(next.config(), told);
    assert_eq!(look(&next), Ok((16, 32, false)));
    for other in [&[][..], &told[..7], &told[..40]] {
        assert!(!next.resume_config(other));
    }
    std::fs::write(&path, vec![0; 512]).unwrap();
    let smaller = BlockDevice::new(open(), BlockOptions::with_queues(1));
    assert!(smaller.resume_config(&told));
    for device in [device, smaller] {
        assert_eq!(look(&device), Err(ResizeRefused { now: 1, told: 16 }));
        assert_eq!(device.config()[0], 16);
    }
    // As far as a host's offsets go.
    let disk = |sectors: u64| [&sectors.to_le_bytes(), &told[8..]].concat();
    let next = BlockDevice::new(open(), BlockOptions::with_queues(1));
    assert!(!next.resume_config(&disk(1 << 54)));
    assert!(next.resume_config(&disk((1 << 54) - 1)));
}
