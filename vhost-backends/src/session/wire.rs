//! The bytes of vhost-user messages (vhost-user: message specification).
//!
//! Request numbers and feature bits come from the crate `vhost`. Its header is private and its
//! bodies are tied to its own connection type, so the layouts are here.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// `flags`: the protocol's version.
pub(crate) const VERSION: u32 = 1;
/// `flags`: where the version is.
pub(crate) const VERSION_MASK: u32 = 3;
/// `flags`: this is a reply.
pub(crate) const FLAG_REPLY: u32 = 1 << 2;
/// `flags`: the sender wants to know how it went.
pub(crate) const FLAG_NEED_REPLY: u32 = 1 << 3;
/// Bytes of a header.
pub(crate) const HEADER_LEN: usize = size_of::<Header>();
/// `SET_VRING_KICK` and its like: which bits are the queue's index.
pub(crate) const VRING_INDEX_MASK: u64 = 0xff;
/// `SET_VRING_KICK` and its like: no descriptor is attached.
pub(crate) const VRING_NOFD: u64 = 1 << 8;

/// The head of every message.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct Header {
    pub(crate) request: u32,
    pub(crate) flags: u32,
    pub(crate) size: u32,
}
const _: () = assert!(size_of::<Header>() == 12);

/// `SET_VRING_NUM`, `SET_VRING_BASE`, `GET_VRING_BASE`, `SET_VRING_ENABLE`.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct VringState {
    pub(crate) index: u32,
    pub(crate) num: u32,
}
const _: () = assert!(size_of::<VringState>() == 8);

/// `SET_VRING_ADDR`.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct VringAddr {
    pub(crate) index: u32,
    pub(crate) flags: u32,
    pub(crate) desc: u64,
    pub(crate) used: u64,
    pub(crate) avail: u64,
    pub(crate) log: u64,
}
const _: () = assert!(size_of::<VringAddr>() == 40);

/// One region of memory.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub(crate) struct Region {
    pub(crate) guest_addr: u64,
    pub(crate) size: u64,
    pub(crate) user_addr: u64,
    pub(crate) mmap_offset: u64,
}
const _: () = assert!(size_of::<Region>() == 32);

/// The head of `SET_MEM_TABLE`; `count` regions follow.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct TableHead {
    pub(crate) count: u32,
    pub(crate) padding: u32,
}
const _: () = assert!(size_of::<TableHead>() == 8);

/// `ADD_MEM_REG` and `REM_MEM_REG`.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct SingleRegion {
    pub(crate) padding: u64,
    pub(crate) region: Region,
}
const _: () = assert!(size_of::<SingleRegion>() == 40);

/// The head of `GET_CONFIG` and `SET_CONFIG`; `size` bytes follow.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct ConfigHead {
    pub(crate) offset: u32,
    pub(crate) size: u32,
    pub(crate) flags: u32,
}
const _: () = assert!(size_of::<ConfigHead>() == 12);

/// `GET_INFLIGHT_FD` and `SET_INFLIGHT_FD`. Some frontends leave out the padding at the end.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct Inflight {
    pub(crate) mmap_size: u64,
    pub(crate) mmap_offset: u64,
    pub(crate) num_queues: u16,
    pub(crate) queue_size: u16,
    pub(crate) padding: u32,
}
const _: () = assert!(size_of::<Inflight>() == 24);
/// Bytes of [`Inflight`] without its padding.
pub(crate) const INFLIGHT_SHORT: usize = 20;

/// `SET_LOG_BASE` with `LOG_SHMFD`.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct LogBase {
    pub(crate) mmap_size: u64,
    pub(crate) mmap_offset: u64,
}
const _: () = assert!(size_of::<LogBase>() == 16);

/// `VringAddr::flags`: writes to the ring are to be logged.
pub(crate) const VRING_F_LOG: u32 = 1;
/// What a backend may say: the configuration changed.
pub(crate) const BACKEND_CONFIG_CHANGED: u32 = 2;
