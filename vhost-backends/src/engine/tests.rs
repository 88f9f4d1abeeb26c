//! Both engines against the same body, and the ways in which hosts fail.

use super::*;
use crate::readiness::Event;
use crate::ring::{DeviceRing, OwnedChain, RingConfig, SplitRing};
use pv_abi::virtio::desc_flag::{NEXT, WRITE};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress};

const DATA: u64 = 0x1_0000;

struct Bench {
    dir: tempfile::TempDir,
    memory: Arc<GuestMemoryMmap>,
    kick: Event,
    stop: Event,
}

impl Bench {
    fn new() -> Bench {
        let ranges = [(GuestAddress(0), 0x20_0000)];
        Bench {
            dir: tempfile::tempdir().unwrap(),
            memory: Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap()),
            kick: Event::new().unwrap(),
            stop: Event::new().unwrap(),
        }
    }

    fn file(&self, len: u64, options: FileOptions) -> Arc<RawFile> {
        let path = self.dir.path().join("disk");
        let file = std::fs::File::create(&path).unwrap();
        file.set_len(len).unwrap();
        Arc::new(RawFile::open(&path, options).unwrap())
    }

    fn wake(&self) -> WakeSources<'_> {
        WakeSources {
            kick: self.kick.as_fd(),
            stop: self.stop.as_fd(),
        }
    }

    fn engine(&self, uring: bool, file: &Arc<RawFile>) -> Box<dyn Engine> {
        let (file, memory) = (file.clone(), self.memory.clone());
        if uring {
            Box::new(UringEngine::new(file, memory, self.wake()).unwrap())
        } else {
            Box::new(SyncEngine::new(file, memory, self.wake()).unwrap())
        }
    }

    /// A chain of these buffers, all readable or all writable.
    fn chain(&self, buffers: &[(u64, u32)], flag: u16) -> OwnedChain {
        for (i, (addr, len)) in buffers.iter().enumerate() {
            let at = 16 * i as u64;
            let more = if i + 1 < buffers.len() { NEXT } else { 0 };
            self.memory.write_obj(*addr, GuestAddress(at)).unwrap();
            self.memory.write_obj(*len, GuestAddress(at + 8)).unwrap();
            self.memory
                .write_obj(flag | more, GuestAddress(at + 12))
                .unwrap();
            self.memory
                .write_obj(i as u16 + 1, GuestAddress(at + 14))
                .unwrap();
        }
        self.memory.write_obj(1u16, GuestAddress(0x8002)).unwrap();
        let config = RingConfig {
            size: 64,
            desc: GuestAddress(0),
            avail: GuestAddress(0x8000),
            used: GuestAddress(0x9000),
            event_idx: false,
            indirect: false,
            in_order: false,
        };
        let mut ring = SplitRing::new(config, self.memory.clone()).unwrap();
        ring.pop().unwrap().unwrap()
    }
}

/// Runs one operation to its end.
fn finish(engine: &mut dyn Engine, operation: Operation<'_>) -> io::Result<()> {
    if let Some(result) = engine.start(3, operation) {
        return result;
    }
    let deadline = Instant::now() + Duration::from_secs(20);
    let mut finished = Vec::new();
    loop {
        engine.wait(&mut finished).unwrap();
        if let Some(done) = finished.pop() {
            assert_eq!(done.token, 3);
            return done.result;
        }
        assert!(Instant::now() < deadline);
    }
}

#[test]
fn scattered_buffers_round_trip_on_every_engine() {
    for (uring, direct) in [(true, false), (true, true), (false, false), (false, true)] {
        let bench = Bench::new();
        let options = FileOptions {
            read_only: false,
            direct,
        };
        let file = bench.file(1 << 20, options);
        let mut engine = bench.engine(uring, &file);
        // Misaligned addresses and lengths, and aligned ones.
        let layouts: [&[(u64, u32)]; 3] = [
            &[(DATA, 4096), (DATA + 0x4000, 4096)],
            &[(DATA + 3, 500), (DATA + 0x4001, 7692)],
            &[(DATA + 512, 512), (DATA + 0x4200, 7680)],
        ];
        for (i, layout) in layouts.iter().enumerate() {
            for offset in [0u64, 512, 4096, 65536 - 512] {
                let data: Vec<u8> = (0..8192u32)
                    .map(|n| (n * 7 + i as u32 + offset as u32) as u8)
                    .collect();
                let chain = bench.chain(layout, 0);
                let mut at = 0;
                for (addr, len) in *layout {
                    let part = &data[at..at + *len as usize];
                    bench.memory.write_slice(part, GuestAddress(*addr)).unwrap();
                    at += *len as usize;
                }
                let (from, len) = (0, 8192);
                let write = Operation::Write {
                    chain: &chain,
                    from,
                    offset,
                    len,
                };
                finish(&mut *engine, write).unwrap();
                finish(&mut *engine, Operation::Flush).unwrap();
                for (addr, len) in *layout {
                    let zeroes = vec![0; *len as usize];
                    bench
                        .memory
                        .write_slice(&zeroes, GuestAddress(*addr))
                        .unwrap();
                }
                let chain = bench.chain(layout, WRITE);
                finish(
                    &mut *engine,
                    Operation::Read {
                        chain: &chain,
                        offset,
                        len,
                    },
                )
                .unwrap();
                let mut back = Vec::new();
                for (addr, len) in *layout {
                    let mut part = vec![0; *len as usize];
                    bench
                        .memory
                        .read_slice(&mut part, GuestAddress(*addr))
                        .unwrap();
                    back.extend(part);
                }
                assert!(
                    back == data,
                    "uring {uring} direct {direct} {layout:?} {offset}"
                );
            }
        }
        let (offset, len) = (4096, 4096);
        for unmap in [false, true] {
            finish(&mut *engine, Operation::WriteZeroes { offset, len, unmap }).unwrap();
        }
        finish(&mut *engine, Operation::Discard { offset, len }).unwrap();
        let chain = bench.chain(&[(DATA, 4096)], WRITE);
        finish(
            &mut *engine,
            Operation::Read {
                chain: &chain,
                offset,
                len,
            },
        )
        .unwrap();
        let mut back = [1; 4096];
        bench
            .memory
            .read_slice(&mut back, GuestAddress(DATA))
            .unwrap();
        assert_eq!(back, [0; 4096]);
        assert_eq!(file.len(), 1 << 20);
    }
}

