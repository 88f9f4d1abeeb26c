//! The program `pv-blkd` as a process, ended with its test whatever happens.
#![allow(unsafe_code, dead_code)]
// UNSAFETY: signals are sent to the child, and descriptors kept from it.

use super::{Disk, FEATURES, Frontend, TIMEOUT};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;

pub(crate) fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pv-blkd"));
    command.stdin(Stdio::null()).stderr(Stdio::piped());
    // Frontends of other tests have descriptors that a child would inherit.
    // SAFETY: close_range is async-signal-safe and takes no pointer.
    unsafe {
        command.pre_exec(|| {
            let on_exec = libc::CLOSE_RANGE_CLOEXEC as libc::c_int;
            match libc::syscall(libc::SYS_close_range, 3, u32::MAX, on_exec) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        })
    };
    command
}

pub(crate) struct Daemon(pub(crate) Child);

impl Daemon {
    pub(crate) fn start(command: &mut Command) -> Daemon {
        Daemon(command.stderr(Stdio::piped()).spawn().unwrap())
    }

    /// On this disk, with these arguments too.
    pub(crate) fn on(disk: &Disk, more: &[&str]) -> Daemon {
        Daemon::with(&mut program(), disk, more)
    }

    pub(crate) fn with(command: &mut Command, disk: &Disk, more: &[&str]) -> Daemon {
        command.arg("--socket-path").arg(&disk.socket);
        Daemon::start(command.arg("--blk-file").arg(&disk.image).args(more))
    }

    pub(crate) fn signal(&self, signal: libc::c_int) {
        let pid = libc::pid_t::try_from(self.0.id()).unwrap();
        // SAFETY: kill takes no pointer; the child has not been waited for.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
    }

    /// Waits for its end: the exit code and what it said.
    pub(crate) fn wait(mut self) -> (Option<i32>, String) {
        let deadline = Instant::now() + TIMEOUT;
        let status = loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "the daemon did not end");
            std::thread::sleep(Duration::from_millis(5));
        };
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

    /// Open descriptors.
    pub(crate) fn fds(&self) -> usize {
        let path = format!("/proc/{}/fd", self.0.id());
        std::fs::read_dir(path).unwrap().count()
    }

    /// A line of its status, as the kernel has it.
    pub(crate) fn field(&self, name: &str) -> String {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_once(':').unwrap().1.trim().to_owned()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A connection to a socket that somebody will listen on.
pub(crate) fn connect(path: &Path) -> UnixStream {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        if let Ok(stream) = UnixStream::connect(path) {
            stream.set_read_timeout(Some(TIMEOUT)).unwrap();
            return stream;
        }
        assert!(Instant::now() < deadline, "nobody listens");
        std::thread::sleep(Duration::from_millis(2));
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

/// A disk with statistics and control.
pub(crate) struct Managed {
    pub(crate) disk: Disk,
    pub(crate) daemon: Daemon,
    pub(crate) stats: PathBuf,
    pub(crate) control: PathBuf,
}

impl Managed {
    pub(crate) fn start(more: &[&str]) -> Managed {
        Managed::with(program(), more)
    }

    pub(crate) fn with(mut command: Command, more: &[&str]) -> Managed {
        let disk = Disk::new(4 * MIB);
        let (stats, control) = (disk.dir.path().join("stats"), disk.dir.path().join("ctl"));
        command.arg("--stats-socket").arg(&stats);
        command.arg("--control-socket").arg(&control);
        let daemon = Daemon::with(&mut command, &disk, more);
        Managed {
            disk,
            daemon,
            stats,
            control,
        }
    }

    pub(crate) fn frontend(&self) -> Frontend {
        Frontend::connect(&self.disk.socket, FEATURES, 1, 64, MIB as usize)
    }
}
