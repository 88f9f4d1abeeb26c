//! Hot upgrade: a daemon hands all that it serves to another process, under load; one that fails
//! half way changes nothing.

mod support;

#[path = "support/front.rs"]
mod front;
#[path = "support/raw.rs"]
mod raw;

use front::{BLOCK, DATA, Front, Op};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use support::load::Verified;
use support::process::{Daemon, TIMEOUT, blkd, connect, http, stats};
use support::{Disk, FEATURES, Frontend, pattern};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

const MIB: u64 = 1 << 20;
/// Frames of the protocol between two daemons, written out again on purpose: a daemon of another
/// version speaks them too, so a number that changes over there has to fail here.
const MEMBER: u32 = 0x5056_0001;
const LISTENER: u32 = 0x5056_0002;
const CONNECTION: u32 = 0x5056_0003;
const ADMIN: u32 = 0x5056_0004;
const END: u32 = 0x5056_0005;
const READY: u32 = 0x5056_0006;
const REFUSED: u32 = 0x5056_0007;

struct Site {
    disk: Disk,
    stats: PathBuf,
    control: PathBuf,
}

impl Site {
    fn new() -> Site {
        let disk = Disk::new(16 * MIB);
        let (stats, control) = (disk.dir.path().join("stats"), disk.dir.path().join("ctl"));
        Site {
            disk,
            stats,
            control,
        }
    }

    fn command(&self, more: &[&str]) -> Command {
        let mut command = blkd();
        command.arg("--stats-socket").arg(&self.stats);
        command.arg("--control-socket").arg(&self.control);
        command.arg("--socket-path").arg(&self.disk.socket);
        command.arg("--blk-file").arg(&self.disk.image).args(more);
        command
    }

    fn start(&self, more: &[&str]) -> Daemon {
        Daemon::start(&mut self.command(more))
    }

    /// Another daemon, which takes over.
    fn take_over(&self, more: &[&str]) -> Daemon {
        let mut command = self.command(more);
        Daemon::start(command.arg("--take-over").arg(&self.control))
    }
}

/// How long the queues stood still, from what the new daemon said.
fn pause_in(said: &str) -> Duration {
    let text = said.lines().find(|line| line.contains("stood still for"));
    let text = text.unwrap_or_else(|| panic!("no pause in {said:?}"));
    let number = text.rsplit(' ').next().unwrap();
    let (digits, unit) = number.split_at(
        number
            .find(|c: char| c.is_alphabetic() || c == 'µ')
            .unwrap(),
    );
    let seconds = match unit {
        "s" => 1.0,
        "ms" => 1e-3,
        "µs" => 1e-6,
        other => panic!("{other}"),
    };
    Duration::from_secs_f64(digits.parse::<f64>().unwrap() * seconds)
}

