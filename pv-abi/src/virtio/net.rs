//! Network device (virtio 1.3 §5.1).

use crate::assert_layout;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Feature bits, as masks (virtio 1.3 §5.1.3).
pub mod feature {
    /// The device completes the checksums of packets that the driver sends.
    pub const CSUM: u64 = 1 << 0;
    /// The driver takes packets with partial checksums.
    pub const GUEST_CSUM: u64 = 1 << 1;
    /// The driver may change its receive offloads.
    pub const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
    /// `mtu` is valid.
    pub const MTU: u64 = 1 << 3;
    /// `mac` is valid.
    pub const MAC: u64 = 1 << 5;
    /// The driver takes TSOv4.
    pub const GUEST_TSO4: u64 = 1 << 7;
    /// The driver takes TSOv6.
    pub const GUEST_TSO6: u64 = 1 << 8;
    /// The driver takes TSO with ECN.
    pub const GUEST_ECN: u64 = 1 << 9;
    /// The device takes TSOv4.
    pub const HOST_TSO4: u64 = 1 << 11;
    /// The device takes TSOv6.
    pub const HOST_TSO6: u64 = 1 << 12;
    /// The device takes TSO with ECN.
    pub const HOST_ECN: u64 = 1 << 13;
    /// The driver can merge receive buffers.
    pub const MRG_RXBUF: u64 = 1 << 15;
    /// `status` is valid.
    pub const STATUS: u64 = 1 << 16;
    /// There is a control queue.
    pub const CTRL_VQ: u64 = 1 << 17;
    /// Control queue: receive modes.
    pub const CTRL_RX: u64 = 1 << 18;
    /// Control queue: VLAN filter.
    pub const CTRL_VLAN: u64 = 1 << 19;
    /// Control queue: the other receive modes.
    pub const CTRL_RX_EXTRA: u64 = 1 << 20;
    /// The driver can announce itself.
    pub const GUEST_ANNOUNCE: u64 = 1 << 21;
    /// More than one pair of queues.
    pub const MQ: u64 = 1 << 22;
    /// Control queue: the MAC address.
    pub const CTRL_MAC_ADDR: u64 = 1 << 23;
    /// Control queue: notification coalescing for each queue.
    pub const VQ_NOTF_COAL: u64 = 1 << 52;
    /// Control queue: notification coalescing.
    pub const NOTF_COAL: u64 = 1 << 53;
    /// The driver takes USOv4.
    pub const GUEST_USO4: u64 = 1 << 54;
    /// The driver takes USOv6.
    pub const GUEST_USO6: u64 = 1 << 55;
    /// The device takes USO.
    pub const HOST_USO: u64 = 1 << 56;
    /// A hash of each received packet.
    pub const HASH_REPORT: u64 = 1 << 57;
    /// `hdr_len` is exact.
    pub const GUEST_HDRLEN: u64 = 1 << 59;
    /// Receive-side scaling.
    pub const RSS: u64 = 1 << 60;
}

/// `Config::status` bits.
pub mod status {
    /// The link is up.
    pub const LINK_UP: u16 = 1;
    /// The driver should announce itself.
    pub const ANNOUNCE: u16 = 2;
}

/// Configuration space (virtio 1.3 §5.1.4).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C, packed)]
pub struct Config {
    /// MAC address.
    pub mac: [u8; 6],
    /// [`status`].
    pub status: u16,
    /// Most pairs of queues.
    pub max_virtqueue_pairs: u16,
    /// Most bytes in a packet, without its Ethernet header.
    pub mtu: u16,
    /// Mbit/s; all ones if unknown.
    pub speed: u32,
    /// 0 half, 1 full, 255 unknown.
    pub duplex: u8,
    /// Longest RSS key, in bytes.
    pub rss_max_key_size: u8,
    /// Longest RSS indirection table, in entries.
    pub rss_max_indirection_table_length: u16,
    /// Kinds of hashes: [`hash_type`].
    pub supported_hash_types: u32,
}
assert_layout!(Config, size 24, align 1, mac @ 0, status @ 6, max_virtqueue_pairs @ 8, mtu @ 10,
    speed @ 12, duplex @ 16, rss_max_key_size @ 17, rss_max_indirection_table_length @ 18,
    supported_hash_types @ 20);

/// `Header::flags` (virtio 1.3 §5.1.6).
pub mod header_flag {
    /// The checksum from `csum_start` on is to be completed at `csum_offset`.
    pub const NEEDS_CSUM: u8 = 1;
    /// The device has checked the checksum.
    pub const DATA_VALID: u8 = 2;
}

/// `Header::gso_type`.
pub mod gso {
    /// One packet.
    pub const NONE: u8 = 0;
    /// TCP on IPv4.
    pub const TCPV4: u8 = 1;
    /// TCP on IPv6.
    pub const TCPV6: u8 = 4;
    /// UDP, one datagram in each segment.
    pub const UDP_L4: u8 = 5;
    /// With the others: TCP with ECN.
    pub const ECN: u8 = 0x80;
}

