//! Running disks: several in one daemon, service managers, larger disks, locks.
#![allow(unsafe_code)]
// UNSAFETY: descriptors are set between fork and exec.

mod support;

#[path = "support/front.rs"]
mod front;
#[path = "support/raw.rs"]
mod raw;

use front::{DATA, Front, Op, STATUS};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;
use support::daemon::Managed;
use support::process::{Daemon, TIMEOUT, blkd, connect, http, manual_names_every_option, stats};
use support::{Disk, FEATURES, Frontend, pattern};

const MIB: u64 = 1 << 20;

#[test]
fn several_disks_in_one_daemon() {
    let disks: Vec<Disk> = (0..3).map(|_| Disk::new(MIB)).collect();
    let mut command = blkd();
    for (index, disk) in disks.iter().enumerate() {
        let read_only = if index == 2 { "on" } else { "off" };
        let (socket, image) = (disk.socket.display(), disk.image.display());
        let keys = format!("socket={socket},file={image},num-queues=2,read-only={read_only}");
        command.arg("--disk").arg(keys);
    }
    let daemon = Daemon::start(&mut command);
    let connect = |disk: &Disk| {
        let features = FEATURES & !(1 << 13 | 1 << 14);
        Frontend::connect(&disk.socket, features, 2, 64, MIB as usize)
    };
    let mut fronts: Vec<Frontend> = disks.iter().map(connect).collect();
    for round in 0..20u64 {
        for (index, front) in fronts.iter_mut().enumerate() {
            let data = pattern(round * 3 + index as u64, 4096);
            let written = front.write_sync(round as usize % 2, round * 4096, &data);
            assert_eq!(written == 0, index != 2, "the third is read-only");
        }
    }
    for (index, front) in fronts.iter_mut().enumerate() {
        for round in 0..20u64 {
            let expected = match index {
                2 => vec![0; 4096],
                _ => pattern(round * 3 + index as u64, 4096),
            };
            assert_eq!(front.read_sync(0, round * 4096, 4096), (0, expected));
        }
    }
    // One that goes and comes back is nothing to the others.
    fronts.remove(0);
    let mut again = connect(&disks[0]);
    assert_eq!(again.read_sync(0, 0, 4096), (0, pattern(0, 4096)));
    assert_eq!(fronts[0].read_sync(0, 0, 4096), (0, pattern(1, 4096)));
    drop((again, fronts));
    assert_eq!(daemon.end(), (Some(0), String::new()));
    assert!(disks.iter().all(|disk| !disk.socket.exists()));
}

#[test]
fn bad_disks_get_a_sentence_and_leave_no_socket() {
    let disk = Disk::new(MIB);
    let good = format!(
        "socket={},file={}",
        disk.socket.display(),
        disk.image.display()
    );
    for (second, expected) in [
        ("socket=x", "--blk-file is needed"),
        (
            "file=/nonexistent,socket=x",
            "cannot open the disk image /nonexistent",
        ),
        ("colour=red", "there is no key \"colour\""),
        (
            "file=x,socket=/nonexistent/s",
            "cannot open the disk image x",
        ),
        (&good, "is in use by another program"),
        (&format!("{good},no-lock=on"), "two sockets have the path"),
    ] {
        let output = blkd()
            .args(["--disk", &good, "--disk", second])
            .output()
            .unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{second}: {said}");
        assert!(said.contains(expected), "{second}: {said}");
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(!disk.socket.exists(), "{second}");
    }
}

