//! Removes socket files at the end, from outside the sandbox.
//!
//! The daemon itself cannot: in its sandbox there are no paths. Before it enters, it starts this
//! second process, which holds one end of a socket pair and nothing else, may remove files in the
//! sockets' folders and nothing else, and waits. A daemon that is killed leaves its sockets behind,
//! which the next one replaces.
#![allow(unsafe_code)]
// UNSAFETY: fork, and ending the child without the parent's clean-up.

use super::listen::SocketPath;
use crate::sandbox::{allow_removal, confine_remover};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

/// The other process. Dropped while armed, it removes the sockets; the files are gone when that
/// returns.
#[derive(Debug)]
pub(super) struct Remover {
    pipe: UnixStream,
    armed: bool,
}

impl Remover {
    /// Starts the process. The caller has one thread; signals that end the daemon are blocked.
    pub(super) fn start(paths: &[SocketPath], armed: bool) -> io::Result<Option<Remover>> {
        if paths.is_empty() {
            return Ok(None);
        }
        let (ours, theirs) = UnixStream::pair()?;
        // SAFETY: there is one thread, so the child may do anything; it never returns.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()),
            0 => {
                // What fails here leaves files behind, no more; there is no one to tell.
                let _ = remove_when_told(paths, &theirs);
                // SAFETY: ends the child without the parent's clean-up.
                unsafe { libc::_exit(0) }
            }
            _ => {
                drop(theirs);
                // Until it has closed its copies, the listeners would outlive a daemon that is
                // killed, and the next one would take them for somebody else's.
                (&ours).read_exact(&mut [0])?;
                Ok(Some(Remover { pipe: ours, armed }))
            }
        }
    }
}

impl Remover {
    /// Whether the sockets are this daemon's, to be removed at the end.
    pub(super) fn arm(&mut self, armed: bool) {
        self.armed = armed;
    }
}

impl Drop for Remover {
    fn drop(&mut self) {
        if !self.armed {
            // The end of the stream ends the process.
            return;
        }
        // A failure means that the process is gone, and so does the end of the stream.
        let _ = self.pipe.write_all(&[1]);
        let _ = self.pipe.read(&mut [0]);
    }
}

fn remove_when_told(paths: &[SocketPath], pipe: &UnixStream) -> io::Result<()> {
    // SAFETY: descriptor 0 and the ones from 1 on are this process's own, which uses none but 0
    // from here; nothing is dropped before it ends.
    unsafe {
        if libc::dup2(pipe.as_raw_fd(), 0) < 0 {
            return Err(io::Error::last_os_error());
        }
        if libc::syscall(libc::SYS_close_range, 1, u32::MAX, 0) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    let folders: Vec<&Path> = paths.iter().map(SocketPath::folder).collect();
    // Best effort, as the daemon's own.
    let _ = allow_removal(&folders);
    confine_remover().map_err(io::Error::other)?;
    let mut byte = 0u8;
    // SAFETY: one byte that is valid; descriptor 0 is the pair's end.
    if unsafe { libc::write(0, (&raw const byte).cast(), 1) } != 1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above.
    if unsafe { libc::read(0, (&raw mut byte).cast(), 1) } == 1 {
        paths.iter().for_each(SocketPath::remove);
    }
    Ok(())
}