#[test]
fn ten_upgrades_under_verified_load() {
    for more in [
        &["--num-queues", "2"][..],
        &["--num-queues", "2", "--direct"],
    ] {
        let site = Site::new();
        let first = site.start(more);
        let mut front = Frontend::connect(&site.disk.socket, FEATURES, 2, 64, MIB as usize);
        let mut load = Verified::new();
        load.round(&mut front);
        let fds = first.fds();
        let done = AtomicBool::new(false);
        let (last, mut pauses) = std::thread::scope(|scope| {
            let upgrades = scope.spawn(|| {
                let mut pauses = Vec::new();
                let mut serving = first;
                for round in 0..10 {
                    let next = site.take_over(more);
                    let (code, said) = serving.wait();
                    assert_eq!(code, Some(0), "{said}");
                    if round > 0 {
                        pauses.push(pause_in(&said));
                    }
                    serving = next;
                    std::thread::sleep(Duration::from_millis(30));
                }
                done.store(true, Ordering::SeqCst);
                (serving, pauses)
            });
            while !done.load(Ordering::SeqCst) {
                assert!(
                    !upgrades.is_finished() || done.load(Ordering::SeqCst),
                    "an upgrade failed"
                );
                load.round(&mut front);
            }
            upgrades.join().unwrap()
        });
        load.round(&mut front);
        // The frontend has seen one connection, and so has the last daemon, which holds no more
        // than the first.
        let connection = stats(&site.stats)["disks"][0]["connection"].clone();
        assert_eq!(connection["connected"], true);
        assert_eq!(connection["reconnects"], 0);
        let deadline = Instant::now() + TIMEOUT;
        while last.fds() != fds {
            assert!(
                Instant::now() < deadline,
                "{} descriptors, {fds} before",
                last.fds()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        let locked = site.start(more).wait();
        assert_eq!(
            locked.0,
            Some(1),
            "the lock went with the disk: {}",
            locked.1
        );
        drop(front);
        // It is served like any other: a new frontend, and the end.
        let mut front = Frontend::connect(&site.disk.socket, FEATURES, 2, 64, MIB as usize);
        load.round(&mut front);
        drop(front);
        let (code, said) = last.end();
        assert_eq!(code, Some(0), "{said}");
        pauses.push(pause_in(&said));
        for path in [&site.disk.socket, &site.stats, &site.control] {
            assert!(!path.exists(), "{}", path.display());
        }
        pauses.sort();
        println!(
            "{more:?}: 10 upgrades, {} writes and {} reads verified; queues stood still for {:?} \
             (median), {:?} (longest)",
            load.written, load.read, pauses[4], pauses[9]
        );
    }
}

/// All that a session can have: packed, the in-flight log, the dirty log, the backend's channel, a
/// configuration that was written to.
#[test]
fn a_session_goes_over_with_all_that_it_has() {
    for packed in [false, true] {
        let site = Site::new();
        let mut serving = site.start(&[]);
        let mut front = Front::new(64, packed, true);
        front.connect(&site.disk.socket);
        front.features |= front::LOG_ALL;
        front.negotiate(true).unwrap();
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(TIMEOUT)).unwrap();
        assert_eq!(front.set(21, &[], &[theirs.as_raw_fd()]), Some(true));
        drop(theirs);
        let log = raw::memory(0x10_0000);
        let base = raw::words(&[0x10_0000, 0]);
        front.send(6, raw::VERSION, &base, &[log.as_raw_fd()]);
        assert_eq!(front.receive(6).unwrap().0, base);
        // The driver turns the write cache off.
        let mut write = [32u32, 1, 0].map(u32::to_ne_bytes).concat();
        write.push(0);
        assert_eq!(front.set(25, &write, &[]), Some(true));
        front.start(front.base).unwrap();
        let io = |front: &mut Front, seed: u64| {
            front.memory.fill(DATA, &pattern(seed, BLOCK as usize));
            front.submit(0, Op::Write, seed * 8);
            front.notify();
            front.settle(1);
            front.memory.fill(DATA + BLOCK, &[0xee; BLOCK as usize]);
            front.submit(1, Op::Read, seed * 8);
            front.submit(2, Op::Flush, 0);
            front.notify();
            front.settle(2);
            let read = front.memory.bytes(DATA + BLOCK, BLOCK as usize);
            assert!(read == pattern(seed, BLOCK as usize));
        };
        io(&mut front, 1);
        for round in 2..6 {
            // Submitted while nobody may be looking, and found by whoever comes.
            let next = site.take_over(&[]);
            front
                .memory
                .fill(DATA + 3 * BLOCK, &pattern(round, BLOCK as usize));
            front.submit(3, Op::Write, 800 + round * 8);
            front.notify();
            assert_eq!(serving.wait().0, Some(0));
            serving = next;
            front.settle(1);
            // Reads mark what they write to guest memory, in the log that was there before.
            log.set_len(0x10_0000).unwrap();
            let marked = || std::fs::read(format!("/proc/self/fd/{}", log.as_raw_fd())).unwrap();
            assert!(marked().iter().any(|byte| *byte != 0));
            io(&mut front, round);
            let mut ask = [32u32, 1, 0].map(u32::to_ne_bytes).concat();
            ask.push(0xff);
            assert_eq!(
                front.query(24, &ask).unwrap()[12..],
                [0],
                "write-through still"
            );
        }
        let image = std::fs::read(&site.disk.image).unwrap();
        for round in 2..6u64 {
            let at = (800 + round as usize * 8) * 512;
            assert!(image[at..at + BLOCK as usize] == pattern(round, BLOCK as usize));
        }
        // An image that grew by itself stays as large as the frontend knows it until it is asked to
        // look, and the backend's channel leads to the frontend as before.
        File::options()
            .write(true)
            .open(&site.disk.image)
            .unwrap()
            .set_len(32 * MIB)
            .unwrap();
        let next = site.take_over(&[]);
        assert_eq!(serving.wait().0, Some(0));
        serving = next;
        std::thread::scope(|scope| {
            let resize = scope.spawn(|| http(&site.control, "PUT", "/disks/disk0/resize", ""));
            let mut head = [0; 12];
            ours.read_exact(&mut head).unwrap();
            let mut reply = [2u32, 1 | 4, 8].map(u32::to_ne_bytes).concat();
            reply.extend([0; 8]);
            ours.write_all(&reply).unwrap();
            let said = resize.join().unwrap().1;
            assert!(
                said.contains("became 65536; the frontend was told"),
                "{said}"
            );
        });
        // And the ring stands where the frontend thinks it does.
        let base = front.stop().unwrap();
        front.start(base).unwrap();
        io(&mut front, 7);
        drop(front);
        assert_eq!(serving.end().0, Some(0));
    }
}

#[test]
fn several_disks_and_one_that_nobody_uses() {
    let disks = [Disk::new(MIB), Disk::new(MIB), Disk::new(MIB)];
    let control = disks[0].dir.path().join("ctl");
    let command = |take_over: bool| {
        let mut command = blkd();
        for disk in &disks {
            let (socket, image) = (disk.socket.display(), disk.image.display());
            command
                .arg("--disk")
                .arg(format!("socket={socket},file={image}"));
        }
        command.arg("--control-socket").arg(&control);
        if take_over {
            command.arg("--take-over").arg(&control);
        }
        Daemon::start(&mut command)
    };
    let mut serving = command(false);
    let mut fronts: Vec<Frontend> = disks[..2]
        .iter()
        .map(|disk| Frontend::connect(&disk.socket, FEATURES, 1, 64, MIB as usize))
        .collect();
    for round in 0..3 {
        for (index, front) in fronts.iter_mut().enumerate() {
            let data = pattern(round * 2 + index as u64, 4096);
            assert_eq!(front.write_sync(0, round * 4096, &data), 0);
        }
        let next = command(true);
        assert_eq!(serving.wait().0, Some(0));
        serving = next;
        for (index, front) in fronts.iter_mut().enumerate() {
            let data = pattern(round * 2 + index as u64, 4096);
            assert!(front.read_sync(0, round * 4096, 4096) == (0, data));
        }
    }
    let mut third = Frontend::connect(&disks[2].socket, FEATURES, 1, 64, MIB as usize);
    assert_eq!(third.write_sync(0, 0, &pattern(9, 512)), 0);
    drop((third, fronts));
    assert_eq!(serving.end().0, Some(0));
    assert!(disks.iter().all(|disk| !disk.socket.exists()));
}

// ---- what fails

/// Asks as a new daemon would; the answer's head.
fn ask(control: &Path, body: &str) -> (UnixStream, String) {
    let mut stream = connect(control);
    let length = body.len();
    let request = format!("POST /take-over HTTP/1.0\r\nContent-Length: {length}\r\n\r\n{body}");
    stream.write_all(request.as_bytes()).unwrap();
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).unwrap() == 1 {
        head.extend(byte);
    }
    (stream, String::from_utf8(head).unwrap())
}

