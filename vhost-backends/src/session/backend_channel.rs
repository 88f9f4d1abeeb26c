//! The backend's own channel (vhost-user: `SET_BACKEND_REQ_FD`): messages that nobody asked for.

use crate::limits::BACKEND_ACK_TIMEOUT_SECS;
use crate::readiness::{Interest, wait};
use crate::session::wire::{
    BACKEND_CONFIG_CHANGED, FLAG_NEED_REPLY, FLAG_REPLY, HEADER_LEN, Header, VERSION,
};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use zerocopy::{FromBytes, IntoBytes};

/// The way from a device to its frontend.
#[derive(Debug)]
pub struct FrontendLink {
    /// `None` once it was broken.
    line: Mutex<Option<Line>>,
}

#[derive(Debug)]
struct Line {
    stream: UnixStream,
    /// Frontends that can, confirm. One that was too slow once is not asked again: its late answer
    /// could not be told from the next.
    ack: bool,
}

const ACK_TIMEOUT: Duration = Duration::from_secs(BACKEND_ACK_TIMEOUT_SECS);

impl FrontendLink {
    pub(crate) fn new(fd: OwnedFd, ack: bool) -> io::Result<FrontendLink> {
        let stream = UnixStream::from(fd);
        // Fails on what is not a socket.
        stream.set_read_timeout(Some(ACK_TIMEOUT))?;
        stream.set_write_timeout(Some(ACK_TIMEOUT))?;
        let line = Mutex::new(Some(Line { stream, ack }));
        Ok(FrontendLink { line })
    }

    /// The channel once more, if it is still of use.
    pub(crate) fn duplicate(&self) -> Option<io::Result<OwnedFd>> {
        let guard = self.line.lock().unwrap_or_else(PoisonError::into_inner);
        let line = guard.as_ref()?;
        Some(line.stream.try_clone().map(OwnedFd::from))
    }

    /// Tells the frontend that configuration space changed, and waits until it has taken notice if
    /// it confirms such messages, [`BACKEND_ACK_TIMEOUT_SECS`] at most. Not to be called from a thread that serves the session's own
    /// messages: the frontend may be waiting for that.
    pub fn config_changed(&self) -> io::Result<()> {
        let mut guard = self.line.lock().unwrap_or_else(PoisonError::into_inner);
        let line = guard.as_mut().ok_or(io::ErrorKind::NotConnected)?;
        match say(line, BACKEND_CONFIG_CHANGED) {
            Ok(Some(0)) => Ok(()),
            Ok(Some(code)) => Err(io::Error::other(format!("the frontend refused: {code}"))),
            Ok(None) => {
                line.ack = false;
                Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "it was sent the message, and has not confirmed it so far",
                ))
            }
            Err(error) => {
                *guard = None;
                Err(error)
            }
        }
    }
}

/// Sends a message without payload. The code that it is answered with, zero if it need not be;
/// `None`: no answer has come in time.
fn say(line: &mut Line, request: u32) -> io::Result<Option<u64>> {
    let Line { stream, ack } = line;
    let ack = *ack;
    let flags = VERSION | if ack { FLAG_NEED_REPLY } else { 0 };
    let size = 0;
    let header = Header {
        request,
        flags,
        size,
    };
    stream.write_all(header.as_bytes())?;
    if !ack {
        return Ok(Some(0));
    }
    if wait([(stream.as_fd(), Interest::Read)], Some(ACK_TIMEOUT))? == [false] {
        return Ok(None);
    }
    let mut answer = [0; HEADER_LEN + size_of::<u64>()];
    stream.read_exact(&mut answer)?;
    let unexpected = || io::Error::other("the frontend answered something else");
    let (header, code) = Header::read_from_prefix(&answer).map_err(|_| unexpected())?;
    if header.request != request || header.flags & FLAG_REPLY == 0 || header.size != 8 {
        return Err(unexpected());
    }
    let code = u64::read_from_bytes(code).map_err(|_| unexpected())?;
    Ok(Some(code))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frontend_that_is_slow_to_confirm_is_told_and_not_asked_again() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        let link = FrontendLink::new(theirs.into(), true).unwrap();
        let error = link.config_changed().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        link.config_changed().unwrap();
        for wish in [FLAG_NEED_REPLY, 0] {
            let mut head = [0; HEADER_LEN];
            ours.read_exact(&mut head).unwrap();
            let head = Header::read_from_bytes(&head).unwrap();
            let expected = (BACKEND_CONFIG_CHANGED, VERSION | wish);
            assert_eq!((head.request, head.flags), expected);
        }
        drop(ours);
        assert!(link.config_changed().is_err());
        assert!(link.duplicate().is_none(), "gone for good");
    }
}
