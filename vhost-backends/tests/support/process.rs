//! `pv-blkd` as a process, in its sandbox, ended with the test.
#![allow(dead_code)]

use std::ffi::OsStr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// For anything that a daemon does.
const LIMIT: Duration = Duration::from_secs(20);

pub(crate) struct Process {
    child: Child,
    socket: PathBuf,
}

impl Process {
    /// On this socket, with these arguments; what it says is thrown away.
    pub(crate) fn start<A: AsRef<OsStr>>(socket: &Path, arguments: &[A]) -> Process {
        Process::start_with(socket, arguments, &[])
    }

    /// The same, with variables.
    pub(crate) fn start_with<A: AsRef<OsStr>>(
        socket: &Path,
        arguments: &[A],
        variables: &[(&str, &str)],
    ) -> Process {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pv-blkd"));
        command.stdin(Stdio::null()).stderr(Stdio::null());
        command.args(arguments).arg("--socket-path").arg(socket);
        command.envs(variables.iter().copied());
        Process {
            child: command.spawn().unwrap(),
            socket: socket.to_owned(),
        }
    }

    /// Connected, once it listens.
    pub(crate) fn connect(&mut self) -> UnixStream {
        match self.connect_or_end() {
            Ok(stream) => stream,
            Err(status) => panic!("the daemon ended: {status:?}"),
        }
    }

    /// Connected, or how it ended before that.
    pub(crate) fn connect_or_end(&mut self) -> Result<UnixStream, ExitStatus> {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Ok(stream) = UnixStream::connect(&self.socket) {
                return Ok(stream);
            }
            if let Some(status) = self.ended() {
                return Err(status);
            }
            assert!(Instant::now() < deadline, "nobody listens");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// How it ended, if it has.
    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// Waits for its end.
    pub(crate) fn end(&mut self) -> ExitStatus {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(status) = self.ended() {
                return status;
            }
            assert!(Instant::now() < deadline, "the daemon does not end");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// SIGKILL, and gone.
    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    fn proc(&self, name: &str) -> PathBuf {
        format!("/proc/{}/{name}", self.child.id()).into()
    }

    /// Open descriptors.
    pub(crate) fn fds(&self) -> usize {
        std::fs::read_dir(self.proc("fd")).unwrap().count()
    }

    /// Mappings of shared files: memory tables and logs.
    pub(crate) fn shared_mappings(&self) -> usize {
        let maps = std::fs::read_to_string(self.proc("maps")).unwrap();
        maps.lines().filter(|line| line.contains("rw-s")).count()
    }

    /// A number of `/proc/PID/status`: `VmRSS:` in KiB, `Threads:`.
    pub(crate) fn status(&self, field: &str) -> u64 {
        let status = std::fs::read_to_string(self.proc("status")).unwrap();
        let line = status.lines().find(|line| line.starts_with(field)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}
