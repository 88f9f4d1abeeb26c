//! Messages on the socket: bytes and descriptors in, bytes out, nothing understood here.
#![allow(unsafe_code)]
// UNSAFETY: descriptors travel in control messages, which only recvmsg and pointer walks give.

use crate::limits::{MAX_MESSAGE_FDS, MAX_PAYLOAD, MESSAGE_TIMEOUT_SECS};
use crate::readiness::{Interest, wait};
use crate::session::handover::PausePoint;
use crate::session::hang_up::HangUp;
use crate::session::wire::{FLAG_REPLY, HEADER_LEN, Header, VERSION};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
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

/// What has come of a message that is not there in full.
#[derive(Debug, Default)]
pub(crate) struct Begun {
    /// Of the header and the payload.
    pub(crate) bytes: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
    pub(crate) fds_truncated: bool,
}

impl Begun {
    fn header(&self) -> Option<Header> {
        let head = self.bytes.get(..HEADER_LEN)?;
        Header::read_from_bytes(head).ok()
    }

    /// Bytes that the message has, as far as that is known.
    fn wanted(&self) -> Result<usize, ChannelEnd> {
        let Some(header) = self.header() else {
            return Ok(HEADER_LEN);
        };
        let size = usize::try_from(header.size).unwrap_or(usize::MAX);
        if size > MAX_PAYLOAD {
            return Err(ChannelEnd::TooLarge(header.size));
        }
        Ok(HEADER_LEN + size)
    }

    pub(crate) fn try_clone(&self) -> io::Result<Begun> {
        Ok(Begun {
            bytes: self.bytes.clone(),
            fds: (self.fds.iter())
                .map(OwnedFd::try_clone)
                .collect::<io::Result<_>>()?,
            fds_truncated: self.fds_truncated,
        })
    }
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
    /// It was asked to pause. What has come of the next message is kept.
    #[error("paused")]
    Paused,
    /// It was asked to pause, and the peer does not take its answers.
    #[error("answers that the frontend does not take hold a pause up")]
    Unread,
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
    stream: Arc<UnixStream>,
    stop: BorrowedFd<'s>,
    point: Option<&'s PausePoint>,
    /// Until when a message is waited for.
    patience: Option<Instant>,
    begun: Begun,
}

impl<'s> Channel<'s> {
    pub(crate) fn new(stream: UnixStream, stop: BorrowedFd<'s>) -> Channel<'s> {
        Channel {
            stream: Arc::new(stream),
            stop,
            point: None,
            patience: None,
            begun: Begun::default(),
        }
    }

    /// Pauses when that is asked for: between two messages, or where the rest of one is waited for.
    pub(crate) fn pausing(self, point: Option<&'s PausePoint>) -> Channel<'s> {
        Channel { point, ..self }
    }

    /// Goes on with a message that another channel began.
    pub(crate) fn beginning(self, begun: Begun) -> Channel<'s> {
        Channel { begun, ..self }
    }

    /// What has come of the next message.
    pub(crate) fn begun(&self) -> &Begun {
        &self.begun
    }

    /// Waits for messages until then and no longer.
    pub(crate) fn until(self, patience: Instant) -> Channel<'s> {
        let patience = Some(patience);
        Channel { patience, ..self }
    }

    pub(crate) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// A way to end the connection from any thread.
    pub(crate) fn hang_up(&self) -> HangUp {
        HangUp::of(Arc::clone(&self.stream))
    }

    /// Waits for the next message.
    pub(crate) fn receive(&mut self) -> Result<Message, ChannelEnd> {
        // Asked for every message: a peer that never pauses must not keep this from being stopped.
        let left = self
            .patience
            .map(|until| until.saturating_duration_since(Instant::now()));
        let pause = self.point.map_or(self.stop, AsFd::as_fd);
        let waits = [self.stop, pause, self.stream.as_fd()];
        let mut deadline = None;
        if !self.begun.bytes.is_empty() {
            // Gone on with after a pause: the clock starts anew.
            deadline = Some(rest_deadline());
        }
        let left = left.or(deadline.map(|_| Duration::from_secs(MESSAGE_TIMEOUT_SECS)));
        match wait(waits.map(|fd| (fd, Interest::Read)), left)? {
            [true, ..] => return Err(ChannelEnd::Stopped),
            // Without a point this is the stop event once more, set since the first look at it.
            [_, true, _] if self.point.is_none() => return Err(ChannelEnd::Stopped),
            [_, true, _] => return Err(ChannelEnd::Paused),
            [.., false] => return Err(ChannelEnd::Half),
            [.., true] => {}
        }
        let header = loop {
            let wanted = self.begun.wanted()?;
            match (
                wanted.checked_sub(self.begun.bytes.len()),
                self.begun.header(),
            ) {
                // More than all of it, which only another process can have left here.
                (None, _) => return Err(ChannelEnd::Half),
                (Some(0), Some(header)) => break header,
                (Some(rest), _) => self.receive_more(rest, &mut deadline)?,
            }
        };
        let Begun {
            bytes,
            fds,
            fds_truncated,
        } = std::mem::take(&mut self.begun);
        Ok(Message {
            header,
            payload: bytes.get(HEADER_LEN..).unwrap_or_default().to_vec(),
            fds,
            fds_truncated,
        })
    }

