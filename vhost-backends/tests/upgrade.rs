//! Hot upgrade: a daemon hands all that it serves to another process, under load.

mod support;

#[path = "support/front.rs"]
mod front;
#[path = "support/raw.rs"]
mod raw;

use front::{BLOCK, DATA, Front, Op};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use support::load::Verified;
use support::process::{Daemon, TIMEOUT, blkd, http, stats};
use support::site::Site;
use support::{Disk, FEATURES, Frontend, pattern};

const MIB: u64 = 1 << 20;

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
