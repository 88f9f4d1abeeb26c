//! A daemon as a process, ended with its test whatever happens, and what is asked of one over its
//! sockets, in `/proc` and in its manual.
#![allow(unsafe_code, dead_code)]
// UNSAFETY: signals are sent to the child, and descriptors and long files kept from it.

use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// For anything that a daemon does.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(20);

/// The program `pv-blkd`.
pub(crate) fn blkd() -> Command {
    program(env!("CARGO_BIN_EXE_pv-blkd"))
}

/// The program `pv-netd`.
pub(crate) fn netd() -> Command {
    program(env!("CARGO_BIN_EXE_pv-netd"))
}

fn program(path: &str) -> Command {
    let mut command = Command::new(path);
    command.stdin(Stdio::null()).stderr(Stdio::piped());
    // Frontends of other tests have descriptors that a child would inherit.
    // SAFETY: close_range is async-signal-safe and takes no pointer.
    unsafe {
        command.pre_exec(|| {
            let on_exec = libc::CLOSE_RANGE_CLOEXEC as libc::c_int;
            match libc::syscall(libc::SYS_close_range, 3, u32::MAX, on_exec) {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        })
    };
    command
}

/// Files may not be longer than this for the program.
pub(crate) fn limit_file_size(command: &mut Command, bytes: u64) {
    // SAFETY: setrlimit is async-signal-safe and gets a valid limit.
    unsafe {
        command.pre_exec(move || {
            let limit = libc::rlimit {
                rlim_cur: bytes,
                rlim_max: bytes,
            };
            match libc::setrlimit(libc::RLIMIT_FSIZE, &limit) {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        })
    };
}

pub(crate) struct Daemon(pub(crate) Child);

impl Daemon {
    pub(crate) fn start(command: &mut Command) -> Daemon {
        Daemon(command.stderr(Stdio::piped()).spawn().unwrap())
    }

    /// What it says is thrown away.
    pub(crate) fn quiet(command: &mut Command) -> Daemon {
        Daemon(command.stderr(Stdio::null()).spawn().unwrap())
    }

    pub(crate) fn signal(&self, signal: libc::c_int) {
        let pid = libc::pid_t::try_from(self.0.id()).unwrap();
        // SAFETY: kill takes no pointer; the child has not been waited for.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
    }

    /// SIGKILL, and gone.
    pub(crate) fn kill(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }

    /// How it ended, if it has.
    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        self.0.try_wait().unwrap()
    }

    /// Waits for its end: how it ended.
    pub(crate) fn wait_status(&mut self) -> ExitStatus {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            if let Some(status) = self.ended() {
                return status;
            }
            assert!(Instant::now() < deadline, "the daemon did not end");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits for its end: the exit code and what it said.
    pub(crate) fn wait(mut self) -> (Option<i32>, String) {
        let status = self.wait_status();
        let mut said = String::new();
        let mut stderr = self.0.stderr.take().unwrap();
        stderr.read_to_string(&mut said).unwrap();
        (status.code(), said)
    }

    /// The exit code and what it said, after SIGTERM.
    pub(crate) fn end(self) -> (Option<i32>, String) {
        self.signal(libc::SIGTERM);
        self.wait()
    }

    /// Connected to its socket, once it listens.
    pub(crate) fn connect(&mut self, socket: &Path) -> UnixStream {
        match self.connect_or_end(socket) {
            Ok(stream) => stream,
            Err(status) => panic!("the daemon ended: {status:?}"),
        }
    }

    /// Connected, or how it ended before that.
    pub(crate) fn connect_or_end(&mut self, socket: &Path) -> Result<UnixStream, ExitStatus> {
        dial(socket, || self.ended())
    }

    fn proc(&self, name: &str) -> PathBuf {
        format!("/proc/{}/{name}", self.0.id()).into()
    }

    /// Open descriptors.
    pub(crate) fn fds(&self) -> usize {
        std::fs::read_dir(self.proc("fd")).unwrap().count()
    }

    /// Waits until it has that many descriptors open.
    pub(crate) fn wait_for_fds(&self, wanted: usize) {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let fds = self.fds();
            if fds == wanted {
                return;
            }
            let late = Instant::now() >= deadline;
            assert!(!late, "{fds} descriptors instead of {wanted}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Mappings of shared files: memory tables and logs.
    pub(crate) fn shared_mappings(&self) -> usize {
        let maps = std::fs::read_to_string(self.proc("maps")).unwrap();
        maps.lines().filter(|line| line.contains("rw-s")).count()
    }

    /// A line of its status, as the kernel has it.
    pub(crate) fn field(&self, name: &str) -> String {
        let status = std::fs::read_to_string(self.proc("status")).unwrap();
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_once(':').unwrap().1.trim().to_owned()
    }

    /// A number of its status: `VmRSS` in KiB, `Threads`.
    pub(crate) fn number(&self, name: &str) -> u64 {
        let field = self.field(name);
        field.split_whitespace().next().unwrap().parse().unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A connection to a socket that somebody will listen on.
pub(crate) fn connect(path: &Path) -> UnixStream {
    dial(path, || None).unwrap()
}

/// Connected, or how the one ended who was to listen.
fn dial(
    path: &Path,
    mut ended: impl FnMut() -> Option<ExitStatus>,
) -> Result<UnixStream, ExitStatus> {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        if let Ok(stream) = UnixStream::connect(path) {
            stream.set_read_timeout(Some(TIMEOUT)).unwrap();
            stream.set_write_timeout(Some(TIMEOUT)).unwrap();
            return Ok(stream);
        }
        if let Some(status) = ended() {
            return Err(status);
        }
        assert!(Instant::now() < deadline, "nobody listens");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Status line and body.
pub(crate) fn http(path: &Path, method: &str, target: &str, body: &str) -> (String, String) {
    let mut stream = connect(path);
    let length = body.len();
    let request = format!("{method} {target} HTTP/1.0\r\nContent-Length: {length}\r\n\r\n{body}");
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.lines().next().unwrap().to_owned(), body.to_owned())
}

pub(crate) fn stats(path: &Path) -> serde_json::Value {
    let (status, body) = http(path, "GET", "/stats", "");
    assert_eq!(status, "HTTP/1.0 200 OK");
    serde_json::from_str(&body).unwrap()
}

/// Whether every option of the program's help is in its manual page.
pub(crate) fn manual_names_every_option(mut program: Command, page: &str) {
    let manual = Path::new(env!("CARGO_MANIFEST_DIR")).join("man").join(page);
    let manual = std::fs::read_to_string(manual).unwrap().replace("\\-", "-");
    let help = String::from_utf8(program.arg("--help").output().unwrap().stdout).unwrap();
    let words = |text: &str| -> BTreeSet<String> {
        text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '-'))
            .filter(|w| w.starts_with("--") && w.len() > 2)
            .map(str::to_owned)
            .collect()
    };
    let (said, written) = (words(&help), words(&manual));
    assert!(!said.is_empty(), "no options in {help:?}");
    let missing: Vec<_> = said.difference(&written).collect();
    assert!(missing.is_empty(), "not in the manual: {missing:?}");
}
