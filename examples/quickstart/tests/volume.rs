//! The guest's file system work on real images: the same code, on a file instead of a device.

use quickstart::image::FileDisk;
use quickstart::pack::{Contents, pack, take};
use quickstart::scan::Plan;
use quickstart::verify::verify;
use quickstart_fs::walk::{Summary, hash_volume, timestamp};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// The second of July 2026, and what FAT makes of the ends of time.
#[test]
fn times_are_calendar_dates() {
    let date = |seconds| {
        let t = timestamp(seconds);
        let year = 1970 + u32::from(t.year_since_1970);
        let (month, day) = (t.zero_indexed_month + 1, t.zero_indexed_day + 1);
        format!(
            "{year}-{month:02}-{day:02} {:02}:{:02}:{:02}",
            t.hours, t.minutes, t.seconds
        )
    };
    assert_eq!(date(1_782_993_599), "2026-07-02 11:59:59");
    assert_eq!(date(951_782_400), "2000-02-29 00:00:00");
    assert_eq!(date(4_107_542_399), "2100-02-28 23:59:59");
    assert_eq!(date(4_107_542_400), "2100-03-01 00:00:00");
    assert_eq!(date(0), "1980-01-01 00:00:00");
    assert!(date(u64::MAX >> 8).starts_with("2107"));
}

struct Bench {
    dir: TempDir,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("in")).unwrap();
        Bench { dir }
    }

    fn folder(&self) -> PathBuf {
        self.dir.path().join("in")
    }

    fn image(&self) -> PathBuf {
        self.dir.path().join("disk.img")
    }

    fn file(&self, path: &str, bytes: &[u8]) {
        let path = self.folder().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    fn pack(&self) -> Contents {
        let plan = Plan::scan(&self.folder()).unwrap();
        assert!(plan.problems.is_empty(), "{}", plan.problem_summary());
        let image = File::create_new(self.image()).unwrap();
        drop(image);
        let image = open(&self.image());
        pack(&plan, &image, |_| {}).unwrap()
    }

    fn guest(&self) -> Summary {
        let disk = FileDisk::new(open(&self.image())).unwrap();
        hash_volume(disk, || 0, timestamp(1_782_993_600)).unwrap().0
    }
}

