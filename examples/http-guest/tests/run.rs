//! The whole example, as its users run it, on every accel that there is.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(120);

/// Those that PV_ACCEL names, or all that work here.
fn accels() -> Vec<&'static str> {
    match std::env::var("PV_ACCEL").as_deref() {
        Ok("kvm") => vec!["kvm"],
        Ok("process") => vec!["process"],
        Ok("all") => vec!["kvm", "process"],
        _ => {
            let kvm = fs::OpenOptions::new()
                .read(true)
                .write(true)
                .open("/dev/kvm");
            if kvm.is_err() {
                // Past the test runner, which keeps what tests print.
                let _ = writeln!(
                    std::io::stderr(),
                    "\nSKIPPED: everything on kvm: /dev/kvm does not open"
                );
                return vec!["process"];
            }
            vec!["kvm", "process"]
        }
    }
}

fn command(scratch: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_http-guest"));
    command
        .args(arguments)
        .env("TMPDIR", scratch)
        .env_remove("PV_ACCEL")
        .stdin(Stdio::null());
    command
}

/// Runs it to its end, which is never far.
fn run(scratch: &Path, arguments: &[&str]) -> Output {
    let mut command = command(scratch, arguments);
    let child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = child.expect("it starts");
    // Both are read while it runs, lest it waits for us.
    let (out, err) = (collect(child.stdout.take()), collect(child.stderr.take()));
    let status = wait(&mut child);
    Output {
        status,
        stdout: out.join().expect("no panic"),
        stderr: err.join().expect("no panic"),
    }
}

fn collect(from: Option<impl Read + Send + 'static>) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        from.expect("piped")
            .read_to_end(&mut bytes)
            .expect("readable");
        bytes
    })
}

