//! What a frontend keeps for its backend: the dirty log and the in-flight log; and what a backend
//! says without being asked.

mod support {
    pub(crate) mod front;
    pub(crate) mod raw;
}

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;
use support::front::{BLOCK, DATA, DESC, Front, GUEST, LOG_ALL, MEMORY, Op, STATUS, TIMEOUT, USED};
use support::raw::{Client, Counting, VERSION, memfd, memory, pair, words};
use vhost_backends::block::{BlockDevice, BlockOptions};
use vhost_backends::engine::{FileOptions, RawFile};
use vhost_backends::session::{Server, SessionEnd};
use vmm_sys_util::eventfd::EventFd;

const PAGE: u64 = 4096;
/// Bytes of a log that covers the frontend's memory.
const LOG: u64 = (GUEST + MEMORY) / PAGE / 8;

/// A block device in this process, and a frontend on it.
struct Served {
    front: Front,
    server: Option<JoinHandle<SessionEnd>>,
    _never: std::io::PipeWriter,
    _dir: tempfile::TempDir,
}

impl Served {
    fn new(packed: bool, with_inflight: bool) -> Served {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("disk.img");
        std::fs::write(&image, vec![0x5a; 1 << 20]).unwrap();
        let file = RawFile::open(&image, FileOptions::default()).unwrap();
        let device = Arc::new(BlockDevice::new(file, BlockOptions::with_queues(1)));
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (stop, never) = std::io::pipe().unwrap();
        let server = Server::new(device, OwnedFd::from(stop));
        let server = std::thread::spawn(move || server.serve(theirs));
        let mut front = Front::new(16, packed, false);
        front.features |= LOG_ALL;
        front.take(ours);
        front.negotiate(with_inflight).unwrap();
        front.features &= !LOG_ALL;
        front.set_features().unwrap();
        Served {
            front,
            server: Some(server),
            _never: never,
            _dir: dir,
        }
    }

    /// Requests until their end.
    fn run(&mut self, op: Op, tokens: std::ops::Range<u16>) {
        for token in tokens {
            self.front.submit(token, op, u64::from(token) * 8);
        }
        self.front.notify();
        let deadline = Instant::now() + TIMEOUT;
        while self.front.in_flight() > 0 {
            assert!(Instant::now() < deadline, "no completion");
            self.front.reap();
            std::thread::yield_now();
        }
    }

    fn end(mut self) {
        let stream = self.front.stream.take().unwrap();
        stream.shutdown(std::net::Shutdown::Both).unwrap();
        assert_eq!(
            self.server.take().unwrap().join().unwrap(),
            SessionEnd::HangUp
        );
    }
}

fn set_log(front: &Front, log: &File, size: u64, offset: u64) -> bool {
    let fds = [log.as_raw_fd()];
    front.send(6, VERSION, &words(&[size, offset]), &fds);
    !front.receive(6).unwrap().0.is_empty()
}

/// Guest-physical pages that are marked.
fn marked(log: &File, offset: u64) -> Vec<u64> {
    let mut bits = vec![0; LOG as usize];
    log.read_exact_at(&mut bits, offset).unwrap();
    (0..8 * LOG)
        .filter(|page| bits[(page / 8) as usize] >> (page % 8) & 1 == 1)
        .collect()
}

fn page(at: u64) -> u64 {
    (GUEST + at) / PAGE
}

