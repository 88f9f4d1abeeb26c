//! Starting a backend process with one end of a socket pair, and ending it.
#![allow(unsafe_code)]
// UNSAFETY: `pre_exec` runs between fork and exec; only async-signal-safe calls are made there.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The descriptor on which the backend finds its socket.
const BACKEND_FD: i32 = 3;
/// How long a backend may take to end by itself once its socket has been closed.
const GRACE: Duration = Duration::from_secs(2);

/// A supervised backend process; ended, and waited for, when dropped.
pub(super) struct BackendProcess(Child);

impl BackendProcess {
    /// Starts the command with `--fd 3`; nothing else of this process reaches it but stdio.
    pub(super) fn start(mut command: Command) -> io::Result<(BackendProcess, UnixStream)> {
        let (ours, theirs) = UnixStream::pair()?;
        let fd = theirs.as_raw_fd();
        command
            .args(["--fd", &BACKEND_FD.to_string()])
            .stdin(Stdio::null());
        // SAFETY: close_range, dup2 and fcntl are async-signal-safe and touch no memory.
        unsafe {
            command.pre_exec(move || {
                let cloexec = libc::CLOSE_RANGE_CLOEXEC as libc::c_int;
                if libc::syscall(libc::SYS_close_range, BACKEND_FD, u32::MAX, cloexec) < 0 {
                    return Err(io::Error::last_os_error());
                }
                let moved = if fd == BACKEND_FD {
                    libc::fcntl(fd, libc::F_SETFD, 0)
                } else {
                    libc::dup2(fd, BACKEND_FD)
                };
                if moved < 0 {
                    Err(io::Error::last_os_error())
                } else {
                    Ok(())
                }
            });
        }
        let name = command.get_program().to_string_lossy().into_owned();
        let child = command.spawn().map_err(|e| {
            io::Error::new(e.kind(), format!("cannot start the backend {name}: {e}"))
        })?;
        drop(theirs);
        Ok((BackendProcess(child), ours))
    }

    pub(super) fn id(&self) -> u32 {
        self.0.id()
    }

    /// Ends it at once; it is known dead when this returns.
    pub(super) fn kill(&mut self) -> String {
        let _ = self.0.kill();
        self.0
            .wait()
            .map_or_else(|e| e.to_string(), |status| status.to_string())
    }

    /// Gives it time to end by itself.
    pub(super) fn finish(&mut self) {
        let deadline = Instant::now() + GRACE;
        while Instant::now() < deadline {
            match self.0.try_wait() {
                Ok(None) => std::thread::sleep(Duration::from_millis(2)),
                _ => return,
            }
        }
        self.kill();
    }
}

impl Drop for BackendProcess {
    fn drop(&mut self) {
        self.kill();
    }
}
