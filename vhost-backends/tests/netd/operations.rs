//! Control, statistics, captures, limits and what it says: several ports in one program.

use super::support::net::{MRG, NetFront, VERSION_1};
use super::support::process::{Daemon, connect, http, manual_names_every_option, netd, stats};
use super::support::raw::{Client, LOG_ALL, memfd, pair, words};
use super::{PLAIN, frame, front, port};
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

#[test]
fn ports_of_one_switch_with_control_and_statistics() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| -> PathBuf { dir.path().join(name) };
    let mut args = Vec::new();
    args.extend(port(&path("a"), 1, "switch=lan,id=a"));
    args.extend(port(&path("b"), 2, "switch=lan,id=b"));
    args.extend(port(&path("c"), 3, "switch=other,id=c"));
    for (flag, name) in [("--control-socket", "ctl"), ("--stats-socket", "stats")] {
        args.extend([flag.into(), path(name).display().to_string()]);
    }
    let daemon = Daemon::start(netd().args(&args));
    let mut fronts = ["a", "b", "c"].map(|name| front(&path(name)));
    for front in &mut fronts {
        for _ in 0..8 {
            assert!(front.offer_receive(0, 2048));
        }
    }
    let sent = frame(2, 1, 900);
    fronts[0].send(1, &PLAIN, &sent);
    assert_eq!(fronts[1].receive(0).1, sent);
    let mut all = frame(2, 1, 70);
    all[..6].fill(0xff);
    fronts[0].send(1, &PLAIN, &all);
    assert_eq!(fronts[1].receive(0).1, all);
    assert!(fronts[2].try_receive(0).is_none(), "another switch");

    let put = |target: &str, body: &str| http(&path("ctl"), "PUT", target, body).0;
    assert_eq!(put("/ports/b/link", "down"), "HTTP/1.0 200 OK");
    fronts[0].send(1, &PLAIN, &sent);
    assert!(fronts[1].try_receive(0).is_none());
    assert_eq!(put("/ports/b/link", "up"), "HTTP/1.0 200 OK");
    assert_eq!(put("/ports/b/announce", ""), "HTTP/1.0 200 OK");
    assert_eq!(put("/ports/b/link", "sideways"), "HTTP/1.0 400 Bad Request");
    assert_eq!(put("/ports/x/link", "up"), "HTTP/1.0 404 Not Found");
    assert_eq!(
        put("/ports/a/limits", "{\"iops\": 1}"),
        "HTTP/1.0 400 Bad Request"
    );
    assert_eq!(
        put("/ports/a/limits", "{\"packets\": 20}"),
        "HTTP/1.0 200 OK"
    );
    assert_eq!(put("/ports/a/limits", "[]"), "HTTP/1.0 400 Bad Request");
    let start = Instant::now();
    for _ in 0..10 {
        fronts[0].send(1, &PLAIN, &sent);
    }
    assert!(
        start.elapsed() > Duration::from_millis(250),
        "{:?}",
        start.elapsed()
    );

    let stats = stats(&path("stats"));
    let a = &stats["ports"][0];
    assert_eq!(
        (&a["port"], &a["mac"]),
        (&"a".into(), &"52:54:00:00:00:01".into())
    );
    assert_eq!(a["sent_frames"], 13);
    assert_eq!(a["limits"]["packets"], 20);
    assert_eq!(stats["ports"][1]["drops"]["link_down"], 1);
    let (_, text) = http(&path("stats"), "GET", "/metrics", "");
    assert!(
        text.contains("pv_net_sent_frames_total{port=\"a\"} 13\n"),
        "{text}"
    );
    assert!(
        text.contains("pv_net_drops_total{port=\"b\",reason=\"link_down\"} 1\n"),
        "{text}"
    );
    drop(fronts);
    assert_eq!(daemon.end(), (Some(0), String::new()));
    for name in ["a", "b", "c", "ctl", "stats"] {
        assert!(!path(name).exists(), "{name}");
    }
}