/// Two disks, the second of the name `b`, on sockets that were passed in the other order.
fn on_passed_sockets(id: &str, names: &str) {
    let (first, second) = (Disk::new(MIB), Disk::new(MIB));
    let listeners = [&first, &second].map(|d| UnixListener::bind(&d.socket).unwrap());
    let raw = listeners.each_ref().map(|l| l.as_raw_fd());
    // The process id is known after the fork only.
    let mut command = Command::new("sh");
    command
        .args(["-c", "LISTEN_PID=$$ exec \"$0\" \"$@\""])
        .arg(env!("CARGO_BIN_EXE_pv-blkd"))
        .args(["--disk", &format!("file={},{id}", first.image.display())])
        .args(["--disk", &format!("file={},id=b", second.image.display())])
        .env("LISTEN_FDS", "2")
        // In the other order.
        .env("LISTEN_FDNAMES", names)
        .stderr(Stdio::piped());
    // SAFETY: dup and dup2 are async-signal-safe.
    unsafe {
        command.pre_exec(move || {
            // Out of the way of the numbers that they get.
            let [a, b] = raw.map(|fd| libc::fcntl(fd, libc::F_DUPFD, 20));
            match libc::dup2(b, 3) == 3 && libc::dup2(a, 4) == 4 {
                true => Ok(()),
                false => Err(std::io::Error::last_os_error()),
            }
        })
    };
    let daemon = Daemon::start(&mut command);
    for (seed, disk) in [(1, &first), (2, &second)] {
        let mut front = Frontend::connect(&disk.socket, FEATURES, 1, 64, MIB as usize);
        assert_eq!(front.write_sync(0, 0, &pattern(seed, 512)), 0);
    }
    assert_eq!(daemon.end(), (Some(0), String::new()));
    for (seed, disk) in [(1, &first), (2, &second)] {
        assert_eq!(
            std::fs::read(&disk.image).unwrap()[..512],
            pattern(seed, 512)[..]
        );
        assert!(disk.socket.exists(), "somebody else made it");
    }
}

#[test]
fn sockets_from_a_service_manager() {
    on_passed_sockets("id=a", "b:a");
    // One that has no name of its own among them, and is the first to choose.
    on_passed_sockets("id=c", "b:unit.socket");
    let first = Disk::new(MIB);
    // Meant for another process: as if there were none.
    let image = first.image.display();
    let mut command = blkd();
    command.env("LISTEN_FDS", "1").env("LISTEN_PID", "1");
    let output = command
        .args(["--disk", &format!("file={image}")])
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("either --socket-path or --fd"), "{said}");
    // One socket for two disks.
    let listener = UnixListener::bind(&first.socket).unwrap();
    let raw = listener.as_raw_fd();
    let mut command = Command::new("sh");
    command
        .args(["-c", "LISTEN_PID=$$ exec \"$0\" \"$@\""])
        .arg(env!("CARGO_BIN_EXE_pv-blkd"))
        .args(["--disk", "fd=3,null=1M,id=a", "--disk", "null=1M,id=b"])
        .env("LISTEN_FDS", "1")
        .stderr(Stdio::piped());
    // SAFETY: dup2 is async-signal-safe.
    unsafe {
        command.pre_exec(
            move || match libc::dup2(libc::fcntl(raw, libc::F_DUPFD, 20), 3) {
                3 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            },
        )
    };
    let (code, said) = Daemon::start(&mut command).wait();
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("for one device, not for two"), "{said}");
}

#[test]
fn a_service_manager_is_told() {
    let name = format!("paravane-notify-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(&name).unwrap();
    let by_name = UnixDatagram::bind_addr(&address).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("notify");
    let by_path = UnixDatagram::bind(&path).unwrap();
    for (socket, shown) in [
        (by_path, path.display().to_string()),
        (by_name, format!("@{name}")),
    ] {
        socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        let mut command = blkd();
        command.env("NOTIFY_SOCKET", &shown);
        let managed = Managed::with(command, &[]);
        let receive = || {
            let mut buffer = [0; 256];
            let len = socket.recv(&mut buffer).unwrap();
            String::from_utf8_lossy(&buffer[..len]).into_owned()
        };
        assert!(receive().starts_with("READY=1\n"));
        // Ready means that it can be connected to.
        UnixStream::connect(&managed.disk.socket).unwrap();
        assert_eq!(managed.daemon.end().0, Some(0));
        assert_eq!(receive(), "STOPPING=1\n");
    }
    let mut command = blkd();
    command.env("NOTIFY_SOCKET", "/nonexistent/notify");
    let managed = Managed::with(command, &[]);
    let (code, said) = managed.daemon.wait();
    assert_eq!(code, Some(1));
    assert!(said.contains("cannot reach NOTIFY_SOCKET"), "{said}");
}

#[test]
fn the_descriptor_file_names_what_the_program_says() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("share/50-pv-blkd.json");
    let text = std::fs::read_to_string(file).unwrap();
    let descriptor: serde_json::Value = serde_json::from_str(&text).unwrap();
    let output = blkd().arg("--print-capabilities").output().unwrap();
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(descriptor["type"], said["type"]);
    assert!(descriptor["binary"].as_str().unwrap().starts_with('/'));
    assert!(descriptor["description"].is_string());
    assert_eq!(
        said["features"],
        serde_json::json!(["read-only", "blk-file"])
    );
}