/// What comes before each packet (virtio 1.3 §5.1.6). With `HASH_REPORT`, [`HashReport`] follows.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Header {
    /// [`header_flag`].
    pub flags: u8,
    /// [`gso`].
    pub gso_type: u8,
    /// Bytes of all headers: a hint.
    pub hdr_len: u16,
    /// Bytes of payload in each segment.
    pub gso_size: u16,
    /// Where the checksum begins.
    pub csum_start: u16,
    /// Where it goes, from there on.
    pub csum_offset: u16,
    /// Receive buffers that hold the packet; zero in sent ones.
    pub num_buffers: u16,
}
assert_layout!(Header, size 12, align 2, flags @ 0, gso_type @ 1, hdr_len @ 2, gso_size @ 4,
    csum_start @ 6, csum_offset @ 8, num_buffers @ 10);

/// Bytes of [`Header`] without `num_buffers`, for drivers before virtio 1.0.
pub const LEGACY_HEADER_LEN: usize = 10;

/// The hash of a packet (virtio 1.3 §5.1.6.4.4).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct HashReport {
    /// Its value.
    pub value: u32,
    /// What it covers: zero if nothing, otherwise one plus the position in [`hash_type`].
    pub report: u16,
    /// Zero.
    pub reserved: u16,
}
assert_layout!(HashReport, size 8, align 4, value @ 0, report @ 4, reserved @ 6);

/// Kinds of hashes (virtio 1.3 §5.1.6.4.3.1).
pub mod hash_type {
    /// IPv4.
    pub const IPV4: u32 = 1 << 0;
    /// TCP on IPv4.
    pub const TCPV4: u32 = 1 << 1;
    /// UDP on IPv4.
    pub const UDPV4: u32 = 1 << 2;
    /// IPv6.
    pub const IPV6: u32 = 1 << 3;
    /// TCP on IPv6.
    pub const TCPV6: u32 = 1 << 4;
    /// UDP on IPv6.
    pub const UDPV6: u32 = 1 << 5;
}

/// What comes first in a control command (virtio 1.3 §5.1.6.5).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct ControlHeader {
    /// [`control`]: which group.
    pub class: u8,
    /// Which one of it.
    pub command: u8,
}
assert_layout!(ControlHeader, size 2, align 1, class @ 0, command @ 1);

/// Control commands (virtio 1.3 §5.1.6.5), each `(class, command)`, and their answers.
pub mod control {
    /// Answer: done.
    pub const OK: u8 = 0;
    /// Answer: refused.
    pub const ERR: u8 = 1;
    /// Take every packet: one byte, on or off.
    pub const RX_PROMISC: (u8, u8) = (0, 0);
    /// Take every multicast packet.
    pub const RX_ALLMULTI: (u8, u8) = (0, 1);
    /// Take every unicast packet.
    pub const RX_ALLUNI: (u8, u8) = (0, 2);
    /// Take no multicast packet.
    pub const RX_NOMULTI: (u8, u8) = (0, 3);
    /// Take no unicast packet.
    pub const RX_NOUNI: (u8, u8) = (0, 4);
    /// Take no broadcast packet.
    pub const RX_NOBCAST: (u8, u8) = (0, 5);
    /// Two tables of addresses, each with a 32-bit count in front: unicast and multicast.
    pub const MAC_TABLE_SET: (u8, u8) = (1, 0);
    /// The MAC address: six bytes.
    pub const MAC_ADDR_SET: (u8, u8) = (1, 1);
    /// Take packets of a VLAN: 16 bits.
    pub const VLAN_ADD: (u8, u8) = (2, 0);
    /// Do not take them any more.
    pub const VLAN_DEL: (u8, u8) = (2, 1);
    /// The driver has announced itself.
    pub const ANNOUNCE_ACK: (u8, u8) = (3, 0);
    /// Pairs of queues in use: 16 bits.
    pub const MQ_VQ_PAIRS_SET: (u8, u8) = (4, 0);
    /// Receive-side scaling: hash types, indirection table, queues, key.
    pub const MQ_RSS_CONFIG: (u8, u8) = (4, 1);
    /// Hashes to report: hash types, reserved, key.
    pub const MQ_HASH_CONFIG: (u8, u8) = (4, 2);
    /// Receive offloads: 64 bits of features.
    pub const GUEST_OFFLOADS_SET: (u8, u8) = (5, 0);
    /// Coalescing of sent packets: most packets, then most microseconds, 32 bits each.
    pub const NOTF_COAL_TX_SET: (u8, u8) = (6, 0);
    /// Coalescing of received packets.
    pub const NOTF_COAL_RX_SET: (u8, u8) = (6, 1);
    /// Coalescing of one queue: its index, reserved (16 bits each), packets, microseconds.
    pub const NOTF_COAL_VQ_SET: (u8, u8) = (6, 2);
    /// What a queue coalesces: as `NOTF_COAL_VQ_SET`, the last two written by the device.
    pub const NOTF_COAL_VQ_GET: (u8, u8) = (6, 3);
}
