//! The program `pv-blkd` as a process.
#![allow(unsafe_code)]
// UNSAFETY: a descriptor is set between fork and exec, and a limit of the child.

mod support;

use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};
use support::process::{Daemon, TIMEOUT, blkd, connect, limit_file_size};
use support::{Disk, FEATURES, Frontend, pattern};

const MIB: u64 = 1 << 20;

fn run(args: &[&str]) -> Output {
    blkd().args(args).output().unwrap()
}

#[test]
fn serves_and_ends_on_sigterm() {
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT] {
        let disk = Disk::new(MIB);
        let daemon = Daemon::on(&disk, &["--num-queues", "2"]);
        let mut front = Frontend::connect(&disk.socket, FEATURES, 2, 64, MIB as usize);
        assert_eq!(front.write_sync(1, 4096, &pattern(1, 8192)), 0);
        assert_eq!(front.read_sync(0, 4096, 8192), (0, pattern(1, 8192)));
        // With the frontend still there.
        daemon.signal(signal);
        let (code, said) = daemon.wait();
        assert_eq!((code, said.as_str()), (Some(0), ""));
        assert!(!disk.socket.exists(), "the socket is removed");
        drop(front);
    }
}

#[test]
fn a_hang_up_that_is_ignored_ends_nothing() {
    let disk = Disk::new(MIB);
    let mut command = Command::new("sh");
    command.args(["-c", "trap '' HUP; exec \"$0\" \"$@\""]);
    command.arg(env!("CARGO_BIN_EXE_pv-blkd"));
    let mut daemon = Daemon::with(&mut command, &disk, &[]);
    drop(daemon.connect(&disk.socket));
    daemon.signal(libc::SIGHUP);
    let mut front = Frontend::connect(&disk.socket, FEATURES, 1, 64, MIB as usize);
    assert_eq!(front.write_sync(0, 0, &pattern(1, 4096)), 0);
    drop(front);
    assert_eq!(daemon.end(), (Some(0), String::new()));
}

#[test]
fn killed_and_started_again() {
    let disk = Disk::new(MIB);
    for round in 0..5u64 {
        let daemon = Daemon::on(&disk, &[]);
        drop(connect(&disk.socket));
        let mut front = Frontend::connect(&disk.socket, FEATURES, 1, 64, MIB as usize);
        if round > 0 {
            assert_eq!(front.read_sync(0, 0, 4096), (0, pattern(round - 1, 4096)));
        }
        assert_eq!(front.write_sync(0, 0, &pattern(round, 4096)), 0);
        // Leaves a stale socket, which the next one replaces.
        daemon.signal(libc::SIGKILL);
        assert_eq!(daemon.wait().0, None);
        assert!(disk.socket.exists());
    }
}

#[test]
fn of_many_that_find_a_stale_socket_one_serves() {
    let dir = tempfile::tempdir().unwrap();
    let [socket, stats] = ["socket", "stats"].map(|name| dir.path().join(name));
    for _ in 0..15 {
        for path in [&socket, &stats] {
            // As a killed one leaves it.
            drop(UnixListener::bind(path).unwrap());
        }
        let mut left: Vec<Daemon> = (0..6)
            .map(|_| {
                let mut command = blkd();
                command.args(["--null", "1M", "--socket-path"]).arg(&socket);
                Daemon::start(command.arg("--stats-socket").arg(&stats))
            })
            .collect();
        let deadline = Instant::now() + TIMEOUT;
        while left.len() > 1 {
            assert!(Instant::now() < deadline, "{} serve", left.len());
            let Some(at) = left.iter_mut().position(|d| d.ended().is_some()) else {
                std::thread::sleep(Duration::from_millis(2));
                continue;
            };
            let (code, said) = left.remove(at).wait();
            assert_eq!(code, Some(1), "{said}");
            assert!(said.contains("another program listens"), "{said}");
        }
        let mut last = left.pop().unwrap();
        // The files are its own, and gone with it.
        drop(last.connect(&socket));
        drop(last.connect(&stats));
        assert_eq!(last.end(), (Some(0), String::new()));
        assert!(!socket.exists() && !stats.exists());
    }
}