/// Takes the record, up to its end.
fn record(stream: &UnixStream) -> Vec<u32> {
    let mut frames = Vec::new();
    loop {
        let mut head = [0; 12];
        // Descriptors that nobody takes are closed by the kernel.
        let mut from = stream;
        from.read_exact(&mut head).unwrap();
        let word = |at: usize| u32::from_ne_bytes(head[at..at + 4].try_into().unwrap());
        let mut payload = vec![0; word(8) as usize];
        from.read_exact(&mut payload).unwrap();
        frames.push(word(0));
        if word(0) == END {
            return frames;
        }
    }
}

const HELLO: &str = r#"{"version":1,"members":["disk0"]}"#;

fn frame(stream: &UnixStream, request: u32, payload: &[u8], fds: &[i32]) {
    let size = payload.len() as u32;
    let mut bytes = [request, 1, size].map(u32::to_ne_bytes).concat();
    bytes.extend(payload);
    // The other side may have hung up by now.
    let _ = stream.send_with_fds(&[bytes.as_slice()], fds);
}

#[test]
fn upgrades_that_fail_leave_the_old_daemon_serving() {
    let site = Site::new();
    let daemon = site.start(&["--num-queues", "2"]);
    let mut front = Frontend::connect(&site.disk.socket, FEATURES, 2, 64, MIB as usize);
    let mut load = Verified::new();
    load.round(&mut front);
    let fds = daemon.fds();
    // Refused before anything is stopped.
    for (body, status, why) in [
        ("", "400", "malformed"),
        ("{\"version\":1}", "400", "malformed"),
        (
            r#"{"version":2,"members":["disk0"]}"#,
            "409",
            "by version 1",
        ),
        (
            r#"{"version":1,"members":["disk1"]}"#,
            "409",
            "serves disk0",
        ),
        (r#"{"version":1,"members":[]}"#, "409", "serves disk0"),
    ] {
        let (mut stream, head) = ask(&site.control, body);
        let mut said = String::new();
        stream.read_to_string(&mut said).unwrap();
        assert!(head.starts_with(&format!("HTTP/1.0 {status}")), "{head}");
        assert!(said.contains(why), "{said}");
        load.round(&mut front);
    }
    let (_, head) = ask(&site.stats, HELLO);
    assert!(head.starts_with("HTTP/1.0 404"), "{head}");
    // Given up half way, in several ways; the queues stand still meanwhile and then go on.
    for how in 0..6 {
        let (stream, head) = ask(&site.control, HELLO);
        assert!(head.starts_with("HTTP/1.0 101 "), "{head}");
        if how > 0 {
            let frames = record(&stream);
            assert_eq!(frames[..3], [MEMBER, LISTENER, CONNECTION]);
            assert_eq!(frames[frames.len() - 3..], [ADMIN, ADMIN, END]);
            assert_eq!(frames.iter().filter(|f| **f == 12).count(), 2, "kicks");
        }
        match how {
            // The new one is killed before and after it has the record.
            0 | 1 => drop(stream),
            2 => frame(&stream, REFUSED, b"\"no\"", &[]),
            3 => frame(&stream, END, b"{}", &[]),
            4 => (&stream).write_all(&[0xff; 64]).unwrap(),
            // Half a message, and then silence.
            _ => (&stream).write_all(&READY.to_ne_bytes()).unwrap(),
        }
        load.round(&mut front);
    }
    // Real ones that were told to serve something else.
    let other = Disk::new(MIB);
    let image = other.image.to_str().unwrap();
    for (more, why) in [
        (&["--num-queues", "1"][..], "were not offered"),
        (
            &["--num-queues", "2", "--read-only"],
            "serves something else",
        ),
        (
            &["--num-queues", "2", "--id", "x"],
            "this daemon serves disk0",
        ),
        (
            &["--num-queues", "2", "--nbd", "unix:/x"],
            "cannot be used with",
        ),
    ] {
        let (code, said) = site.take_over(more).wait();
        assert_ne!(code, Some(0));
        assert!(said.contains(why), "{more:?}: {said}");
        load.round(&mut front);
    }
    let mut command = blkd();
    command
        .arg("--stats-socket")
        .arg(&site.stats)
        .arg("--control-socket")
        .arg(&site.control);
    command.arg("--socket-path").arg(&site.disk.socket);
    command
        .args(["--num-queues", "2", "--blk-file", image])
        .arg("--take-over")
        .arg(&site.control);
    let (code, said) = Daemon::start(&mut command).wait();
    assert_eq!(code, Some(1));
    assert!(said.contains("serves something else"), "{said}");
    load.round(&mut front);
    daemon.wait_for_fds(fds);
    assert!(
        site.disk.socket.exists() && site.control.exists(),
        "nobody removed them"
    );
    let connection = stats(&site.stats)["disks"][0]["connection"].clone();
    assert_eq!(
        (&connection["connected"], &connection["connections"]),
        (&true.into(), &1.into())
    );
    // After all that, one that succeeds.
    let next = site.take_over(&["--num-queues", "2"]);
    let (code, said) = daemon.wait();
    assert_eq!(code, Some(0));
    assert_eq!(
        said.lines().filter(|l| l.contains("serving on")).count(),
        9,
        "{said}"
    );
    load.round(&mut front);
    drop(front);
    assert_eq!(next.end().0, Some(0));
}

#[test]
fn disks_that_live_in_their_process_are_not_handed_over() {
    let site = Site::new();
    let mut command = blkd();
    command.arg("--socket-path").arg(&site.disk.socket);
    command.arg("--control-socket").arg(&site.control);
    let daemon = Daemon::start(command.args(["--memory", "1M"]));
    drop(connect(&site.disk.socket));
    let (mut stream, head) = ask(&site.control, HELLO);
    let mut said = String::new();
    stream.read_to_string(&mut said).unwrap();
    assert!(head.starts_with("HTTP/1.0 409"), "{head}");
    assert!(said.contains("gone with its process"), "{said}");
    assert_eq!(daemon.end().0, Some(0));
}

/// A new daemon believes nothing of what it is sent.
#[test]
fn a_false_record_is_refused_with_a_sentence() {
    let site = Site::new();
    let listener = UnixListener::bind(&site.control).unwrap();
    let served = UnixListener::bind(&site.disk.socket).unwrap();
    let stats = UnixListener::bind(&site.stats).unwrap();
    let identity = |path: &Path| {
        use std::os::unix::fs::MetadataExt;
        let metadata = std::fs::symlink_metadata(path).unwrap();
        (metadata.dev(), metadata.ino())
    };
    let (dev, ino) = identity(&site.disk.image);
    let (socket_dev, socket_ino) = identity(&site.disk.socket);
    let good = format!(
        r#"{{"name":"disk0","identity":"image {dev}:{ino}, read-only false","socket":[{socket_dev},{socket_ino}]}}"#
    );
    let admin = |stream: &UnixStream| {
        for (path, control, fd) in [
            (&site.stats, false, stats.as_raw_fd()),
            (&site.control, true, listener.as_raw_fd()),
        ] {
            let (dev, ino) = identity(path);
            let head = format!(r#"{{"control":{control},"socket":[{dev},{ino}]}}"#);
            frame(stream, ADMIN, head.as_bytes(), &[fd]);
        }
    };
    let end = br#"{"paused_at_nanos":0}"#;
    let file = File::open(&site.disk.image).unwrap();
    let (peer, _other) = UnixStream::pair().unwrap();
    let no_config = br#"{"config":[]}"#;
    let member = good.as_bytes();
    type Say<'s> = Box<dyn Fn(&UnixStream) + 's>;
    let cases: Vec<(&str, Say<'_>)> = vec![
        ("hung up", Box::new(|_| {})),
        ("something else", Box::new(|s| frame(s, END, end, &[]))),
        (
            "wrong order",
            Box::new(|s| frame(s, LISTENER, b"null", &[served.as_raw_fd()])),
        ),
        ("wrong order", Box::new(|s| frame(s, 2, &[0; 8], &[]))),
        ("malformed", Box::new(|s| frame(s, MEMBER, b"[", &[]))),
        (
            "a message of",
            Box::new(|s| frame(s, MEMBER, &[0; 5000], &[])),
        ),
        (
            "should be",
            Box::new(|s| {
                frame(s, MEMBER, member, &[]);
                frame(s, LISTENER, b"null", &[file.as_raw_fd()]);
            }),
        ),
        (
            "without a descriptor",
            Box::new(|s| {
                frame(s, MEMBER, member, &[]);
                frame(s, CONNECTION, no_config, &[]);
            }),
        ),
        (
            "other statistics or control sockets",
            Box::new(|s| {
                frame(s, MEMBER, member, &[]);
                frame(s, LISTENER, b"null", &[served.as_raw_fd()]);
                for control in [true, false] {
                    let head = format!(r#"{{"control":{control},"socket":[1,2]}}"#);
                    frame(s, ADMIN, head.as_bytes(), &[served.as_raw_fd()]);
                }
                frame(s, END, end, &[]);
            }),
        ),
        (
            "were not offered",
            Box::new(|s| {
                frame(s, MEMBER, member, &[]);
                frame(s, LISTENER, b"null", &[served.as_raw_fd()]);
                frame(s, CONNECTION, no_config, &[peer.as_raw_fd()]);
                frame(s, 2, &[0xff; 8], &[]);
                admin(s);
                frame(s, END, end, &[]);
            }),
        ),
        (
            "not the one that the frontend knows",
            Box::new(|s| {
                frame(s, MEMBER, member, &[]);
                frame(s, CONNECTION, no_config, &[peer.as_raw_fd()]);
                admin(s);
                frame(s, END, end, &[]);
            }),
        ),
        (
            "is not served",
            Box::new(|s| {
                frame(s, MEMBER, member, &[]);
                frame(s, CONNECTION, no_config, &[peer.as_raw_fd()]);
                frame(s, 9999, &[], &[]);
                admin(s);
                frame(s, END, end, &[]);
            }),
        ),
    ];
    for (why, say) in &cases {
        let daemon = site.take_over(&["--no-lock"]);
        let (stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        // The request, which is right.
        let mut request = Vec::new();
        let mut byte = [0];
        while !request.ends_with(b"}") {
            (&stream).read_exact(&mut byte).unwrap();
            request.extend(byte);
        }
        (&stream)
            .write_all(b"HTTP/1.0 101 Switching Protocols\r\n\r\n")
            .unwrap();
        say(&stream);
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let (code, said) = daemon.wait();
        assert_eq!(code, Some(1), "{why}: {said}");
        assert!(said.contains(why), "{why}: {said}");
        assert!(!said.contains("bug"), "{said}");
        assert!(
            site.disk.socket.exists() && site.control.exists(),
            "not its own"
        );
    }
}
