//! A tap interface of the host.
//!
//! Frames carry their offloads in both directions: what the guest sends goes on as it is, and what
//! comes is as large as the guest takes it, which the kernel is told whenever that changes.
#![allow(unsafe_code)]
// UNSAFETY: the ioctls of tap interfaces.

use super::writer::{self, Writer};
use super::{Port, Received, vectors};
use crate::net::frame::Frame;
use crate::net::limits::{MAX_BATCH, MAX_QUEUE_PAIRS};
use crate::net::offload::Offloads;
use crate::net::source::{Came, Reader};
use crate::net::stats::Drop;
use crate::session::quota::PEER_LINES;
use pv_abi::virtio::net::Header;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Mutex, PoisonError};
use zerocopy::IntoBytes;

/// `TUNSETOFFLOAD`, `TUNSETQUEUE`: what is called once the sandbox is entered.
pub(crate) const LATE_IOCTLS: [u64; 2] = [0x4004_54d0, 0x4004_54d9];
const TUNSETIFF: u64 = 0x4004_54ca;
const TUNGETIFF: u64 = 0x8004_54d2;
const TUNSETVNETHDRSZ: u64 = 0x4004_54d8;

/// `TUNSETOFFLOAD`.
const CSUM: u64 = 1;
const TSO4: u64 = 2;
const TSO6: u64 = 4;
const TSO_ECN: u64 = 8;
const USO4: u64 = 0x20;
const USO6: u64 = 0x40;

/// `struct ifreq`, as far as tap interfaces use it.
#[repr(C)]
struct Request {
    name: [u8; libc::IFNAMSIZ],
    flags: libc::c_short,
    rest: [u8; 22],
}

/// Whether frames are written together.
#[derive(Debug, Default)]
enum Together {
    /// Not known yet.
    #[default]
    Unknown,
    Yes(Box<Writer>),
    /// The host cannot do it.
    No,
}

/// A tap interface, with a queue for each pair.
#[derive(Debug)]
pub struct Tap {
    queues: Vec<File>,
    /// Of each queue.
    writers: Vec<Mutex<Together>>,
    /// The kernel takes large UDP frames (Linux 6.2 and later).
    uso: bool,
    /// Queues that the kernel spreads frames over.
    attached: AtomicU16,
}

impl Tap {
    /// Opens the interface `name`, or makes one for as long as this exists. Bringing it up is the
    /// caller's.
    pub fn open(name: &str, pairs: u16) -> io::Result<Tap> {
        let pairs = pairs.clamp(1, MAX_QUEUE_PAIRS);
        let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if pairs > 1 {
            flags |= libc::IFF_MULTI_QUEUE;
        }
        let bytes = name.as_bytes();
        if bytes.is_empty() || bytes.len() >= libc::IFNAMSIZ || bytes.contains(&0) {
            let reason = "a name has 1 to 15 bytes";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
        }
        let open = |_| {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
                .open("/dev/net/tun")?;
            // Bits 0 to 15.
            let mut request = request(flags as libc::c_short);
            for (to, from) in request.name.iter_mut().zip(bytes) {
                *to = *from;
            }
            // SAFETY: the request is an ifreq that lives through the call.
            check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) })?;
            Ok(file)
        };
        let queues = (0..pairs).map(open).collect::<io::Result<_>>()?;
        Tap::ready(queues)
    }

    /// Takes queues of a tap interface that somebody else opened, with `IFF_VNET_HDR`.
    pub fn from_fds(fds: Vec<OwnedFd>) -> io::Result<Tap> {
        let bad = |reason| Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
        if fds.is_empty() || fds.len() > usize::from(MAX_QUEUE_PAIRS) {
            return bad("a tap interface has 1 to 7 queues here");
        }
        let queues: Vec<File> = fds.into_iter().map(File::from).collect();
        for file in &queues {
            let mut request = request(0);
            // SAFETY: the request is an ifreq that lives through the call.
            check(unsafe { libc::ioctl(file.as_raw_fd(), TUNGETIFF, &raw mut request) })?;
            let flags = libc::c_int::from(request.flags);
            if flags & libc::IFF_TAP == 0 || flags & libc::IFF_NO_PI == 0 {
                return bad("the descriptor is not of a tap interface without packet information");
            }
            if flags & libc::IFF_VNET_HDR == 0 {
                return bad("the tap interface was opened without IFF_VNET_HDR");
            }
            let flags = crate::readiness::status_flags(file.as_fd())? | libc::O_NONBLOCK;
            // SAFETY: F_SETFL takes no pointer.
            check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags) })?;
        }
        Tap::ready(queues)
    }

    fn ready(queues: Vec<File>) -> io::Result<Tap> {
        let len = size_of::<Header>() as libc::c_int;
        for file in &queues {
            // SAFETY: the length is an int that lives through the call.
            check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETVNETHDRSZ, &raw const len) })?;
        }
        let attached = AtomicU16::new(queues.len() as u16);
        let writers = queues.iter().map(|_| Mutex::default()).collect();
        let mut tap = Tap {
            queues,
            writers,
            uso: false,
            attached,
        };
        tap.uso = tap.tell(CSUM | USO4 | USO6).is_ok();
        tap.tell(0)?;
        tap.attach_queues(1);
        Ok(tap)
    }

    /// Tells the kernel what the guest takes.
    fn tell(&self, offloads: u64) -> io::Result<()> {
        let Some(first) = self.queues.first() else {
            return Ok(());
        };
        // SAFETY: TUNSETOFFLOAD takes no pointer.
        check(unsafe { libc::ioctl(first.as_raw_fd(), LATE_IOCTLS[0], offloads) })
    }

    fn attach_queues(&self, wanted: u16) {
        let wanted = wanted.clamp(1, self.queues.len() as u16);
        // Ordering: Relaxed, calls come one after the other.
        let now = self.attached.swap(wanted, Ordering::Relaxed);
        for (index, file) in (0..).zip(&self.queues) {
            let flag = match (index < now, index < wanted) {
                (false, true) => libc::IFF_ATTACH_QUEUE,
                (true, false) => libc::IFF_DETACH_QUEUE,
                _ => continue,
            };
            // Bits 0 to 15.
            let mut request = request(flag as libc::c_short);
            // SAFETY: the request is an ifreq that lives through the call.
            let done = unsafe { libc::ioctl(file.as_raw_fd(), LATE_IOCTLS[1], &raw mut request) };
            if let Err(error) = check(done)
                && PEER_LINES.may_say()
            {
                tracing::warn!(%error, index, "a tap queue stays as it was");
            }
        }
    }
}