#[test]
fn refuses_a_path_that_is_in_use_or_not_a_socket() {
    let disk = Disk::new(MIB);
    let listener = UnixListener::bind(&disk.socket).unwrap();
    let (code, said) = Daemon::on(&disk, &[]).wait();
    assert_eq!(code, Some(1));
    assert!(said.contains("another program listens"), "{said}");
    assert!(disk.socket.exists());
    drop(listener);
    std::fs::remove_file(&disk.socket).unwrap();
    std::fs::write(&disk.socket, "precious").unwrap();
    let (code, said) = Daemon::on(&disk, &[]).wait();
    assert_eq!(code, Some(1));
    assert!(said.contains("is not a socket"), "{said}");
    assert_eq!(std::fs::read_to_string(&disk.socket).unwrap(), "precious");
}

#[test]
fn bad_arguments_get_a_sentence() {
    let disk = Disk::new(MIB);
    let (image, dir) = (
        disk.image.to_str().unwrap(),
        disk.dir.path().to_str().unwrap(),
    );
    let cases: [(&[&str], &str); 9] = [
        (&[], "--blk-file"),
        (&["--blk-file", image], "--socket-path"),
        (
            &["--socket-path", "x", "--fd", "3", "--blk-file", image],
            "cannot be used with",
        ),
        (
            &["--socket-path", "x", "--blk-file", "/nonexistent"],
            "cannot open the disk image /nonexistent",
        ),
        (
            &["--socket-path", "x", "--blk-file", dir],
            "neither a regular file",
        ),
        (
            &["--socket-path", "/nonexistent/x", "--blk-file", image],
            "cannot listen on /nonexistent/x",
        ),
        (
            &[
                "--socket-path",
                "x",
                "--blk-file",
                image,
                "--num-queues",
                "0",
            ],
            "--num-queues",
        ),
        (
            &[
                "--socket-path",
                "x",
                "--blk-file",
                image,
                "--num-queues",
                "33",
            ],
            "--num-queues",
        ),
        (&["--fd", "999", "--blk-file", image], "--fd 999"),
    ];
    let useless: &[(&[&str], &str)] = &[
        (&["--memory", "1M", "--read-only"], "--read-only"),
        (&["--null", "1M", "--read-only"], "--read-only"),
        (&["--memory", "1M", "--overlay", "o"], "--overlay"),
        (&["--memory", "1M", "--format", "qcow2"], "--format"),
        (&["--memory", "1M", "--direct"], "--direct"),
        (&["--nbd", "unix:/nonexistent", "--direct"], "--direct"),
        (&["--null", "1M", "--no-lock"], "--no-lock"),
        (&["--memory", "1M", "--nbd-retry", "3"], "--nbd-retry"),
        (&["--blk-file", image, "--nbd-retry", "0"], "--nbd-retry"),
        (&["--disk", "null=1M,read-only=on"], "--read-only"),
    ];
    let useless = useless
        .iter()
        .map(|(args, flag)| (*args, format!("{flag} is of no use without")));
    let cases = cases.map(|(args, expected)| (args, expected.to_owned()));
    for (args, expected) in cases.into_iter().chain(useless) {
        let output = run(args);
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success(), "{args:?}");
        assert!(said.contains(&expected), "{args:?}: {said}");
        assert!(!said.contains("panicked"), "{said}");
        assert_eq!(said.lines().count(), 1, "{args:?}: {said}");
    }
}

