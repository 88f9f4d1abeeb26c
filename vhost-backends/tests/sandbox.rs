//! The sandbox: what it refuses, and that serving goes on inside it, on every engine.
#![allow(unsafe_code)]
// UNSAFETY: a user is changed and a filter installed between fork and exec.

mod support;

use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Output, Stdio};
use std::time::Instant;
use support::daemon::Managed;
use support::process::{Daemon, TIMEOUT, blkd};
use support::{Disk, FEATURES, Frontend, pattern};

const MIB: u64 = 1 << 20;
/// Somebody without privileges.
const NOBODY: u32 = 65534;

/// A copy that an unprivileged user can execute, wherever the build directory is.
fn program_for_all(disk: &Disk) -> Command {
    let copy = disk.dir.path().join("pv-blkd");
    // By another process: one that another test forks here would hold it open for writing for a
    // moment, and it could not be executed.
    let copied = Command::new("cp")
        .arg(env!("CARGO_BIN_EXE_pv-blkd"))
        .arg(&copy)
        .status();
    assert!(copied.unwrap().success());
    let open = |path: &std::path::Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    open(disk.dir.path(), 0o777);
    open(&copy, 0o755);
    open(&disk.image, 0o666);
    let mut command = Command::new(copy);
    command.stdin(Stdio::null());
    command
}

fn am_root() -> bool {
    // SAFETY: no pointer.
    unsafe { libc::geteuid() == 0 }
}

/// Every line of a self-test: the call and how it ended.
fn lines(output: &Output) -> Vec<(String, String)> {
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| line.split_once(' '))
        .map(|(call, rest)| (call.to_owned(), rest.trim().to_owned()))
        .collect()
}

fn assert_all_killed(output: &Output) {
    let lines = lines(output);
    assert!(lines.len() >= 10, "{output:?}");
    for (call, outcome) in lines {
        assert_eq!(outcome, "killed (SIGSYS)", "{call}");
    }
    assert!(output.status.success());
}

#[test]
fn open_socket_and_execve_are_refused() {
    let output = blkd().arg("--self-test").output().unwrap();
    assert_all_killed(&output);
    let calls: Vec<String> = lines(&output).into_iter().map(|(call, _)| call).collect();
    for call in ["open", "socket", "execve", "fork", "ptrace"] {
        assert!(calls.iter().any(|c| c == call), "{call}");
    }
}

#[test]
fn they_are_refused_to_an_unprivileged_user_too() {
    if !am_root() {
        // The test above was that.
        return;
    }
    let disk = Disk::new(MIB);
    let mut command = program_for_all(&disk);
    let output = command.uid(NOBODY).gid(NOBODY).arg("--self-test").output();
    assert_all_killed(&output.unwrap());
}

#[test]
fn without_a_filter_paths_and_privileges_are_still_gone() {
    let args = ["--self-test", "--seccomp", "none"];
    let output = blkd().args(args).output().unwrap();
    let outcomes = lines(&output);
    let of = |call: &str| {
        let found = outcomes.iter().find(|(c, _)| c == call);
        found.map(|(_, outcome)| outcome.as_str()).unwrap()
    };
    for call in ["mount", "ptrace", "unshare"] {
        assert!(of(call).starts_with("refused"), "{call}: {}", of(call));
    }
    // Where the kernel has Landlock.
    if !has_no_landlock() {
        for call in ["open", "openat2", "execve"] {
            assert!(of(call).starts_with("refused"), "{call}: {}", of(call));
        }
    }
    // The self-test says that it is not enough.
    assert!(!output.status.success());
}

/// Asked of the kernel: `LANDLOCK_CREATE_RULESET_VERSION`.
fn has_no_landlock() -> bool {
    // SAFETY: no attributes, so no pointer is read.
    let abi = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0usize, 0usize, 1u32) };
    abi < 1
}

