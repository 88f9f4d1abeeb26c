//! `kill -9` at random moments under a verified load: overlapping writes, reads, write-zeroes and
//! flushes, 32 at a time, with the in-flight log kept by the frontend. A model knows what each
//! sector may hold.
//!
//! `PV_SOAK_ROUNDS` is the number of kills for each kind of ring, `PV_SOAK_SEED` where the random
//! numbers start.

mod support {
    pub(crate) mod front;
    pub(crate) mod process;
    pub(crate) mod raw;
}

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use support::front::{BLOCK, DATA, Front, Op, TIMEOUT};
use support::process::{Daemon, blkd};
use vhost_backends::engine::{BlockingDisk, FileOptions, Qcow2Disk};

/// Few enough that most requests overlap another one.
const SECTORS: u64 = 192;
const DEPTH: u16 = 32;
const ROUNDS: u64 = 16;
/// Kills come at most so long after a start: some before anything is set up.
const LONGEST_LIFE_MILLIS: u64 = 40;

struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005);
        self.0 = self.0.wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

/// A number of its own for each write; what a sector holds tells it. These two are not random.
type Stamp = u64;
const ZEROES: Stamp = 0;

fn content(stamp: Stamp, sector: u64) -> Vec<u8> {
    if stamp == ZEROES {
        return vec![0; 512];
    }
    let word = |i: u64| stamp.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (sector << 40 | i << 8 | 1);
    (0..64).flat_map(|i| word(i).to_le_bytes()).collect()
}

/// Something that a sector may hold.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    stamp: Stamp,
    began: u64,
    /// Acknowledged.
    over: Option<u64>,
}

#[derive(Debug)]
struct InFlight {
    op: Op,
    sector: u64,
    sectors: u64,
    began: u64,
    /// Of a read: what each of its sectors may have held at any time since it began.
    allowed: Vec<Allowed>,
}

#[derive(Debug)]
struct Allowed {
    stamps: Vec<Stamp>,
    /// A write was in flight at the same time: a part of the sector may be read before it, and
    /// the rest after.
    raced: bool,
}

impl Allowed {
    fn has(&self, found: &[u8], sector: u64) -> bool {
        let contents: Vec<_> = self.stamps.iter().map(|s| content(*s, sector)).collect();
        if !self.raced {
            return contents.iter().any(|content| content == found);
        }
        let mut words = (0..512).step_by(8).map(|at| at..at + 8);
        words.all(|word| {
            contents
                .iter()
                .any(|c| c[word.clone()] == found[word.clone()])
        })
    }
}

/// What each sector may hold: of all that was written there, what no write replaced for certain.
struct Model {
    sectors: Vec<Vec<Candidate>>,
    in_flight: Vec<Option<InFlight>>,
    clock: u64,
    stamps: Stamp,
}

impl Model {
    fn new() -> Model {
        let start = Candidate {
            stamp: ZEROES,
            began: 0,
            over: Some(0),
        };
        Model {
            sectors: vec![vec![start]; SECTORS as usize],
            in_flight: (0..DEPTH).map(|_| None).collect(),
            clock: 1,
            stamps: 1,
        }
    }

    fn allowed_at(&self, sector: u64) -> Allowed {
        let candidates = &self.sectors[sector as usize];
        Allowed {
            stamps: candidates.iter().map(|c| c.stamp).collect(),
            raced: candidates.iter().any(|c| c.over.is_none()),
        }
    }

    /// A request begins; the stamp of what it writes.
    fn begin(&mut self, token: u16, op: Op, sector: u64, sectors: u64) -> Stamp {
        self.clock += 1;
        let began = self.clock;
        let stamp = match op {
            Op::Write => {
                self.stamps += 1;
                self.stamps
            }
            _ => ZEROES,
        };
        let range = sector..sector + sectors;
        let mut allowed = Vec::new();
        match op {
            Op::Read => allowed = range.map(|s| self.allowed_at(s)).collect(),
            Op::Flush => {}
            Op::Write | Op::Zeroes => {
                for s in range {
                    self.sectors[s as usize].push(Candidate {
                        stamp,
                        began,
                        over: None,
                    });
                    // Reads under way may see it already.
                    for read in self.in_flight.iter_mut().flatten() {
                        if read.op == Op::Read
                            && (read.sector..read.sector + read.sectors).contains(&s)
                        {
                            let allowed = &mut read.allowed[(s - read.sector) as usize];
                            allowed.stamps.push(stamp);
                            allowed.raced = true;
                        }
                    }
                }
            }
        }
        self.in_flight[usize::from(token)] = Some(InFlight {
            op,
            sector,
            sectors,
            began,
            allowed,
        });
        stamp
    }