#[test]
fn what_does_not_answer_is_not_waited_for() {
    let disk = Disk::new(MIB);
    let path = |name: &str| disk.dir.path().join(name).to_str().unwrap().to_owned();
    let (full, silent, pipe) = (path("full"), path("silent"), path("pipe"));
    let status = Command::new("mkfifo").arg(&pipe).status().unwrap();
    assert!(status.success());
    let listener = UnixListener::bind(&full).unwrap();
    // SAFETY: takes no pointer.
    assert_eq!(unsafe { libc::listen(listener.as_raw_fd(), 0) }, 0);
    // Room for one, which is this.
    let _queued = UnixStream::connect(&full).unwrap();
    let _silent = UnixListener::bind(&silent).unwrap();
    let [s, t, u] = ["s", "t", "u"].map(path);
    let [nbd, mute] = [&full, &silent].map(|path| format!("unix:{path}"));
    let (taken, late) = ("another program listens", "does not answer in time");
    let null = ["--null", "1M"];
    let cases: [(&[&str], &[&str], &str); 8] = [
        (
            &["--blk-file", &pipe],
            &["--no-lock"],
            "neither a regular file",
        ),
        (&null, &["--socket-path", &full], taken),
        (
            &null,
            &["--socket-path", &s, "--stats-socket", &full],
            taken,
        ),
        (
            &null,
            &["--socket-path", &t, "--control-socket", &full],
            taken,
        ),
        (&["--nbd", &nbd], &["--socket-path", &u], late),
        (&["--nbd", &mute], &["--socket-path", &u], late),
        (&null, &["--take-over", &full], late),
        (&null, &["--take-over", &silent], late),
    ];
    // All at once: some take their time.
    let daemons = cases.map(|(args, more, expected)| {
        let mut command = blkd();
        command.args(args).args(more);
        (Daemon::start(&mut command), expected)
    });
    for (daemon, expected) in daemons {
        let (code, said) = daemon.wait();
        assert_eq!(code, Some(1), "{expected}: {said}");
        assert!(said.contains(expected), "{expected}: {said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
    assert!([s, t, u].iter().all(|path| !Path::new(path).exists()));
}

#[test]
fn prints_capabilities_and_help() {
    let output = run(&["--print-capabilities"]);
    assert!(output.status.success());
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["type"], "block");
    assert!(run(&["--help"]).status.success());
    assert!(run(&["--version"]).status.success());
}

/// A command with `fd` open as a number that nothing else in a new process has.
fn with_fd(disk: &Disk, fd: i32) -> Command {
    let mut command = blkd();
    command
        .arg("--blk-file")
        .arg(&disk.image)
        .args(["--fd", "50"]);
    // SAFETY: dup2 is async-signal-safe.
    unsafe {
        command.pre_exec(move || match libc::dup2(fd, 50) {
            -1 => Err(std::io::Error::last_os_error()),
            _ => Ok(()),
        })
    };
    command
}

#[test]
fn a_connected_descriptor_is_served_until_its_peer_hangs_up() {
    let disk = Disk::new(MIB);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let daemon = Daemon::start(&mut with_fd(&disk, theirs.as_raw_fd()));
    drop(theirs);
    ours.set_read_timeout(Some(TIMEOUT)).unwrap();
    let head: Vec<u8> = [1u32, 1, 0].iter().flat_map(|w| w.to_ne_bytes()).collect();
    std::io::Write::write_all(&mut &ours, &head).unwrap();
    let mut reply = [0; 20];
    (&ours).read_exact(&mut reply).unwrap();
    drop(ours);
    assert_eq!(daemon.wait(), (Some(0), String::new()));
}

#[test]
fn a_listening_descriptor_is_kept() {
    let disk = Disk::new(MIB);
    let listener = UnixListener::bind(&disk.socket).unwrap();
    let daemon = Daemon::start(&mut with_fd(&disk, listener.as_raw_fd()));
    for round in 0..2 {
        let mut front = Frontend::connect(&disk.socket, FEATURES, 1, 64, MIB as usize);
        assert_eq!(front.write_sync(0, 0, &pattern(round, 512)), 0);
    }
    daemon.signal(libc::SIGTERM);
    assert_eq!(daemon.wait().0, Some(0));
    assert!(disk.socket.exists(), "somebody else made it");
}

#[test]
fn a_file_that_is_no_socket_is_refused() {
    let disk = Disk::new(MIB);
    let file = std::fs::File::open(&disk.image).unwrap();
    let (code, said) = Daemon::start(&mut with_fd(&disk, file.as_raw_fd())).wait();
    assert_eq!(code, Some(1));
    assert!(said.contains("is not a Unix stream socket"), "{said}");
}

#[test]
fn past_a_file_size_limit_a_write_fails_and_the_rest_goes_on() {
    for direct in [false, true] {
        let disk = Disk::new(MIB);
        let mut command = blkd();
        command.arg("--socket-path").arg(&disk.socket);
        command.arg("--blk-file").arg(&disk.image);
        if direct {
            command.arg("--direct");
        }
        limit_file_size(&mut command, 64 << 10);
        let daemon = Daemon::start(&mut command);
        let mut front = Frontend::connect(&disk.socket, FEATURES, 1, 64, MIB as usize);
        for at in [64 << 10, 512 << 10] {
            assert_ne!(front.write_sync(0, at, &pattern(1, 4096)), 0);
        }
        // Half of it fits.
        assert_ne!(front.write_sync(0, 60 << 10, &pattern(2, 8192)), 0);
        assert_eq!(front.write_sync(0, 0, &pattern(3, 4096)), 0);
        assert_eq!(front.read_sync(0, 0, 4096), (0, pattern(3, 4096)));
        daemon.signal(libc::SIGTERM);
        assert_eq!(daemon.wait().0, Some(0));
    }
}

#[test]
fn idle_costs_nothing() {
    let disk = Disk::new(MIB);
    let daemon = Daemon::on(&disk, &[]);
    let mut front = Frontend::connect(&disk.socket, FEATURES, 1, 64, MIB as usize);
    for i in 0..200 {
        assert_eq!(front.read_sync(0, 4096 * (i % 16), 4096).0, 0);
    }
    std::thread::sleep(Duration::from_millis(50));
    let ticks = || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", daemon.0.id())).unwrap();
        let fields: Vec<&str> = stat
            .rsplit(')')
            .next()
            .unwrap()
            .split_whitespace()
            .collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    };
    let before = ticks();
    std::thread::sleep(Duration::from_millis(500));
    assert!(ticks() - before <= 1);
}