/// Every kind of request, verified, on several queues and over several connections.
fn verified_io(disk: &Disk) {
    for round in 0..3u64 {
        let mut front = Frontend::connect(&disk.socket, FEATURES, 2, 128, MIB as usize);
        for i in 0..64u64 {
            let len = 4096 * (1 + i as usize % 5);
            let data = pattern(i + round, len);
            assert_eq!(front.write_sync(i as usize % 2, i * 65536, &data), 0);
        }
        // Misaligned for O_DIRECT: the bounce.
        assert_eq!(front.write_sync(0, 512 * 3, &pattern(99, 512)), 0);
        assert_eq!(front.read_sync(0, 512 * 3, 512), (0, pattern(99, 512)));
        front.queues[0].flush(7).unwrap();
        front.kick(0);
        assert_eq!(front.complete(0), (7, 0));
        for i in 0..64u64 {
            let data = pattern(i + round, 4096 * (1 + i as usize % 5));
            if i == 0 {
                continue;
            }
            assert_eq!(
                front.read_sync((i as usize + 1) % 2, i * 65536, data.len()),
                (0, data)
            );
        }
        front.queues[1].write_zeroes(65536, 4096, false, 8).unwrap();
        front.queues[1].discard(2 * 65536, 4096, 9).unwrap();
        front.kick(1);
        let mut both = [front.complete(1), front.complete(1)];
        both.sort();
        assert_eq!(both, [(8, 0), (9, 0)]);
        assert_eq!(front.read_sync(0, 65536, 4096), (0, vec![0; 4096]));
    }
}

fn serves_confined(mut command: Command, disk: &Disk, more: &[&str]) {
    let daemon = Daemon::with(
        &mut command,
        disk,
        &[&["--num-queues", "2", "--verbose"], more].concat(),
    );
    verified_io(disk);
    // Seen from outside: a filter, no privileges to get, and none left.
    assert_eq!(daemon.field("Seccomp:"), "2");
    assert_eq!(daemon.field("NoNewPrivs:"), "1");
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
        assert_eq!(daemon.field(set), "0000000000000000", "{set}");
    }
    let (code, said) = daemon.end();
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("sandbox: "), "{said}");
    assert!(said.contains("seccomp: kill"), "{said}");
    assert!(!disk.socket.exists(), "the socket is removed from outside");
}

#[test]
fn page_cache_is_served_inside() {
    let disk = Disk::new(16 * MIB);
    serves_confined(blkd(), &disk, &[]);
}

#[test]
fn direct_is_served_inside() {
    let disk = Disk::new(16 * MIB);
    serves_confined(blkd(), &disk, &["--direct"]);
}

#[test]
fn unprivileged_user_is_served_inside() {
    if !am_root() {
        return;
    }
    let disk = Disk::new(16 * MIB);
    let mut command = program_for_all(&disk);
    command.uid(NOBODY).gid(NOBODY);
    serves_confined(command, &disk, &[]);
}

/// A host that answers some calls with an errno, as containers do.
fn without(command: &mut Command, calls: &[libc::c_long], errno: i32) {
    use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};
    let program: BpfProgram = SeccompFilter::new(
        calls.iter().map(|call| (*call, vec![])).collect(),
        SeccompAction::Allow,
        SeccompAction::Errno(errno as u32),
        TargetArch::x86_64,
    )
    .and_then(TryInto::try_into)
    .unwrap();
    // SAFETY: the program was built before; applying it makes system calls only.
    unsafe {
        command.pre_exec(move || {
            seccompiler::apply_filter(&program).map_err(|_| std::io::ErrorKind::Other.into())
        })
    };
}

#[test]
fn without_io_uring_plain_calls_serve_inside() {
    let disk = Disk::new(16 * MIB);
    let mut command = blkd();
    without(&mut command, &[libc::SYS_io_uring_setup], libc::EPERM);
    serves_confined(command, &disk, &[]);
}

#[test]
fn a_container_without_landlock_and_namespaces_is_reported_and_served() {
    let disk = Disk::new(16 * MIB);
    let mut command = blkd();
    let absent = [
        libc::SYS_landlock_create_ruleset,
        libc::SYS_landlock_restrict_self,
    ];
    without(&mut command, &absent, libc::ENOSYS);
    without(&mut command, &[libc::SYS_unshare], libc::EPERM);
    let daemon = Daemon::with(&mut command, &disk, &["--num-queues", "2"]);
    verified_io(&disk);
    let (code, said) = daemon.end();
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("the sandbox lacks landlock"), "{said}");
    assert!(said.contains("the sandbox lacks namespaces"), "{said}");
}

