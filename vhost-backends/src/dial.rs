//! Connections to Unix sockets by their paths, which do not wait for a peer that does not accept.
#![allow(unsafe_code)]
// UNSAFETY: a connect that does not wait, which the standard library does not have.

use crate::limits::{CONNECT_RETRY_MILLIS, CONNECT_SECS};
use std::io;
use std::mem::offset_of;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// Connects, within [`CONNECT_SECS`] where the peer's queue is full.
pub(crate) fn connect(path: &Path) -> io::Result<UnixStream> {
    let address = SocketAddress::of(path)?;
    let deadline = Instant::now() + Duration::from_secs(CONNECT_SECS);
    loop {
        match address.connect() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if Instant::now() >= deadline {
                    return Err(in_words(error));
                }
                std::thread::sleep(Duration::from_millis(CONNECT_RETRY_MILLIS));
            }
            result => return result.map(UnixStream::from),
        }
    }
}

/// The error of a wait that has an end, which the host calls a lack of resources.
pub(crate) fn in_words(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            io::Error::new(io::ErrorKind::TimedOut, "it does not answer in time")
        }
        _ => error,
    }
}

/// A path as `connect` has it.
pub(crate) struct SocketAddress {
    address: libc::sockaddr_un,
    len: libc::socklen_t,
}

impl SocketAddress {
    /// Fails for a path that is too long, or none.
    pub(crate) fn of(path: &Path) -> io::Result<SocketAddress> {
        let bytes = path.as_os_str().as_bytes();
        let mut address = libc::sockaddr_un {
            sun_family: libc::AF_UNIX as libc::sa_family_t,
            sun_path: [0; 108],
        };
        // With a zero at the end.
        let room = address.sun_path.len() - 1;
        if bytes.is_empty() || bytes.len() > room || bytes.contains(&0) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        for (to, from) in address.sun_path.iter_mut().zip(bytes) {
            *to = libc::c_char::from_ne_bytes([*from]);
        }
        // At most 110.
        let len = offset_of!(libc::sockaddr_un, sun_path) + bytes.len() + 1;
        let len = len as libc::socklen_t;
        Ok(SocketAddress { address, len })
    }

    /// Connects, or fails where that would take time: [`io::ErrorKind::WouldBlock`] where the peer's
    /// queue is full.
    pub(crate) fn connect(&self) -> io::Result<OwnedFd> {
        let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: takes no pointer.
        let fd = unsafe { libc::socket(libc::AF_UNIX, kind, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new descriptor that nobody else has.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: the address is as long as said, and lives through the call.
        match unsafe { libc::connect(fd, (&raw const self.address).cast(), self.len) } {
            0 => {}
            _ => return Err(io::Error::last_os_error()),
        }
        // As any other from here.
        // SAFETY: takes no pointer.
        match unsafe { libc::fcntl(fd, libc::F_SETFL, 0) } {
            0 => Ok(socket),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_full_queue_is_waited_for_so_long() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let refused = |path: &Path| connect(path).unwrap_err();
        assert_eq!(refused(&path).kind(), io::ErrorKind::NotFound);
        let long = dir.path().join("x".repeat(108));
        assert_eq!(refused(&long).kind(), io::ErrorKind::InvalidInput);
        let listener = UnixListener::bind(&path).unwrap();
        // SAFETY: takes no pointer.
        assert_eq!(unsafe { libc::listen(listener.as_raw_fd(), 0) }, 0);
        let first = connect(&path).unwrap();
        assert!(refused(&path).to_string().contains("in time"));
        // One that comes to it after a while.
        let late = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            listener.accept().unwrap();
            listener
        });
        let _second = connect(&path).unwrap();
        drop((first, late.join().unwrap()));
        assert_eq!(refused(&path).kind(), io::ErrorKind::ConnectionRefused);
    }
}
