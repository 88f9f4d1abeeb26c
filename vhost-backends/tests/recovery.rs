//! A backend that ends at any point of a request, and the one after it: every token completes
//! exactly once, acknowledged writes are on the disk, the used index goes forward only.

mod support {
    pub(crate) mod process;
    pub(crate) mod front;
    pub(crate) mod raw;
}

use std::ffi::OsStr;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::time::Instant;
use support::process::Process;
use support::front::{BLOCK, DATA, Front, Op, TIMEOUT};

const DISK: u64 = 1 << 20;
const ROUNDS: u64 = 3;

fn start(dir: &Path, crash_at: Option<&str>) -> Process {
    let variables: Vec<_> = crash_at.map(|at| ("PV_CRASH_AT", at)).into_iter().collect();
    let image = dir.join("disk.img");
    let arguments = [OsStr::new("--blk-file"), image.as_os_str()];
    Process::start_with(&dir.join("blk.sock"), &arguments, &variables)
}

fn has_crashed(daemon: &mut Process) -> bool {
    let Some(status) = daemon.ended() else {
        return false;
    };
    assert_eq!(status.signal(), Some(libc::SIGABRT));
    true
}

fn wait_for_crash(daemon: &mut Process) {
    assert_eq!(daemon.end().signal(), Some(libc::SIGABRT));
}

fn block(token: u16, round: u64) -> Vec<u8> {
    let seed = u64::from(token) << 8 | round;
    (0..BLOCK)
        .map(|i| (seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (i % 57)) as u8 ^ i as u8)
        .collect()
}

#[derive(Clone, Copy, Debug)]
struct Case {
    op: Op,
    depth: u16,
    size: u16,
    packed: bool,
    indirect: bool,
}

/// Runs rounds of requests under backends that end where `crashes` says, one after the other, and
/// a last one that does not. How many of them did end.
fn run(case: Case, crashes: &[String]) -> usize {
    let dir = tempfile::tempdir().unwrap();
    let mut options = std::fs::File::options();
    options.read(true).write(true).create_new(true);
    let disk = options.open(dir.path().join("disk.img")).unwrap();
    disk.set_len(DISK).unwrap();
    if case.op == Op::Read {
        for token in 0..case.depth {
            let at = BLOCK * u64::from(token);
            disk.write_all_at(&block(token, 0), at).unwrap();
        }
    }
    let mut plan = crashes.iter();
    let mut crashed = 0;
    let mut daemon = start(dir.path(), plan.next().map(String::as_str));
    let mut front = Front::new(case.size, case.packed, case.indirect);
    let mut connected = connect(&mut front, dir.path());
    for round in 0..ROUNDS {
        for token in 0..case.depth {
            let data = DATA + BLOCK * u64::from(token);
            match case.op {
                Op::Write => front.fill(data, &block(token, round)),
                _ => front.fill(data, &[0xee; BLOCK as usize]),
            }
            front.submit(token, case.op, u64::from(token) * BLOCK / 512);
        }
        front.notify();
        let deadline = Instant::now() + TIMEOUT;
        while front.in_flight() > 0 {
            if !connected || has_crashed(&mut daemon) {
                // It may end in the middle of a set-up too.
                wait_for_crash(&mut daemon);
                crashed += 1;
                daemon = start(dir.path(), plan.next().map(String::as_str));
                connected = connect(&mut front, dir.path());
            }
            for token in front.reap() {
                check(&front, &disk, case, token, round);
            }
            assert!(
                Instant::now() < deadline,
                "{case:?} {crashes:?}: {} of round {round} are not given back",
                front.in_flight()
            );
            std::thread::yield_now();
        }
    }
    // It may have ended after the last one.
    let base = match front.stop() {
        Some(base) => base,
        None => {
            wait_for_crash(&mut daemon);
            crashed += 1;
            daemon = start(dir.path(), None);
            assert!(connect(&mut front, dir.path()));
            front.stop().unwrap()
        }
    };
    // Nothing is left, and nothing comes twice.
    let taken = u64::from(case.depth) * ROUNDS;
    if !case.packed {
        assert_eq!(u64::from(base), taken & 0xffff);
        assert_eq!(u64::from(front.published()), taken & 0xffff);
    } else {
        assert_eq!(base & 0xffff, base >> 16);
    }
    assert!(front.reap().is_empty());
    drop(daemon);
    crashed
}

/// `false`: the backend ended meanwhile.
fn connect(front: &mut Front, dir: &Path) -> bool {
    front.connect(&dir.join("blk.sock"));
    let base = front.forgetful_base();
    front
        .negotiate(true)
        .and_then(|()| front.start(base))
        .is_some()
}

fn check(front: &Front, disk: &std::fs::File, case: Case, token: u16, round: u64) {
    let at = BLOCK * u64::from(token);
    let mut stored = vec![0; BLOCK as usize];
    match case.op {
        Op::Read => {
            let read = front.bytes(DATA + at, BLOCK as usize);
            assert!(
                read == block(token, 0),
                "{case:?}: token {token} was read wrong"
            );
        }
        Op::Write => {
            disk.read_exact_at(&mut stored, at).unwrap();
            assert!(
                stored == block(token, round),
                "{case:?}: token {token} is lost"
            );
        }
        Op::Flush => {}
    }
}

fn sweep(packed: bool) {
    let mut cases = 0;
    let mut crashes = 0;
    for op in [Op::Read, Op::Write, Op::Flush] {
        for (depth, size, indirect) in [(1, 16, false), (8, 32, false), (32, 32, true)] {
            let case = Case {
                op,
                depth,
                size,
                packed,
                indirect,
            };
            for point in 1..=6 {
                let depth = u64::from(depth);
                let mut counts = vec![1, depth / 2 + 1, depth, depth + 1, 2 * depth + depth / 2];
                counts.sort_unstable();
                counts.dedup();
                for count in counts {
                    // Once, and once more while the next one recovers.
                    let once = [format!("P{point}:{count}")];
                    let ended = run(case, &once);
                    assert!(ended == 1 || count > 1, "{case:?} {once:?} never came");
                    crashes += ended;
                    let twice = [once[0].clone(), format!("P{}:1", (point + 2) % 6 + 1)];
                    crashes += run(case, &twice);
                    cases += 2;
                }
            }
        }
    }
    // While memory is exchanged, before the first request.
    let case = Case {
        op: Op::Write,
        depth: 8,
        size: 32,
        packed,
        indirect: false,
    };
    assert_eq!(run(case, &["P7:1".into()]), 1);
    println!("{cases} cases, {crashes} crashes");
    assert!(crashes > cases);
}

#[test]
fn every_crash_point_of_a_split_ring() {
    sweep(false);
}

#[test]
fn every_crash_point_of_a_packed_ring() {
    sweep(true);
}
