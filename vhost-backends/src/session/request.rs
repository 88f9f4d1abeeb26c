//! Messages, parsed: a typed request or a refusal, and descriptors counted exactly.

use crate::limits::{MAX_CONFIG_LEN, MAX_TABLE_REGIONS};
use crate::session::socket::Message;
use crate::session::wire::{
    ConfigHead, FLAG_NEED_REPLY, FLAG_REPLY, INFLIGHT_SHORT, Inflight, LogBase, Region,
    SingleRegion, TableHead, VERSION, VERSION_MASK, VRING_INDEX_MASK, VRING_NOFD, VringAddr,
    VringState,
};
use std::os::fd::OwnedFd;
use vhost::vhost_user::message::FrontendReq;
use zerocopy::{FromBytes, Immutable, KnownLayout};

/// Where configuration space starts for frontends that count from the transport's registers
/// (older Cloud Hypervisor); others count from zero. No device has this much configuration.
const CONFIG_BASE_OLD: u32 = 0x100;

/// Why a message was not carried out. The session goes on, with its state unchanged.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// A request number that is not served.
    #[error("request {0} is not served")]
    NotServed(u32),
    /// A header with another version, or of a reply.
    #[error("header flags {0:#x}")]
    BadFlags(u32),
    /// The payload does not have this message's size.
    #[error("payload of {0} bytes")]
    BadSize(usize),
    /// Too few or too many descriptors.
    #[error("{0} descriptors")]
    BadFdCount(usize),
    /// No queue with this index.
    #[error("no queue {0}")]
    NoQueue(u64),
    /// A value outside its domain.
    #[error("{0}")]
    BadValue(&'static str),
    /// Not now: the ring is running, or what this builds on is missing.
    #[error("{0}")]
    BadState(&'static str),
    /// Feature bits that were not offered.
    #[error("features {0:#x} were not offered")]
    Features(u64),
    /// A memory region cannot be used.
    #[error("memory region: {0}")]
    Memory(#[from] crate::session::memory::MemoryError),
    /// A ring cannot be set up.
    #[error("ring: {0}")]
    Ring(#[from] crate::ring::RingError),
    /// A file cannot be an in-flight log.
    #[error("in-flight log: {0}")]
    Inflight(#[from] crate::ring::InflightError),
    /// A file cannot be a dirty log.
    #[error("dirty log: {0}")]
    DirtyLog(#[from] crate::ring::DirtyLogError),
    /// The host could not do it.
    #[error("host: {0}")]
    Host(#[from] std::io::Error),
}

/// What a frontend asks for.
#[derive(Debug)]
pub(crate) enum Request {
    GetFeatures,
    SetFeatures(u64),
    SetOwner,
    /// `RESET_OWNER` and `RESET_DEVICE`.
    Reset,
    SetMemTable(Vec<(Region, OwnedFd)>),
    SetVringNum(VringState),
    SetVringAddr(VringAddr),
    SetVringBase(VringState),
    GetVringBase(u32),
    SetVringKick(u64, Option<OwnedFd>),
    SetVringCall(u64, Option<OwnedFd>),
    SetVringErr(u64, Option<OwnedFd>),
    SetVringEnable(VringState),
    GetProtocolFeatures,
    SetProtocolFeatures(u64),
    GetQueueNum,
    GetConfig {
        /// As sent, for the reply.
        head: ConfigHead,
        /// From the start of configuration space.
        offset: u32,
    },
    SetConfig {
        offset: u32,
        data: Vec<u8>,
    },
    GetMaxMemSlots,
    AddMemReg(Region, OwnedFd),
    RemMemReg(Region),
    SetStatus(u64),
    GetStatus,
    GetInflight {
        shape: Inflight,
        /// Bytes of the payload, and so of the reply's.
        len: usize,
    },
    SetInflight(Inflight, OwnedFd),
    SetLogBase(LogBase, OwnedFd),
    SetLogFd(OwnedFd),
    SetBackendChannel(OwnedFd),
    SetMtu(u64),
    /// The station to announce.
    SendRarp([u8; 6]),
}

/// What kind of answer a request number has, whatever its content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// An acknowledgement, if that was negotiated and asked for.
    Ack,
    /// A payload of its own; a refused one is answered with none.
    Payload,
}

/// The kind of answer to a request number. Unknown numbers are taken for sets.
pub(crate) fn answer_kind(request: u32) -> Answer {
    match FrontendReq::try_from(request) {
        Ok(
            FrontendReq::GET_FEATURES
            | FrontendReq::GET_VRING_BASE
            | FrontendReq::GET_PROTOCOL_FEATURES
            | FrontendReq::GET_QUEUE_NUM
            | FrontendReq::GET_CONFIG
            | FrontendReq::GET_INFLIGHT_FD
            | FrontendReq::SET_LOG_BASE
            | FrontendReq::GET_MAX_MEM_SLOTS
            | FrontendReq::GET_STATUS
            | FrontendReq::CREATE_CRYPTO_SESSION
            | FrontendReq::POSTCOPY_ADVISE
            | FrontendReq::POSTCOPY_END
            | FrontendReq::GET_SHARED_OBJECT
            | FrontendReq::SET_DEVICE_STATE_FD
            | FrontendReq::CHECK_DEVICE_STATE
            | FrontendReq::GET_SHMEM_CONFIG,
        ) => Answer::Payload,
        _ => Answer::Ack,
    }
}

/// Parses a message. Descriptors that the request does not take are closed.
pub(crate) fn parse(message: Message) -> Result<Request, Refusal> {
    let flags = message.header.flags;
    if flags & VERSION_MASK != VERSION
        || flags & FLAG_REPLY != 0
        || flags & !(VERSION_MASK | FLAG_REPLY | FLAG_NEED_REPLY) != 0
    {
        return Err(Refusal::BadFlags(flags));
    }
    if message.fds_truncated {
        return Err(Refusal::BadFdCount(message.fds.len()));
    }
    let number = message.header.request;
    let code = FrontendReq::try_from(number).map_err(|_| Refusal::NotServed(number))?;
    let (body, fds) = (message.payload.as_slice(), message.fds);
    let request = match code {
        FrontendReq::SET_MEM_TABLE => return mem_table(body, fds),
        FrontendReq::ADD_MEM_REG => {
            let region = exact::<SingleRegion>(body)?.region;
            return Ok(Request::AddMemReg(region, one(fds)?));
        }
        FrontendReq::REM_MEM_REG => {
            // Older frontends attach the region's descriptor; it is closed without a look.
            if fds.len() > 1 {
                return Err(Refusal::BadFdCount(fds.len()));
            }
            return Ok(Request::RemMemReg(exact::<SingleRegion>(body)?.region));
        }
        FrontendReq::SET_VRING_KICK => {
            let (index, fd) = vring_fd(body, fds)?;
            return Ok(Request::SetVringKick(index, fd));
        }
        FrontendReq::SET_VRING_CALL => {
            let (index, fd) = vring_fd(body, fds)?;
            return Ok(Request::SetVringCall(index, fd));
        }
        FrontendReq::SET_VRING_ERR => {
            let (index, fd) = vring_fd(body, fds)?;
            return Ok(Request::SetVringErr(index, fd));
        }
        FrontendReq::SET_INFLIGHT_FD => {
            return Ok(Request::SetInflight(inflight(body)?, one(fds)?));
        }
        FrontendReq::SET_LOG_BASE => return Ok(Request::SetLogBase(exact(body)?, one(fds)?)),
        FrontendReq::SET_LOG_FD => return empty_or_u64(body, Request::SetLogFd(one(fds)?)),
        FrontendReq::SET_BACKEND_REQ_FD => {
            return empty_or_u64(body, Request::SetBackendChannel(one(fds)?));
        }
        FrontendReq::GET_INFLIGHT_FD => {
            let (shape, len) = (inflight(body)?, body.len());
            Request::GetInflight { shape, len }
        }
        FrontendReq::GET_FEATURES => empty(body, Request::GetFeatures)?,
        FrontendReq::SET_FEATURES => Request::SetFeatures(exact(body)?),
        FrontendReq::SET_OWNER => empty(body, Request::SetOwner)?,
        FrontendReq::RESET_OWNER | FrontendReq::RESET_DEVICE => empty(body, Request::Reset)?,
        FrontendReq::SET_VRING_NUM => Request::SetVringNum(exact(body)?),
        FrontendReq::SET_VRING_ADDR => Request::SetVringAddr(exact(body)?),
        FrontendReq::SET_VRING_BASE => Request::SetVringBase(exact(body)?),
        FrontendReq::GET_VRING_BASE => Request::GetVringBase(exact::<VringState>(body)?.index),
        FrontendReq::SET_VRING_ENABLE => Request::SetVringEnable(exact(body)?),
        FrontendReq::GET_PROTOCOL_FEATURES => empty(body, Request::GetProtocolFeatures)?,
        FrontendReq::SET_PROTOCOL_FEATURES => Request::SetProtocolFeatures(exact(body)?),
        FrontendReq::GET_QUEUE_NUM => empty(body, Request::GetQueueNum)?,
        FrontendReq::GET_CONFIG => {
            let (head, offset, _) = config(body)?;
            Request::GetConfig { head, offset }
        }
        FrontendReq::SET_CONFIG => {
            let (_, offset, data) = config(body)?;
            let data = data.to_vec();
            Request::SetConfig { offset, data }
        }
        FrontendReq::GET_MAX_MEM_SLOTS => empty(body, Request::GetMaxMemSlots)?,
        FrontendReq::SET_STATUS => Request::SetStatus(exact(body)?),
        FrontendReq::GET_STATUS => empty(body, Request::GetStatus)?,
        FrontendReq::NET_SET_MTU => Request::SetMtu(exact(body)?),
        FrontendReq::SEND_RARP => {
            // Six bytes of address, and two that mean nothing.
            let [a, b, c, d, e, f, _, _] = exact::<u64>(body)?.to_ne_bytes();
            Request::SendRarp([a, b, c, d, e, f])
        }
        // Nothing of these is offered: IOTLB, postcopy, device state, shared objects.
        _ => return Err(Refusal::NotServed(number)),
    };
    if fds.is_empty() {
        Ok(request)
    } else {
        Err(Refusal::BadFdCount(fds.len()))
    }
}

fn exact<T: FromBytes + KnownLayout + Immutable>(body: &[u8]) -> Result<T, Refusal> {
    T::read_from_bytes(body).map_err(|_| Refusal::BadSize(body.len()))
}

fn empty(body: &[u8], request: Request) -> Result<Request, Refusal> {
    if body.is_empty() {
        Ok(request)
    } else {
        Err(Refusal::BadSize(body.len()))
    }
}

/// Frontends differ in whether these have a payload; its value means nothing.
fn empty_or_u64(body: &[u8], request: Request) -> Result<Request, Refusal> {
    if body.len() == size_of::<u64>() {
        Ok(request)
    } else {
        empty(body, request)
    }
}

fn inflight(body: &[u8]) -> Result<Inflight, Refusal> {
    if body.len() != INFLIGHT_SHORT {
        return exact(body);
    }
    let mut whole = [0; size_of::<Inflight>()];
    for (to, from) in whole.iter_mut().zip(body) {
        *to = *from;
    }
    exact(&whole)
}

fn one(fds: Vec<OwnedFd>) -> Result<OwnedFd, Refusal> {
    let count = fds.len();
    match <[OwnedFd; 1]>::try_from(fds) {
        Ok([fd]) => Ok(fd),
        Err(_) => Err(Refusal::BadFdCount(count)),
    }
}

fn vring_fd(body: &[u8], fds: Vec<OwnedFd>) -> Result<(u64, Option<OwnedFd>), Refusal> {
    let value: u64 = exact(body)?;
    if value & !(VRING_INDEX_MASK | VRING_NOFD) != 0 {
        return Err(Refusal::BadValue("reserved bits beside the queue's index"));
    }
    let index = value & VRING_INDEX_MASK;
    if value & VRING_NOFD == 0 {
        Ok((index, Some(one(fds)?)))
    } else if fds.is_empty() {
        Ok((index, None))
    } else {
        Err(Refusal::BadFdCount(fds.len()))
    }
}

fn mem_table(body: &[u8], fds: Vec<OwnedFd>) -> Result<Request, Refusal> {
    let (head, rest) =
        TableHead::read_from_prefix(body).map_err(|_| Refusal::BadSize(body.len()))?;
    let count = usize::try_from(head.count).unwrap_or(usize::MAX);
    if count == 0 || count > MAX_TABLE_REGIONS {
        return Err(Refusal::BadValue("number of memory regions"));
    }
    if rest.len() != count * size_of::<Region>() {
        return Err(Refusal::BadSize(body.len()));
    }
    if fds.len() != count {
        return Err(Refusal::BadFdCount(fds.len()));
    }
    let regions = rest
        .chunks_exact(size_of::<Region>())
        .map(exact::<Region>)
        .collect::<Result<Vec<_>, _>>()?;
    Ok(Request::SetMemTable(regions.into_iter().zip(fds).collect()))
}

fn config(body: &[u8]) -> Result<(ConfigHead, u32, &[u8]), Refusal> {
    let (head, data) =
        ConfigHead::read_from_prefix(body).map_err(|_| Refusal::BadSize(body.len()))?;
    if u32::try_from(data.len()) != Ok(head.size) || data.len() > MAX_CONFIG_LEN {
        return Err(Refusal::BadSize(body.len()));
    }
    let offset = head
        .offset
        .checked_sub(CONFIG_BASE_OLD)
        .unwrap_or(head.offset);
    if u64::from(offset) + u64::from(head.size) > MAX_CONFIG_LEN as u64 {
        return Err(Refusal::BadValue("configuration range"));
    }
    Ok((head, offset, data))
}
