//! Messages on the socket: bytes and descriptors in, bytes out, nothing understood here.
#![allow(unsafe_code)]
// UNSAFETY: descriptors travel in control messages, which only recvmsg and pointer walks give.

use crate::limits::{MAX_MESSAGE_FDS, MAX_PAYLOAD, MESSAGE_TIMEOUT_SECS};
use crate::readiness::{Interest, wait};
use crate::session::handover::PausePoint;
use crate::session::wire::{FLAG_REPLY, HEADER_LEN, Header, VERSION};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;
use zerocopy::{FromBytes, IntoBytes};

/// One message as it came.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) header: Header,
    pub(crate) payload: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
    /// More descriptors came than were taken; the kernel closed them.
    pub(crate) fds_truncated: bool,
}

/// Why no message came.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ChannelEnd {
    /// The peer hung up between two messages.
    #[error("the frontend hung up")]
    HangUp,
    /// The stop event is set.
    #[error("stopped")]
    Stopped,
    /// Between two messages, it was asked to pause.
    #[error("paused")]
    Paused,
    /// The peer hung up in the middle of a message, or took too long over one.
    #[error("half a message")]
    Half,
    /// A header with which the end of the message cannot be found.
    #[error("a message of {0} bytes")]
    TooLarge(u32),
    /// The socket failed.
    #[error("the socket failed")]
    Io(#[from] io::Error),
}

/// One connection.
#[derive(Debug)]
pub(crate) struct Channel<'s> {
    stream: UnixStream,
    stop: BorrowedFd<'s>,
    point: Option<&'s PausePoint>,
    /// Until when a message is waited for.
    patience: Option<Instant>,
}

