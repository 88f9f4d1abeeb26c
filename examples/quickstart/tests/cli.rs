//! Bad arguments and missing files: one sentence, and a code that is not zero.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Output};

fn quickstart(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_quickstart"));
    command
        .args(args)
        .env("NO_COLOR", "1")
        .env_remove("PV_ACCEL");
    command.output().unwrap()
}

/// The complaint, which is on standard error and leaves standard output empty.
fn complaint(args: &[&str]) -> String {
    let output = quickstart(args);
    assert!(!output.status.success(), "{args:?}");
    assert!(output.status.code().is_some(), "{args:?} ended by a signal");
    assert!(output.stdout.is_empty(), "{args:?}");
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        !said.contains("panicked") && !said.contains("RUST_BACKTRACE"),
        "{said}"
    );
    // One line and nothing else to read.
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.starts_with("quickstart: "), "{said}");
    said
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn help_tells_every_option() {
    let output = quickstart(&["--help"]);
    assert!(output.status.success());
    let help = String::from_utf8(output.stdout).unwrap();
    let options = [
        "--accel",
        "--backend",
        "--disk",
        "--vcpus",
        "--memory",
        "--guest",
        "--skip",
        "--timeout",
    ];
    for option in options {
        assert!(help.contains(option), "{option}: {help}");
    }
    assert!(help.contains("Examples:"), "{help}");
}

#[test]
fn arguments() {
    assert!(complaint(&["--accel", "xen"]).contains("possible values: auto, kvm, process"));
    assert!(complaint(&["--backend", "thread"]).contains("possible values: process, in-process"));
    assert!(complaint(&["--vcpus", "0"]).contains("1..=64"));
    assert!(complaint(&["--memory", "1M"]).contains("less than 64 MiB"));
    assert!(complaint(&["--memory", "1T"]).contains("`1T` is more than 60 GiB"));
    assert!(complaint(&["--memory", "lots"]).contains("write it as 64M or 1G"));
    assert!(complaint(&["--frobnicate"]).contains("--help"));
}

#[test]
fn folders() {
    let dir = tempfile::tempdir().unwrap();
    let said = complaint(&["/nonexistent"]);
    assert!(
        said.contains("cannot find the folder /nonexistent"),
        "{said}"
    );
    let said = complaint(&[text(dir.path())]);
    assert!(said.contains("holds no file to pack"), "{said}");
    let file = dir.path().join("file");
    fs::write(&file, "x").unwrap();
    let said = complaint(&[text(&file)]);
    assert!(said.contains("is not a folder"), "{said}");
    std::os::unix::fs::symlink("file", dir.path().join("link")).unwrap();
    let said = complaint(&[text(dir.path())]);
    assert!(
        said.contains("link is a symbolic link") && said.contains("--skip"),
        "{said}"
    );
}

#[test]
fn guests_and_disks() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("folder");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("file"), "x").unwrap();
    let said = complaint(&["--guest", "/nonexistent.elf", text(&folder)]);
    assert!(
        said.contains("cannot read the guest /nonexistent.elf"),
        "{said}"
    );

    let inside = folder.join("disk.img");
    let said = complaint(&["--disk", text(&inside), text(&folder)]);
    assert!(said.contains("lies in the folder itself"), "{said}");
    let nowhere = dir.path().join("no/such/place.img");
    let said = complaint(&["--disk", text(&nowhere), text(&folder)]);
    // By the name that was given, not by that which an unfinished image has.
    let named = format!("cannot create {}: ", text(&nowhere));
    assert!(said.contains(&named), "{said}");
    let said = complaint(&["--disk", text(&nowhere)]);
    assert!(said.contains("there is no disk image"), "{said}");

    let junk = dir.path().join("junk.img");
    fs::write(&junk, vec![7; 4096]).unwrap();
    let said = complaint(&["--disk", text(&junk), text(&folder)]);
    assert!(said.contains("exists: remove it"), "{said}");
    let said = complaint(&["--disk", text(&junk)]);
    assert!(
        said.contains("is not a disk image with a FAT partition"),
        "{said}"
    );
    let said = complaint(&["--disk", text(dir.path())]);
    assert!(said.contains("is not a file"), "{said}");
    assert_eq!(fs::read(&junk).unwrap(), vec![7; 4096]);
}

#[test]
fn guests_that_have_no_end_are_not_read() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "x").unwrap();
    let large = dir.path().join("large");
    File::create(&large).unwrap().set_len(1 << 40).unwrap();
    for (guest, why) in [
        ("/dev/zero", "/dev/zero is not a regular file"),
        (text(dir.path()), "is not a regular file"),
        (text(&large), "at most"),
    ] {
        let said = complaint(&["--guest", guest, text(dir.path())]);
        assert!(said.contains("the guest is refused"), "{said}");
        assert!(said.contains(why), "{said}");
    }
}

fn full() -> File {
    File::options().write(true).open("/dev/full").unwrap()
}

#[test]
fn output_that_nobody_takes() {
    let quickstart = || Command::new(env!("CARGO_BIN_EXE_quickstart"));
    let output = quickstart().arg("--help").stdout(full()).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.starts_with("quickstart: cannot print"), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    for (arg, code) in [("/nonexistent", 1), ("--frobnicate", 2)] {
        let status = quickstart().arg(arg).stderr(full()).status().unwrap();
        assert_eq!(status.code(), Some(code), "{arg}");
    }
}
