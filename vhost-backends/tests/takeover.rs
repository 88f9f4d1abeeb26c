//! Hot upgrade beside frontends that are in the middle of something, or up to no good: none of them
//! delays the others, or keeps them where they are.

mod support;

#[path = "support/raw.rs"]
mod raw;

use raw::{Client, NEED_REPLY, VERSION, event, memory, pair, words};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use support::process::{Daemon, TIMEOUT, blkd, connect, http, stats};
use support::{Disk, FEATURES, Frontend, pattern};

const MIB: u64 = 1 << 20;
/// Longer than any upgrade here takes, and less than a stalled frontend could cost.
const SOON: Duration = Duration::from_secs(8);

/// Two disks: one with a frontend that works, one with another that does not.
struct Pair {
    disks: [Disk; 2],
    control: PathBuf,
    serving: Option<Daemon>,
    good: Option<Frontend>,
    rounds: u64,
}

impl Pair {
    fn new() -> Pair {
        let disks = [Disk::new(MIB), Disk::new(MIB)];
        let control = disks[0].dir.path().join("ctl");
        let mut pair = Pair {
            disks,
            control,
            serving: None,
            good: None,
            rounds: 0,
        };
        pair.serving = Some(pair.daemon(false));
        let socket = &pair.disks[0].socket;
        drop(connect(socket));
        pair.good = Some(Frontend::connect(socket, FEATURES, 1, 64, MIB as usize));
        pair.work();
        pair
    }

    fn daemon(&self, take_over: bool) -> Daemon {
        let mut command = blkd();
        for disk in &self.disks {
            let (socket, image) = (disk.socket.display(), disk.image.display());
            let disk = format!("socket={socket},file={image}");
            command.arg("--disk").arg(disk);
        }
        command.arg("--control-socket").arg(&self.control);
        if take_over {
            command.arg("--take-over").arg(&self.control);
        }
        Daemon::start(&mut command)
    }

    /// The good frontend's disk works.
    fn work(&mut self) {
        self.rounds += 1;
        let data = pattern(self.rounds, 4096);
        let good = self.good.as_mut().unwrap();
        assert_eq!(good.write_sync(0, 4096, &data), 0);
        assert!(good.read_sync(0, 4096, 4096) == (0, data));
    }

    /// An upgrade that goes well, and soon.
    fn upgrade(&mut self) {
        let start = Instant::now();
        let next = self.daemon(true);
        let (code, said) = self.serving.replace(next).unwrap().wait();
        assert_eq!(code, Some(0), "{said}");
        self.work();
        assert!(start.elapsed() < SOON, "held up: {:?}", start.elapsed());
    }

    /// Somebody asks, and goes away again.
    fn fail(&self) {
        let mut stream = connect(&self.control);
        let body = r#"{"version":1,"members":["disk0","disk1"]}"#;
        let length = body.len();
        let request = format!("POST /take-over HTTP/1.0\r\nContent-Length: {length}\r\n\r\n{body}");
        stream.write_all(request.as_bytes()).unwrap();
        let mut head = [0; 12];
        stream.read_exact(&mut head).unwrap();
        assert_eq!(&head, b"HTTP/1.0 101");
        // The record's end: everything stands still by then.
        let end = 0x5056_0005u32.to_ne_bytes();
        let mut last = [0; 4];
        while last != end {
            last.rotate_left(1);
            stream.read_exact(&mut last[3..]).unwrap();
        }
    }

    fn other(&self) -> UnixStream {
        connect(&self.disks[1].socket)
    }

    /// Whoever comes to the other disk now is served.
    fn end(mut self) {
        let socket = &self.disks[1].socket;
        let mut front = Frontend::connect(socket, FEATURES, 1, 64, MIB as usize);
        assert_eq!(front.write_sync(0, 0, &pattern(9, 512)), 0);
        drop((front, self.good.take()));
        assert_eq!(self.serving.take().unwrap().end().0, Some(0));
    }
}

/// A message, as bytes.
fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let head = [request, flags, payload.len() as u32];
    [&head.map(u32::to_ne_bytes).concat(), payload].concat()
}

fn hung_up(stream: &UnixStream) {
    let mut rest = Vec::new();
    let mut stream = stream;
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    match stream.read_to_end(&mut rest) {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
    }
}

