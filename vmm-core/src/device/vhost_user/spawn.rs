//! Starting a backend process with one end of a socket pair, reaching one by its socket, and ending
//! it.
#![allow(unsafe_code)]
// UNSAFETY: `pre_exec` runs between fork and exec; std has no non-blocking connect.

use crate::limits::BACKEND_DEATH;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The descriptor on which the backend finds its socket.
const BACKEND_FD: i32 = 3;
/// How long a backend may take to end by itself once its socket has been closed.
const GRACE: Duration = Duration::from_secs(2);

/// A supervised backend process; ended when dropped.
pub(super) struct BackendProcess(Option<Child>);

impl BackendProcess {
    /// Starts the command with `--fd 3`; nothing else of this process reaches it but stdio.
    ///
    /// It dies with the calling thread, which therefore has to live as long as it shall.
    pub(super) fn start(mut command: Command) -> io::Result<(BackendProcess, UnixStream)> {
        let (ours, theirs) = UnixStream::pair()?;
        let fd = theirs.as_raw_fd();
        command
            .args(["--fd", &BACKEND_FD.to_string()])
            .stdin(Stdio::null());
        // SAFETY: getpid cannot fail.
        let parent = unsafe { libc::getpid() };
        // SAFETY: prctl, getppid, close_range, dup2 and fcntl are async-signal-safe and touch no
        // memory.
        unsafe {
            command.pre_exec(move || {
                if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) < 0 {
                    return Err(io::Error::last_os_error());
                }
                if libc::getppid() != parent {
                    return Err(io::Error::from_raw_os_error(libc::ESRCH));
                }
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
        Ok((BackendProcess(Some(child)), ours))
    }

    pub(super) fn id(&self) -> u32 {
        self.0.as_ref().map_or(0, Child::id)
    }

    /// Kills it and waits a while; how it ended, or `None` if it has not yet.
    pub(super) fn kill(&mut self) -> Option<String> {
        let child = self.0.as_mut()?;
        let _ = child.kill();
        ended(BACKEND_DEATH, || how(child))
    }

    /// Gives it time to end by itself, and kills it otherwise.
    pub(super) fn finish(&mut self) {
        if let Some(child) = self.0.as_mut()
            && ended(GRACE, || how(child)).is_none()
        {
            self.kill();
        }
    }
}

/// How a child ended, if it has.
fn how(child: &mut Child) -> Option<String> {
    match child.try_wait() {
        Ok(status) => status.map(|s| s.to_string()),
        Err(error) => Some(error.to_string()),
    }
}

/// What `look` finds, if it does so in time.
pub(super) fn ended<T>(limit: Duration, mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + limit;
    loop {
        let found = look();
        if found.is_some() || Instant::now() >= deadline {
            return found;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

impl Drop for BackendProcess {
    fn drop(&mut self) {
        if self.kill().is_none()
            && let Some(mut child) = self.0.take()
        {
            // It cannot die now (a hung file system); somebody has to wait for it all the same.
            let reaper = std::thread::Builder::new().name("pv-reaper".into());
            if let Err(error) = reaper.spawn(move || child.wait()) {
                tracing::error!(%error, "a backend that does not die is left behind");
            }
        }
    }
}

/// Connects without waiting: a listener whose backlog is full gives `WouldBlock`.
pub(super) fn connect(path: &Path) -> io::Result<UnixStream> {
    // SAFETY: all zeroes is a valid sockaddr_un.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    let name = path.as_os_str().as_bytes();
    if name.len() >= address.sun_path.len() {
        let text = format!("the socket path {} is too long", path.display());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    for (to, from) in address.sun_path.iter_mut().zip(name) {
        *to = *from as libc::c_char;
    }
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: plain values.
    let fd = unsafe { libc::socket(libc::AF_UNIX, kind, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: fresh, owned by nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let len = size_of::<libc::sockaddr_un>() as libc::socklen_t;
    // SAFETY: the address is a whole sockaddr_un, terminated by a zero.
    if unsafe { libc::connect(fd, (&raw const address).cast(), len) } < 0 {
        let error = io::Error::last_os_error();
        return Err(io::Error::new(
            error.kind(),
            format!("connect to {}: {error}", path.display()),
        ));
    }
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}
