//! What a backend says without being asked (vhost-user: `SET_BACKEND_REQ_FD`).
//!
//! The one message that is served is the one that can come: a change of configuration. Others are
//! refused, and passed over by their length. Nothing here waits for the backend.

use crate::limits::{MAX_NOTICE, NOTICES_AT_ONCE};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

/// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`.
const CONFIG_CHANGE: u32 = 2;
const HEADER_LEN: usize = 12;
/// Flags of a header: version 1, is a reply, wants a reply.
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// The VMM's end of a backend's own channel.
#[derive(Debug)]
pub(super) struct Notices {
    stream: UnixStream,
    /// A header, as far as it has come.
    header: [u8; HEADER_LEN],
    have: usize,
    /// Bytes of payload that nobody wants.
    skip: usize,
}

impl Notices {
    /// A channel, and the end that goes to the backend.
    pub(super) fn channel() -> io::Result<(Notices, UnixStream)> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let notices = Notices {
            stream: ours,
            header: [0; HEADER_LEN],
            have: 0,
            skip: 0,
        };
        Ok((notices, theirs))
    }

    /// Takes what has come, up to a bound; whether the configuration has changed.
    ///
    /// # Errors
    /// The channel is of no more use: it was closed, or what came is no message.
    pub(super) fn take(&mut self) -> io::Result<bool> {
        let mut changed = false;
        for _ in 0..NOTICES_AT_ONCE {
            match self.next() {
                Ok((CONFIG_CHANGE, flags)) => {
                    changed = true;
                    // Before anything is asked: the backend's thread may be waiting for this.
                    self.answer(CONFIG_CHANGE, flags, 0)?;
                }
                Ok((other, flags)) => self.answer(other, flags, 1)?,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(changed)
    }

    /// The next message's request and flags. Descriptors that came with it are closed by the kernel.
    fn next(&mut self) -> io::Result<(u32, u32)> {
        while self.have < HEADER_LEN {
            let rest = self.header.get_mut(self.have..).unwrap_or_default();
            self.have += some(self.stream.read(rest)?)?;
            if self.have == HEADER_LEN {
                let size = word(&self.header, 8);
                self.skip = usize::try_from(size).unwrap_or(usize::MAX);
                if self.skip > MAX_NOTICE || word(&self.header, 4) & 3 != VERSION {
                    return Err(io::Error::other("not a message"));
                }
            }
        }
        while self.skip > 0 {
            let mut sink = [0; 256];
            let most = self.skip.min(sink.len());
            let part = sink.get_mut(..most).unwrap_or_default();
            self.skip -= some(self.stream.read(part)?)?.min(self.skip);
        }
        self.have = 0;
        Ok((word(&self.header, 0), word(&self.header, 4)))
    }

    fn answer(&mut self, request: u32, flags: u32, code: u64) -> io::Result<()> {
        if flags & NEED_REPLY == 0 {
            return Ok(());
        }
        let mut bytes = Vec::with_capacity(HEADER_LEN + 8);
        for word in [request, VERSION | REPLY, 8] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(code.to_ne_bytes());
        // A backend that does not take its answers in has closed its own channel.
        self.stream.write_all(&bytes)
    }
}

fn some(count: usize) -> io::Result<usize> {
    match count {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        count => Ok(count),
    }
}

fn word(header: &[u8; HEADER_LEN], at: usize) -> u32 {
    let bytes = header.get(at..).and_then(|rest| rest.first_chunk());
    bytes.map_or(0, |bytes| u32::from_ne_bytes(*bytes))
}

impl AsRawFd for Notices {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(request: u32, flags: u32, size: u32) -> Vec<u8> {
        [request, flags, size]
            .into_iter()
            .flat_map(u32::to_ne_bytes)
            .collect()
    }

    #[test]
    fn changes_are_taken_and_answered_and_others_refused() {
        let (mut notices, mut peer) = Notices::channel().unwrap();
        assert!(!notices.take().unwrap());
        peer.write_all(&message(CONFIG_CHANGE, VERSION, 0)).unwrap();
        assert!(notices.take().unwrap());
        peer.write_all(&message(3, VERSION | NEED_REPLY, 300))
            .unwrap();
        peer.write_all(&[7; 300]).unwrap();
        assert!(!notices.take().unwrap());
        peer.write_all(&message(CONFIG_CHANGE, VERSION | NEED_REPLY, 0))
            .unwrap();
        assert!(notices.take().unwrap());
        let mut answers = [0; 40];
        peer.read_exact(&mut answers).unwrap();
        let refused = [message(3, VERSION | REPLY, 8), vec![1, 0, 0, 0, 0, 0, 0, 0]];
        let done = [message(CONFIG_CHANGE, VERSION | REPLY, 8), vec![0; 8]];
        assert_eq!(answers.to_vec(), [refused.concat(), done.concat()].concat());
    }

    #[test]
    fn messages_in_pieces_are_put_together() {
        let (mut notices, mut peer) = Notices::channel().unwrap();
        let bytes = [message(9, VERSION, 2), vec![0; 2], message(2, VERSION, 0)].concat();
        let (last, rest) = bytes.split_last().unwrap();
        for byte in rest {
            peer.write_all(&[*byte]).unwrap();
            assert!(!notices.take().unwrap());
        }
        peer.write_all(&[*last]).unwrap();
        assert!(notices.take().unwrap());
    }

    #[test]
    fn what_is_no_message_ends_the_channel() {
        for bytes in [message(2, VERSION, MAX_NOTICE as u32 + 1), message(2, 0, 0)] {
            let (mut notices, mut peer) = Notices::channel().unwrap();
            peer.write_all(&bytes).unwrap();
            notices.take().unwrap_err();
        }
        let (mut notices, peer) = Notices::channel().unwrap();
        drop(peer);
        notices.take().unwrap_err();
        let (mut notices, mut peer) = Notices::channel().unwrap();
        peer.write_all(&message(2, VERSION, MAX_NOTICE as u32))
            .unwrap();
        peer.write_all(&vec![0; MAX_NOTICE]).unwrap();
        assert!(notices.take().unwrap());
    }

    #[test]
    fn a_flood_is_taken_in_parts() {
        let (mut notices, mut peer) = Notices::channel().unwrap();
        for _ in 0..NOTICES_AT_ONCE + 1 {
            peer.write_all(&message(2, VERSION, 0)).unwrap();
        }
        assert!(notices.take().unwrap());
        assert!(notices.take().unwrap());
        assert!(!notices.take().unwrap());
    }
}
