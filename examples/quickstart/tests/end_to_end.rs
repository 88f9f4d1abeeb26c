//! The whole job, as a user runs it, on every accel that there is.
//!
//! `PARAVANE_ACCEL=kvm` or `=process` forces one, which then has to work.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Far beyond what the slowest of these takes.
const LIMIT: Duration = Duration::from_secs(120);

fn accels() -> Vec<String> {
    match std::env::var("PARAVANE_ACCEL") {
        Ok(accel) => vec![accel],
        Err(_) if Path::new("/dev/kvm").exists() => vec!["kvm".into(), "process".into()],
        Err(_) => {
            eprintln!("skipped: kvm, because there is no /dev/kvm");
            vec!["process".into()]
        }
    }
}

/// Runs to the end or, past the limit, to a failure: never hangs.
fn quickstart(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_quickstart"));
    command.args(args).args(["--timeout", "60"]);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let start = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if start.elapsed() > LIMIT {
            child.kill().unwrap();
            panic!("{args:?} did not end");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    child.wait_with_output().unwrap()
}

/// The table of a run that must go well.
fn table(args: &[&str]) -> String {
    let output = quickstart(args);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        output.status.success(),
        "{args:?}: {:?}: {said}",
        output.status
    );
    String::from_utf8(output.stdout).unwrap()
}

fn complaint(args: &[&str]) -> String {
    let output = quickstart(args);
    assert_eq!(output.status.code(), Some(1), "{args:?}");
    assert!(output.stdout.is_empty(), "{args:?}");
    String::from_utf8(output.stderr).unwrap()
}

/// A value of the table.
fn row<'a>(table: &'a str, name: &str) -> &'a str {
    let line = table
        .lines()
        .find(|line| line.trim_start().starts_with(name));
    let line = line.unwrap_or_else(|| panic!("no {name} in {table}"));
    line.trim_start()[name.len()..].trim()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn folder() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("folder");
    fs::create_dir_all(folder.join("inner/empty")).unwrap();
    fs::write(folder.join("nothing"), "").unwrap();
    fs::write(folder.join("inner/Größe 1"), "1").unwrap();
    let large: Vec<u8> = (0..6_000_000u32)
        .map(|i| (i / 7 + i / 1000) as u8)
        .collect();
    fs::write(folder.join("inner/large file.bin"), large).unwrap();
    (dir, folder)
}

#[test]
fn one_guest_on_every_accel() {
    let (_dir, folder) = folder();
    let mut guests = Vec::new();
    for accel in accels() {
        let table = table(&["--accel", &accel, text(&folder)]);
        assert_eq!(row(&table, "accel"), accel);
        assert_eq!(row(&table, "files"), "3");
        assert_eq!(row(&table, "bytes"), "6000001");
        assert!(row(&table, "hashed at").ends_with("MB/s"), "{table}");
        guests.push(row(&table, "guest ELF sha256").to_owned());
    }
    guests.dedup();
    assert_eq!(guests.len(), 1, "not the same guest everywhere");
}

#[test]
fn a_disk_is_kept_and_taken_again() {
    let (dir, folder) = folder();
    let disk = dir.path().join("disk.img");
    for accel in accels() {
        let made = table(&["--accel", &accel, "--disk", text(&disk), text(&folder)]);
        let image = fs::read(&disk).unwrap();
        let taken = table(&["--accel", &accel, "--disk", text(&disk)]);
        assert_eq!(row(&made, "bytes"), row(&taken, "bytes"));
        assert_eq!(fs::metadata(&disk).unwrap().len(), image.len() as u64);
        fs::remove_file(&disk).unwrap();
    }
}

#[test]
fn what_cannot_be_packed_is_left_out_aloud() {
    let (_dir, folder) = folder();
    std::os::unix::fs::symlink("nothing", folder.join("a link")).unwrap();
    fs::write(folder.join("what?"), "x").unwrap();
    for accel in accels() {
        let output = quickstart(&["--accel", &accel, "--skip", text(&folder)]);
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{said}");
        assert!(said.contains("a link is a symbolic link"), "{said}");
        assert!(said.contains("what? has '?' in its name"), "{said}");
        let table = String::from_utf8(output.stdout).unwrap();
        assert_eq!(row(&table, "left out"), "2");
        assert_eq!(row(&table, "files"), "3");
    }
}

#[test]
fn more_vcpus_and_memory() {
    let (_dir, folder) = folder();
    for accel in accels() {
        let args = [
            "--accel",
            &accel,
            "--vcpus",
            "3",
            "--memory",
            "200M",
            text(&folder),
        ];
        assert_eq!(row(&table(&args), "files"), "3");
    }
}

#[test]
fn other_guests() {
    let (dir, folder) = folder();
    let same = dir.path().join("quickstart.elf");
    fs::write(&same, guest_images::QUICKSTART).unwrap();
    let hello = dir.path().join("hello.elf");
    fs::write(&hello, guest_images::FIRST_GUEST).unwrap();
    let junk = dir.path().join("junk.elf");
    fs::write(&junk, "not an ELF file").unwrap();
    for accel in accels() {
        let args = |guest| ["--accel", &accel, "--guest", text(guest), text(&folder)];
        assert_eq!(row(&table(&args(&same)), "files"), "3");
        let said = complaint(&args(&hello));
        assert!(said.contains("hello from a guest on"), "{said}");
        assert!(said.contains("ended without a report"), "{said}");
        assert!(complaint(&args(&junk)).contains("the guest is refused"));
    }
}

/// A volume whose directory leads nowhere: the guest says so, and the run fails.
#[test]
fn a_damaged_disk_is_reported() {
    let (dir, folder) = folder();
    let disk = dir.path().join("disk.img");
    let accel = accels().remove(0);
    table(&["--accel", &accel, "--disk", text(&disk), text(&folder)]);
    let mut image = fs::read(&disk).unwrap();
    // The boot sector of the volume, where the first partition starts.
    image[1 << 20..(1 << 20) + 512].fill(0);
    fs::write(&disk, image).unwrap();
    let said = complaint(&["--accel", &accel, "--disk", text(&disk)]);
    assert!(
        said.contains("is not a disk image with a FAT partition"),
        "{said}"
    );
}
