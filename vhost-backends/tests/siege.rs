//! Frontends that mean no good, against the daemon itself, in its sandbox: whatever they send, it
//! goes on, its descriptors, mappings, threads and memory are back where they were, and the next
//! good frontend is served.

mod support {
    pub(crate) mod front;
    pub(crate) mod process;
    pub(crate) mod raw;
}

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use support::front::{BLOCK, DATA, Front, GUEST, LOG_ALL, MEMORY, Op, TIMEOUT, USER};
use support::process::{Daemon, blkd};
use support::raw::{Client, NEED_REPLY, VERSION, event, memory, pair, words};
use vmm_sys_util::eventfd::EventFd;

const DISK: u64 = 1 << 20;
/// KiB that memory may grow beyond what the first frontends left.
const GROWTH_KIB: u64 = 6 << 10;

struct Besieged {
    daemon: Daemon,
    socket: PathBuf,
    /// Descriptors, shared mappings and threads between two connections.
    baseline: [usize; 3],
    resident: u64,
    _dir: tempfile::TempDir,
}

impl Besieged {
    fn new() -> Besieged {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("disk.img");
        File::create(&image).unwrap().set_len(DISK).unwrap();
        let arguments = [PathBuf::from("--blk-file"), image, "--num-queues=2".into()];
        let socket = dir.path().join("blk.sock");
        let daemon = Daemon::quiet(blkd().arg("--socket-path").arg(&socket).args(arguments));
        let mut besieged = Besieged {
            daemon,
            socket,
            baseline: [0; 3],
            resident: 0,
            _dir: dir,
        };
        // Twice: what is kept for good is there then.
        besieged.serves_a_good_one();
        besieged.serves_a_good_one();
        std::thread::sleep(Duration::from_millis(100));
        besieged.baseline = besieged.state();
        besieged.resident = besieged.daemon.number("VmRSS");
        besieged
    }

    fn state(&self) -> [usize; 3] {
        let daemon = &self.daemon;
        let threads = daemon.number("Threads") as usize;
        [daemon.fds(), daemon.shared_mappings(), threads]
    }