    /// A request is acknowledged.
    fn end(&mut self, token: u16) -> InFlight {
        let done = self.in_flight[usize::from(token)].take().unwrap();
        self.clock += 1;
        if matches!(done.op, Op::Write | Op::Zeroes) {
            for s in done.sector..done.sector + done.sectors {
                let candidates = &mut self.sectors[s as usize];
                // What was acknowledged before this one began is replaced.
                candidates.retain(|c| c.over.is_none_or(|over| over > done.began));
                let own = candidates.iter_mut().find(|c| c.began == done.began);
                own.unwrap().over = Some(self.clock);
            }
        }
        done
    }
}

fn assert_allowed(found: &[u8], sector: u64, allowed: &Allowed, what: &str) {
    assert!(
        allowed.has(found, sector),
        "{what}: sector {sector} is to be {allowed:?} and starts with {:x?}",
        &found[..16]
    );
}

struct Soak {
    front: Front,
    model: Model,
    random: Random,
    free: Vec<u16>,
    done: u64,
}

impl Soak {
    fn submit(&mut self, token: u16) {
        let op = match self.random.below(20) {
            0..=10 => Op::Write,
            11..=16 => Op::Read,
            17..=18 => Op::Zeroes,
            _ => Op::Flush,
        };
        let most = BLOCK / 512;
        let sectors = if op == Op::Flush {
            0
        } else {
            1 + self.random.below(most)
        };
        let sector = self.random.below(SECTORS - most);
        let stamp = self.model.begin(token, op, sector, sectors);
        let at = DATA + BLOCK * u64::from(token);
        let data: Vec<u8> = match op {
            Op::Write => (sector..sector + sectors)
                .flat_map(|s| content(stamp, s))
                .collect(),
            _ => vec![0xee; BLOCK as usize],
        };
        self.front.memory.fill(at, &data);
        self.front.submit_sectors(token, op, sector, sectors as u32);
    }

    fn reap(&mut self) {
        for token in self.front.reap() {
            let done = self.model.end(token);
            if done.op == Op::Read {
                let at = DATA + BLOCK * u64::from(token);
                let data = self.front.memory.bytes(at, 512 * done.sectors as usize);
                for ((found, allowed), s) in data.chunks(512).zip(&done.allowed).zip(done.sector..)
                {
                    assert_allowed(found, s, allowed, "read");
                }
            }
            self.free.push(token);
            self.done += 1;
        }
    }

    /// Keeps the queue full until the backend is gone. `false`: it did not come to that.
    fn work(&mut self, socket: &Path, gone: &AtomicBool) -> bool {
        let stream = loop {
            // Ordering: SeqCst, nothing here is in a hurry.
            if gone.load(Ordering::SeqCst) {
                return false;
            }
            if let Ok(stream) = UnixStream::connect(socket) {
                break stream;
            }
            std::thread::sleep(Duration::from_micros(500));
        };
        self.front.take(stream);
        let base = self.front.forgetful_base();
        let ready = self.front.negotiate(true);
        if ready.and_then(|()| self.front.start(base)).is_none() {
            return false;
        }
        while !gone.load(Ordering::SeqCst) {
            while let Some(token) = self.free.pop() {
                self.submit(token);
            }
            self.front.notify();
            self.reap();
            std::thread::yield_now();
        }
        true
    }
}

fn number(variable: &str, default: u64) -> u64 {
    match std::env::var(variable) {
        Ok(text) => text.parse().unwrap(),
        Err(_) => default,
    }
}

/// What the disk is. Always past the page cache or never: direct I/O that is still under way when its
/// process is killed would meet the next one's cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Raw,
    Direct,
    /// With clusters of a sector, so that most requests change its tables.
    Qcow2,
}

