//! Hot upgrades that fail half way, or should: nothing changes, and nothing that is sent is believed.

mod support;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use support::load::Verified;
use support::process::{Daemon, TIMEOUT, blkd, connect, stats};
use support::site::Site;
use support::{Disk, FEATURES, Frontend};
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