#[test]
fn the_manual_names_every_option() {
    manual_names_every_option(blkd(), "pv-blkd.1");
}

/// Sectors, as configuration space has them.
fn capacity(front: &Front) -> u64 {
    let [offset, size, flags] = [0u32, 8, 0].map(u32::to_ne_bytes);
    let ask = [offset, size, flags, [0; 4], [0; 4]].concat();
    let reply = front.query(24, &ask).unwrap();
    u64::from_le_bytes(reply[12..].try_into().unwrap())
}

/// The status of one request.
fn status_of(front: &mut Front, op: Op, sector: u64) -> u8 {
    let before = front.published();
    front.submit(0, op, sector);
    front.notify();
    let deadline = Instant::now() + TIMEOUT;
    while front.published() == before {
        assert!(Instant::now() < deadline, "no completion");
        std::thread::yield_now();
    }
    let status = front.memory.get::<u8>(STATUS);
    front.memory.put(STATUS, 0u8);
    assert_eq!(front.reap(), [0]);
    status
}

#[test]
fn a_disk_grows_while_it_is_served_and_does_not_shrink() {
    let managed = Managed::start(&[]);
    let set_len = |sectors: u64| {
        let image = std::fs::File::options()
            .write(true)
            .open(&managed.disk.image);
        image.unwrap().set_len(sectors * 512).unwrap();
    };
    let resize = || http(&managed.control, "PUT", "/disks/disk0/resize", "");
    let mut front = Front::new(64, false, false);
    front.connect(&managed.disk.socket);
    front.negotiate(false).unwrap();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(TIMEOUT)).unwrap();
    assert_eq!(front.set(21, &[], &[theirs.as_raw_fd()]), Some(true));
    drop(theirs);
    front.start(0).unwrap();
    assert_eq!(capacity(&front), 8192);
    assert_eq!(status_of(&mut front, Op::Write, 8192), 1);
    // Growing by itself is not enough.
    set_len(16384);
    assert_eq!(status_of(&mut front, Op::Write, 8192), 1);
    std::thread::scope(|scope| {
        let answer = scope.spawn(resize);
        let mut head = [0; 12];
        ours.read_exact(&mut head).unwrap();
        let expected = [2u32, 1 | 8, 0].map(u32::to_ne_bytes).concat();
        assert_eq!(
            head[..],
            expected,
            "CONFIG_CHANGE, with a wish for an answer"
        );
        // As a frontend does it: it reads the new configuration, and then answers.
        assert_eq!(capacity(&front), 16384);
        let mut reply = [2u32, 1 | 4, 8].map(u32::to_ne_bytes).concat();
        reply.extend([0; 8]);
        ours.write_all(&reply).unwrap();
        let (status, said) = answer.join().unwrap();
        assert_eq!(status, "HTTP/1.0 200 OK", "{said}");
        assert!(
            said.contains("8192 sectors became 16384; the frontend was told"),
            "{said}"
        );
    });
    front.memory.fill(DATA, &pattern(9, 4096));
    assert_eq!(status_of(&mut front, Op::Write, 16384 - 8), 0);
    assert_eq!(
        status_of(&mut front, Op::Write, 16384 - 7),
        1,
        "one sector past the end"
    );
    let image = std::fs::read(&managed.disk.image).unwrap();
    assert!(image[(16384 - 8) * 512..] == pattern(9, 4096));
    // Smaller: nothing changes for the guest but what is not there any more.
    set_len(4096);
    let (status, said) = resize();
    assert_eq!(status, "HTTP/1.0 409 Conflict", "{said}");
    assert!(
        said.contains("4096 sectors and the guest was told 16384"),
        "{said}"
    );
    assert_eq!(capacity(&front), 16384);
    assert_eq!(status_of(&mut front, Op::Read, 8192), 1);
    assert_eq!(status_of(&mut front, Op::Read, 0), 0);
    assert_eq!(stats(&managed.stats)["disks"][0]["errors"]["past_end"], 1);
    // A frontend without the channel finds out by itself.
    drop((front, ours));
    let mut front = Front::new(64, false, false);
    front.connect(&managed.disk.socket);
    front.negotiate(false).unwrap();
    front.start(0).unwrap();
    set_len(32768);
    let (status, said) = resize();
    assert_eq!(status, "HTTP/1.0 200 OK", "{said}");
    assert!(said.contains("was not told"), "{said}");
    assert_eq!(capacity(&front), 32768);
    assert_eq!(status_of(&mut front, Op::Write, 32760), 0);
    assert!(resize().1.contains("32768 sectors as before"));
    drop(front);
    assert_eq!(managed.daemon.end().0, Some(0));
}