impl Tap {
    /// Sends frames with few system calls. `None`: the host cannot, and nothing was sent.
    fn send_together(
        &self,
        pair: u16,
        file: BorrowedFd<'_>,
        frames: &[Frame<'_>],
    ) -> Option<usize> {
        let writer = self.writers.get(usize::from(pair))?;
        let mut together = writer.lock().unwrap_or_else(PoisonError::into_inner);
        if let Together::Unknown = *together {
            *together = match Writer::new() {
                Ok(writer) => Together::Yes(Box::new(writer)),
                Err(_) => Together::No,
            };
        }
        let Together::Yes(writer) = &mut *together else {
            return None;
        };
        let mut taken = 0;
        for some in frames.chunks(MAX_BATCH) {
            match writer.write(file, some) {
                Ok(n) => taken += n,
                Err(error) => {
                    *together = Together::No;
                    // The first that is tried says it.
                    let unsupported = error.kind() == io::ErrorKind::Unsupported && taken == 0;
                    return (!unsupported).then_some(taken);
                }
            }
        }
        Some(taken)
    }
}

fn request(flags: libc::c_short) -> Request {
    Request {
        name: [0; libc::IFNAMSIZ],
        flags,
        rest: [0; 22],
    }
}

fn check(code: libc::c_int) -> io::Result<()> {
    if code < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

impl Port for Tap {
    fn max_pairs(&self) -> u16 {
        // At most MAX_QUEUE_PAIRS.
        self.queues.len() as u16
    }

    fn offloads(&self) -> Offloads {
        Offloads {
            uso4: self.uso,
            uso6: self.uso,
            ..Offloads::ALL
        }
    }

    fn set_guest_offloads(&self, offloads: Offloads) {
        let mut bits = 0;
        if offloads.checksum {
            for (taken, bit) in [
                (true, CSUM),
                (offloads.tso4, TSO4),
                (offloads.tso6, TSO6),
                (offloads.ecn && (offloads.tso4 || offloads.tso6), TSO_ECN),
                // The kernel knows both or neither.
                (self.uso && offloads.uso4 && offloads.uso6, USO4 | USO6),
            ] {
                bits |= if taken { bit } else { 0 };
            }
        }
        if let Err(error) = self.tell(bits)
            && PEER_LINES.may_say()
        {
            // Frames come as they came before, and are completed on the way to the guest.
            tracing::warn!(%error, "the tap interface keeps its offloads");
        }
    }

    fn set_pairs(&self, pairs: u16) {
        self.attach_queues(pairs);
    }

    fn send(&self, pair: u16, frames: &[Frame<'_>]) -> usize {
        let Some(file) = self.queues.get(usize::from(pair)) else {
            return 0;
        };
        if frames.len() >= writer::WORTH
            && let Some(taken) = self.send_together(pair, file.as_fd(), frames)
        {
            return taken;
        }
        let mut taken = 0;
        for frame in frames {
            let sent = vectors::write(file.as_fd(), frame.header.as_bytes(), frame.pieces());
            // A frame that the kernel does not like is gone, as on any network; so is one for an
            // interface that is down.
            if sent.is_ok() {
                taken += 1;
            }
        }
        taken
    }

    fn source(&self, pair: u16) -> Option<BorrowedFd<'_>> {
        self.queues.get(usize::from(pair)).map(AsFd::as_fd)
    }

    fn receive(&self, pair: u16, reader: &mut Reader<'_>) -> io::Result<Received> {
        let Some(file) = self.queues.get(usize::from(pair)) else {
            return Ok(Received::Drained);
        };
        let mut lost = 0;
        for _ in 0..Reader::BATCH {
            let read = reader.read(|head, views, rest| {
                let n = vectors::read(file.as_fd(), head, views, rest)?;
                let len = n.checked_sub(head.len());
                let len = len.ok_or(io::ErrorKind::InvalidData)?;
                Ok(Came { len, tag: None })
            });
            match read {
                Ok(true) => {}
                Ok(false) => return Ok(Received::Drained),
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return Ok(Received::Drained),
                    io::ErrorKind::Interrupted => {}
                    // A frame that its header has no words for is gone.
                    io::ErrorKind::InvalidInput => {
                        reader.drop(Drop::PortError);
                        lost += 1;
                    }
                    // The interface is gone, or this queue is detached.
                    _ if error.raw_os_error() == Some(libc::EBADFD) => {
                        return Ok(Received::Away);
                    }
                    _ => return Err(error),
                },
            }
        }
        Ok(Received::after_losing(lost))
    }
}
