//! Starting a backend process with one end of a socket pair, reaching one by its socket, and ending
//! it.
#![allow(unsafe_code)]
// UNSAFETY: `pre_exec` runs between fork and exec; std has no non-blocking connect.

use crate::limits::BACKEND_DEATH;
use crate::pidfd;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Least number of the descriptor on which the backend finds its socket: it is none of stdio's.
const LEAST_FD: i32 = 3;
/// How long a backend may take to end by itself once its socket has been closed.
const GRACE: Duration = Duration::from_secs(2);

/// A supervised backend process; ended when dropped.
pub(super) struct BackendProcess(Option<Running>);

struct Running {
    child: Child,
    /// By which it is killed: where the embedder ignores SIGCHLD, or reaps what is not its own, the
    /// number is free as soon as the process is dead.
    pidfd: OwnedFd,
}

impl BackendProcess {
    /// Starts the command with `--fd N`; nothing else of this process reaches it but stdio.
    ///
    /// It dies with the calling thread, which therefore has to live as long as it shall.
    pub(super) fn start(mut command: Command) -> io::Result<(BackendProcess, UnixStream)> {
        let (ours, theirs) = UnixStream::pair()?;
        let theirs = above_stdio(theirs)?;
        // It keeps its number: any other one may be in use in the new process, by std.
        let fd = theirs.as_raw_fd();
        command.args(["--fd", &fd.to_string()]).stdin(Stdio::null());
        // SAFETY: getpid cannot fail.
        let parent = unsafe { libc::getpid() };
        // SAFETY: prctl, getppid, close_range and fcntl are async-signal-safe and touch no memory.
        unsafe {
            command.pre_exec(move || {
                if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) < 0 {
                    return Err(io::Error::last_os_error());
                }
                if libc::getppid() != parent {
                    return Err(io::Error::from_raw_os_error(libc::ESRCH));
                }
                let cloexec = libc::CLOSE_RANGE_CLOEXEC as libc::c_int;
                if libc::syscall(libc::SYS_close_range, LEAST_FD, u32::MAX, cloexec) < 0
                    || libc::fcntl(fd, libc::F_SETFD, 0) < 0
                {
                    return Err(io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let name = command.get_program().to_string_lossy().into_owned();
        let named = |e: io::Error| {
            io::Error::new(e.kind(), format!("cannot start the backend {name}: {e}"))
        };
        let mut child = command.spawn().map_err(named)?;
        drop(theirs);
        let pidfd = match pidfd::open(child.id()) {
            Ok(pidfd) => pidfd,
            Err(error) => {
                // It has only just begun, so the number is its own; and it ends without its socket.
                let _ = child.kill();
                let _ = child.wait();
                return Err(named(error));
            }
        };
        Ok((BackendProcess(Some(Running { child, pidfd })), ours))
    }

    pub(super) fn id(&self) -> u32 {
        self.0.as_ref().map_or(0, |running| running.child.id())
    }

    /// Kills it and waits a while; how it ended, or `None` if it has not yet.
    pub(super) fn kill(&mut self) -> Option<String> {
        let running = self.0.as_mut()?;
        // An error means that it is dead.
        let _ = pidfd::signal(&running.pidfd, libc::SIGKILL);
        pidfd::ends_within(&running.pidfd, BACKEND_DEATH).then(|| running.how())
    }

    /// How it ended by itself, if it does so in time.
    pub(super) fn has_ended(&mut self, limit: Duration) -> Option<String> {
        let running = self.0.as_mut()?;
        pidfd::ends_within(&running.pidfd, limit).then(|| running.how())
    }

    /// Gives it time to end by itself, and kills it otherwise.
    pub(super) fn finish(&mut self) {
        if let Some(running) = self.0.as_mut() {
            if pidfd::ends_within(&running.pidfd, GRACE) {
                running.how();
            } else {
                self.kill();
            }
        }
    }
}

impl Running {
    /// How it ended, which it has; nobody needs to wait for it then.
    fn how(&mut self) -> String {
        match self.child.try_wait() {
            Ok(Some(status)) => status.to_string(),
            // Somebody else has asked already.
            Ok(None) | Err(_) => "it ended".into(),
        }
    }
}

/// The same socket, with a number that stdio in a new process does not take.
fn above_stdio(socket: UnixStream) -> io::Result<OwnedFd> {
    let fd = socket.as_raw_fd();
    if fd >= LEAST_FD {
        return Ok(socket.into());
    }
    // SAFETY: plain values.
    let fd = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, LEAST_FD) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: fresh, owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
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
            && let Some(Running { mut child, .. }) = self.0.take()
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("/bin/sh");
        // What is appended becomes $1 and $2.
        command.args(["-c", script, "sh"]);
        command
    }

    #[test]
    fn a_backend_finds_its_socket_where_it_is_told_and_nothing_else() {
        // A descriptor of ours that is not close-on-exec stays here all the same.
        let (open, _other) = UnixStream::pair().unwrap();
        // SAFETY: our own descriptor.
        assert!(unsafe { libc::fcntl(open.as_raw_fd(), libc::F_SETFD, 0) } >= 0);
        let said = std::env::temp_dir().join(format!("pv-spawn-{}", std::process::id()));
        let mut command = shell("ls /proc/self/fd; echo $1 $2");
        command.stdout(std::fs::File::create(&said).unwrap());
        let (mut process, mut ours) = BackendProcess::start(command).unwrap();
        let limit = Some(Duration::from_secs(20));
        ours.set_read_timeout(limit).unwrap();
        assert_eq!(ours.read(&mut [0]).unwrap(), 0);
        process.finish();
        let text = std::fs::read_to_string(&said).unwrap();
        std::fs::remove_file(&said).unwrap();
        let words: Vec<&str> = text.split_whitespace().collect();
        let (own, told) = words.split_at(words.len() - 2);
        assert_eq!(told[0], "--fd");
        assert!(own.contains(&told[1]), "{text}");
        let known = ["0", "1", "2", told[1]];
        // `ls` itself has opened the folder.
        let strangers = own.iter().filter(|fd| !known.contains(fd)).count();
        assert_eq!(strangers, 1, "{text}");
        let error = BackendProcess::start(Command::new("/nonexistent")).err();
        assert!(error.unwrap().to_string().contains("/nonexistent"));
    }

    #[test]
    fn one_that_somebody_else_has_reaped_is_gone_and_nobody_else_is_killed() {
        let (mut process, _ours) = BackendProcess::start(shell("exit 3")).unwrap();
        let id = process.id();
        // SAFETY: a child of ours, and no status wanted.
        let reaped = unsafe { libc::waitpid(id as libc::pid_t, std::ptr::null_mut(), 0) };
        assert_eq!(reaped, id as libc::pid_t);
        // Now somebody else shall have its number, where the host can be asked for that.
        let mut stranger = (0..200).find_map(|_| {
            std::fs::write("/proc/sys/kernel/ns_last_pid", (id - 1).to_string()).ok()?;
            let mut child = Command::new("/bin/sleep").arg("60").spawn().ok()?;
            if child.id() == id {
                return Some(child);
            }
            child.kill().unwrap();
            child.wait().unwrap();
            None
        });
        assert_eq!(process.kill().as_deref(), Some("it ended"));
        drop(process);
        match &mut stranger {
            Some(child) => {
                assert!(child.try_wait().unwrap().is_none(), "a stranger was killed");
                child.kill().unwrap();
                child.wait().unwrap();
            }
            // Past the test runner, which keeps what tests print.
            None => {
                use std::io::Write;
                let _ = writeln!(
                    io::stderr(),
                    "\nSKIPPED: no other process got the number {id}"
                );
            }
        }
    }

    #[test]
    fn one_that_does_not_end_by_itself_is_killed() {
        let (mut process, _ours) = BackendProcess::start(shell("exec sleep 60")).unwrap();
        let how = process.kill().unwrap();
        assert!(how.contains("SIGKILL"), "{how}");
    }
}
