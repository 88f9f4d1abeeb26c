//! Connects to a Unix socket by its path, from outside the sandbox.
//!
//! The daemon itself cannot: in its sandbox there are no paths. Before it enters, it starts this
//! second process, which holds one end of a socket pair and nothing else, connects to one path when
//! it is told, and hands the connection over.
#![allow(unsafe_code)]
// UNSAFETY: fork, and ending the child without the parent's clean-up.

use crate::dial::{self, SocketAddress};
use crate::readiness::{Interest, wait};
use crate::sandbox::confine_connector;
use std::io::{self, Read, Write};
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// How long the other process may take to start.
const START: Duration = Duration::from_secs(2);
/// How long its answer is waited for: it connects without waiting, so it has one at once where the
/// host has time for it. Whoever asks may hold up a queue. An answer that comes later is the next
/// one's.
const PATIENCE: Duration = Duration::from_millis(20);

/// The other process. It ends with this, and with the daemon however that ends: it waits for nothing
/// but the daemon's word, or its end. (A parent-death signal would not do: Landlock keeps it from
/// leaving the daemon's domain.)
#[derive(Debug)]
pub(crate) struct Connector(Mutex<Pipe>);

#[derive(Debug)]
struct Pipe {
    stream: UnixStream,
    /// An answer is on its way. There is never more than one.
    asked: bool,
}

impl Connector {
    /// Starts the process. The caller has one thread; signals that end the daemon are blocked.
    pub(crate) fn start(path: &Path) -> io::Result<Connector> {
        let address = SocketAddress::of(path)?;
        let (ours, theirs) = UnixStream::pair()?;
        // SAFETY: there is one thread, so the child may do anything; it never returns.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()),
            0 => {
                // What fails here leaves the daemon without this peer; it says so.
                let _ = connect_when_told(&address, &theirs);
                // SAFETY: ends the child without the parent's clean-up.
                unsafe { libc::_exit(0) }
            }
            _ => {
                drop(theirs);
                ours.set_read_timeout(Some(START))?;
                ours.set_write_timeout(Some(PATIENCE))?;
                // Until it has closed its copies, the daemon's sockets would outlive a daemon
                // that is killed.
                (&ours).read_exact(&mut [0]).map_err(dial::in_words)?;
                Ok(Connector(Mutex::new(Pipe {
                    stream: ours,
                    asked: false,
                })))
            }
        }
    }

    /// A new connection. [`io::ErrorKind::WouldBlock`]: the other process has not answered yet.
    pub(crate) fn connect(&self) -> io::Result<UnixStream> {
        let mut pipe = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Pipe { stream, asked } = &mut *pipe;
        if !*asked {
            stream.write_all(&[1])?;
            *asked = true;
        }
        let [answered] = wait([(stream.as_fd(), Interest::Read)], Some(PATIENCE))?;
        if !answered {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let answer = stream.recv_with_fd(&mut [0]).map_err(io::Error::from)?;
        *asked = false;
        match answer {
            (1, Some(file)) => Ok(UnixStream::from(OwnedFd::from(file))),
            (1, None) => Err(io::ErrorKind::ConnectionRefused.into()),
            _ => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }
}

fn connect_when_told(address: &SocketAddress, pipe: &UnixStream) -> io::Result<()> {
    // SAFETY: descriptor 0 and the ones from 1 on are this process's own, which uses none but 0
    // from here; nothing is dropped before it ends, the stream on 0 neither.
    let pipe = unsafe {
        if libc::dup2(pipe.as_raw_fd(), 0) < 0 {
            return Err(io::Error::last_os_error());
        }
        if libc::syscall(libc::SYS_close_range, 1, u32::MAX, 0) != 0 {
            return Err(io::Error::last_os_error());
        }
        ManuallyDrop::new(UnixStream::from_raw_fd(0))
    };
    confine_connector().map_err(io::Error::other)?;
    send(&pipe, None)?;
    while (&*pipe).read(&mut [0])? == 1 {
        send(&pipe, address.connect().ok())?;
    }
    Ok(())
}

/// One byte, and a connection if there is one.
fn send(pipe: &UnixStream, connection: Option<OwnedFd>) -> io::Result<()> {
    let fd = connection.as_ref().map(AsRawFd::as_raw_fd);
    let sent = pipe.send_with_fds(&[&[1u8][..]], fd.as_slice());
    sent.map(drop).map_err(io::Error::from)
}
