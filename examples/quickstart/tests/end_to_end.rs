//! The whole job, as a user runs it, on every accel that there is.
//!
//! `PV_ACCEL` chooses the accels, as in all tests: `kvm`, `process` or `all` runs these and fails where
//! one does not work; unset, every one that works here is run.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use vmm_core::Accel;

/// Far beyond what the slowest of these takes.
const LIMIT: Duration = Duration::from_secs(120);

/// Says once what is left out, past the test runner, which keeps what tests print.
fn skipped(accel: Accel, why: &anyhow::Error) {
    static SAID: Mutex<Vec<Accel>> = Mutex::new(Vec::new());
    let mut said = SAID.lock().unwrap();
    if !said.contains(&accel) {
        said.push(accel);
        let _ = writeln!(
            std::io::stderr(),
            "\nSKIPPED: everything on {accel}: {why:#}"
        );
    }
}

fn accels() -> Vec<String> {
    let both = [Accel::Kvm, Accel::Process];
    let works = |accel: &Accel| match accel.check() {
        Ok(()) => true,
        Err(why) => {
            skipped(*accel, &why.into());
            false
        }
    };
    match std::env::var("PV_ACCEL").as_deref() {
        Err(_) | Ok("") => both
            .iter()
            .filter(|a| works(a))
            .map(Accel::to_string)
            .collect(),
        Ok("all") => both.iter().map(Accel::to_string).collect(),
        Ok(name) => vec![name.to_owned()],
    }
}

/// Runs to the end or, past the limit, to a failure: never hangs.
fn quickstart(args: &[&str]) -> Output {
    let mut command = command(args);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    finish(command.spawn().unwrap())
}

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_quickstart"));
    command
        .args(args)
        .args(["--timeout", "60"])
        .env_remove("PV_ACCEL");
    command.stdin(Stdio::null());
    command
}

fn finish(mut child: Child) -> Output {
    wait_for("the end", || child.try_wait().unwrap().is_some());
    child.wait_with_output().unwrap()
}

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < LIMIT, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
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
fn one_guest_on_every_accel_with_every_backend() {
    let (_dir, folder) = folder();
    let mut guests = Vec::new();
    for accel in accels() {
        for backend in ["process", "in-process"] {
            let table = table(&["--accel", &accel, "--backend", backend, text(&folder)]);
            assert_eq!(row(&table, "accel"), accel);
            assert_eq!(row(&table, "files"), "3");
            assert_eq!(row(&table, "bytes"), "6000001");
            assert!(row(&table, "hashed at").ends_with("MB/s"), "{table}");
            assert!(
                row(&table, "checked").starts_with("3 files and the manifest"),
                "{table}"
            );
            guests.push(row(&table, "guest ELF sha256").to_owned());
        }
    }
    guests.dedup();
    assert_eq!(guests.len(), 1, "not the same guest everywhere");
}

/// Where the command line says nothing, the variable does; "all" is for tests alone.
#[test]
fn the_variable_chooses_the_accel() {
    let (_dir, folder) = folder();
    for accel in accels() {
        let child = command(&[text(&folder)])
            .env("PV_ACCEL", &accel)
            .stdout(Stdio::piped())
            .spawn();
        let output = finish(child.unwrap());
        assert!(output.status.success(), "{:?}", output.status);
        let table = String::from_utf8(output.stdout).unwrap();
        assert_eq!(row(&table, "accel"), format!("{accel} (as PV_ACCEL says)"));
    }
    let child = command(&[text(&folder)])
        .env("PV_ACCEL", "all")
        .stderr(Stdio::piped())
        .spawn();
    let output = finish(child.unwrap());
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        said.starts_with("quickstart: PV_ACCEL is \"all\": "),
        "{said}"
    );
    assert_eq!(said.lines().count(), 1, "{said}");
}