impl<'s> Channel<'s> {
    pub(crate) fn new(stream: UnixStream, stop: BorrowedFd<'s>) -> Channel<'s> {
        Channel {
            stream,
            stop,
            point: None,
            patience: None,
        }
    }

    /// Pauses between two messages when that is asked for.
    pub(crate) fn pausing(self, point: Option<&'s PausePoint>) -> Channel<'s> {
        Channel { point, ..self }
    }

    /// Waits for messages until then and no longer.
    pub(crate) fn until(self, patience: Instant) -> Channel<'s> {
        let patience = Some(patience);
        Channel { patience, ..self }
    }

    pub(crate) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Waits for the next message.
    pub(crate) fn receive(&mut self) -> Result<Message, ChannelEnd> {
        let mut fds = Vec::new();
        let mut truncated = false;
        // Asked for every message: a peer that never pauses must not keep this from being stopped.
        let left = self
            .patience
            .map(|until| until.saturating_duration_since(Instant::now()));
        let pause = self.point.map_or(self.stop, AsFd::as_fd);
        let waits = [self.stop, pause, self.stream.as_fd()];
        match wait(waits.map(|fd| (fd, Interest::Read)), left)? {
            [true, ..] => return Err(ChannelEnd::Stopped),
            // Without a point this is the stop event once more, set since the first look at it.
            [_, true, _] if self.point.is_none() => return Err(ChannelEnd::Stopped),
            [_, true, _] => return Err(ChannelEnd::Paused),
            [.., false] => return Err(ChannelEnd::Half),
            [.., true] => {}
        }
        let mut head = [0; HEADER_LEN];
        if !self.fill(&mut head, &mut fds, &mut truncated, None)? {
            return Err(ChannelEnd::HangUp);
        }
        let header = Header::read_from_bytes(&head).map_err(|_| ChannelEnd::Half)?;
        let size = usize::try_from(header.size).unwrap_or(usize::MAX);
        if size > MAX_PAYLOAD {
            return Err(ChannelEnd::TooLarge(header.size));
        }
        let mut payload = vec![0; size];
        let deadline = Instant::now() + Duration::from_secs(MESSAGE_TIMEOUT_SECS);
        if !self.fill(&mut payload, &mut fds, &mut truncated, Some(deadline))? {
            return Err(ChannelEnd::Half);
        }
        Ok(Message {
            header,
            payload,
            fds,
            fds_truncated: truncated,
        })
    }

    /// Sends a message that is no reply, with descriptors.
    pub(crate) fn send(
        &mut self,
        request: u32,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ChannelEnd> {
        let header = Header {
            request,
            flags: VERSION,
            // Whoever receives it refuses more than MAX_PAYLOAD.
            size: u32::try_from(payload.len()).unwrap_or(u32::MAX),
        };
        let bytes = [header.as_bytes(), payload].concat();
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let deadline = Instant::now() + Duration::from_secs(MESSAGE_TIMEOUT_SECS);
        // The descriptors go with the first byte.
        let sent = loop {
            match self.stream.send_with_fds(&[bytes.as_slice()], &raw) {
                Ok(sent) => break sent,
                Err(error) => self.after(error.into(), Interest::Write, Some(deadline))?,
            }
        };
        self.send_all(bytes.get(sent..).unwrap_or_default(), deadline)
    }

    /// Sends a reply to `request`.
    pub(crate) fn reply(&mut self, request: u32, payload: &[u8]) -> Result<(), ChannelEnd> {
        let header = Header {
            request,
            flags: VERSION | FLAG_REPLY,
            // Replies are at most MAX_PAYLOAD bytes.
            size: u32::try_from(payload.len()).unwrap_or(0),
        };
        let bytes = [header.as_bytes(), payload].concat();
        let deadline = Instant::now() + Duration::from_secs(MESSAGE_TIMEOUT_SECS);
        self.send_all(&bytes, deadline)
    }

    fn send_all(&mut self, mut rest: &[u8], deadline: Instant) -> Result<(), ChannelEnd> {
        while !rest.is_empty() {
            // SAFETY: `rest` is valid for its length through the call.
            let n = unsafe {
                libc::send(
                    self.stream.as_raw_fd(),
                    rest.as_ptr().cast(),
                    rest.len(),
                    libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
                )
            };
            match usize::try_from(n) {
                Ok(n) => rest = rest.get(n..).unwrap_or_default(),
                Err(_) => self.after_error(Interest::Write, Some(deadline))?,
            }
        }
        Ok(())
    }

    /// Sends a reply with a descriptor.
    pub(crate) fn reply_with_fd(
        &mut self,
        request: u32,
        payload: &[u8],
        fd: &OwnedFd,
    ) -> Result<(), ChannelEnd> {
        let header = Header {
            request,
            flags: VERSION | FLAG_REPLY,
            // Replies are at most MAX_PAYLOAD bytes.
            size: u32::try_from(payload.len()).unwrap_or(0),
        };
        let deadline = Instant::now() + Duration::from_secs(MESSAGE_TIMEOUT_SECS);
        // A socket that is writable takes so few bytes at once.
        while !ready(self.stream.as_fd(), Interest::Write) {
            self.after(
                io::ErrorKind::WouldBlock.into(),
                Interest::Write,
                Some(deadline),
            )?;
        }
        let bytes = [header.as_bytes(), payload].concat();
        match self.stream.send_with_fd(bytes.as_slice(), fd.as_raw_fd()) {
            Ok(n) if n == bytes.len() => Ok(()),
            Ok(_) => Err(ChannelEnd::Half),
            Err(error) => Err(io::Error::from(error).into()),
        }
    }

    /// Fills `buf`. `false`: the peer hung up before the first byte.
    fn fill(
        &mut self,
        buf: &mut [u8],
        fds: &mut Vec<OwnedFd>,
        truncated: &mut bool,
        mut deadline: Option<Instant>,
    ) -> Result<bool, ChannelEnd> {
        let mut done = 0;
        while done < buf.len() {
            let rest = buf.get_mut(done..).unwrap_or_default();
            match receive_some(self.stream.as_fd(), rest, fds, truncated) {
                Ok(0) if done == 0 => return Ok(false),
                Ok(0) => return Err(ChannelEnd::Half),
                Ok(n) => {
                    done += n;
                    // The first byte starts the clock.
                    deadline.get_or_insert_with(|| {
                        Instant::now() + Duration::from_secs(MESSAGE_TIMEOUT_SECS)
                    });
                }
                Err(error) => self.after(error, Interest::Read, deadline)?,
            }
        }
        Ok(true)
    }

    fn after_error(&self, interest: Interest, deadline: Option<Instant>) -> Result<(), ChannelEnd> {
        self.after(io::Error::last_os_error(), interest, deadline)
    }

    /// After a call that did not get through: waits, or says why that is pointless.
    fn after(
        &self,
        error: io::Error,
        interest: Interest,
        deadline: Option<Instant>,
    ) -> Result<(), ChannelEnd> {
        match error.kind() {
            io::ErrorKind::Interrupted => return Ok(()),
            io::ErrorKind::WouldBlock => {}
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
                return Err(ChannelEnd::HangUp);
            }
            _ => return Err(error.into()),
        }
        let timeout = deadline.map(|d| d.saturating_duration_since(Instant::now()));
        let ready = wait(
            [(self.stop, Interest::Read), (self.stream.as_fd(), interest)],
            timeout,
        )?;
        match ready {
            [true, _] => Err(ChannelEnd::Stopped),
            [false, false] => Err(ChannelEnd::Half),
            [false, true] => Ok(()),
        }
    }
}

fn ready(fd: BorrowedFd<'_>, interest: Interest) -> bool {
    wait([(fd, interest)], Some(Duration::ZERO)).is_ok_and(|[ready]| ready)
}

/// Room for the control message with [`MAX_MESSAGE_FDS`] descriptors, aligned as `cmsghdr` is.
#[repr(C, align(8))]
struct ControlBuffer([u8; CONTROL_LEN]);

// SAFETY: CMSG_SPACE is arithmetic on its argument.
const CONTROL_LEN: usize =
    unsafe { libc::CMSG_SPACE((MAX_MESSAGE_FDS * size_of::<RawFd>()) as u32) } as usize;

/// Reads what is there, up to `buf.len()`, and takes the descriptors that came with it.
fn receive_some(
    socket: BorrowedFd<'_>,
    buf: &mut [u8],
    fds: &mut Vec<OwnedFd>,
    truncated: &mut bool,
) -> io::Result<usize> {
    let mut control = ControlBuffer([0; CONTROL_LEN]);
    let mut iov = libc::iovec {
        iov_base: buf.as_mut_ptr().cast(),
        iov_len: buf.len(),
    };
    // SAFETY: all zeroes is a valid msghdr.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &mut iov;
    header.msg_iovlen = 1;
    header.msg_control = control.0.as_mut_ptr().cast();
    header.msg_controllen = CONTROL_LEN as _;
    // SAFETY: `header` points to `iov` and `control`, which are valid for the lengths given.
    let n = unsafe {
        libc::recvmsg(
            socket.as_raw_fd(),
            &mut header,
            libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC,
        )
    };
    let n = usize::try_from(n).map_err(|_| io::Error::last_os_error())?;
    *truncated |= header.msg_flags & libc::MSG_CTRUNC != 0;
    // SAFETY: the kernel filled `header`; the macros stay inside the control buffer it describes.
    // Each descriptor was just made for this process and nothing else owns it.
    unsafe {
        let mut cmsg = libc::CMSG_FIRSTHDR(&header);
        while !cmsg.is_null() {
            let c = cmsg.read_unaligned();
            if c.cmsg_level == libc::SOL_SOCKET && c.cmsg_type == libc::SCM_RIGHTS {
                let bytes = (c.cmsg_len as usize).saturating_sub(libc::CMSG_LEN(0) as usize);
                let data = libc::CMSG_DATA(cmsg).cast::<[u8; size_of::<RawFd>()]>();
                for i in 0..bytes / size_of::<RawFd>() {
                    let fd = RawFd::from_ne_bytes(data.add(i).read());
                    fds.push(OwnedFd::from_raw_fd(fd));
                }
            }
            cmsg = libc::CMSG_NXTHDR(&header, cmsg);
        }
    }
    if fds.len() > MAX_MESSAGE_FDS {
        *truncated = true;
        fds.truncate(MAX_MESSAGE_FDS);
    }
    Ok(n)
}