/// Two ports of one switch, each with a frontend that has offered buffers.
fn neighbours(dir: &Path, features: u64) -> (Daemon, [NetFront; 2]) {
    let mut args = Vec::new();
    for (index, name) in [(1, "a"), (2, "b")] {
        args.extend(port(&dir.join(name), index, "switch=lan"));
    }
    let daemon = Daemon::start(netd().args(&args));
    let fronts = ["a", "b"].map(|name| {
        let client = Client::over(connect(&dir.join(name)));
        let mut front = NetFront::on(client, VERSION_1 | MRG | features, 2);
        (0..4).for_each(|_| assert!(front.offer_receive(0, 2048)));
        front
    });
    (daemon, fronts)
}

/// A host with huge pages gives them or says no; what it does not have is nobody's end.
#[test]
fn memory_of_huge_pages_that_the_host_does_not_have() {
    let sealed = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW;
    let size = 2 << 20;
    let huge = match memfd(size, libc::MFD_HUGETLB | libc::MFD_HUGE_2MB, sealed) {
        Ok(huge) => huge,
        Err(error) => {
            println!("SKIPPED: this host makes no file of huge pages: {error}");
            return;
        }
    };
    let dir = tempfile::tempdir().unwrap();
    let (mut daemon, [mut a, mut b]) = neighbours(dir.path(), 0);
    let table = |size: u64| [pair(1, 0), words(&[0x4000_0000, size, 0x7f00_0000_0000, 0])].concat();
    // The rings go on in it, so it is touched at once.
    let taken = a.client.set(5, &table(size), &[&huge]);
    println!("huge pages were taken: {taken}");
    assert!(a.client.set(5, &table(16 << 20), &[&a.memory.file]));
    assert_ne!(a.client.query_u64(1), 0);
    b.send(1, &PLAIN, &frame(1, 2, 100));
    assert_eq!(daemon.ended(), None);
    assert_eq!(daemon.end().0, Some(0));
}

#[test]
fn a_dirty_log_that_is_cut_off_under_other_ports() {
    let dir = tempfile::tempdir().unwrap();
    let (mut daemon, [mut a, mut b]) = neighbours(dir.path(), LOG_ALL);
    let size = 1 << 20;
    let mut set_log = |log: &File| {
        a.client.send(6, 1, &words(&[size, 0]), &[log]);
        let reply = a.client.receive().unwrap();
        assert_eq!(reply.0, 6);
        !reply.2.is_empty()
    };
    let loose = memfd(size, 0, 0).unwrap();
    let firm = memfd(size, 0, libc::F_SEAL_SHRINK).unwrap();
    assert!(set_log(&firm));
    let taken = set_log(&loose);
    loose.set_len(0).unwrap();
    // What arrives is marked.
    let sent = frame(1, 2, 200);
    b.send(1, &PLAIN, &sent);
    assert_eq!(a.receive(0).1, sent);
    b.send(1, &PLAIN, &sent);
    assert_eq!(a.receive(0).1, sent);
    assert_eq!((taken, daemon.ended()), (false, None));
    let mut bits = Vec::new();
    (&firm).read_to_end(&mut bits).unwrap();
    assert!(bits.iter().any(|byte| *byte != 0));
    assert_ne!(b.client.query_u64(1), 0);
    assert_eq!(daemon.end().0, Some(0));
}

