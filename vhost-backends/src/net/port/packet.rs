//! A network interface of the host, through a packet socket (packet(7)).
//!
//! The kernel takes a frame's VLAN tag out before packet sockets see it, and says so beside the
//! frame; it is put back on the way to the guest.
#![allow(unsafe_code)]
// UNSAFETY: socket, bind, setsockopt and if_nametoindex as packet sockets need them.

use super::{Port, Received, vectors};
use crate::net::frame::Frame;
use crate::net::offload::Offloads;
use crate::net::source::{Came, Reader};
use crate::net::stats::Drop;
use pv_abi::virtio::net::LEGACY_HEADER_LEN;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use zerocopy::IntoBytes;

/// Every protocol, in network order.
const ALL: u16 = (libc::ETH_P_ALL as u16).to_be();
/// Do not show what is sent on the interface by this host (Linux 4.20).
const PACKET_IGNORE_OUTGOING: libc::c_int = 23;
/// Bytes of frames that wait in the kernel.
const RECEIVE_BUFFER: libc::c_int = 4 << 20;
/// Words for what the kernel says beside a frame: `struct cmsghdr` and `struct tpacket_auxdata`.
const CONTROL_WORDS: usize = 8;
/// `tp_vlan_tci` is one, and `tp_vlan_tpid` too.
const VLAN_VALID: u32 = 1 << 4;
const VLAN_PROTOCOL_VALID: u32 = 1 << 6;

/// An interface, taken as it is: frames that the host itself gets are seen too.
#[derive(Debug)]
pub struct Interface {
    socket: OwnedFd,
}

impl Interface {
    /// Opens the interface `name`, and lets it take frames for any station.
    pub fn open(name: &str) -> io::Result<Interface> {
        let c_name = CString::new(name)?;
        // SAFETY: the name is a C string.
        let index = unsafe { libc::if_nametoindex(c_name.as_ptr()) };
        let index = libc::c_int::try_from(index).unwrap_or(0);
        if index == 0 {
            return Err(io::Error::last_os_error());
        }
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // No protocol: nothing is queued before the socket is bound to its interface.
        // SAFETY: socket takes no pointer.
        let fd = unsafe { libc::socket(libc::AF_PACKET, kind, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made and nothing else owns it.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        let on: libc::c_int = 1;
        set(&socket, libc::SOL_PACKET, libc::PACKET_VNET_HDR, &on)?;
        set(&socket, libc::SOL_PACKET, PACKET_IGNORE_OUTGOING, &on)?;
        set(&socket, libc::SOL_PACKET, libc::PACKET_AUXDATA, &on)?;
        // As much as the host allows.
        let _ = set(&socket, libc::SOL_SOCKET, libc::SO_RCVBUF, &RECEIVE_BUFFER);
        // SAFETY: all-zero is a valid packet_mreq.
        let mut membership: libc::packet_mreq = unsafe { std::mem::zeroed() };
        membership.mr_ifindex = index;
        membership.mr_type = libc::PACKET_MR_PROMISC as libc::c_ushort;
        let add = libc::PACKET_ADD_MEMBERSHIP;
        set(&socket, libc::SOL_PACKET, add, &membership)?;
        // SAFETY: all-zero is a valid sockaddr_ll.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as libc::c_ushort;
        address.sll_protocol = ALL;
        address.sll_ifindex = index;
        // SAFETY: the address is valid for the length given.
        let code = unsafe {
            libc::bind(
                socket.as_raw_fd(),
                (&raw const address).cast(),
                size_of_val(&address) as libc::socklen_t,
            )
        };
        if code < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Interface { socket })
    }
}

fn set<T>(socket: &OwnedFd, level: libc::c_int, name: libc::c_int, value: &T) -> io::Result<()> {
    // SAFETY: the value is valid for its own size.
    let code = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw const *value).cast(),
            size_of::<T>() as libc::socklen_t,
        )
    };
    if code < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The tag that a frame was parted from, in the frame's order.
fn tag(control: &[u8]) -> Option<[u8; 4]> {
    let half = |at: usize| Some(u16::from_ne_bytes(*control.get(at..)?.first_chunk()?));
    let word = |at: usize| Some(u32::from_ne_bytes(*control.get(at..)?.first_chunk()?));
    // The length of both, level and type.
    let data = size_of::<usize>() + 8;
    let kind = [word(data - 8)?, word(data - 4)?];
    let status = word(data)?;
    if kind != [libc::SOL_PACKET as u32, libc::PACKET_AUXDATA as u32] || status & VLAN_VALID == 0 {
        return None;
    }
    let value = half(data + 16)?;
    let protocol = match status & VLAN_PROTOCOL_VALID {
        0 => libc::ETH_P_8021Q as u16,
        _ => half(data + 18)?,
    };
    let ([a, b], [c, d]) = (protocol.to_be_bytes(), value.to_be_bytes());
    Some([a, b, c, d])
}

impl Port for Interface {
    fn max_pairs(&self) -> u16 {
        1
    }

    fn offloads(&self) -> Offloads {
        // Large UDP frames depend on the kernel and the driver.
        Offloads {
            uso4: false,
            uso6: false,
            ..Offloads::ALL
        }
    }

    fn send(&self, _pair: u16, frames: &[Frame<'_>]) -> usize {
        let mut taken = 0;
        for frame in frames {
            let header = frame.header.as_bytes();
            let header = header.get(..LEGACY_HEADER_LEN).unwrap_or_default();
            match vectors::write(self.socket.as_fd(), header, frame.pieces()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // One that the interface does not carry is gone.
                _ => taken += 1,
            }
        }
        taken
    }

    fn source(&self, pair: u16) -> Option<BorrowedFd<'_>> {
        (pair == 0).then(|| self.socket.as_fd())
    }

    fn receive(&self, _pair: u16, reader: &mut Reader<'_>) -> io::Result<Received> {
        let mut lost = 0;
        for _ in 0..Reader::BATCH {
            let read = reader.read(|head, views, rest| {
                let head = head.get_mut(..LEGACY_HEADER_LEN).unwrap_or_default();
                let mut control = [0u64; CONTROL_WORDS];
                let fd = self.socket.as_fd();
                let (n, said) = vectors::receive(fd, head, views, rest, &mut control)?;
                let len = n.checked_sub(LEGACY_HEADER_LEN);
                let len = len.ok_or(io::ErrorKind::InvalidData)?;
                let control = control.as_bytes().get(..said).unwrap_or_default();
                let tag = tag(control);
                Ok(Came { len, tag })
            });
            match read {
                Ok(true) => {}
                Ok(false) => return Ok(Received::Drained),
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return Ok(Received::Drained),
                    // The interface went down, or a frame was too short to have a header.
                    io::ErrorKind::NetworkDown
                    | io::ErrorKind::Interrupted
                    | io::ErrorKind::InvalidData => {}
                    // A frame that its header has no words for is gone.
                    io::ErrorKind::InvalidInput => {
                        reader.drop(Drop::PortError);
                        lost += 1;
                    }
                    _ => return Err(error),
                },
            }
        }
        Ok(Received::after_losing(lost))
    }
}
