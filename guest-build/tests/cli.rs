//! `guest-build check` on input and output that is not what it should be.

use std::fs::{File, OpenOptions};
use std::process::{Command, Output, Stdio};

fn guest_build(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_guest-build"));
    command.args(args).stdin(Stdio::null());
    command
}

fn full() -> File {
    OpenOptions::new().write(true).open("/dev/full").unwrap()
}

fn complaint(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(said.lines().count(), 1, "{said}");
    said
}

#[test]
fn output_that_cannot_be_written_is_said() {
    let mut command = guest_build(&["check", "--help"]);
    let said = complaint(&command.stdout(full()).output().unwrap());
    assert!(said.contains("cannot write to standard output"), "{said}");
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = guest_build(&["--help"]);
    complaint(&command.stdout(writer).output().unwrap());
}

#[test]
fn a_complaint_that_cannot_be_written_leaves_the_code() {
    let mut command = guest_build(&["check", "/nonexistent"]);
    let status = command.stderr(full()).status().unwrap();
    assert_eq!(status.code(), Some(1));
}

#[test]
fn only_files_of_bearable_size_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let large = dir.path().join("large");
    let file = File::create(&large).unwrap();
    file.set_len((512 << 20) + 1).unwrap();
    for (path, why) in [
        ("/dev/zero", "is not a file"),
        (dir.path().to_str().unwrap(), "is not a file"),
        (large.to_str().unwrap(), "is larger than 512 MiB"),
    ] {
        let said = complaint(&guest_build(&["check", path]).output().unwrap());
        assert!(said.contains(why), "{path}: {said}");
    }
}