#[test]
fn output_that_nobody_reads_is_no_bug() {
    let disk = Disk::new(MIB);
    let socket = disk.socket.to_str().unwrap();
    let good: &[&[&str]] = &[&["--help"], &["--print-capabilities"], &["--self-test"]];
    let bad: &[&[&str]] = &[&["--socket-path", socket, "--blk-file", "/nonexistent"]];
    for (code, args) in [(0, good), (1, bad)]
        .iter()
        .flat_map(|(code, all)| all.iter().map(move |args| (*code, *args)))
    {
        // Both go to pipes that nobody holds the other end of.
        let mut command = blkd();
        let mut child = command
            .args(args)
            .stdout(std::io::pipe().unwrap().1)
            .stderr(std::io::pipe().unwrap().1)
            .spawn()
            .unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(code), "{args:?}");
    }
}

#[test]
fn output_that_is_lost_is_an_error() {
    for args in ["--help", "--version", "--print-capabilities", "--self-test"] {
        let full = std::fs::File::options().write(true).open("/dev/full");
        let mut command = blkd();
        let output = command.arg(args).stdout(full.unwrap()).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{args}: {said}");
        assert!(said.contains("cannot write to standard output"), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
}

#[test]
fn a_peer_fills_neither_the_log_nor_its_time() {
    let disk = Disk::new(MIB);
    let daemon = Daemon::on(&disk, &["--verbose"]);
    drop(connect(&disk.socket));
    for round in 0..300u32 {
        let mut stream = connect(&disk.socket);
        // Refused, and then no message at all.
        let bytes = [99u32, 1, 0, 99, 1, 0xffff_0000 + round];
        let bytes: Vec<u8> = bytes.iter().flat_map(|w| w.to_ne_bytes()).collect();
        std::io::Write::write_all(&mut stream, &bytes).unwrap();
        // Until the session is over.
        let _ = stream.read(&mut [0; 16]);
    }
    let (code, said) = daemon.end();
    assert_eq!(code, Some(0));
    let lines = said.lines().count();
    assert!(lines <= 64 + 5, "{lines} lines");
    let left_out = said.lines().find(|line| line.contains("left out")).unwrap();
    let count: u32 = (left_out.split_whitespace())
        .find_map(|word| word.parse().ok())
        .unwrap();
    assert!(count > 800, "{left_out}");
}

#[test]
fn a_process_without_room_for_a_connection_takes_it_later() {
    let disk = Disk::new(MIB);
    let daemon = Daemon::on(&disk, &["--sandbox", "none"]);
    drop(connect(&disk.socket));
    let limit = |most: u64| {
        let limit = libc::rlimit {
            rlim_cur: most,
            rlim_max: 1024,
        };
        let pid = libc::pid_t::try_from(daemon.0.id()).unwrap();
        // SAFETY: the new limit is valid for the call, and the old one is not asked for.
        unsafe { libc::prlimit(pid, libc::RLIMIT_NOFILE, &limit, std::ptr::null_mut()) }
    };
    std::thread::sleep(Duration::from_millis(50));
    // The lowest number that is free is one too many.
    let fd = |number: &u64| format!("/proc/{}/fd/{number}", daemon.0.id());
    let free = (0..).find(|number| std::fs::symlink_metadata(fd(number)).is_err());
    if limit(free.unwrap()) != 0 {
        println!("SKIPPED: this host does not let a process's limits be changed");
        return;
    }
    let waiting = connect(&disk.socket);
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(limit(1024), 0);
    drop(waiting);
    let mut front = Frontend::connect(&disk.socket, FEATURES, 1, 64, MIB as usize);
    assert_eq!(front.write_sync(0, 0, &pattern(1, 512)), 0);
    drop(front);
    let (code, said) = daemon.end();
    assert_eq!(code, Some(0), "{said}");
    assert!(
        said.contains("cannot take a connection yet"),
        "said: {said}"
    );
    assert!(said.lines().count() < 30, "it does not spin: {said}");
}
