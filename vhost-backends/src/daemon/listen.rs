//! Where the frontend comes from: a path, or an inherited socket.
#![allow(unsafe_code)]
// UNSAFETY: a descriptor number from the command line becomes an owned descriptor; umask.

use super::options::SocketArgs;
use crate::dial::SocketAddress;
use crate::folder::{FolderLock, folder_of};
use crate::limits::MAX_PASSED;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// What to serve on.
#[derive(Debug)]
pub(super) enum Socket {
    /// One connection after the other.
    Listening(UnixListener, Option<SocketPath>),
    /// Only this one.
    Connected(UnixStream),
    /// To be taken over from another process; its file, if it was named.
    Awaited(Option<SocketPath>),
}

/// A socket file that this process made.
#[derive(Clone, Debug)]
pub(super) struct SocketPath {
    path: PathBuf,
    identity: (u64, u64),
}

impl SocketPath {
    /// Device and inode.
    pub(super) fn identity(&self) -> (u64, u64) {
        self.identity
    }

    pub(super) fn folder(&self) -> &Path {
        folder_of(&self.path)
    }

    /// Removes the file, unless it is another one by now. While somebody still listens on it, no
    /// other program takes it for a stale one, and none has its inode.
    pub(super) fn remove(&self) {
        if identity(&self.path).is_ok_and(|now| now == self.identity) {
            // Gone already is as good.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// First descriptor that systemd passes (sd_listen_fds(3)).
const LISTEN_FDS_START: RawFd = 3;

/// Sockets that the service manager opened for this process, and their names. Those that no disk
/// takes stay open, unused.
#[derive(Debug, Default)]
struct Passed {
    fds: std::collections::VecDeque<(RawFd, String)>,
}

impl Passed {
    /// As `LISTEN_FDS`, `LISTEN_PID` and `LISTEN_FDNAMES` say.
    fn from_environment() -> Result<Passed, String> {
        let text = |name| std::env::var(name).unwrap_or_default();
        // Meant for another process: one that started this one without cleaning up.
        if text("LISTEN_PID").parse() != Ok(std::process::id()) {
            return Ok(Passed::default());
        }
        let count = text("LISTEN_FDS");
        let count: RawFd = count
            .parse()
            .ok()
            .filter(|count| (0..=MAX_PASSED).contains(count))
            .ok_or(format!("LISTEN_FDS is {count:?}, not 0 to {MAX_PASSED}"))?;
        let names = text("LISTEN_FDNAMES");
        let mut names = names.split(':');
        let fds = (LISTEN_FDS_START..LISTEN_FDS_START + count)
            .map(|fd| (fd, names.next().unwrap_or_default().to_owned()))
            .collect();
        Ok(Passed { fds })
    }

    /// The one with this name, or the first that has none of `names`.
    fn take(&mut self, name: &str, names: &[String]) -> Option<RawFd> {
        let mut fds = self.fds.iter();
        let named = fds.position(|(_, passed)| passed == name);
        let mut fds = self.fds.iter();
        let any = || fds.position(|(_, passed)| !names.contains(passed));
        self.fds.remove(named.or_else(any)?).map(|(fd, _)| fd)
    }
}

/// The sockets of a daemon, as they are opened one after the other.
#[derive(Debug)]
pub(crate) struct Sockets {
    passed: Passed,
    /// The names of all devices.
    names: Vec<String>,
    /// Inherited descriptors that have an owner.
    claimed: Vec<RawFd>,
    opened: Vec<Socket>,
    made: Vec<SocketPath>,
    taking_over: bool,
}

impl Sockets {
    /// None yet, beside those that a service manager passed. The error is a sentence.
    pub(super) fn from_environment(taking_over: bool) -> Result<Sockets, String> {
        Ok(Sockets {
            passed: Passed::from_environment()?,
            names: Vec::new(),
            claimed: Vec::new(),
            opened: Vec::new(),
            made: Vec::new(),
            taking_over,
        })
    }

    /// Says which devices there will be: a socket that was passed for one of them is for no other.
    pub(crate) fn name_devices(&mut self, names: impl Iterator<Item = String>) {
        self.names = names.collect();
    }

    /// Makes sure that an inherited descriptor has one owner. The error is a sentence.
    pub(crate) fn claim(&mut self, fd: RawFd) -> Result<(), String> {
        if self.claimed.contains(&fd) {
            return Err(format!("descriptor {fd} is for one device, not for two"));
        }
        self.claimed.push(fd);
        Ok(())
    }

    /// Opens what the command line named for the device `name`, or takes what was passed. The
    /// error is a sentence.
    pub(crate) fn open(&mut self, args: SocketArgs, name: &str) -> Result<(), String> {
        let socket = if self.taking_over {
            if args.fd.is_some() {
                return Err("--fd is of no use with --take-over, which brings the socket".into());
            }
            let path = args.socket_path.map(|path| self.await_path(path));
            Socket::Awaited(path.transpose()?)
        } else if let Some(path) = args.socket_path {
            let listener = self.listen(&path, false)?;
            Socket::Listening(listener, self.made.last().cloned())
        } else {
            let passed = || self.passed.take(name, &self.names);
            let fd = args.fd.or_else(passed);
            let fd = fd.ok_or("either --socket-path or --fd is needed")?;
            self.claim(fd)?;
            inherit(fd)?
        };
        self.opened.push(socket);
        Ok(())
    }

    /// Whether sockets are not made: a running daemon will hand them over.
    pub(crate) fn taking_over(&self) -> bool {
        self.taking_over
    }

    /// A statistics or control socket, for this user alone if `private`.
    pub(super) fn admin(&mut self, path: &Path, private: bool) -> Result<Socket, String> {
        if self.taking_over {
            return Ok(Socket::Awaited(Some(self.await_path(path.to_owned())?)));
        }
        let listener = self.listen(path, private)?;
        Ok(Socket::Listening(listener, self.made.last().cloned()))
    }

    /// A listening socket of a device's own, for this user alone if `private`.
    pub(crate) fn listen(&mut self, path: &Path, private: bool) -> Result<UnixListener, String> {
        if self.made.iter().any(|made| made.path == path) {
            return Err(format!("two sockets have the path {}", path.display()));
        }
        let (listener, made) = listen(path.to_owned(), private)?;
        self.made.push(made);
        if private {
            // As it is already, but for folders whose own rules come before the umask.
            fs::set_permissions(path, fs::Permissions::from_mode(0o600))
                .map_err(|error| format!("cannot protect {}: {error}", path.display()))?;
        }
        Ok(listener)
    }

    /// The file of a socket that another process listens on.
    fn await_path(&mut self, path: PathBuf) -> Result<SocketPath, String> {
        let identity = identity(&path)
            .map_err(|error| format!("there is no socket {}: {error}", path.display()))?;
        let path = SocketPath { path, identity };
        self.made.push(path.clone());
        Ok(path)
    }

    /// The files that this process made.
    pub(super) fn made(&self) -> &[SocketPath] {
        &self.made
    }

    /// Takes back what was made.
    pub(super) fn remove_made(&self) {
        if !self.taking_over {
            self.made.iter().for_each(SocketPath::remove);
        }
    }

    /// Those of the devices, in their order.
    pub(super) fn into_opened(self) -> Vec<Socket> {
        self.opened
    }
}

fn listen(path: PathBuf, private: bool) -> Result<(UnixListener, SocketPath), String> {
    let shown = path.display().to_string();
    let cannot = |error: io::Error| format!("cannot listen on {shown}: {error}");
    // Of several that find the same stale socket, one removes it and listens before the next looks;
    // and nobody looks between another's `bind` and `listen`.
    let alone = FolderLock::around(&path);
    let listener = match bind(&path, private) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            alone.as_ref().map_err(|error| {
                format!("cannot see whether the socket {shown} is in use: {error}")
            })?;
            remove_stale(&path)?;
            bind(&path, private).map_err(cannot)?
        }
        result => result.map_err(cannot)?,
    };
    let identity = identity(&path).map_err(cannot)?;
    drop(alone);
    Ok((listener, SocketPath { path, identity }))
}

/// A socket that only this user may connect to if `private`, from its first moment: connecting takes
/// the right to write to the file. The caller has one thread.
fn bind(path: &Path, private: bool) -> io::Result<UnixListener> {
    if !private {
        return UnixListener::bind(path);
    }
    // SAFETY: takes no pointer, and cannot fail.
    let before = unsafe { libc::umask(0o177) };
    let bound = UnixListener::bind(path);
    // SAFETY: as above.
    unsafe { libc::umask(before) };
    bound
}

/// Removes a socket that nobody listens on; refuses anything else.
fn remove_stale(path: &Path) -> Result<(), String> {
    let shown = path.display();
    let kind = fs::symlink_metadata(path)
        .map_err(|error| format!("cannot look at {shown}: {error}"))?
        .file_type();
    if !kind.is_socket() {
        return Err(format!(
            "{shown} exists and is not a socket; remove it or choose another path"
        ));
    }
    match SocketAddress::of(path).and_then(|address| address.connect()) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    Err(format!("cannot replace the stale socket {shown}: {error}"))
                }
                _ => Ok(()),
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        _ => Err(format!("another program listens on {shown}")),
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

fn inherit(fd: RawFd) -> Result<Socket, String> {
    let bad = |error: io::Error| format!("--fd {fd} is not a Unix stream socket: {error}");
    // SAFETY: fcntl takes no pointer here; it fails if the number is not an open descriptor.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } != 0 {
        return Err(bad(io::Error::last_os_error()));
    }
    // SAFETY: it is open, as the call above showed, and stays so during this function.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    let kind = kind_of(borrowed).map_err(bad)?;
    let kind =
        kind.ok_or_else(|| format!("--fd {fd} is a socket, but not a Unix stream socket"))?;
    // SAFETY: whoever started this program passed the descriptor to it by number, and nothing
    // else in it uses that number.
    let owned = unsafe { OwnedFd::from_raw_fd(fd) };
    Ok(match kind {
        Kind::Listening => Socket::Listening(UnixListener::from(owned), None),
        Kind::Connected => Socket::Connected(UnixStream::from(owned)),
    })
}