impl Kind {
    fn arguments(self) -> &'static [&'static str] {
        match self {
            Kind::Raw => &[],
            Kind::Direct => &["--direct"],
            Kind::Qcow2 => &["--format", "qcow2"],
        }
    }

    /// Whether it could be made.
    fn make(self, image: &Path) -> bool {
        let bytes = SECTORS * 512;
        if self != Kind::Qcow2 {
            std::fs::File::create_new(image)
                .unwrap()
                .set_len(bytes)
                .unwrap();
            return true;
        }
        let mut make = Command::new("qemu-img");
        make.args(["create", "-q", "-f", "qcow2", "-o", "cluster_size=512"]);
        match make.arg(image).arg(bytes.to_string()).status() {
            Ok(status) => assert!(status.success()),
            Err(error) => {
                println!("SKIPPED: a qcow2 image ({error})");
                return false;
            }
        }
        true
    }

    fn read(self, image: &Path) -> Vec<u8> {
        if self != Kind::Qcow2 {
            return std::fs::read(image).unwrap();
        }
        let check = Command::new("qemu-img").arg("check").arg(image).output();
        let check = check.unwrap();
        // 3: what was being allocated at a kill is lost space, and nothing else.
        let said = String::from_utf8_lossy(&check.stdout);
        assert!(matches!(check.status.code(), Some(0 | 3)), "{said}");
        let disk = Qcow2Disk::open(image, FileOptions::default()).unwrap();
        let mut bytes = vec![0; (SECTORS * 512) as usize];
        disk.read_at(&mut bytes, 0).unwrap();
        bytes
    }
}

/// Rate-limited now and then, which keeps requests waiting.
fn start(socket: &Path, image: &Path, kind: Kind, random: &mut Random) -> Daemon {
    let mut command = blkd();
    command.arg("--socket-path").arg(socket);
    command.arg("--blk-file").arg(image).args(kind.arguments());
    if random.below(3) == 0 {
        command.args(["--iops", "4000"]);
    }
    Daemon::quiet(&mut command)
}

fn soak(packed: bool, indirect: bool, kind: Kind) {
    let rounds = number("PV_SOAK_ROUNDS", ROUNDS);
    let clock = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap();
    let seed = number("PV_SOAK_SEED", clock.as_nanos() as u64);
    let name = format!("packed {packed}, indirect {indirect}, {kind:?}, seed {seed}");
    println!("{name}");
    // The directory may be on a file system without O_DIRECT; the build's is not.
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let image = dir.path().join("disk.img");
    let socket = dir.path().join("blk.sock");
    if !kind.make(&image) {
        return;
    }
    let mut soak = Soak {
        front: Front::new(128, packed, indirect),
        model: Model::new(),
        random: Random(seed),
        free: (0..DEPTH).collect(),
        done: 0,
    };
    let (mut working, mut left) = (0, 0);
    for _ in 0..rounds {
        let mut daemon = start(&socket, &image, kind, &mut soak.random);
        let life = Duration::from_millis(soak.random.below(LONGEST_LIFE_MILLIS));
        let gone = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(life);
                daemon.kill();
                gone.store(true, Ordering::SeqCst);
            });
            working += u64::from(soak.work(&socket, &gone));
        });
        // What it published before it ended is there for good.
        soak.reap();
        left += soak.front.in_flight();
    }
    // One that lives gives everything back, and nothing twice.
    let mut daemon = start(&socket, &image, kind, &mut soak.random);
    soak.front.take(daemon.connect(&socket));
    let base = soak.front.forgetful_base();
    soak.front.negotiate(true).unwrap();
    soak.front.start(base).unwrap();
    soak.front.notify();
    let deadline = Instant::now() + TIMEOUT;
    while soak.front.in_flight() > 0 {
        soak.reap();
        assert!(
            Instant::now() < deadline,
            "{name}: {} are not given back",
            soak.front.in_flight()
        );
        std::thread::yield_now();
    }
    soak.front.stop().unwrap();
    assert!(soak.front.reap().is_empty());
    // And this is what the disk holds.
    daemon.signal(libc::SIGTERM);
    assert!(daemon.wait_status().success());
    for (sector, stored) in (0..SECTORS).zip(kind.read(&image).chunks(512)) {
        let allowed = soak.model.allowed_at(sector);
        assert_allowed(stored, sector, &allowed, &name);
    }
    println!(
        "{name}: {rounds} kills, {working} of them under load with {left} requests in flight \
         together, {} requests in all, no mismatch",
        soak.done
    );
    assert!(working > 0 && left > 0 && soak.done > 0);
}

#[test]
fn killed_at_random_with_a_split_ring() {
    soak(false, false, Kind::Raw);
}

#[test]
fn killed_at_random_with_a_packed_ring() {
    soak(true, false, Kind::Raw);
}

#[test]
fn killed_at_random_with_direct_io() {
    soak(false, true, Kind::Direct);
    soak(true, true, Kind::Direct);
}

#[test]
fn killed_at_random_with_a_qcow2_image() {
    soak(false, true, Kind::Qcow2);
    soak(true, true, Kind::Qcow2);
}