fn open(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

/// Bytes that do not repeat at any power of two.
fn noise(length: usize, seed: u32) -> Vec<u8> {
    let mut state = seed | 1;
    let step = |_| {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as u8
    };
    (0..length).map(step).collect()
}

#[test]
fn names_sizes_and_nesting() {
    let bench = Bench::new();
    bench.file("README.TXT", b"eight point three, upper case");
    bench.file("readme.md", b"lower case");
    bench.file("empty", b"");
    bench.file("one", b"1");
    for size in [511, 512, 513, 4095, 4096, 4097, 131_071, 131_072, 131_073] {
        bench.file(&format!("sizes/{size}.bin"), &noise(size, size as u32));
    }
    bench.file("large.bin", &noise(40 << 20, 7));
    bench.file(&format!("{}.long", "n".repeat(242)), b"longest");
    bench.file("Ünïcödé and spaces/日本語のなまえ.md", "かな".as_bytes());
    bench.file(".hidden/.also", b"dots");
    bench.file("a.b.c.d/e.f.g", b"more dots");
    let deep: String = (0..60).map(|level| format!("l{level}/")).collect();
    bench.file(&format!("{deep}bottom.txt"), b"far down");
    fs::create_dir_all(bench.folder().join("nothing/in here")).unwrap();

    let packed = bench.pack();
    assert_eq!(take(&bench.image()).unwrap(), packed);
    let summary = bench.guest();
    verify(&bench.image(), &packed).unwrap();
    assert_eq!(summary.files, packed.digests.len() as u64);
    assert_eq!(summary.bytes, packed.bytes);
    // sizes, the one with spaces, .hidden, a.b.c.d, 60 levels, two empty ones.
    assert_eq!(summary.folders, 1 + 1 + 1 + 1 + 60 + 2);

    // Again on the same image: the manifest is replaced and not hashed.
    assert_eq!(bench.guest().files, summary.files);
    verify(&bench.image(), &packed).unwrap();
}

/// Names that FAT makes up for others stay apart from those that entries have by right.
#[test]
fn made_up_names_do_not_collide() {
    let bench = Bench::new();
    for name in [
        "a long name.txt",
        "a long name 2.txt",
        "ALONGN~1.TXT",
        "alongn~2.txt",
    ] {
        bench.file(name, name.as_bytes());
        bench.file(&format!("folder/{name}"), name.as_bytes());
    }
    bench.file("another folder/file", b"1");
    bench.file("ANOTHE~1/file", b"2");
    bench.file("a third folder", b"3");
    bench.file("ATHIRD~1", b"4");
    let packed = bench.pack();
    assert_eq!(packed.digests.len(), 12);
    assert_eq!(bench.guest().files, 12);
    verify(&bench.image(), &packed).unwrap();
}

#[test]
fn many_files_in_one_folder() {
    let bench = Bench::new();
    for i in 0..2000 {
        bench.file(
            &format!("crowd/a file with a long name {i}.txt"),
            &noise(i % 700, i as u32),
        );
    }
    let packed = bench.pack();
    assert_eq!(bench.guest().files, 2000);
    verify(&bench.image(), &packed).unwrap();
}

#[test]
fn changes_are_found() {
    let bench = Bench::new();
    bench.file("a", &noise(10_000, 1));
    bench.file("b", &noise(10_000, 2));
    let packed = bench.pack();
    let error = verify(&bench.image(), &packed).unwrap_err();
    assert!(
        format!("{error:#}").contains("left no readable manifest"),
        "{error:#}"
    );
    bench.guest();
    verify(&bench.image(), &packed).unwrap();

    // Taken again, it has no manifest that could pass for one of the next guest.
    assert_eq!(take(&bench.image()).unwrap(), packed);
    let error = verify(&bench.image(), &packed).unwrap_err();
    assert!(
        format!("{error:#}").contains("left no readable manifest"),
        "{error:#}"
    );
    assert_eq!(take(&bench.image()).unwrap(), packed);
    bench.guest();
    verify(&bench.image(), &packed).unwrap();

    let mut other = packed.clone();
    other.digests.get_mut("a").unwrap()[0] ^= 1;
    let error = verify(&bench.image(), &other).unwrap_err();
    assert_eq!(
        format!("{error:#}"),
        "the disk image has changed: a has another hash"
    );
    let mut other = packed.clone();
    other.digests.remove("b");
    let error = verify(&bench.image(), &other).unwrap_err();
    assert!(
        format!("{error:#}").contains("b was not there before"),
        "{error:#}"
    );
    let mut other = packed.clone();
    other.digests.insert("c".into(), [0; 32]);
    let error = verify(&bench.image(), &other).unwrap_err();
    assert!(format!("{error:#}").contains("c is missing"), "{error:#}");
}

#[test]
fn damaged_images_end_in_an_error() {
    let bench = Bench::new();
    bench.file("folder/file", &noise(300_000, 3));
    bench.pack();
    let good = fs::read(bench.image()).unwrap();
    let hash = |bytes: &[u8]| {
        fs::write(bench.image(), bytes).unwrap();
        let disk = FileDisk::new(open(&bench.image())).unwrap();
        hash_volume(disk, || 0, timestamp(1_782_993_600))
    };
    hash(&[]).unwrap_err();
    hash(&[0; 4096]).unwrap_err();
    // Cut in the partition table's promise, in the tables, in the data.
    for length in [512, 1 << 20, (1 << 20) + 512, (1 << 20) + 100_000] {
        hash(&good[..length]).unwrap_err();
    }
}