/// What a Unix stream socket is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Listening,
    Connected,
}

/// `None`: a socket of another kind.
pub(super) fn kind_of(fd: BorrowedFd<'_>) -> io::Result<Option<Kind>> {
    let domain = option(fd, libc::SO_DOMAIN)?;
    let kind = option(fd, libc::SO_TYPE)?;
    if domain != libc::AF_UNIX || kind != libc::SOCK_STREAM {
        return Ok(None);
    }
    Ok(Some(match option(fd, libc::SO_ACCEPTCONN)? {
        0 => Kind::Connected,
        _ => Kind::Listening,
    }))
}

fn option(fd: BorrowedFd<'_>, name: libc::c_int) -> io::Result<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: `value` and `len` are valid for writes, and `len` is the size of `value`.
    let code = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            name,
            (&raw mut value).cast(),
            &mut len,
        )
    };
    if code == 0 {
        Ok(value)
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;
    use std::thread;

    #[test]
    fn of_many_that_find_a_stale_socket_one_listens() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        for round in 0..100 {
            if round % 2 == 0 {
                drop(UnixListener::bind(&path).unwrap());
            }
            let together = Barrier::new(6);
            let one = || {
                together.wait();
                listen(path.clone(), false)
            };
            let all: Vec<_> = thread::scope(|scope| {
                let threads: Vec<_> = (0..6).map(|_| scope.spawn(one)).collect();
                threads.into_iter().map(|t| t.join().unwrap()).collect()
            });
            let (listen, refused): (Vec<_>, Vec<_>) = all.into_iter().partition(Result::is_ok);
            assert_eq!(listen.len(), 1);
            for sentence in refused.into_iter().filter_map(Result::err) {
                assert!(sentence.contains("another program listens"), "{sentence}");
            }
            let (listener, made) = listen.into_iter().flatten().next().unwrap();
            drop(UnixStream::connect(&path).unwrap());
            made.remove();
            drop(listener);
            assert!(!path.exists());
        }
    }

    #[test]
    fn what_may_not_be_looked_at_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let folder = FolderLock::around(&path).unwrap();
        // Nothing is in the way.
        let (listener, made) = listen(path.clone(), false).unwrap();
        drop(listener);
        let refused = listen(path.clone(), false).unwrap_err();
        assert!(refused.contains("has locked its folder"), "{refused}");
        assert_eq!(identity(&path).unwrap(), made.identity());
        drop(folder);
        listen(path, false).unwrap();
    }
}
