//! A backend that ends at any point of a request, and the one after it: every token completes
//! exactly once, acknowledged writes are on the disk, the used index goes forward only.

mod support {
    pub(crate) mod front;
    pub(crate) mod process;
    pub(crate) mod raw;
}

use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::time::Instant;
use support::front::{BLOCK, DATA, Front, Op, TIMEOUT};
use support::process::{Daemon, blkd};

const DISK: u64 = 1 << 20;
const ROUNDS: u64 = 3;

fn start(dir: &Path, crash_at: Option<&str>) -> Daemon {
    let mut command = blkd();
    command.arg("--socket-path").arg(dir.join("blk.sock"));
    command.arg("--blk-file").arg(dir.join("disk.img"));
    Daemon::quiet(command.envs(crash_at.map(|at| ("PV_CRASH_AT", at))))
}

fn has_crashed(daemon: &mut Daemon) -> bool {
    let Some(status) = daemon.ended() else {
        return false;
    };
    assert_eq!(status.signal(), Some(libc::SIGABRT));
    true
}

fn wait_for_crash(daemon: &mut Daemon) {
    assert_eq!(daemon.wait_status().signal(), Some(libc::SIGABRT));
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
    /// The memory table is sent again while requests are in flight.
    swap: bool,
}

/// Runs rounds of requests under backends that end where `crashes` says, one after the other, and
/// a last one that does not. How many of them did end.
fn run(case: Case, crashes: &[String]) -> usize {
    let dir = tempfile::tempdir().unwrap();
    let mut options = std::fs::File::options();
    options.read(true).write(true).create_new(true);
    let disk = options.open(dir.path().join("disk.img")).unwrap();
    disk.set_len(DISK).unwrap();
    if matches!(case.op, Op::Read | Op::Zeroes) {
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
                Op::Write => front.memory.fill(data, &block(token, round)),
                _ => front.memory.fill(data, &[0xee; BLOCK as usize]),
            }
            front.submit(token, case.op, u64::from(token) * BLOCK / 512);
        }
        front.notify();
        if case.swap && connected {
            // Whether the backend is still there to answer, the loop finds out.
            let _ = front.set_memory();
        }
        let deadline = Instant::now() + TIMEOUT;
        while front.in_flight() > 0 {
            if !connected || has_crashed(&mut daemon) {
                // It may end in the middle of a set-up too.
                wait_for_crash(&mut daemon);
                crashed += 1;
                for token in (0..case.depth).filter(|t| front.outstanding[usize::from(*t)]) {
                    check_unacknowledged(&disk, case, token, round);
                }
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
            let read = front.memory.bytes(DATA + at, BLOCK as usize);
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
        Op::Zeroes => {
            disk.read_exact_at(&mut stored, at).unwrap();
            assert!(stored == [0; BLOCK as usize], "{case:?}: token {token}");
        }
    }
}

/// A write that was not acknowledged left each sector as it was or as it is to be.
fn check_unacknowledged(disk: &std::fs::File, case: Case, token: u16, round: u64) {
    if case.op != Op::Write {
        return;
    }
    let mut stored = vec![0; BLOCK as usize];
    disk.read_exact_at(&mut stored, BLOCK * u64::from(token))
        .unwrap();
    let old = match round.checked_sub(1) {
        Some(last) => block(token, last),
        None => vec![0; BLOCK as usize],
    };
    let new = block(token, round);
    for at in (0..stored.len()).step_by(512) {
        let sector = at..at + 512;
        let found = &stored[sector.clone()];
        assert!(
            *found == old[sector.clone()] || *found == new[sector],
            "{case:?}: token {token} is torn at {at}"
        );
    }
}

fn sweep(packed: bool) {
    let mut cases = 0;
    let mut crashes = 0;
    let mut one = |case: Case, plan: &[String], must: bool| {
        let ended = run(case, plan);
        assert!(ended == 1 || !must, "{case:?} {plan:?} never came");
        crashes += ended;
        cases += 1;
    };
    for op in [Op::Read, Op::Write, Op::Flush, Op::Zeroes] {
        for (depth, size, indirect) in [(1, 16, false), (8, 32, false), (32, 32, true)] {
            let case = Case {
                op,
                depth,
                size,
                packed,
                indirect,
                swap: false,
            };
            for point in 1..=6 {
                let depth = u64::from(depth);
                let mut counts = vec![1, depth / 2 + 1, depth, depth + 1, 2 * depth + depth / 2];
                counts.sort_unstable();
                counts.dedup();
                for count in counts {
                    // Once, and once more while the next one recovers.
                    let once = [format!("P{point}:{count}")];
                    one(case, &once, count == 1);
                    let twice = [once[0].clone(), format!("P{}:1", (point + 2) % 6 + 1)];
                    one(case, &twice, false);
                }
            }
            // While memory is exchanged: before the first request, and under those of each round.
            let case = Case { swap: true, ..case };
            for count in 1..=1 + ROUNDS {
                let once = [format!("P7:{count}")];
                one(case, &once, true);
                let twice = [once[0].clone(), "P7:1".into()];
                one(case, &twice, false);
            }
        }
    }
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
