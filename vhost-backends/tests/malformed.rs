//! qcow2 images that lie, served by the daemon in its sandbox: each is refused, or served with
//! I/O errors; no panic, no hang, no memory that grows with what an image claims.
//!
//! The corpus is made here: every field of the header, images cut at every border, tables that
//! loop, overlap or lead outside, absurd sizes, chains of backing files that do not end.

mod support {
    pub(crate) mod front;
    pub(crate) mod process;
    pub(crate) mod raw;
}

use std::path::{Path, PathBuf};
use std::time::Instant;
use support::front::{DATA, Front, Op, TIMEOUT};
use support::process::{Daemon, blkd};
use vhost_backends::engine::{BlockingDisk, FileOptions, Qcow2Disk, create_overlay};

const MIB: usize = 1 << 20;
const CLUSTER: usize = 65536;
/// KiB that the daemon may take at any time: itself, its tables' limit, and its pool of buffers.
const MOST_MEMORY_KIB: u64 = 128 << 10;
/// Fields of the header: name, offset, bytes.
const FIELDS: [(&str, usize, usize); 19] = [
    ("magic", 0, 4),
    ("version", 4, 4),
    ("backing_file_offset", 8, 8),
    ("backing_file_size", 16, 4),
    ("cluster_bits", 20, 4),
    ("size", 24, 8),
    ("crypt_method", 32, 4),
    ("l1_size", 36, 4),
    ("l1_table_offset", 40, 8),
    ("refcount_table_offset", 48, 8),
    ("refcount_table_clusters", 56, 4),
    ("nb_snapshots", 60, 4),
    ("snapshots_offset", 64, 8),
    ("incompatible_features", 72, 8),
    ("compatible_features", 80, 8),
    ("autoclear_features", 88, 8),
    ("refcount_order", 96, 4),
    ("header_length", 100, 4),
    ("compression_type", 104, 1),
];

