//! A vhost-user session, as the backend.
//!
//! In come a connected socket and a [`Device`]; out go calls to that device. The session is a
//! total function of message and state: whatever comes is carried out or refused, and a refusal
//! is a NACK where the frontend asked for an answer. Only what cannot be understood as a message
//! at all ends the connection. In-flight requests are drained before anything that they use is
//! taken away, and before the answer to the message that takes it away.
//!
//! | file | what it does |
//! |---|---|
//! | `socket` | bytes and descriptors |
//! | `wire` | layouts |
//! | `request` | bytes to a typed request or a refusal |
//! | this | typed request and state to an answer |
//! | `vring`, `memory` | the state |
//! | `device` | the seam to devices |
//! | `notifier` | calls to the frontend, which cannot block |
//! | `quota` | how much a peer can make this process log |
//! | `backend_channel` | what the backend has to say without being asked |
//! | `hang_up` | the end of a connection from inside |
//! | `handover` | a session between two processes |
//! | `memfd` | files of memory, made and mapped |
//! | `server` | connection after connection |
//!
//! The in-flight log and the dirty log are the ring's ([`crate::ring`]); here they are mapped and
//! given to rings as these start.

mod backend_channel;
mod device;
pub(crate) mod handover;
mod hang_up;
pub(crate) mod memfd;
pub(crate) mod memory;
mod notifier;
pub(crate) mod quota;
mod request;
mod server;
pub(crate) mod socket;
mod vring;
pub(crate) mod wire;

pub use backend_channel::FrontendLink;
pub use device::{ConfigRefused, Device, QueueSetup, QueueStop, QueueWorker};
pub use hang_up::HangUp;
pub use memory::MemoryError;
pub use notifier::Notifier;
pub use request::Refusal;
pub use server::{ConnectionEvent, Server, ServerHandle, SessionEnd, serve};

use crate::limits::{MAX_MEM_SLOTS, MAX_QUEUES, MAX_RING_SIZE};
use crate::ring::crash::{Point, hit};
use crate::ring::{DirtyLog, InflightLog};
use memory::MemoryTable;
use pv_abi::virtio::feature;
use quota::PEER_LINES;
use request::{Answer, Request, answer_kind};
use socket::{Channel, ChannelEnd, Message};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use vhost::vhost_user::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vring::{LOG_ALL, Surroundings, Vring};
use wire::{FLAG_NEED_REPLY, Inflight, LogBase, VringState};
use zerocopy::IntoBytes;

/// The virtio feature bit that says that there are protocol features.
const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// Protocol features that every session serves.
pub const PROTOCOL_FEATURES_SERVED: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::CONFIG)
    .union(VhostUserProtocolFeatures::RESET_DEVICE)
    .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(VhostUserProtocolFeatures::STATUS)
    .union(VhostUserProtocolFeatures::BACKEND_REQ);

/// Protocol features that sessions serve for devices which [serve through the
/// ring](Device::serves_through_ring).
pub const PROTOCOL_FEATURES_OF_RINGS: VhostUserProtocolFeatures =
    VhostUserProtocolFeatures::INFLIGHT_SHMFD.union(VhostUserProtocolFeatures::LOG_SHMFD);

/// What a request is answered with.
#[derive(Debug)]
enum Reply {
    /// It was done; there is nothing more to say.
    Done,
    Payload(Vec<u8>),
    PayloadAndFd(Vec<u8>, OwnedFd),
}

/// The state of one connection.
struct Session<'d> {
    device: &'d dyn Device,
    features: u64,
    protocol_features: u64,
    /// The frontend said `SET_OWNER`.
    owned: bool,
    memory: MemoryTable,
    inflight: Option<Arc<InflightLog>>,
    dirty: Option<Arc<DirtyLog>>,
    dirty_call: Arc<Notifier>,
    vrings: Vec<Vring>,
    status: u8,
    /// The logs' files and the frontend's channel, as they came: for whoever takes this up.
    inflight_file: Option<(Inflight, OwnedFd)>,
    dirty_file: Option<(LogBase, OwnedFd)>,
    link: Option<Arc<FrontendLink>>,
    /// Nothing runs yet: the session is being taken up.
    held: bool,
    /// Ends the connection that this serves.
    hang_up: HangUp,
}