/// Every page that differs is marked, and nothing is that the device had no business with.
#[test]
fn every_page_that_is_written_is_marked() {
    for packed in [false, true] {
        let mut served = Served::new(packed, true);
        let log = memory(LOG + PAGE);
        let called = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        assert!(set_log(&served.front, &log, LOG, PAGE));
        assert!(served.front.set(7, &[], &[called.as_raw_fd()]).unwrap());
        served.front.start(served.front.base).unwrap();
        // LOG_ALL is not on yet.
        served.run(Op::Read, 0..2);
        assert!(marked(&log, PAGE).is_empty());

        // Turned on under a running ring, as QEMU does: features, then the ring's addresses.
        served.front.features |= LOG_ALL;
        served.front.set_features().unwrap();
        served.front.ring_log = Some(GUEST + USED);
        assert!(served.front.set_addr().unwrap());
        let before = served.front.memory.bytes(0, MEMORY as usize);
        served
            .front
            .memory
            .fill(DATA + 3 * BLOCK, &[0; BLOCK as usize]);
        served.run(Op::Read, 2..5);
        let after = served.front.memory.bytes(0, MEMORY as usize);
        let found = marked(&log, PAGE);
        let written_by_us = |p: u64| [page(DESC), page(0x4000), page(0x1_0000)].contains(&p);
        for at in (0..MEMORY).step_by(PAGE as usize) {
            let range = at as usize..(at + PAGE) as usize;
            if before[range.clone()] != after[range] && !written_by_us(page(at)) {
                assert!(found.contains(&page(at)), "{packed} {at:#x}");
            }
        }
        let mut allowed = vec![page(STATUS), page(USED)];
        allowed.extend((2..5).map(|token| page(DATA + token * BLOCK)));
        if packed {
            allowed.push(page(DESC));
            assert!(found.contains(&page(DESC)));
        } else {
            assert!(found.contains(&page(USED)));
        }
        assert!(found.iter().all(|p| allowed.contains(p)), "{found:x?}");
        assert!(called.read().is_ok(), "the frontend is told");

        // The data of a write is not written to memory.
        log.write_all_at(&vec![0; LOG as usize], PAGE).unwrap();
        served.run(Op::Write, 0..4);
        let found = marked(&log, PAGE);
        assert!(!found.contains(&page(DATA)) && found.contains(&page(STATUS)));

        // Without the ring's flag its pages are not marked.
        served.front.ring_log = None;
        assert!(served.front.set_addr().unwrap());
        log.write_all_at(&vec![0; LOG as usize], PAGE).unwrap();
        served.run(Op::Read, 0..1);
        assert!(!marked(&log, PAGE).contains(&page(USED)));
        assert!(marked(&log, PAGE).contains(&page(DATA)));

        // Turned off: nothing more is marked, and the log may go away.
        served.front.features &= !LOG_ALL;
        served.front.set_features().unwrap();
        log.write_all_at(&vec![0; LOG as usize], PAGE).unwrap();
        served.run(Op::Read, 0..5);
        assert!(marked(&log, PAGE).is_empty());
        served.end();
    }
}

#[test]
fn a_dirty_log_at_its_limits() {
    let mut served = Served::new(false, false);
    let log = memory(2 * PAGE);
    let front = &served.front;
    for (size, offset) in [
        (0, 0),
        (2 * PAGE + 1, 0),
        (PAGE + 1, PAGE),
        (u64::MAX, PAGE),
        (PAGE, u64::MAX),
        (PAGE, 1),
    ] {
        assert!(!set_log(front, &log, size, offset), "{size} {offset}");
    }
    let (_, event) = std::io::pipe().unwrap();
    let event = File::from(OwnedFd::from(event));
    assert!(!set_log(front, &event, PAGE, 0), "not a file of memory");
    // Shorter than memory: what lies past its end is left out, and nothing else happens.
    assert!(set_log(front, &log, PAGE, PAGE));
    served.front.features |= LOG_ALL;
    served.front.set_features().unwrap();
    served.front.start(0).unwrap();
    served.run(Op::Read, 0..5);
    let mut bits = vec![0; 2 * PAGE as usize];
    log.read_exact_at(&mut bits, 0).unwrap();
    assert!(bits.iter().all(|byte| *byte == 0));
    served.end();
}