#[test]
fn a_shorter_file_than_expected_is_an_error() {
    for (uring, direct) in [(true, false), (true, true), (false, false), (false, true)] {
        let bench = Bench::new();
        let options = FileOptions {
            read_only: false,
            direct,
        };
        let file = bench.file(1 << 20, options);
        let mut engine = bench.engine(uring, &file);
        let path = bench.dir.path().join("disk");
        std::fs::File::options()
            .write(true)
            .open(path)
            .unwrap()
            .set_len(8192 + 512)
            .unwrap();
        let chain = bench.chain(&[(DATA, 8192)], WRITE);
        let read = |offset| Operation::Read {
            chain: &chain,
            offset,
            len: 8192,
        };
        finish(&mut *engine, read(0)).unwrap();
        for offset in [4096, 8192, 65536] {
            finish(&mut *engine, read(offset)).unwrap_err();
        }
    }
}

#[test]
fn a_token_in_use_is_refused_and_drop_waits() {
    let bench = Bench::new();
    let options = FileOptions {
        read_only: false,
        direct: true,
    };
    let file = bench.file(1 << 20, options);
    let mut engine = bench.engine(true, &file);
    let chain = bench.chain(&[(DATA, 4096)], WRITE);
    let read = Operation::Read {
        chain: &chain,
        offset: 0,
        len: 4096,
    };
    assert!(engine.start(0, read).is_none());
    assert!(engine.start(0, read).unwrap().is_err());
    assert!(
        engine
            .start(crate::limits::MAX_IN_FLIGHT as Token, read)
            .unwrap()
            .is_err()
    );
    assert_eq!(engine.in_flight(), 1);
    drop(engine);
}

#[test]
fn events_end_a_wait() {
    for uring in [true, false] {
        let bench = Bench::new();
        let file = bench.file(4096, FileOptions::default());
        let mut engine = bench.engine(uring, &file);
        let mut finished = Vec::new();
        // Each kick is an edge, also while the counter has never been read.
        for _ in 0..3 {
            bench.kick.set();
            assert!(!engine.wait(&mut finished).unwrap().stop);
        }
        bench.stop.set();
        assert!(engine.wait(&mut finished).unwrap().stop);
        assert!(engine.reap(&mut finished).unwrap().stop, "it stays set");
    }
}

/// A regular file is readable whenever it is asked: as a kick it would never let a queue sleep.
#[test]
fn a_kick_that_cannot_be_waited_for_is_refused() {
    let bench = Bench::new();
    let file = bench.file(4096, FileOptions::default());
    for path in ["/proc/self/exe", "/dev/null"] {
        let kick = std::fs::File::open(path).unwrap();
        let wake = WakeSources {
            kick: kick.as_fd(),
            stop: bench.stop.as_fd(),
        };
        let memory = bench.memory.clone();
        assert!(UringEngine::new(file.clone(), memory.clone(), wake).is_err());
        assert!(SyncEngine::new(file.clone(), memory.clone(), wake).is_err());
        assert!(file.clone().open_engine(memory, wake).is_err());
    }
}

/// There is no io_uring operation for it, and a disk may take minutes.
#[test]
fn a_secure_erase_does_not_hold_the_queue_up() {
    let bench = Bench::new();
    let file = bench.file(1 << 20, FileOptions::default());
    let mut engine = bench.engine(true, &file);
    let erase = Operation::SecureErase {
        offset: 0,
        len: 4096,
    };
    for token in 0..3 {
        assert!(engine.start(token, erase).is_none(), "it is in flight");
    }
    let chain = bench.chain(&[(DATA, 4096)], WRITE);
    let read = Operation::Read {
        chain: &chain,
        offset: 0,
        len: 4096,
    };
    if let Some(result) = engine.start(3, read) {
        result.unwrap();
    }
    let deadline = Instant::now() + Duration::from_secs(20);
    let mut finished = Vec::new();
    while engine.in_flight() > 0 {
        assert!(Instant::now() < deadline);
        engine.wait(&mut finished).unwrap();
    }
    for token in 0..3 {
        let done = finished.iter().find(|done| done.token == token).unwrap();
        // A regular file cannot do it, which the thread was told.
        let error = done.result.as_ref().unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOTTY));
    }
    // One that is still being made when the engine goes is waited for.
    assert!(engine.start(0, erase).is_none());
}

#[test]
fn full_devices_and_wrong_kinds_of_file() {
    let dir = tempfile::tempdir().unwrap();
    for path in ["/dev/full", "/dev/null", dir.path().to_str().unwrap()] {
        assert!(
            RawFile::open(path.as_ref(), FileOptions::default()).is_err(),
            "{path}"
        );
    }
}