impl<'d> Session<'d> {
    fn new(device: &'d dyn Device, hang_up: HangUp) -> Session<'d> {
        Session {
            device,
            features: 0,
            protocol_features: 0,
            owned: false,
            memory: MemoryTable::default(),
            inflight: None,
            dirty: None,
            dirty_call: Arc::default(),
            vrings: (0..device.queue_count()).map(Vring::new).collect(),
            status: 0,
            inflight_file: None,
            dirty_file: None,
            link: None,
            held: false,
            hang_up,
        }
    }

    /// Serves a connection until its end, or until it is to pause. Everything is drained then.
    fn serve(&mut self, channel: &mut Channel<'_>) -> ChannelEnd {
        let end = loop {
            let answered = channel
                .receive()
                .and_then(|message| self.answer(channel, message));
            if let Err(end) = answered {
                break end;
            }
        };
        if matches!(end, ChannelEnd::Paused) {
            self.leave_all();
        } else {
            self.end();
        }
        end
    }

    /// Drains everything, and lets go of the frontend.
    fn end(&mut self) {
        self.leave_all();
        self.device.set_frontend(None);
    }

    fn answer(&mut self, channel: &mut Channel<'_>, message: Message) -> Result<(), ChannelEnd> {
        let header = message.header;
        let outcome = request::parse(message).and_then(|request| self.handle(request));
        if let Err(refusal) = &outcome
            && PEER_LINES.may_say()
        {
            tracing::warn!(request = header.request, %refusal, "request refused");
        }
        match (answer_kind(header.request), outcome) {
            (_, Ok(Reply::Payload(payload))) => channel.reply(header.request, &payload),
            (_, Ok(Reply::PayloadAndFd(payload, fd))) => {
                channel.reply_with_fd(header.request, &payload, &fd)
            }
            // As GET_CONFIG does it: an empty reply is an error that the frontend can see.
            (Answer::Payload, _) => channel.reply(header.request, &[]),
            (Answer::Ack, outcome) => {
                let wanted = header.flags & FLAG_NEED_REPLY != 0
                    && self.protocol_features & VhostUserProtocolFeatures::REPLY_ACK.bits() != 0;
                if wanted {
                    let code = u64::from(outcome.is_err());
                    channel.reply(header.request, code.as_bytes())
                } else {
                    Ok(())
                }
            }
        }
    }

    fn offered_features(&self) -> u64 {
        let of_rings = if self.device.serves_through_ring() {
            feature::RING_PACKED | LOG_ALL
        } else {
            0
        };
        self.device.features() | PROTOCOL_FEATURES | of_rings
    }

    fn offered_protocol_features(&self) -> VhostUserProtocolFeatures {
        let served = if self.device.serves_through_ring() {
            PROTOCOL_FEATURES_SERVED | PROTOCOL_FEATURES_OF_RINGS
        } else {
            PROTOCOL_FEATURES_SERVED
        };
        self.device.protocol_features(served, self.owned)
    }

    fn handle(&mut self, request: Request) -> Result<Reply, Refusal> {
        match request {
            Request::GetFeatures => return u64_reply(self.offered_features()),
            Request::GetProtocolFeatures => {
                return u64_reply(self.offered_protocol_features().bits());
            }
            Request::GetQueueNum => return u64_reply(self.vrings.len() as u64),
            Request::GetMaxMemSlots => return u64_reply(MAX_MEM_SLOTS as u64),
            Request::GetStatus => return u64_reply(u64::from(self.status)),
            Request::GetConfig { head, offset } => return self.get_config(head, offset),
            Request::GetInflight { shape, len } => return self.get_inflight(shape, len),
            Request::SetInflight(shape, fd) => self.set_inflight(shape, fd)?,
            Request::SetLogBase(base, fd) => return self.set_log(base, fd),
            Request::SetLogFd(fd) => {
                self.need(VhostUserProtocolFeatures::LOG_SHMFD)?;
                set_notifier(&self.dirty_call, Some(fd))?;
            }
            Request::SetBackendChannel(fd) => {
                self.need(VhostUserProtocolFeatures::BACKEND_REQ)?;
                let ack = self.protocol_features & VhostUserProtocolFeatures::REPLY_ACK.bits() != 0;
                let link = Arc::new(FrontendLink::new(fd, ack)?);
                self.link = Some(Arc::clone(&link));
                self.device.set_frontend(Some(link));
            }
            Request::GetVringBase(index) => {
                let num = self.vring(u64::from(index))?.stop();
                return Ok(Reply::Payload(
                    VringState { index, num }.as_bytes().to_vec(),
                ));
            }
            // A frontend that comes back on the same connection says this again.
            Request::SetOwner => self.owned = true,
            Request::SetFeatures(features) => self.set_features(features)?,
            Request::SetProtocolFeatures(features) => {
                let unknown = features & !self.offered_protocol_features().bits();
                if unknown != 0 {
                    return Err(Refusal::Features(unknown));
                }
                self.protocol_features = features;
            }
            Request::Reset => self.reset(),
            Request::SetStatus(status) => self.set_status(status)?,
            Request::SetConfig { offset, data } => self
                .device
                .write_config(offset, &data)
                .map_err(|_| Refusal::BadValue("configuration is read-only"))?,
            Request::SetMtu(mtu) => {
                if !self.device.set_mtu(mtu) {
                    return Err(Refusal::BadValue("the device takes no such MTU"));
                }
            }
            Request::SendRarp(mac) => {
                if !self.device.announce_guest(mac) {
                    return Err(Refusal::BadValue("the device announces nobody"));
                }
            }
            Request::SetMemTable(regions) => {
                let sealed = self.device.needs_sealed_memory();
                self.set_memory(MemoryTable::from_regions(regions, sealed))?;
            }
            Request::AddMemReg(region, fd) => {
                let sealed = self.device.needs_sealed_memory();
                let table = self.memory.with(region, fd, sealed)?;
                self.set_memory(Ok(table))?;
            }
            Request::RemMemReg(region) => {
                let table = self.memory.without(region)?;
                self.set_memory(Ok(table))?;
            }
            Request::SetVringNum(v) => self.vring(u64::from(v.index))?.set_size(v.num)?,
            Request::SetVringBase(v) => {
                let packed = self.features & feature::RING_PACKED != 0;
                self.vring(u64::from(v.index))?.set_base(v.num, packed)?;
            }
            Request::SetVringAddr(addr) => {
                self.change(u64::from(addr.index), |vring| vring.set_addr(addr))?;
            }
            Request::SetVringKick(index, kick) => {
                if kick.is_none() {
                    self.vring(index)?.stop();
                    return Err(Refusal::BadValue("a ring without a kick is not served"));
                }
                self.change(index, |vring| vring.set_kick(kick))?;
            }
            Request::SetVringCall(index, fd) => self.vring(index)?.set_call(fd)?,
            Request::SetVringErr(index, fd) => self.vring(index)?.set_err(fd)?,
            Request::SetVringEnable(v) => {
                let enable = match v.num {
                    0 => false,
                    1 => true,
                    _ => return Err(Refusal::BadValue("enable is neither 0 nor 1")),
                };
                self.change(u64::from(v.index), |vring| vring.set_enable(enable))?;
            }
        }
        Ok(Reply::Done)
    }

    fn get_config(&self, head: wire::ConfigHead, offset: u32) -> Result<Reply, Refusal> {
        // `parse` has checked the range against MAX_CONFIG_LEN.
        let mut data = self.device.read_config(offset, head.size);
        data.resize(usize::try_from(head.size).unwrap_or(0), 0);
        Ok(Reply::Payload([head.as_bytes(), &data].concat()))
    }

    fn set_features(&mut self, features: u64) -> Result<(), Refusal> {
        let unknown = features & !self.offered_features();
        if unknown != 0 {
            return Err(Refusal::Features(unknown));
        }
        if self.features != features {
            self.pause_all();
            self.features = features;
        }
        self.start_all()
    }

    fn set_status(&mut self, status: u64) -> Result<(), Refusal> {
        let status = u8::try_from(status).map_err(|_| Refusal::BadValue("status"))?;
        if status == 0 {
            for vring in &mut self.vrings {
                vring.stop();
            }
            self.forget_in_flight();
            self.device.status_cleared();
        }
        self.status = status;
        Ok(())
    }

    fn reset(&mut self) {
        for vring in &mut self.vrings {
            vring.reset();
        }
        self.forget_in_flight();
        self.features &= PROTOCOL_FEATURES;
        self.status = 0;
        self.device.reset();
    }

    /// Exchanges the memory under all queues. After a table that cannot be used there is none:
    /// the frontend believes that the old one is gone.
    fn set_memory(&mut self, table: Result<MemoryTable, MemoryError>) -> Result<(), Refusal> {
        self.pause_all();
        hit(Point::P7);
        let (table, failed) = match table {
            Ok(table) => (table, None),
            Err(error) => (MemoryTable::default(), Some(error)),
        };
        self.memory = table;
        match failed {
            Some(error) => Err(error.into()),
            None => self.start_all(),
        }
    }

    /// Gives the frontend a new file for an in-flight log. It comes into use when the frontend
    /// sends it back.
    fn get_inflight(&self, shape: Inflight, len: usize) -> Result<Reply, Refusal> {
        self.need(VhostUserProtocolFeatures::INFLIGHT_SHMFD)?;
        let (queues, size) = (shape.num_queues, shape.queue_size);
        if queues == 0 || queues > MAX_QUEUES || size == 0 || size > MAX_RING_SIZE {
            return Err(crate::ring::InflightError::BadShape { queues, size }.into());
        }
        let mmap_size = InflightLog::len_for(queues, size);
        let fd = memfd::sealed(c"inflight", mmap_size)?;
        let reply = Inflight {
            mmap_size,
            mmap_offset: 0,
            padding: 0,
            ..shape
        };
        let mut payload = reply.as_bytes().to_vec();
        payload.truncate(len);
        Ok(Reply::PayloadAndFd(payload, fd))
    }

    fn set_inflight(&mut self, shape: Inflight, fd: OwnedFd) -> Result<(), Refusal> {
        self.need(VhostUserProtocolFeatures::INFLIGHT_SHMFD)?;
        let file = self.log_file(fd)?;
        let kept = file.try_clone()?.into();
        let log = InflightLog::map(
            file,
            shape.mmap_offset,
            shape.mmap_size,
            shape.num_queues,
            shape.queue_size,
        )?;
        self.pause_all();
        self.inflight = Some(Arc::new(log));
        self.inflight_file = Some((shape, kept));
        self.start_all()
    }

    /// The device is reset and drained: what comes next starts over.
    fn forget_in_flight(&self) {
        if let Some(log) = &self.inflight {
            log.clear();
        }
    }

    fn set_log(&mut self, base: LogBase, fd: OwnedFd) -> Result<Reply, Refusal> {
        self.need(VhostUserProtocolFeatures::LOG_SHMFD)?;
        let file = self.log_file(fd)?;
        let kept = file.try_clone()?.into();
        let log = DirtyLog::map(file, base.mmap_offset, base.mmap_size)?;
        self.pause_all();
        self.dirty = Some(Arc::new(log));
        self.dirty_file = Some((base, kept));
        self.start_all()?;
        Ok(Reply::Payload(base.as_bytes().to_vec()))
    }

    /// A log is as firm as memory has to be, and looked at before its length.
    fn log_file(&self, fd: OwnedFd) -> Result<File, Refusal> {
        let file = File::from(fd);
        if self.device.needs_sealed_memory() && !memfd::keeps_its_length(&file) {
            return Err(Refusal::BadValue(
                "the log's file is not sealed against shrinking (F_SEAL_SHRINK)",
            ));
        }
        Ok(file)
    }

    fn need(&self, feature: VhostUserProtocolFeatures) -> Result<(), Refusal> {
        if self.protocol_features & feature.bits() == 0 {
            return Err(Refusal::BadState("the protocol feature was not negotiated"));
        }
        Ok(())
    }

    /// The queues, and what they run on.
    fn vrings_and(&mut self) -> (&mut [Vring], Surroundings<'_>) {
        let with = Surroundings {
            device: self.device,
            memory: &self.memory,
            features: self.features,
            inflight: self.inflight.as_ref(),
            dirty: self.dirty.as_ref(),
            dirty_call: &self.dirty_call,
            held: self.held,
            hang_up: &self.hang_up,
        };
        (&mut self.vrings, with)
    }

    /// Changes what a ring runs on: it is drained, changed, and goes on if it can.
    fn change(&mut self, index: u64, change: impl FnOnce(&mut Vring)) -> Result<(), Refusal> {
        let (vrings, with) = self.vrings_and();
        let vring = usize::try_from(index)
            .ok()
            .and_then(|i| vrings.get_mut(i))
            .ok_or(Refusal::NoQueue(index))?;
        vring.pause();
        change(vring);
        vring.start(&with)
    }

    /// Stops every queue for whoever serves the rings next.
    fn leave_all(&mut self) {
        self.vrings.iter_mut().for_each(Vring::leave);
    }

    fn pause_all(&mut self) {
        for vring in &mut self.vrings {
            vring.pause();
        }
    }

    /// Starts every queue that is complete. One that cannot start does not keep the others back.
    fn start_all(&mut self) -> Result<(), Refusal> {
        let (vrings, with) = self.vrings_and();
        let mut outcome = Ok(());
        for vring in vrings {
            outcome = outcome.and(vring.start(&with));
        }
        outcome
    }

    fn vring(&mut self, index: u64) -> Result<&mut Vring, Refusal> {
        usize::try_from(index)
            .ok()
            .and_then(|i| self.vrings.get_mut(i))
            .ok_or(Refusal::NoQueue(index))
    }
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        self.pause_all();
    }
}

fn u64_reply(value: u64) -> Result<Reply, Refusal> {
    Ok(Reply::Payload(value.as_bytes().to_vec()))
}

/// Only an eventfd can be signalled without a chance to wait for the peer.
fn set_notifier(notifier: &Notifier, fd: Option<OwnedFd>) -> Result<(), Refusal> {
    notifier
        .set(fd)
        .map_err(|error| match error.raw_os_error() {
            Some(libc::EINVAL) => Refusal::BadValue("the descriptor is no eventfd"),
            _ => error.into(),
        })
}
