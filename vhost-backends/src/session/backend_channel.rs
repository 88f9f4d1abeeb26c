//! The backend's own channel (vhost-user: `SET_BACKEND_REQ_FD`): messages that nobody asked for.

use crate::limits::BACKEND_ACK_TIMEOUT_SECS;
use crate::session::wire::{
    BACKEND_CONFIG_CHANGED, FLAG_NEED_REPLY, FLAG_REPLY, HEADER_LEN, Header, VERSION,
};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use zerocopy::{FromBytes, IntoBytes};

/// The way from a device to its frontend.
#[derive(Debug)]
pub struct FrontendLink {
    /// `None` once an answer did not come: a later one could not be told from it.
    stream: Mutex<Option<UnixStream>>,
    /// Frontends that can, confirm.
    ack: bool,
}

impl FrontendLink {
    pub(crate) fn new(fd: OwnedFd, ack: bool) -> io::Result<FrontendLink> {
        let stream = UnixStream::from(fd);
        let timeout = Some(Duration::from_secs(BACKEND_ACK_TIMEOUT_SECS));
        // Fails on what is not a socket.
        stream.set_read_timeout(timeout)?;
        stream.set_write_timeout(timeout)?;
        let stream = Mutex::new(Some(stream));
        Ok(FrontendLink { stream, ack })
    }

    /// The channel once more, if it is still of use.
    pub(crate) fn duplicate(&self) -> Option<io::Result<OwnedFd>> {
        let guard = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        let stream = guard.as_ref()?;
        Some(stream.try_clone().map(OwnedFd::from))
    }

    /// Tells the frontend that configuration space changed, and waits until it has taken notice if
    /// it confirms such messages. Not to be called from a thread that serves the session's own
    /// messages: the frontend may be waiting for that.
    pub fn config_changed(&self) -> io::Result<()> {
        let mut guard = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        let stream = guard.as_mut().ok_or(io::ErrorKind::NotConnected)?;
        let outcome = say(stream, BACKEND_CONFIG_CHANGED, self.ack);
        match outcome {
            Ok(0) => Ok(()),
            Ok(code) => Err(io::Error::other(format!("the frontend refused: {code}"))),
            Err(error) => {
                *guard = None;
                Err(error)
            }
        }
    }
}

/// Sends a message without payload; the code that it is answered with, zero if it is not.
fn say(stream: &mut UnixStream, request: u32, ack: bool) -> io::Result<u64> {
    let flags = VERSION | if ack { FLAG_NEED_REPLY } else { 0 };
    let size = 0;
    let header = Header {
        request,
        flags,
        size,
    };
    stream.write_all(header.as_bytes())?;
    if !ack {
        return Ok(0);
    }
    let mut answer = [0; HEADER_LEN + size_of::<u64>()];
    stream.read_exact(&mut answer)?;
    let unexpected = || io::Error::other("the frontend answered something else");
    let (header, code) = Header::read_from_prefix(&answer).map_err(|_| unexpected())?;
    if header.request != request || header.flags & FLAG_REPLY == 0 || header.size != 8 {
        return Err(unexpected());
    }
    u64::read_from_bytes(code).map_err(|_| unexpected())
}