#[test]
fn in_flight_logs_at_their_limits() {
    let mut client = Client::connect(Arc::new(Counting::default()));
    let shape = |size: u64, offset: u64, queues: u16, entries: u16| {
        let mut bytes = words(&[size, offset]);
        bytes.extend(queues.to_ne_bytes());
        bytes.extend(entries.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes
    };
    // Not negotiated.
    assert!(client.query(31, &shape(0, 0, 1, 128)).is_empty());
    client.negotiate();
    for (queues, entries) in [(0, 128), (1, 0), (33, 128), (1, 1025), (u16::MAX, u16::MAX)] {
        assert!(client.query(31, &shape(0, 0, queues, entries)).is_empty());
        let file = memory(1 << 20);
        assert!(!client.set(32, &shape(1 << 20, 0, queues, entries), &[&file]));
    }
    for (queues, entries) in [(1, 1), (16, 1024)] {
        let reply = client.query(31, &shape(0, 0, queues, entries));
        assert_eq!(reply.len(), 24);
        // Some frontends leave out the padding, and get as much back.
        let short = &shape(0, 0, queues, entries)[..20];
        assert_eq!(client.query(31, short), reply[..20]);
        let size = u64::from_ne_bytes(reply[..8].try_into().unwrap());
        let enough = memory(size);
        assert!(client.set(32, &shape(size, 0, queues, entries), &[&enough]));
        assert!(!client.set(32, &shape(size, 1, queues, entries), &[&enough]));
        let less = memory(size - 1);
        assert!(!client.set(32, &shape(size, 0, queues, entries), &[&less]));
        assert!(!client.set(32, &shape(0, 0, queues, entries), &[&enough]));
        assert!(!client.set(32, &shape(u64::MAX, 0, queues, entries), &[&enough]));
    }
    client.close();
}

#[test]
fn logs_that_can_be_cut_off_are_refused_where_others_depend_on_it() {
    for sealed in [false, true] {
        let mut client = Client::connect(Arc::new(Counting {
            sealed,
            ..Counting::default()
        }));
        client.negotiate();
        let mut shape = words(&[1 << 20, 0]);
        shape.extend([1, 0, 128, 0, 0, 0, 0, 0]);
        let loose = memfd(1 << 20, 0, 0).unwrap();
        for (file, taken) in [(&loose, !sealed), (&memory(1 << 20), true)] {
            assert_eq!(client.set(32, &shape, &[file]), taken);
            client.send(6, VERSION, &words(&[1 << 20, 0]), &[file]);
            assert_eq!(!client.receive().unwrap().2.is_empty(), taken);
        }
        client.close();
    }
}

#[test]
fn a_log_that_is_not_of_the_ring_is_refused() {
    let mut served = Served::new(false, true);
    // desc_num of another ring.
    let log = served.front.log.as_ref().unwrap();
    log.file.write_all_at(&[1, 0, 99, 0], 8).unwrap();
    let started = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        served.front.start(0).unwrap();
    }));
    assert!(started.is_err(), "SET_VRING_ENABLE is refused");
    // A new log, and it goes.
    log.file.write_all_at(&[0; 16], 0).unwrap();
    assert!(served.front.set(18, &pair(0, 1), &[]).unwrap());
    served.run(Op::Read, 0..5);
    served.end();
}

#[test]
fn the_frontend_hears_of_a_new_configuration() {
    let device = Arc::new(Counting::default());
    let mut client = Client::connect(device.clone());
    let (ours, theirs) = UnixStream::pair().unwrap();
    let theirs = File::from(OwnedFd::from(theirs));
    // Not negotiated.
    client.send(21, VERSION, &[], &[&theirs]);
    client.negotiate();
    assert!(device.frontend.lock().unwrap().is_none());
    assert!(!client.set(21, &[], &[&memory(4096)]), "not a socket");
    assert!(client.set(21, &[], &[&theirs]));
    drop(theirs);
    let link = device.frontend.lock().unwrap().clone().unwrap();
    ours.set_read_timeout(Some(TIMEOUT)).unwrap();
    let answer = |request: u32, flags: u32, code: u64| {
        let mut head = [0; 12];
        (&ours).read_exact(&mut head).unwrap();
        let expected: Vec<u8> = [2u32, VERSION | 8, 0]
            .iter()
            .flat_map(|w| w.to_ne_bytes())
            .collect();
        assert_eq!(
            head,
            expected[..],
            "CONFIG_CHANGE, with a wish for an answer"
        );
        let mut reply: Vec<u8> = [request, flags, 8]
            .iter()
            .flat_map(|w| w.to_ne_bytes())
            .collect();
        reply.extend(code.to_ne_bytes());
        (&ours).write_all(&reply).unwrap();
    };
    std::thread::scope(|scope| {
        // The session goes on while the device waits.
        let said = scope.spawn(|| link.config_changed());
        assert_eq!(client.query_u64(17), 2);
        answer(2, VERSION | 4, 0);
        said.join().unwrap().unwrap();
        let said = scope.spawn(|| link.config_changed());
        answer(2, VERSION | 4, 1);
        assert!(said.join().unwrap().is_err(), "refused, and still there");
        let said = scope.spawn(|| link.config_changed());
        answer(9, VERSION | 4, 0);
        assert!(said.join().unwrap().is_err(), "nonsense");
    });
    assert!(link.config_changed().is_err(), "not used again after that");
    client.close();
    assert!(
        device.frontend.lock().unwrap().is_none(),
        "gone with the session"
    );
}