fn wait(child: &mut Child) -> std::process::ExitStatus {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait().expect("ours") {
            return status;
        }
        if start.elapsed() > LIMIT {
            child.kill().expect("ours");
            child.wait().expect("ours");
            panic!("it did not end");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Files of many lengths, around those at which something changes, and names that are no plain ones.
fn folder(at: &Path) {
    fs::create_dir_all(at.join("below/further")).expect("a folder");
    for length in [
        0, 1, 511, 1459, 1460, 32_768, 65_536, 262_144, 262_145, 1_500_000,
    ] {
        let bytes: Vec<u8> = (0..length).map(|i| (i * 31 + length) as u8).collect();
        fs::write(at.join(format!("{length}.bin")), bytes).expect("written");
    }
    for name in [
        "below/a name with spaces & 100%.txt",
        "below/further/ünïcode?.html",
    ] {
        fs::write(at.join(name.replace('?', "")), name).expect("written");
    }
}

#[test]
fn every_file_is_fetched_ten_thousand_times_without_an_error() {
    let scratch = tempfile::tempdir().expect("a folder");
    let site = scratch.path().join("site");
    folder(&site);
    let site = site.to_str().expect("a plain path");
    for accel in accels() {
        let arguments = ["--accel", accel, "--port", "0", "--requests", "10000", site];
        let output = run(scratch.path(), &arguments);
        let text = String::from_utf8_lossy(&output.stdout);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{accel}: {text}{errors}");
        let line = text
            .lines()
            .find(|line| line.starts_with("10000 requests, 12 files, "));
        let line = line.unwrap_or_else(|| panic!("{accel}: {text}{errors}"));
        assert!(line.contains(" 0 errors, "), "{line}");
        println!("{accel}: {line}");
    }
}

#[test]
fn two_guests_talk_over_the_switch() {
    let scratch = tempfile::tempdir().expect("a folder");
    for accel in accels() {
        let output = run(
            scratch.path(),
            &["--accel", accel, "--pair", "--seconds", "1"],
        );
        let text = String::from_utf8_lossy(&output.stdout);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{accel}: {text}{errors}");
        assert!(text.contains(" Gbit/s"), "{accel}: {text}{errors}");
        println!("{accel}: {}", text.trim());
    }
}

/// A client says what it likes, then Ctrl-C comes: everything that was started has ended, and what was
/// made is gone.
#[test]
fn ctrl_c_ends_everything() {
    for accel in accels() {
        let scratch = tempfile::tempdir().expect("a folder");
        let mut command = command(scratch.path(), &["--accel", accel, "--port", "0"]);
        let child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
        let mut child = child.expect("it starts");
        let mut url = String::new();
        let out = child.stdout.take().expect("piped");
        BufReader::new(out).read_line(&mut url).expect("a line");
        let address = url
            .trim()
            .trim_start_matches("http://")
            .trim_end_matches('/')
            .to_owned();
        for (request, status) in [
            ("GET / HTTP/1.0\r\n\r\n", "200"),
            ("HEAD / HTTP/1.0\r\n\r\n", "200"),
            ("GET /none HTTP/1.0\r\n\r\n", "404"),
            ("POST / HTTP/1.1\r\n\r\n", "405"),
            ("nonsense\r\n\r\n", "400"),
        ] {
            let mut stream = TcpStream::connect(&address).expect("it listens");
            stream.set_read_timeout(Some(LIMIT)).expect("a limit");
            stream.write_all(request.as_bytes()).expect("taken");
            let mut answer = String::new();
            stream
                .read_to_string(&mut answer)
                .expect("an answer and an end");
            assert!(
                answer.starts_with(&format!("HTTP/1.1 {status} ")),
                "{accel}: {answer}"
            );
        }
        // One that is in the middle of something.
        let mut open = TcpStream::connect(&address).expect("it listens");
        open.write_all(b"GET / HT").expect("taken");
        let interrupt = Command::new("kill")
            .args(["-INT", &child.id().to_string()])
            .status();
        assert!(interrupt.expect("kill is there").success());
        assert!(!wait(&mut child).success(), "it ends as interrupted");
        let left: Vec<_> = fs::read_dir(scratch.path()).expect("a folder").collect();
        assert!(left.is_empty(), "{accel}: {left:?}");
        assert_eq!(processes_that_name(scratch.path()), Vec::<String>::new());
    }
}

/// However the program ends, its backends end with it, the one of both guests among them.
#[test]
fn nothing_outlives_a_program_that_is_killed() {
    for accel in accels() {
        for mode in [&["--pair", "--seconds", "60"][..], &["--port", "0"]] {
            let scratch = tempfile::tempdir().expect("a folder");
            let mut command = command(scratch.path(), &["--accel", accel]);
            command.args(mode).stdout(Stdio::null());
            let child = command.stderr(Stdio::piped()).spawn();
            let mut child = child.expect("it starts");
            // All that it starts hold this.
            let said = collect(child.stderr.take());
            let start = Instant::now();
            let started = loop {
                let found = naming(scratch.path());
                if found.iter().any(|line| line.starts_with("pv-netd ")) {
                    break true;
                }
                if start.elapsed() > LIMIT {
                    break false;
                }
                std::thread::sleep(Duration::from_millis(10));
            };
            child.kill().expect("ours");
            child.wait().expect("ours");
            assert!(started, "{accel} {mode:?}");
            while !said.is_finished() {
                assert!(start.elapsed() < LIMIT, "{accel} {mode:?}: one is left");
                std::thread::sleep(Duration::from_millis(10));
            }
            said.join().expect("no panic");
            assert_eq!(processes_that_name(scratch.path()), Vec::<String>::new());
        }
    }
}

/// Command lines of processes that name this folder; one that is just ending gets a moment.
fn processes_that_name(folder: &Path) -> Vec<String> {
    let start = Instant::now();
    loop {
        let found = naming(folder);
        if found.is_empty() || start.elapsed() > Duration::from_secs(10) {
            return found;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Those there are now.
fn naming(folder: &Path) -> Vec<String> {
    let name = folder.to_str().expect("a plain path");
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").expect("proc").flatten() {
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if line.contains(name) {
            found.push(line);
        }
    }
    found
}

#[test]
fn what_cannot_work_gets_a_sentence() {
    let scratch = tempfile::tempdir().expect("a folder");
    let empty = scratch.path().join("empty");
    fs::create_dir(&empty).expect("a folder");
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("an address").port().to_string();
    let empty = empty.to_str().expect("a plain path");
    for (arguments, says) in [
        (&["--port", &port][..], "is taken: give another with --port"),
        (&["--port", "0", empty], "holds no file to serve"),
        (&["--port", "0", "/nowhere"], "/nowhere"),
        (&["--port", "70000"], "70000"),
        (&["--requests", "0"], "--requests"),
        (&["--pair", "x"], "[FOLDER]"),
        (&["--frobnicate"], "--frobnicate"),
    ] {
        let output = run(scratch.path(), arguments);
        assert!(!output.status.success(), "{arguments:?}");
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(text.contains(says), "{arguments:?}: {text}");
        assert!(!text.contains("panicked"), "{arguments:?}: {text}");
        assert_eq!(text.lines().count(), 1, "{arguments:?}: {text}");
    }
}
