use super::*;

fn measure(kind: Kind, bytes: u64, began: u64) -> Measure {
    Measure { kind, bytes, began }
}

#[test]
fn buckets_are_powers_of_two_with_closed_upper_bounds() {
    assert_eq!(bucket(0), 0);
    assert_eq!(bucket(1000), 0);
    assert_eq!(bucket(1001), 1);
    for power in 0..BOUNDS {
        let bound = 1000u64 << power;
        assert_eq!(bucket(bound), power, "{bound}");
        assert_eq!(bucket(bound + 1), power + 1, "one past {bound}");
        assert_eq!(bound_seconds(power) * 1e9, bound as f64);
    }
    assert_eq!(bucket(u64::MAX), BOUNDS);
}

#[test]
fn sums_over_queues_and_names_kinds_and_errors() {
    let stats = DeviceStats::new(2);
    for (queue, kind, took) in [
        (0, Kind::Read, 900),
        (1, Kind::Read, 3000),
        (1, Kind::Write, 1),
    ] {
        stats
            .queue(queue)
            .unwrap()
            .done(measure(kind, 4096, 100), 100 + took);
    }
    stats
        .queue(0)
        .unwrap()
        .failed(&io::Error::from_raw_os_error(libc::ENOSPC));
    stats
        .queue(1)
        .unwrap()
        .failed(&io::Error::from_raw_os_error(libc::EIO));
    stats
        .queue(1)
        .unwrap()
        .failed(&io::ErrorKind::UnexpectedEof.into());
    assert!(stats.queue(2).is_none());
    let snapshot = stats.snapshot();
    let read = &snapshot.operations[Kind::Read as usize];
    assert_eq!((read.name, read.requests, read.bytes), ("read", 2, 8192));
    assert_eq!((read.p50_seconds, read.p99_seconds), (1e-6, 4e-6));
    assert!((read.seconds - 3.9e-6).abs() < 1e-12);
    assert_eq!(snapshot.operations[Kind::Write as usize].requests, 1);
    assert_eq!(snapshot.errors["no_space"], 1);
    assert_eq!(snapshot.errors["io"], 1);
    assert_eq!(snapshot.errors["past_end"], 1);
    assert_eq!(snapshot.errors.values().sum::<u64>(), 3);
}

#[test]
fn in_flight_has_an_age() {
    let stats = DeviceStats::new(1);
    let queue = stats.queue(0).unwrap();
    queue.flies(3, measure(Kind::Read, 0, 0));
    queue.flies(4, measure(Kind::Read, 0, stats.now()));
    // A token that does not exist changes nothing.
    queue.flies(u16::MAX, measure(Kind::Read, 0, 0));
    std::thread::sleep(Duration::from_millis(2));
    let now = stats.snapshot().queues[0];
    assert_eq!(now.in_flight, 2);
    assert!(now.oldest_seconds >= 0.002);
    queue.landed(3);
    assert_eq!(stats.snapshot().queues[0].in_flight, 1);
    queue.clear_in_flight();
    let now = stats.snapshot().queues[0];
    assert_eq!((now.in_flight, now.oldest_seconds), (0, 0.0));
}

#[test]
fn connections_and_reconnects() {
    let stats = DeviceStats::new(1);
    assert!(!stats.snapshot().connection.connected);
    for broken in [false, true, false] {
        stats.connected();
        assert!(stats.snapshot().connection.connected);
        stats.disconnected(broken);
    }
    let connection = stats.snapshot().connection;
    assert_eq!((connection.connections, connection.reconnects), (3, 2));
    assert_eq!((connection.broken, connection.connected), (1, false));
}

fn report() -> DiskReport {
    let stats = DeviceStats::new(2);
    stats
        .queue(1)
        .unwrap()
        .done(measure(Kind::Write, 512, 0), 5000);
    DiskReport {
        disk: "root".into(),
        limits: Limits {
            iops: 100,
            ..Limits::default()
        },
        refused: 3,
        retired_rings: 0,
        calls: 1,
        wakes: 2,
        snapshot: stats.snapshot(),
    }
}

#[test]
fn prometheus_text_is_well_formed() {
    let text = prometheus(&[
        report(),
        DiskReport {
            disk: "data".into(),
            ..report()
        },
    ]);
    let mut typed = std::collections::HashSet::new();
    let mut seen = std::collections::HashSet::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            assert!(
                typed.insert(rest.split(' ').next().unwrap().to_owned()),
                "{line}"
            );
        } else if !line.starts_with('#') {
            let (series, value) = line.rsplit_once(' ').unwrap();
            assert!(value.parse::<f64>().is_ok(), "{line}");
            assert!(seen.insert(series.to_owned()), "twice: {line}");
            let name = series.split('{').next().unwrap();
            let family = ["_bucket", "_sum", "_count"]
                .iter()
                .find_map(|end| name.strip_suffix(end).filter(|n| typed.contains(*n)))
                .unwrap_or(name);
            assert!(typed.contains(family), "{line} has no type");
        }
    }
    for line in [
        "pv_blk_refused_total{disk=\"data\"} 3",
        "pv_blk_request_duration_seconds_bucket{disk=\"root\",operation=\"write\",le=\"0.000004\"} 0",
        "pv_blk_request_duration_seconds_bucket{disk=\"root\",operation=\"write\",le=\"0.000008\"} 1",
        "pv_blk_request_duration_seconds_bucket{disk=\"root\",operation=\"write\",le=\"+Inf\"} 1",
        "pv_blk_request_duration_seconds_count{disk=\"root\",operation=\"write\"} 1",
        "pv_blk_limit_iops{disk=\"root\"} 100",
        "pv_blk_in_flight{disk=\"root\",queue=\"1\"} 0",
    ] {
        assert!(text.lines().any(|l| l == line), "{line}\n{text}");
    }
}

#[test]
fn json_has_the_same() {
    let value: serde_json::Value = serde_json::from_str(&json(&[report()])).unwrap();
    let disk = &value["disks"][0];
    assert_eq!(disk["disk"], "root");
    assert_eq!(disk["limits"]["iops"], 100);
    assert_eq!(disk["operations"][1]["name"], "write");
    assert_eq!(disk["operations"][1]["bytes"], 512);
    assert_eq!(disk["connection"]["connected"], false);
    assert_eq!(disk["errors"]["io"], 0);
}