fn get(image: &[u8], at: usize, bytes: usize) -> u64 {
    let field = &image[at..at + bytes];
    field
        .iter()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

fn put(image: &mut [u8], at: usize, bytes: usize, value: u64) {
    image[at..at + bytes].copy_from_slice(&value.to_be_bytes()[8 - bytes..]);
}

/// An image on a base, with some of its clusters written.
struct Good {
    dir: tempfile::TempDir,
    image: Vec<u8>,
}

impl Good {
    fn new() -> Good {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("base.img");
        std::fs::write(&base, vec![5; 4 * MIB]).unwrap();
        let path = dir.path().join("good.qcow2");
        create_overlay(&path, &base, false).unwrap();
        let disk = Qcow2Disk::open(&path, FileOptions::default()).unwrap();
        for at in [0, MIB, 3 * MIB] {
            disk.write_at(&vec![7; 2 * CLUSTER], at as u64).unwrap();
        }
        disk.flush().unwrap();
        drop(disk);
        let image = std::fs::read(&path).unwrap();
        Good { dir, image }
    }

    /// Where the first table of each kind lies: what the header and its first entry say.
    fn tables(&self) -> [(&'static str, usize); 4] {
        let at = |offset: usize| (get(&self.image, offset, 8) & 0x00ff_ffff_ffff_fe00) as usize;
        let (l1, refcounts) = (at(40), at(48));
        [
            ("l1", l1),
            ("l2", at(l1)),
            ("refcount table", refcounts),
            ("refcount block", at(refcounts)),
        ]
    }
}

#[derive(Default)]
struct Tally {
    refused: usize,
    failing: usize,
    served: usize,
}

/// Serves `path`, and asks a few things of it.
fn try_image(dir: &Path, path: &Path, what: &str, tally: &mut Tally) {
    let began = Instant::now();
    let socket = dir.join("blk.sock");
    let _ = std::fs::remove_file(&socket);
    let arguments = [
        PathBuf::from("--blk-file"),
        path.into(),
        "--format=qcow2".into(),
    ];
    let mut daemon = Daemon::quiet(blkd().arg("--socket-path").arg(&socket).args(arguments));
    match daemon.connect_or_end(&socket) {
        Err(status) => {
            assert_eq!(status.code(), Some(1), "{what}: {status:?}");
            tally.refused += 1;
        }
        Ok(stream) => {
            let failures = ask(stream);
            let ended = daemon.ended();
            assert!(ended.is_none(), "{what}: {ended:?}");
            assert!(failures.is_some(), "{what}: requests without an answer");
            if failures == Some(0) {
                tally.served += 1;
            } else {
                tally.failing += 1;
            }
            let most = daemon.number("VmHWM");
            assert!(most < MOST_MEMORY_KIB, "{what}: {most} KiB");
        }
    }
    assert!(began.elapsed() < TIMEOUT, "{what}: slow");
}

/// Reads, writes, zeroes and flushes; how many failed. `None`: some were never given back.
fn ask(stream: std::os::unix::net::UnixStream) -> Option<usize> {
    let mut front = Front::new(64, false, true);
    front.may_fail = true;
    front.take(stream);
    front.negotiate(false)?;
    front.start(0)?;
    // Clusters that are there, that come from the base, and that are nowhere.
    let places = [
        0,
        8,
        MIB / 512,
        2 * MIB / 512,
        3 * MIB / 512 + 120,
        4 * MIB / 512 - 8,
    ];
    for op in [Op::Read, Op::Write, Op::Zeroes, Op::Read, Op::Flush] {
        for (token, place) in (0..).zip(places) {
            front
                .memory
                .fill(DATA + 4096 * u64::from(token), &[9; 4096]);
            front.submit(token, op, place as u64);
        }
        front.notify();
        let deadline = Instant::now() + TIMEOUT;
        while front.in_flight() > 0 {
            front.reap();
            if Instant::now() > deadline {
                return None;
            }
            std::thread::yield_now();
        }
    }
    front.stop()?;
    Some(front.failures)
}

struct Corpus {
    good: Good,
    path: PathBuf,
    tally: Tally,
}

impl Corpus {
    fn new() -> Corpus {
        let good = Good::new();
        let path = good.dir.path().join("bad.qcow2");
        let mut corpus = Corpus {
            good,
            path,
            tally: Tally::default(),
        };
        corpus.change("as it was made", |_| {});
        assert_eq!(corpus.tally.served, 1);
        corpus
    }

    fn change(&mut self, what: &str, how: impl FnOnce(&mut Vec<u8>)) {
        let mut image = self.good.image.clone();
        how(&mut image);
        std::fs::write(&self.path, image).unwrap();
        try_image(self.good.dir.path(), &self.path, what, &mut self.tally);
    }

    fn report(self, at_least_refused: usize) {
        let Tally {
            refused,
            failing,
            served,
        } = self.tally;
        println!("{refused} refused, {failing} with I/O errors, {served} served");
        assert!(refused >= at_least_refused);
    }
}

#[test]
fn every_field_of_the_header() {
    let mut corpus = Corpus::new();
    for (name, at, bytes) in FIELDS {
        let now = get(&corpus.good.image, at, bytes);
        let max = u64::MAX >> (64 - 8 * bytes);
        let mut values = vec![
            0,
            1,
            now.wrapping_sub(1) & max,
            now.wrapping_add(1) & max,
            now.wrapping_add(512) & max,
            max / 2,
            max / 2 + 1,
            max - 1,
            max,
            CLUSTER as u64 & max,
            corpus.good.image.len() as u64 & max,
            (1 << 40) & max,
        ];
        values.sort_unstable();
        values.dedup();
        for value in values.into_iter().filter(|value| *value != now) {
            corpus.change(&format!("{name} = {value:#x}"), |image| {
                put(image, at, bytes, value);
            });
        }
    }
    // Each bit of each feature word: one of them names another file to keep the data in.
    for at in [72, 80, 88] {
        for bit in 0..64 {
            corpus.change(&format!("feature bit {bit} at {at}"), |image| {
                put(image, at, 8, 1 << bit);
            });
        }
    }
    // Extensions of the header: their lengths and types.
    for at in (104..200).step_by(4) {
        for value in [0, 1, 0x7fff_ffff, 0xffff_ffff, 0x4441_5441, 0x2385_2875] {
            corpus.change(&format!("extension word {value:#x} at {at}"), |image| {
                put(image, at, 4, value);
            });
        }
    }
    corpus.report(80);
}

#[test]
fn tables_that_loop_overlap_or_lead_outside() {
    let mut corpus = Corpus::new();
    let len = corpus.good.image.len() as u64;
    let tables = corpus.good.tables();
    let data = get(&corpus.good.image, tables[1].1, 8) & 0x00ff_ffff_ffff_fe00;
    let mut targets: Vec<u64> = tables.iter().map(|(_, at)| *at as u64).collect();
    targets.extend([0, 512, data, data + 1, len - CLUSTER as u64, len]);
    targets.extend([len + CLUSTER as u64, 1 << 40, 0x00ff_ffff_ffff_0000]);
    for (name, table) in tables {
        for target in &targets {
            // Plain, "copied", compressed, all zeroes, and with reserved bits.
            for bits in [0, 1 << 63, 1 << 62, 1, 1 << 63 | 0x1fe] {
                for entry in [0, 16] {
                    corpus.change(
                        &format!("{name}[{entry}] = {target:#x} | {bits:#x}"),
                        |image| {
                            put(image, table + 8 * entry, 8, target | bits);
                        },
                    );
                }
            }
        }
        corpus.change(&format!("{name} all ones"), |image| {
            image[table..table + CLUSTER].fill(0xff);
        });
        corpus.change(&format!("{name} all zeroes"), |image| {
            image[table..table + CLUSTER].fill(0);
        });
        corpus.change(&format!("{name} all the same"), |image| {
            let first: [u8; 8] = image[table..table + 8].try_into().unwrap();
            for entry in image[table..table + CLUSTER].chunks_exact_mut(8) {
                entry.copy_from_slice(&first);
            }
        });
    }
    corpus.report(20);
}

#[test]
fn cut_anywhere_and_absurdly_large() {
    let mut corpus = Corpus::new();
    let len = corpus.good.image.len();
    let borders = (0..len)
        .step_by(CLUSTER)
        .flat_map(|at| [at.wrapping_sub(1), at, at + 1, at + 512]);
    let header = (0..=120).step_by(4);
    for cut in header.chain(borders).filter(|cut| *cut < len) {
        corpus.change(&format!("cut at {cut}"), |image| image.truncate(cut));
    }
    for cluster_bits in [0, 8, 9, 12, 20, 21, 22, 31, 63, 64] {
        for size in [0, 1, 511, 1 << 40, 1 << 60, u64::MAX / 2, u64::MAX] {
            for l1_size in [0, 1, 1 << 22, 1 << 25, u64::from(u32::MAX)] {
                let what =
                    format!("cluster_bits {cluster_bits}, size {size:#x}, l1_size {l1_size:#x}");
                corpus.change(&what, |image| {
                    put(image, 20, 4, cluster_bits);
                    put(image, 24, 8, size);
                    put(image, 36, 4, l1_size);
                });
            }
        }
    }
    corpus.report(100);
}

/// Chains that loop, are too long, or lead to what is no image.
#[test]
fn backing_files_that_are_none() {
    let mut corpus = Corpus::new();
    let dir = corpus.good.dir.path().to_owned();
    let name_at = get(&corpus.good.image, 8, 8) as usize;
    let room = get(&corpus.good.image, 16, 4) as usize;
    let fifo = dir.join("fifo");
    let made = std::process::Command::new("mkfifo").arg(&fifo).status();
    let fifo_there = made.is_ok_and(|status| status.success());
    let mut names = vec![
        dir.join("nobody"),
        dir.join("bad.qcow2"),
        dir.clone(),
        "/dev/zero".into(),
        "json:{\"driver\":\"file\",\"filename\":\"/etc/passwd\"}".into(),
        "nbd:unix:/nowhere".into(),
        "".into(),
    ];
    if fifo_there {
        names.push(fifo);
    } else {
        println!("SKIPPED: no mkfifo to make a pipe with");
    }
    for name in names {
        for format in ["raw", "qcow2", "vmdk", "x"] {
            let name = name.to_str().unwrap();
            corpus.change(&format!("backing file {name:?}, {format}"), |image| {
                // The name moves behind everything that the header may have in its cluster.
                let at = 4096;
                image[at..at + name.len()].copy_from_slice(name.as_bytes());
                put(image, 8, 8, at as u64);
                put(image, 16, 4, name.len() as u64);
                put_format(image, format);
            });
        }
    }
    for (at, len) in [(0, room), (name_at, 0), (name_at, 1024), (name_at, 65536)] {
        corpus.change(&format!("backing name of {len} at {at}"), |image| {
            put(image, 8, 8, at as u64);
            put(image, 16, 4, len as u64);
        });
    }
    // As long as is allowed and beyond, and two that are each other's base.
    for depth in [8, 16, 17, 40] {
        let mut below = dir.join("base.img");
        for level in 0..depth {
            let path = dir.join(format!("{depth}-{level}.qcow2"));
            if create_overlay(&path, &below, level > 0).is_err() {
                assert!(level > 8, "{level}");
                break;
            }
            below = path;
        }
        try_image(&dir, &below, &format!("{depth} deep"), &mut corpus.tally);
    }
    let (one, two) = (dir.join("one.qcow2"), dir.join("two.qcow2"));
    create_overlay(&one, &dir.join("base.img"), false).unwrap();
    create_overlay(&two, &one, true).unwrap();
    std::fs::remove_file(&one).unwrap();
    create_overlay(&one, &dir.join("good.qcow2"), true).unwrap();
    std::fs::remove_file(dir.join("good.qcow2")).unwrap();
    std::os::unix::fs::symlink(&two, dir.join("good.qcow2")).unwrap();
    let before = corpus.tally.refused;
    try_image(&dir, &two, "each other's base", &mut corpus.tally);
    assert_eq!(corpus.tally.refused, before + 1);
    corpus.report(15);
}

/// Changes the extension that names the backing file's format, which comes first.
fn put_format(image: &mut [u8], format: &str) {
    let mut at = get(image, 100, 4) as usize;
    while get(image, at, 4) != 0 {
        let len = get(image, at + 4, 4) as usize;
        if get(image, at, 4) == 0xe279_2aca {
            let room = len.next_multiple_of(8).max(8);
            image[at + 8..at + 8 + room].fill(0);
            let text = &format.as_bytes()[..format.len().min(room)];
            image[at + 8..at + 8 + text.len()].copy_from_slice(text);
            put(image, at + 4, 4, text.len() as u64);
            return;
        }
        at += 8 + len.next_multiple_of(8);
    }
}
