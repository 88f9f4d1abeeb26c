//! What is asked of running disks: limits that hold and change, statistics, and who may change what.

mod support;

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use support::daemon::Managed;
use support::process::{TIMEOUT, blkd, connect, http, limit_file_size, stats};
use support::{Frontend, pattern};

const MIB: u64 = 1 << 20;

/// How long so many reads take, eight at a time, and that each is right.
fn timed_reads(front: &mut Frontend, count: usize) -> Duration {
    let start = Instant::now();
    for round in 0..count / 8 {
        for slot in 0..8 {
            let at = ((round * 8 + slot) % 256) as u64 * 4096;
            front.read(0, at, slot * 4096, 4096, slot);
        }
        front.kick(0);
        for _ in 0..8 {
            assert_eq!(front.complete(0).1, 0);
        }
    }
    start.elapsed()
}

#[test]
fn limits_hold_and_change_while_running() {
    // Both engines' ways of waiting, and both limits.
    for more in [
        &["--iops", "400", "--iops-burst", "1"][..],
        &["--iops", "400", "--iops-burst", "1", "--direct"],
        &["--bandwidth", "1600K", "--bandwidth-burst", "4K"],
    ] {
        let managed = Managed::start(more);
        let mut front = managed.frontend();
        let took = timed_reads(&mut front, 160).as_secs_f64();
        assert!(
            (0.38..2.0).contains(&took),
            "160 at 400/s took {took} s: {more:?}"
        );
        let held = stats(&managed.stats)["disks"][0]["queues"][0]["held_seconds"].clone();
        assert!(held.as_f64().unwrap() > 0.2, "{held}");
        // None at all, then slow, then faster while requests are held back.
        let put = |body: &str| http(&managed.control, "PUT", "/disks/disk0/limits", body).0;
        assert_eq!(put("{}"), "HTTP/1.0 200 OK");
        let took = timed_reads(&mut front, 160).as_secs_f64();
        assert!(took < 0.3, "{took}");
        assert_eq!(
            put(r#"{"bandwidth": 1, "bandwidth-burst": 1}"#),
            "HTTP/1.0 200 OK"
        );
        front.read(0, 0, 0, 4096, 1);
        front.kick(0);
        assert_eq!(front.complete(0), (1, 0), "the first goes into debt");
        front.read(0, 0, 0, 4096, 2);
        front.kick(0);
        std::thread::sleep(Duration::from_millis(200));
        assert!(
            front.queues[0].completions().next().is_none(),
            "held back for an hour"
        );
        assert_eq!(put(r#"{"iops": 1000000}"#), "HTTP/1.0 200 OK");
        assert_eq!(front.complete(0), (2, 0));
        assert_eq!(
            stats(&managed.stats)["disks"][0]["limits"]["iops"],
            1_000_000
        );
        drop(front);
        assert_eq!(managed.daemon.end(), (Some(0), String::new()));
    }
}

#[test]
fn a_held_back_queue_stops_at_once() {
    let managed = Managed::start(&["--bandwidth", "1", "--bandwidth-burst", "1"]);
    let mut front = managed.frontend();
    for slot in 0..4 {
        front.read(0, 0, slot * 4096, 4096, slot);
    }
    front.kick(0);
    front.complete(0);
    let start = Instant::now();
    assert_eq!(managed.daemon.end().0, Some(0));
    assert!(start.elapsed() < Duration::from_secs(1));
}

#[test]
fn statistics_say_what_happened() {
    let managed = Managed::start(&["--id", "root"]);
    for round in 0..3u64 {
        let mut front = managed.frontend();
        assert_eq!(front.write_sync(0, 0, &pattern(round, 8192)), 0);
        assert_eq!(front.read_sync(0, 0, 8192), (0, pattern(round, 8192)));
        assert_ne!(front.read_sync(0, 4 * MIB, 512).0, 0);
        let now = stats(&managed.stats);
        assert_eq!(now["disks"][0]["connection"]["connected"], true);
    }
    let deadline = Instant::now() + TIMEOUT;
    let disk = loop {
        let now = stats(&managed.stats)["disks"][0].clone();
        if now["connection"]["connected"] == false {
            break now;
        }
        assert!(Instant::now() < deadline);
    };
    assert_eq!(disk["disk"], "root");
    assert_eq!(disk["connection"]["connections"], 3);
    assert_eq!(disk["connection"]["reconnects"], 2);
    assert_eq!(disk["refused"], 3);
    let [read, write] = [0, 1].map(|at| disk["operations"][at].clone());
    assert_eq!(
        (&read["name"], &read["requests"]),
        (&"read".into(), &3.into())
    );
    assert_eq!(
        (&write["bytes"], &write["requests"]),
        (&24576.into(), &3.into())
    );
    let p99 = read["p99_seconds"].as_f64().unwrap();
    assert!(p99 > 0.0 && p99 < 5.0, "{p99}");
    assert_eq!(disk["queues"][0]["in_flight"], 0);
    let (status, text) = http(&managed.stats, "GET", "/metrics", "");
    assert_eq!(status, "HTTP/1.0 200 OK");
    for line in [
        "pv_blk_connected{disk=\"root\"} 0",
        "pv_blk_reconnects_total{disk=\"root\"} 2",
        "pv_blk_request_duration_seconds_count{disk=\"root\",operation=\"write\"} 3",
        "pv_blk_bytes_total{disk=\"root\",operation=\"read\"} 24576",
        "pv_blk_errors_total{disk=\"root\",error=\"io\"} 0",
    ] {
        assert!(text.lines().any(|l| l == line), "{line}\n{text}");
    }
    assert_eq!(managed.daemon.end().0, Some(0));
    assert!(!managed.stats.exists() && !managed.control.exists());
}

#[test]
fn host_errors_are_counted_by_class() {
    let mut command = blkd();
    limit_file_size(&mut command, 64 << 10);
    let managed = Managed::with(command, &[]);
    let mut front = managed.frontend();
    assert_ne!(front.write_sync(0, MIB, &pattern(1, 4096)), 0);
    // The image shrinks under the guest.
    std::fs::OpenOptions::new()
        .write(true)
        .open(&managed.disk.image)
        .unwrap()
        .set_len(0)
        .unwrap();
    assert_ne!(front.read_sync(0, MIB, 4096).0, 0);
    let errors = stats(&managed.stats)["disks"][0]["errors"].clone();
    assert_eq!(
        (&errors["too_large"], &errors["past_end"]),
        (&1.into(), &1.into())
    );
}

#[test]
fn only_the_control_socket_changes_anything() {
    let managed = Managed::start(&[]);
    let put = |path, target, body| http(path, "PUT", target, body).0;
    let refused = put(&managed.stats, "/disks/disk0/limits", "{\"iops\": 1}");
    assert_eq!(refused, "HTTP/1.0 403 Forbidden");
    assert_eq!(stats(&managed.control)["disks"][0]["limits"]["iops"], 0);
    for (target, body, status) in [
        ("/disks/none/limits", "{}", "404 Not Found"),
        ("/disks/disk0/limits", "", "400 Bad Request"),
        ("/disks/disk0/limits", "[]", "400 Bad Request"),
        ("/disks/disk0/limits", " [1, 2]", "400 Bad Request"),
        ("/disks/disk0/limits", "{\"iops\": -1}", "400 Bad Request"),
        (
            "/disks/disk0/limits",
            "{\"iops\": 1e300}",
            "400 Bad Request",
        ),
        (
            "/disks/disk0/limits",
            "{\"iops\": 1125899906842625}",
            "400 Bad Request",
        ),
        ("/disks/disk0/limits", "{\"speed\": 1}", "400 Bad Request"),
        ("/disks/disk0", "{}", "404 Not Found"),
        ("", "", "404 Not Found"),
    ] {
        assert_eq!(
            put(&managed.control, target, body),
            format!("HTTP/1.0 {status}"),
            "{body}"
        );
    }
    assert_eq!(stats(&managed.control)["disks"][0]["limits"]["iops"], 0);
    let mode = std::fs::metadata(&managed.control)
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn bad_clients_of_the_statistics_are_left_and_cost_nothing() {
    let managed = Managed::start(&[]);
    let mut front = managed.frontend();
    assert_eq!(front.write_sync(0, 0, &pattern(7, 4096)), 0);
    stats(&managed.stats);
    let before = managed.daemon.fds();
    for round in 0..50u64 {
        let mut stream = connect(&managed.stats);
        // May be refused before all of it is taken.
        let _ = match round % 5 {
            0 => Ok(()),
            1 => stream.write_all(b"GET /sta"),
            2 => stream.write_all(&[0xff; 64]),
            3 => {
                stream.write_all(b"PUT / HTTP/1.0\r\nContent-Length: 99999999999999999999\r\n\r\n")
            }
            _ => stream.write_all(&pattern(round, 20_000)),
        };
        if round % 5 == 3 {
            let mut answer = String::new();
            let _ = stream.read_to_string(&mut answer);
            assert!(answer.starts_with("HTTP/1.0 413"), "{answer}");
        }
    }
    // Nobody waits for those that say nothing, say half of it, or do not take their answer: they are
    // still there when others have theirs.
    let kept_waiting = (0..10).all(|_| {
        let slow: Vec<UnixStream> = (0..8).map(|_| connect(&managed.stats)).collect();
        (&slow[1]).write_all(b"GET /sta").unwrap();
        (&slow[2])
            .write_all(b"GET /stats HTTP/1.0\r\n\r\n")
            .unwrap();
        stats(&managed.stats);
        slow[0].set_nonblocking(true).unwrap();
        let silent = (&slow[0]).read(&mut [0]).map_err(|error| error.kind());
        silent != Err(std::io::ErrorKind::WouldBlock)
    });
    assert!(!kept_waiting);
    // Nor does it help them to be many; and each has its time, and no more.
    let mut many: Vec<UnixStream> = (0..40).map(|_| connect(&managed.stats)).collect();
    stats(&managed.stats);
    for silent in &mut many {
        assert_eq!(silent.read(&mut [0]).unwrap(), 0, "it was left");
    }
    assert_eq!(
        front.read_sync(0, 0, 4096),
        (0, pattern(7, 4096)),
        "the disk did not notice"
    );
    let deadline = Instant::now() + TIMEOUT;
    while managed.daemon.fds() > before {
        assert!(Instant::now() < deadline, "descriptors are left");
        std::thread::sleep(Duration::from_millis(10));
    }
    drop(front);
    assert_eq!(managed.daemon.end(), (Some(0), String::new()));
}