    /// Waits until everything of the last connection is gone.
    fn recovers(&mut self, what: &str) {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let ended = self.daemon.ended();
            assert!(ended.is_none(), "{what}: the daemon ended: {ended:?}");
            let state = self.state();
            if state == self.baseline {
                return;
            }
            let baseline = self.baseline;
            assert!(
                Instant::now() < deadline,
                "{what}: fds, mappings, threads {state:?} instead of {baseline:?}"
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn has_not_grown(&self) {
        let now = self.daemon.number("VmRSS");
        let before = self.resident;
        assert!(now <= before + GROWTH_KIB, "{before} KiB, then {now} KiB");
    }

    fn front(&mut self, packed: bool) -> Front {
        let mut front = Front::new(64, packed, true);
        front.take(self.daemon.connect(&self.socket));
        front
    }

    fn serves_a_good_one(&mut self) {
        let mut front = self.front(false);
        front.negotiate(true).unwrap();
        front.start(0).unwrap();
        let data: Vec<u8> = (0..BLOCK).map(|i| (i * 7) as u8).collect();
        front.memory.fill(DATA, &data);
        front.submit(0, Op::Write, 8);
        finish(&mut front);
        front.submit(1, Op::Read, 8);
        finish(&mut front);
        assert!(front.memory.bytes(DATA + BLOCK, BLOCK as usize) == data);
        assert_eq!(front.stop(), Some(2));
    }
}

fn finish(front: &mut Front) {
    front.notify();
    let deadline = Instant::now() + TIMEOUT;
    while front.in_flight() > 0 {
        front.reap();
        assert!(Instant::now() < deadline, "no completion");
        std::thread::yield_now();
    }
}

/// A payload that this message could have.
fn usual(number: u32, features: u64) -> Vec<u8> {
    let shape = [words(&[0, 0]), pair(1 | 64 << 16, 0)].concat();
    match number {
        1 | 3 | 4 | 15 | 17 | 21 | 34 | 36 | 40 => vec![],
        2 => words(&[features]),
        5 => [pair(1, 0), words(&[GUEST, MEMORY, USER, 0])].concat(),
        6 => words(&[4096, 0]),
        8 => pair(0, 64),
        9 => [pair(0, 1), words(&[USER, USER + 0x8000, USER + 0x4000, 0])].concat(),
        10 | 11 => pair(0, 0),
        18 => pair(0, 1),
        24 | 25 => [pair(0, 60), vec![0; 64]].concat(),
        31 | 32 => shape,
        37 | 38 => words(&[0, GUEST + MEMORY, MEMORY, USER + MEMORY, 0]),
        _ => words(&[0]),
    }
}

/// One of everything that may arrive as a descriptor.
fn descriptors() -> Vec<Box<dyn AsRawFd>> {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (reader, writer) = std::io::pipe().unwrap();
    let mut by_path = File::options();
    by_path.read(true).custom_flags(libc::O_PATH);
    vec![
        Box::new(memory(MEMORY)),
        Box::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()),
        Box::new(theirs),
        Box::new(reader),
        Box::new(File::open("/").unwrap()),
        Box::new(memory(4096)),
        Box::new(writer),
        Box::new(by_path.open("/").unwrap()),
        Box::new(File::options().write(true).open("/dev/null").unwrap()),
        Box::new(ours),
    ]
}

const STATES: [&str; 7] = [
    "connected",
    "negotiated",
    "disabled",
    "running",
    "running with an in-flight log",
    "running with a dirty log",
    "stopped",
];

fn bring_to(state: usize, front: &mut Front) {
    if state == 5 {
        front.features |= LOG_ALL;
    }
    if state >= 1 {
        front.negotiate(state == 4).unwrap();
    }
    if state == 5 {
        let log = memory(1 << 20);
        front.send(6, VERSION, &words(&[1 << 20, 0]), &[log.as_raw_fd()]);
        front.receive(6).unwrap();
    }
    if state >= 2 {
        front.start(front.base).unwrap();
        for token in 0..8 {
            front.submit(token, Op::Write, 8 * u64::from(token));
        }
        finish(front);
        // And some more, on the way while the rest happens.
        for token in 0..8 {
            front.submit(token, Op::Read, 8 * u64::from(token));
        }
        front.notify();
    }
    match state {
        2 => assert!(front.set(18, &pair(0, 0), &[]).unwrap()),
        6 => drop(front.stop().unwrap()),
        _ => {}
    }
}

/// Every message in every state, with 0 to 64 descriptors of every kind, as it should be and not.
fn every_message(packed: bool) {
    let mut besieged = Besieged::new();
    let descriptors = descriptors();
    let mut sent = 0;
    for (state, name) in STATES.iter().enumerate() {
        for number in (0..47).chain([u32::MAX]) {
            let mut front = besieged.front(packed);
            bring_to(state, &mut front);
            let usual = usual(number, front.features);
            let longer = [&usual[..], &[0]].concat();
            let fillings = [
                usual.clone(),
                vec![0; usual.len()],
                vec![0xff; usual.len()],
                longer,
                vec![],
            ];
            for count in 0..=64usize {
                let fds: Vec<i32> = (0..count)
                    .map(|i| descriptors[(i + sent) % descriptors.len()].as_raw_fd())
                    .collect();
                for (n, payload) in fillings.iter().enumerate() {
                    // Beyond what any message takes, one of them is enough.
                    if count > 2 && n != count % fillings.len() {
                        continue;
                    }
                    let flags = VERSION | if sent % 2 == 0 { NEED_REPLY } else { 0 };
                    assert!(front.send(number, flags, payload, &fds));
                    sent += 1;
                }
            }
            // After all that, a question is answered as always.
            let question = if number == 1 { 15 } else { 1 };
            front.send(question, VERSION, &[], &[]);
            let mut client = Client::over(front.stream.take().unwrap());
            loop {
                let answer = client.receive();
                let (request, _, payload) = answer.expect("the session hung up");
                if request == question {
                    assert_eq!(payload.len(), 8, "{name}, {number}");
                    break;
                }
                assert_eq!(request, number, "{name}");
            }
            drop(client);
            besieged.recovers(&format!("{name}, message {number}"));
        }
        besieged.serves_a_good_one();
    }
    println!("{sent} messages");
    besieged.has_not_grown();
}

#[test]
fn every_message_with_0_to_64_descriptors_on_a_split_ring() {
    every_message(false);
}

#[test]
fn every_message_with_0_to_64_descriptors_on_a_packed_ring() {
    every_message(true);
}

#[test]
fn a_thousand_connections_cut_off_under_io() {
    let mut besieged = Besieged::new();
    for round in 0..1000usize {
        let mut front = besieged.front(round % 2 == 0);
        front.negotiate(round % 3 == 0).unwrap();
        front.start(front.base).unwrap();
        for token in 0..32 {
            let op = [Op::Read, Op::Write, Op::Flush, Op::Zeroes][usize::from(token) % 4];
            front.submit(token, op, 8 * u64::from(token));
        }
        front.notify();
        match round % 4 {
            // Half a message, a reply that nobody takes, a ring that is disabled, or nothing.
            0 => drop(front.stream.as_ref().unwrap().write(&[1, 0, 0])),
            1 => drop(front.send(1, VERSION, &[], &[])),
            2 => drop(front.send(18, VERSION, &pair(0, 0), &[])),
            _ => {}
        }
        drop(front);
        if round % 100 == 99 {
            besieged.recovers(&format!("round {round}"));
            besieged.serves_a_good_one();
        }
    }
    besieged.recovers("the last one");
    besieged.has_not_grown();
}

/// Something is owed to the daemon, or to the frontend; then nothing more happens, and the
/// connection stays open. It is given up after some seconds, and the next one gets its turn.
fn stalls(how: impl FnOnce(&mut UnixStream)) {
    let mut besieged = Besieged::new();
    let mut stalled = besieged.daemon.connect(&besieged.socket);
    let limit = Some(Duration::from_secs(2));
    stalled.set_write_timeout(limit).unwrap();
    how(&mut stalled);
    let began = Instant::now();
    besieged.serves_a_good_one();
    println!("served after {:.1} s", began.elapsed().as_secs_f64());
    drop(stalled);
    besieged.recovers("stalled");
}

#[test]
fn who_stalls_does_not_keep_the_next_one_waiting() {
    let header = |request: u32, len: u32| -> Vec<u8> {
        [request, VERSION, len]
            .iter()
            .flat_map(|w| w.to_ne_bytes())
            .collect()
    };
    std::thread::scope(|scope| {
        scope.spawn(|| stalls(|stream| stream.write_all(&header(1, 0)[..3]).unwrap()));
        scope.spawn(|| {
            stalls(|stream| {
                stream.write_all(&header(2, 8)).unwrap();
                stream.write_all(&[0; 4]).unwrap();
            });
        });
        // Answers that nobody takes, until both directions are full.
        scope.spawn(|| stalls(|stream| while stream.write_all(&header(1, 0)).is_ok() {}));
    });
}

/// For whoever has it, as FIONBIO, which every file knows.
fn block(file: &File, blocking: bool) {
    let same = OwnedFd::from(file.try_clone().unwrap());
    UnixStream::from(same).set_nonblocking(!blocking).unwrap();
}

/// Signals that cannot be given: an eventfd that is full, and made to block after it was sent. A
/// pipe is not even taken.
#[test]
fn descriptors_that_would_block_hold_nothing_up() {
    let mut besieged = Besieged::new();
    let (_reader, writer) = std::io::pipe().unwrap();
    for packed in [false, true] {
        for blocking in [false, true] {
            let mut full = event();
            block(&full, blocking);
            let mut front = besieged.front(packed);
            front.negotiate(true).unwrap();
            front.start(front.base).unwrap();
            for request in [13, 14] {
                let fds = [writer.as_raw_fd()];
                assert!(!front.set(request, &words(&[0]), &fds).unwrap());
                let fds = [full.as_raw_fd()];
                assert!(front.set(request, &words(&[0]), &fds).unwrap());
            }
            // It may have been signalled already.
            block(&full, false);
            while full.write(&(u64::MAX - 1).to_ne_bytes()).is_err() {
                let _ = full.read(&mut [0; 8]);
            }
            block(&full, true);
            front.want_call();
            for token in 0..32 {
                front.submit(token, Op::Write, 8 * u64::from(token));
            }
            finish(&mut front);
            // Retired, with an error to signal.
            front.break_ring();
            front.notify();
            drop(front);
            besieged.recovers("blocked");
            besieged.serves_a_good_one();
        }
    }
}