#[test]
fn a_disk_is_kept_and_taken_again() {
    let (dir, folder) = folder();
    let disk = dir.path().join("disk.img");
    for accel in accels() {
        let made = table(&["--accel", &accel, "--disk", text(&disk), text(&folder)]);
        let image = fs::read(&disk).unwrap();
        let mistyped = dir.path().join("dsik.img");
        let said = complaint(&["--accel", &accel, "--disk", text(&mistyped)]);
        assert!(said.contains("there is no disk image"), "{said}");
        assert!(!mistyped.exists());
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

/// A folder that takes long to pack: one file of this many bytes, without blocks.
fn slow_folder(bytes: u64) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("folder");
    fs::create_dir(&folder).unwrap();
    let file = File::create(folder.join("sparse")).unwrap();
    file.set_len(bytes).unwrap();
    (dir, folder)
}

fn signal(child: &Child, name: &str) {
    let mut kill = Command::new("kill");
    let status = kill.args(["-s", name, &child.id().to_string()]).status();
    assert!(status.unwrap().success());
}

fn is_empty(folder: &Path) -> bool {
    fs::read_dir(folder).unwrap().next().is_none()
}

/// Whether packing has begun: the child has a file of a disk's size open.
fn is_packing(child: &Child) -> bool {
    let Ok(entries) = fs::read_dir(format!("/proc/{}/fd", child.id())) else {
        return false;
    };
    let mut files = entries.filter_map(|entry| fs::metadata(entry.ok()?.path()).ok());
    files.any(|file| file.is_file() && file.len() > 32 << 20)
}

#[test]
fn an_interrupted_run_leaves_no_image() {
    let (dir, folder) = slow_folder(3 << 30);
    let disk = dir.path().join("disk.img");
    let partial = dir.path().join("disk.img.partial");
    for (name, number) in [("INT", 2), ("TERM", 15), ("HUP", 1)] {
        let mut command = command(&["--disk", text(&disk), text(&folder)]);
        let child = command.stderr(Stdio::piped()).spawn().unwrap();
        wait_for("half an image", || is_packing(&child));
        assert!(!disk.exists());
        signal(&child, name);
        let output = finish(child);
        assert_eq!(output.status.signal(), Some(number), "{:?}", output.status);
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.ends_with("quickstart: interrupted\n"), "{said}");
        assert!(!disk.exists() && !partial.exists());
    }

    // What nobody can clean up after is replaced by the next run.
    let child = command(&["--disk", text(&disk), text(&folder)])
        .spawn()
        .unwrap();
    wait_for("half an image", || is_packing(&child));
    signal(&child, "KILL");
    finish(child);
    assert!(partial.exists() && !disk.exists());
    fs::remove_dir_all(&folder).unwrap();
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("file"), "x").unwrap();
    let accel = accels().remove(0);
    let table = table(&["--accel", &accel, "--disk", text(&disk), text(&folder)]);
    assert_eq!(row(&table, "bytes"), "1");
    assert!(disk.exists() && !partial.exists());
}

#[test]
fn scratch_is_gone_however_the_run_ends() {
    let (_dir, folder) = slow_folder(3 << 30);
    let scratch = tempfile::tempdir().unwrap();
    for name in ["INT", "KILL"] {
        let mut command = command(&[text(&folder)]);
        let child = command.env("TMPDIR", scratch.path()).spawn().unwrap();
        wait_for("half an image", || is_packing(&child));
        signal(&child, name);
        finish(child);
        assert!(is_empty(scratch.path()), "{name}");
    }
}

/// The last run's manifest does not pass for that of a guest that writes none.
#[test]
fn the_last_manifest_does_not_count() {
    let (dir, folder) = folder();
    let disk = dir.path().join("disk.img");
    let hello = dir.path().join("hello.elf");
    fs::write(&hello, guest_images::FIRST_GUEST).unwrap();
    for accel in accels() {
        table(&["--accel", &accel, "--disk", text(&disk), text(&folder)]);
        let volume = quickstart::image::open(&disk, false).unwrap();
        let packed = quickstart::verify::walk(&volume).unwrap();
        drop(volume);
        quickstart::verify::verify(&disk, &packed).unwrap();
        let hello = text(&hello);
        complaint(&["--accel", &accel, "--guest", hello, "--disk", text(&disk)]);
        let error = quickstart::verify::verify(&disk, &packed).unwrap_err();
        let error = format!("{error:#}");
        assert!(error.contains("left no readable manifest"), "{error}");
        table(&["--accel", &accel, "--disk", text(&disk)]);
        fs::remove_file(&disk).unwrap();
    }
}

#[test]
fn output_that_nobody_takes() {
    let (_dir, folder) = folder();
    let full = || File::options().write(true).open("/dev/full").unwrap();
    for accel in accels() {
        let command = || command(&["--accel", &accel, text(&folder)]);
        let (reader, closed) = std::io::pipe().unwrap();
        drop(reader);
        for stdout in [Stdio::from(full()), Stdio::from(closed)] {
            let child = command().stdout(stdout).stderr(Stdio::piped()).spawn();
            let output = finish(child.unwrap());
            assert_eq!(output.status.code(), Some(1));
            let said = String::from_utf8(output.stderr).unwrap();
            assert!(said.contains("\nquickstart: cannot print"), "{said}");
            assert!(!said.contains("panicked"), "{said}");
        }
        let child = command().stdout(Stdio::piped()).stderr(full()).spawn();
        let output = finish(child.unwrap());
        assert!(output.status.success(), "{:?}", output.status);
        let table = String::from_utf8(output.stdout).unwrap();
        assert_eq!(row(&table, "files"), "3");
    }
}
