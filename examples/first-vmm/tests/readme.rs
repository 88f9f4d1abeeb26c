//! The README's code is what is compiled here, is as short as it says, and runs.
//!
//! `PV_ACCEL` chooses the accels, as in all tests: `kvm`, `process` or `all` runs these and fails
//! where one does not work; unset, every one that works here is run.

use std::io::{self, Read, Write};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};
use vmm_core::Accel;

const README: &str = include_str!("../../../README.md");
const VMM: &str = include_str!("../src/main.rs");
const GUEST: &str = include_str!("../../../guests/first-guest/src/main.rs");

/// Longest that one run may take, on the slowest of the hosts that this is tested on.
const RUN_LIMIT: Duration = Duration::from_secs(60);

/// Lines of code: neither blank nor nothing but a comment.
fn lines_of_code(text: &str) -> usize {
    let is_code = |line: &&str| !line.is_empty() && !line.starts_with("//");
    text.lines().map(str::trim).filter(is_code).count()
}

/// The bodies of the README's Rust code blocks.
fn rust_blocks() -> Vec<&'static str> {
    let opened = README.split("```rust\n").skip(1);
    opened
        .map(|rest| rest.split_once("```").expect("the block is closed").0)
        .collect()
}

#[test]
fn the_readme_shows_the_files_that_are_compiled() {
    assert_eq!(rust_blocks(), [VMM, GUEST]);
}

#[test]
fn the_readme_keeps_its_word_on_length() {
    assert!(README.contains("20 lines") && README.contains("15 lines"));
    assert!(lines_of_code(VMM) <= 20, "{}", lines_of_code(VMM));
    assert!(lines_of_code(GUEST) <= 15, "{}", lines_of_code(GUEST));
    assert_eq!(lines_of_code("a\n\n  // b\n//! c\n  d // e\n"), 2);
}

/// Says once what is left out, past the test runner, which keeps what tests print.
fn skipped(accel: Accel, why: &anyhow::Error) {
    static SAID: Mutex<Vec<Accel>> = Mutex::new(Vec::new());
    let mut said = SAID.lock().expect("nobody panics with it");
    if !said.contains(&accel) {
        said.push(accel);
        let _ = writeln!(io::stderr(), "\nSKIPPED: everything on {accel}: {why:#}");
    }
}

/// The accels to run on; a forced one is never left out.
fn accels() -> Vec<Accel> {
    let both = [Accel::Kvm, Accel::Process];
    match std::env::var("PV_ACCEL").as_deref() {
        Err(_) | Ok("") => both
            .into_iter()
            .filter(|accel| {
                let works = accel.check().map_err(anyhow::Error::new);
                if let Err(why) = &works {
                    skipped(*accel, why);
                }
                works.is_ok()
            })
            .collect(),
        Ok("all") => both.into(),
        Ok(name) => vec![Accel::from_name(name).expect("PV_ACCEL names an accel")],
    }
}

/// Runs the VMM and returns how it ended and everything that it said.
fn first_vmm(accel: &str, disk: Option<&Path>) -> (ExitStatus, String) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_first-vmm"))
        .args(disk)
        .env("PV_ACCEL", accel)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the VMM starts");
    let deadline = Instant::now() + RUN_LIMIT;
    let status = loop {
        if let Some(status) = child.try_wait().expect("the VMM is our child") {
            break status;
        }
        if Instant::now() >= deadline {
            child.kill().expect("the VMM is our child");
            child.wait().expect("the VMM is our child");
            panic!("the VMM has not ended within {RUN_LIMIT:?}");
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    // A few lines: they fit the pipes.
    let mut said = String::new();
    let stdout = child.stdout.take().expect("piped");
    let stderr = child.stderr.take().expect("piped");
    let read = (stdout.chain(stderr)).read_to_string(&mut said);
    read.expect("the VMM speaks UTF-8");
    (status, said)
}

#[test]
fn it_runs_with_a_disk() {
    for accel in accels() {
        let mut disk = tempfile::NamedTempFile::new().expect("a temporary file");
        disk.write_all(b"Paravane").expect("written");
        disk.as_file().set_len(64 << 10).expect("64 KiB");
        let (status, said) = first_vmm(accel.name(), Some(disk.path()));
        assert!(status.success(), "{accel}: {status}\n{said}");
        for line in [
            &format!("Info: hello from a guest on {accel}\n"),
            // "Paravane" in ASCII.
            "Info: 128 sectors, the first begins [50, 61, 72, 61, 76, 61, 6e, 65]\n",
            "the guest exited with code 0\n",
        ] {
            assert!(said.contains(line), "{accel}: {line:?} is missing\n{said}");
        }
    }
}

#[test]
fn it_runs_without_a_disk() {
    for accel in accels() {
        let (status, said) = first_vmm(accel.name(), None);
        let wanted = format!("Info: hello from a guest on {accel}\nthe guest exited with code 0\n");
        assert!(status.success(), "{accel}: {status}\n{said}");
        assert_eq!(said, wanted, "{accel}");
    }
}

#[test]
fn what_cannot_work_is_said() {
    let (status, said) = first_vmm("abacus", None);
    assert!(!status.success());
    assert!(
        said.contains("Error: no accel is called \"abacus\""),
        "{said}"
    );
    let missing = Path::new("/nonexistent/disk.img");
    for accel in accels() {
        let (status, said) = first_vmm(accel.name(), Some(missing));
        assert!(!status.success(), "{accel}");
        assert!(said.contains("cannot open the disk image"), "{said}");
    }
}