#[test]
fn a_daemon_without_a_second_process_leaves_no_socket() {
    let disk = Disk::new(MIB);
    let mut command = blkd();
    let calls = [libc::SYS_fork, libc::SYS_clone, libc::SYS_clone3];
    without(&mut command, &calls, libc::EAGAIN);
    let (code, said) = Daemon::with(&mut command, &disk, &[]).wait();
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("cannot start a process"), "{said}");
    assert!(!disk.socket.exists());
}

#[test]
fn a_control_socket_is_private_from_its_first_moment() {
    let mut command = Command::new("sh");
    command.args(["-c", "umask 0; exec \"$0\" \"$@\""]);
    command.arg(env!("CARGO_BIN_EXE_pv-blkd"));
    // Seem to succeed, and change nothing: what is seen is the mode at first.
    let changes = [libc::SYS_chmod, libc::SYS_fchmod, libc::SYS_fchmodat];
    without(&mut command, &changes, 0);
    let mut managed = Managed::with(command, &[]);
    drop(managed.daemon.connect(&managed.control));
    let mode = |path: &std::path::Path| {
        let metadata = std::fs::metadata(path).unwrap();
        metadata.permissions().mode() & 0o777
    };
    assert_eq!(mode(&managed.control), 0o600);
    assert_eq!(mode(&managed.stats), 0o777, "the umask is as it was");
    assert_eq!(managed.daemon.end().0, Some(0));
}

#[test]
fn strict_does_not_start_without_a_layer() {
    let disk = Disk::new(MIB);
    let mut command = blkd();
    let absent = [libc::SYS_landlock_create_ruleset];
    without(&mut command, &absent, libc::ENOSYS);
    let daemon = Daemon::with(&mut command, &disk, &["--sandbox", "strict"]);
    let (code, said) = daemon.wait();
    assert_eq!(code, Some(1));
    assert!(
        said.contains("cannot enter the sandbox: landlock"),
        "{said}"
    );
    assert!(!disk.socket.exists(), "it cleans up");
}

#[test]
fn none_is_none() {
    let disk = Disk::new(16 * MIB);
    let daemon = Daemon::with(
        &mut blkd(),
        &disk,
        &[
            "--num-queues",
            "2",
            "--sandbox",
            "none",
            "--seccomp",
            "none",
        ],
    );
    verified_io(&disk);
    assert_eq!(daemon.field("Seccomp:"), "0");
    assert_eq!(daemon.field("NoNewPrivs:"), "0");
    assert_eq!(daemon.end().0, Some(0));
}

/// The process that removes the socket must not keep it alive when the daemon is killed.
#[test]
fn a_daemon_that_is_killed_at_once_leaves_a_stale_socket_and_no_process() {
    let disk = Disk::new(MIB);
    for _ in 0..20 {
        let mut daemon = Daemon::with(&mut blkd(), &disk, &[]);
        let deadline = Instant::now() + TIMEOUT;
        while std::os::unix::net::UnixStream::connect(&disk.socket).is_err() {
            if daemon.ended().is_some() {
                panic!("it did not start: {:?}", daemon.wait());
            }
            assert!(Instant::now() < deadline, "nobody listens");
        }
        // As soon as it serves: an answer proves that it is past its set-up.
        let mut front = Frontend::connect(&disk.socket, FEATURES, 1, 64, MIB as usize);
        assert_eq!(front.read_sync(0, 0, 512).0, 0);
        daemon.0.kill().unwrap();
        daemon.0.wait().unwrap();
        let refused = std::os::unix::net::UnixStream::connect(&disk.socket).unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
        // Standard error ends when the last process that holds it has.
        let mut said = String::new();
        let mut stderr = daemon.0.stderr.take().unwrap();
        stderr.read_to_string(&mut said).unwrap();
        assert_eq!(said, "");
    }
}