    /// Takes at most `rest` bytes more of the message that is coming.
    fn receive_more(
        &mut self,
        rest: usize,
        deadline: &mut Option<Instant>,
    ) -> Result<(), ChannelEnd> {
        let begun = &mut self.begun;
        let have = begun.bytes.len();
        begun.bytes.resize(have + rest, 0);
        let (fds, truncated) = (&mut begun.fds, &mut begun.fds_truncated);
        let buf = begun.bytes.get_mut(have..).unwrap_or_default();
        let outcome = receive_some(self.stream.as_fd(), buf, fds, truncated);
        let got = *outcome.as_ref().unwrap_or(&0);
        begun.bytes.truncate(have + got);
        match outcome {
            Ok(0) if have == 0 => Err(ChannelEnd::HangUp),
            Ok(0) => Err(ChannelEnd::Half),
            Ok(_) => {
                // The first byte starts the clock.
                deadline.get_or_insert_with(rest_deadline);
                Ok(())
            }
            Err(error) => match self.after(error, Interest::Read, *deadline)? {
                Ready::Yes => Ok(()),
                Ready::Pause => Err(ChannelEnd::Paused),
            },
        }
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
        let deadline = rest_deadline();
        // The descriptors go with the first byte.
        let sent = loop {
            match self.stream.send_with_fds(&[bytes.as_slice()], &raw) {
                Ok(sent) => break sent,
                Err(error) => self.after_write(error.into(), deadline)?,
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
        let deadline = rest_deadline();
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
                Err(_) => self.after_write(io::Error::last_os_error(), deadline)?,
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
        let deadline = rest_deadline();
        // A socket that is writable takes so few bytes at once.
        while !ready(self.stream.as_fd(), Interest::Write) {
            self.after_write(io::ErrorKind::WouldBlock.into(), deadline)?;
        }
        let bytes = [header.as_bytes(), payload].concat();
        match self.stream.send_with_fd(bytes.as_slice(), fd.as_raw_fd()) {
            Ok(n) if n == bytes.len() => Ok(()),
            Ok(_) => Err(ChannelEnd::Half),
            Err(error) => Err(io::Error::from(error).into()),
        }
    }

    fn after_write(&self, error: io::Error, deadline: Instant) -> Result<(), ChannelEnd> {
        match self.after(error, Interest::Write, Some(deadline))? {
            Ready::Yes => Ok(()),
            Ready::Pause => Err(ChannelEnd::Unread),
        }
    }

    /// After a call that did not get through: waits, or says why that is pointless.
    fn after(
        &self,
        error: io::Error,
        interest: Interest,
        deadline: Option<Instant>,
    ) -> Result<Ready, ChannelEnd> {
        match error.kind() {
            io::ErrorKind::Interrupted => return Ok(Ready::Yes),
            io::ErrorKind::WouldBlock => {}
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
                return Err(ChannelEnd::HangUp);
            }
            _ => return Err(error.into()),
        }
        let timeout = deadline.map(|d| d.saturating_duration_since(Instant::now()));
        let pause = self.point.map_or(self.stop, AsFd::as_fd);
        let ready = wait(
            [
                (self.stop, Interest::Read),
                (pause, Interest::Read),
                (self.stream.as_fd(), interest),
            ],
            timeout,
        )?;
        match ready {
            [true, ..] => Err(ChannelEnd::Stopped),
            // What can be done at once is done first.
            [.., true] => Ok(Ready::Yes),
            [_, true, _] if self.point.is_some() => Ok(Ready::Pause),
            [_, true, _] => Err(ChannelEnd::Stopped),
            [.., false] => Err(ChannelEnd::Half),
        }
    }
}

/// What a wait for the socket gave.
enum Ready {
    /// It can be tried again.
    Yes,
    /// It cannot, and a pause is asked for.
    Pause,
}

/// Until when the rest of a message may take.
fn rest_deadline() -> Instant {
    Instant::now() + Duration::from_secs(MESSAGE_TIMEOUT_SECS)
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