#[test]
fn a_message_that_is_half_there_goes_over() {
    use std::os::fd::AsRawFd;
    use vmm_sys_util::sock_ctrl_msg::ScmSocket;
    let mut pair = Pair::new();
    let mut other = Client::over(pair.other());
    other.negotiate();
    let region = memory(MIB);
    let add = message(37, VERSION | NEED_REPLY, &words(&[0, 0, MIB, 0, 0]));
    // Cut in the header, after it, and in the payload; the descriptor comes with the first part.
    for cut in [1, 7, 12, 13, 51] {
        let (first, rest) = add.split_at(cut);
        let fds = [region.as_raw_fd()];
        other.stream.send_with_fds(&[first], &fds).unwrap();
        pair.upgrade();
        other.stream.write_all(rest).unwrap();
        let (number, _, code) = other.receive().unwrap();
        assert_eq!((number, code), (37, vec![0; 8]), "cut at {cut}");
        assert!(other.set(38, &words(&[0, 0, MIB, 0, 0]), &[]));
    }
    // One byte for each of several upgrades.
    let ask = message(1, VERSION, &[]);
    for byte in &ask[..3] {
        other.stream.write_all(&[*byte]).unwrap();
        pair.upgrade();
    }
    other.stream.write_all(&ask[3..]).unwrap();
    assert_eq!(other.receive().unwrap().0, 1);
    drop(other);
    pair.end();
}

#[test]
fn an_upgrade_that_fails_loses_nothing_of_half_a_message() {
    let pair = Pair::new();
    let mut other = Client::over(pair.other());
    other.negotiate();
    let ask = message(1, VERSION, &[]);
    other.stream.write_all(&ask[..5]).unwrap();
    pair.fail();
    other.stream.write_all(&ask[5..]).unwrap();
    assert_eq!(other.receive().unwrap().0, 1);
    drop(other);
    pair.end();
}

#[test]
fn answers_that_nobody_takes_hold_up_nothing() {
    let mut pair = Pair::new();
    let other = pair.other();
    other.set_nonblocking(true).unwrap();
    let ask = message(1, VERSION, &[]);
    // Until both directions are full.
    let mut full = Instant::now();
    while full.elapsed() < Duration::from_millis(300) {
        if (&other).write(&ask).is_ok_and(|n| n > 0) {
            full = Instant::now();
        }
    }
    pair.upgrade();
    other.set_nonblocking(false).unwrap();
    hung_up(&other);
    drop(other);
    pair.end();
}

/// Kick, call and addresses of a queue; whether the last of them was accepted.
fn complete(other: &mut Client, at: u64) -> bool {
    assert!(other.set(8, &pair(0, 64), &[]));
    assert!(other.set(10, &pair(0, 0), &[]));
    let addr = words(&[0, at, at + 0x2000, at + 0x1000, 0]);
    assert!(other.set(9, &addr, &[]));
    let (kick, call) = (event(), event());
    assert!(other.set(13, &words(&[0]), &[&call]));
    assert!(other.set(18, &pair(0, 1), &[]));
    other.set(12, &words(&[0]), &[&kick])
}

#[test]
fn a_queue_that_cannot_start_ends_its_own_session() {
    let mut pair = Pair::new();
    for succeeds in [false, true] {
        let mut other = Client::over(pair.other());
        other.negotiate();
        let region = memory(MIB);
        assert!(other.set(37, &words(&[0, 0, MIB, 0, 0]), &[&region]));
        assert!(!complete(&mut other, 1 << 40), "addresses outside memory");
        assert!(other.query_u64(1) != 0, "it was refused, and goes on");
        if succeeds {
            pair.upgrade();
        } else {
            pair.fail();
            pair.work();
        }
        hung_up(&other.stream);
    }
    pair.end();
}

#[test]
fn memory_that_is_gone_ends_its_own_session() {
    let mut pair = Pair::new();
    let mut other = Client::over(pair.other());
    other.negotiate();
    let region = tempfile::tempfile().unwrap();
    region.set_len(MIB).unwrap();
    assert!(other.set(37, &words(&[0, 0, MIB, 0, 0]), &[&region]));
    region.set_len(0).unwrap();
    pair.upgrade();
    hung_up(&other.stream);
    pair.end();
}

/// As with any image that is cut off under its guest: I/O errors and a count.
#[test]
fn an_image_that_became_smaller_goes_over() {
    let mut pair = Pair::new();
    let socket = &pair.disks[1].socket;
    let mut other = Frontend::connect(socket, FEATURES, 1, 64, MIB as usize);
    assert_eq!(other.write_sync(0, 0, &pattern(3, 512)), 0);
    let image = std::fs::File::options()
        .write(true)
        .open(&pair.disks[1].image);
    image.unwrap().set_len(MIB / 2).unwrap();
    for _ in 0..2 {
        pair.upgrade();
        assert!(other.read_sync(0, 0, 512) == (0, pattern(3, 512)));
        assert_ne!(other.read_sync(0, MIB - 512, 512).0, 0);
        let (status, said) = http(&pair.control, "PUT", "/disks/disk1/resize", "");
        assert!(
            status.contains("409") && said.contains("the guest was told 2048"),
            "{said}"
        );
        let errors = stats(&pair.control)["disks"][1]["errors"].clone();
        assert_eq!(errors["past_end"], 1, "{errors}");
    }
    drop(other);
    let image = std::fs::File::options()
        .write(true)
        .open(&pair.disks[1].image);
    image.unwrap().set_len(MIB).unwrap();
    pair.end();
}