#[test]
fn a_capture_has_what_passes() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| -> PathBuf { dir.path().join(name) };
    let mut args: Vec<String> = port(&path("a"), 1, "loopback,id=a").into();
    args.extend(["--control-socket".into(), path("ctl").display().to_string()]);
    let daemon = Daemon::start(netd().args(&args));
    let mut front = front(&path("a"));
    for round in 0..3usize {
        let mut reader = connect(&path("ctl"));
        let request = b"GET /ports/a/capture HTTP/1.0\r\n\r\n";
        reader.write_all(request).unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            reader.read_exact(&mut byte).unwrap();
            head.push(byte[0]);
        }
        assert!(head.starts_with(b"HTTP/1.0 200 OK"));
        let mut block = || {
            let mut start = [0; 8];
            reader.read_exact(&mut start).unwrap();
            let word = |i: usize| u32::from_le_bytes(start[i..i + 4].try_into().unwrap());
            let mut rest = vec![0; word(4) as usize - 8];
            reader.read_exact(&mut rest).unwrap();
            assert_eq!(rest[rest.len() - 4..], start[4..], "both lengths");
            (word(0), rest)
        };
        assert_eq!(block().0, 0x0a0d_0d0a);
        assert_eq!(block().0, 1);
        for len in [60usize, 61, 1514, 9000] {
            while front.in_flight(0) < 16 {
                assert!(front.offer_receive(0, 2048));
            }
            let sent = frame(1, 1, len + round);
            front.send(1, &PLAIN, &sent);
            assert_eq!(front.receive(0).1, sent);
            for direction in [2, 1] {
                let (kind, body) = block();
                assert_eq!(kind, 6);
                assert_eq!(body[12..16], (sent.len() as u32).to_le_bytes());
                assert!(body[20..20 + sent.len()] == sent);
                let options = 20 + sent.len().next_multiple_of(4);
                assert_eq!(body[options..options + 8], [2, 0, 4, 0, direction, 0, 0, 0]);
            }
        }
        // It hangs up; nobody minds.
    }
    assert_eq!(
        http(&path("ctl"), "GET", "/ports/x/capture", "").0,
        "HTTP/1.0 404 Not Found"
    );
    front.send(1, &PLAIN, &frame(1, 1, 60));
    drop(front);
    assert_eq!(daemon.end(), (Some(0), String::new()));
}

#[test]
fn what_it_says_about_itself() {
    let output = netd().arg("--print-capabilities").output().unwrap();
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(said["type"], "net");
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("share/50-pv-netd.json");
    let text = std::fs::read_to_string(file).unwrap();
    let descriptor: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(descriptor["type"], said["type"]);

    manual_names_every_option(netd(), "pv-netd.1");
}

#[test]
fn bad_ports_get_a_sentence() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    for (more, why) in [
        (
            "tap=a-name-that-is-too-long",
            "cannot open the tap interface",
        ),
        ("tap-fd=200", "is not an inherited descriptor"),
        ("interface=none-such", "cannot open the interface"),
        ("queue-pairs=2", "where frames go"),
    ] {
        let output = netd().args(port(&socket, 1, more)).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{more}: {said}");
        assert!(said.contains(why), "{more}: {said}");
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(!socket.exists(), "{more}");
    }
}

#[test]
fn descriptors_are_as_many_as_may_be_and_enough() {
    let dir = tempfile::tempdir().unwrap();
    let ports: Vec<String> = (0..20u8)
        .flat_map(|index| port(&dir.path().join(index.to_string()), index, "loopback"))
        .collect();
    let limited = |limits: &str| {
        let mut command = Command::new("sh");
        let script = format!("ulimit {limits} && exec \"$@\"");
        command
            .args(["-c", &script, "sh"])
            .arg(netd().get_program());
        command
            .args(&ports)
            .stdin(Stdio::null())
            .stderr(Stdio::piped());
        command
    };
    let output = limited("-n 256").output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("need 800 descriptors"), "{said}");
    assert!(!dir.path().join("0").exists());
    // A soft limit alone is no obstacle.
    let daemon = Daemon::start(&mut limited("-S -n 256"));
    let mut fronts: Vec<NetFront> = (0..20)
        .map(|index: u8| front(&dir.path().join(index.to_string())))
        .collect();
    for front in &mut fronts {
        assert!(front.offer_receive(0, 2048));
        front.send(1, &PLAIN, &frame(1, 1, 60));
        front.receive(0);
    }
    drop(fronts);
    assert_eq!(daemon.end(), (Some(0), String::new()));
}