#[test]
fn an_image_has_one_writer_or_many_readers() {
    let disk = Disk::new(MIB);
    let second = |more: &[&str]| {
        let other = disk.dir.path().join("other.sock");
        let mut command = blkd();
        command.arg("--socket-path").arg(other);
        Daemon::start(command.arg("--blk-file").arg(&disk.image).args(more))
    };
    let serves = |daemon: Daemon| {
        drop(connect(&disk.dir.path().join("other.sock")));
        assert_eq!(daemon.end(), (Some(0), String::new()));
    };
    let refused = |daemon: Daemon, why: &str| {
        let (code, said) = daemon.wait();
        assert_eq!(code, Some(1));
        assert!(said.contains(why) && said.lines().count() == 1, "{said}");
    };
    let writer = Daemon::on(&disk, &[]);
    drop(connect(&disk.socket));
    refused(second(&[]), "is in use by another program");
    refused(
        second(&["--read-only"]),
        "is being written by another program",
    );
    serves(second(&["--no-lock"]));
    // QEMU's programs keep to the same locks.
    let qemu = |command: &str| {
        let mut qemu = Command::new("qemu-io");
        qemu.args(["-f", "raw", "-c", command]).arg(&disk.image);
        qemu.stdin(Stdio::null()).output()
    };
    match qemu("write 0 512") {
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(!output.status.success() && said.contains("lock"), "{said}");
        }
        Err(error) => println!("SKIPPED: qemu-io and its locks ({error})"),
    }
    // A killed one's lock is gone with it.
    writer.signal(libc::SIGKILL);
    writer.wait();
    let reader = Daemon::on(&disk, &["--read-only"]);
    drop(connect(&disk.socket));
    serves(second(&["--read-only"]));
    refused(second(&[]), "is in use by another program");
    assert_eq!(reader.end().0, Some(0));
    // Disks that share a base, each with writes of its own.
    let overlay = |name: &str| disk.dir.path().join(name).to_str().unwrap().to_owned();
    let (one, two) = (overlay("one.qcow2"), overlay("two.qcow2"));
    let first = Daemon::on(&disk, &["--overlay", &one]);
    drop(connect(&disk.socket));
    serves(second(&["--overlay", &two]));
    refused(second(&["--overlay", &one]), "one.qcow2 is in use");
    refused(second(&[]), "is in use by another program");
    assert_eq!(first.end().0, Some(0));
}

#[test]
fn of_several_that_make_an_overlay_one_has_it() {
    let disk = Disk::new(MIB);
    let at = |name: &str| disk.dir.path().join(name);
    for round in 0..5 {
        let overlay = at(&format!("overlay{round}"));
        let mut daemons: Vec<Daemon> = (0..3)
            .map(|n| {
                let mut command = blkd();
                command.arg("--socket-path").arg(at(&format!("{n}.sock")));
                command.arg("--blk-file").arg(&disk.image);
                Daemon::start(command.arg("--overlay").arg(&overlay))
            })
            .collect();
        let deadline = Instant::now() + TIMEOUT;
        while daemons.len() > 1 {
            assert!(Instant::now() < deadline, "{} serve", daemons.len());
            let Some(over) = daemons.iter_mut().position(|d| d.ended().is_some()) else {
                std::thread::sleep(std::time::Duration::from_millis(5));
                continue;
            };
            let (code, said) = daemons.remove(over).wait();
            assert_eq!(code, Some(1), "{said}");
            assert!(said.contains("is in use by another program"), "{said}");
        }
        let last = daemons.remove(0);
        assert_eq!(last.end(), (Some(0), String::new()));
    }
}
