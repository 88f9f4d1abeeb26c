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
//! | `server` | connection after connection |
//!
//! The in-flight log and the dirty log have their places in `vring` (around start and stop) and
//! in `memory` (one log for all slots). Until they are there, they are not offered.

mod device;
pub(crate) mod memory;
mod request;
mod server;
mod socket;
mod vring;
mod wire;

pub use device::{ConfigRefused, Device, Notifier, QueueSetup, QueueStop, QueueWorker};
pub use memory::MemoryError;
pub use request::Refusal;
pub use server::{Server, ServerHandle, SessionEnd};

use crate::limits::{MAX_MEM_SLOTS, MAX_REFUSALS_LOGGED};
use memory::MemoryTable;
use request::{Answer, Request, answer_kind};
use socket::{Channel, ChannelEnd, Message};
use vhost::vhost_user::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vring::Vring;
use wire::{FLAG_NEED_REPLY, VringState};
use zerocopy::IntoBytes;

/// The virtio feature bit that says that there are protocol features.
const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// Protocol features that every session serves.
pub const PROTOCOL_FEATURES_SERVED: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::CONFIG)
    .union(VhostUserProtocolFeatures::RESET_DEVICE)
    .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(VhostUserProtocolFeatures::STATUS);

/// What a request is answered with.
#[derive(Debug, PartialEq, Eq)]
enum Reply {
    /// It was done; there is nothing more to say.
    Done,
    Payload(Vec<u8>),
}

/// The state of one connection.
struct Session<'d> {
    device: &'d dyn Device,
    features: u64,
    protocol_features: u64,
    memory: MemoryTable,
    vrings: Vec<Vring>,
    status: u8,
    refused: u32,
}

impl<'d> Session<'d> {
    fn new(device: &'d dyn Device) -> Session<'d> {
        Session {
            device,
            features: 0,
            protocol_features: 0,
            memory: MemoryTable::default(),
            vrings: (0..device.queue_count()).map(Vring::new).collect(),
            status: 0,
            refused: 0,
        }
    }

    /// Serves a connection until its end. Everything is drained and closed when this returns.
    fn serve(&mut self, channel: &mut Channel<'_>) -> ChannelEnd {
        let end = loop {
            let answered = channel
                .receive()
                .and_then(|message| self.answer(channel, message));
            if let Err(end) = answered {
                break end;
            }
        };
        self.pause_all();
        end
    }

    fn answer(&mut self, channel: &mut Channel<'_>, message: Message) -> Result<(), ChannelEnd> {
        let header = message.header;
        let outcome = request::parse(message).and_then(|request| self.handle(request));
        if let Err(refusal) = &outcome {
            self.refused = self.refused.saturating_add(1);
            if self.refused <= MAX_REFUSALS_LOGGED {
                tracing::warn!(request = header.request, %refusal, "request refused");
            }
        }
        match (answer_kind(header.request), outcome) {
            (_, Ok(Reply::Payload(payload))) => channel.reply(header.request, &payload),
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
        self.device.features() | PROTOCOL_FEATURES
    }

    fn handle(&mut self, request: Request) -> Result<Reply, Refusal> {
        match request {
            Request::GetFeatures => return u64_reply(self.offered_features()),
            Request::GetProtocolFeatures => return u64_reply(PROTOCOL_FEATURES_SERVED.bits()),
            Request::GetQueueNum => return u64_reply(self.vrings.len() as u64),
            Request::GetMaxMemSlots => return u64_reply(MAX_MEM_SLOTS as u64),
            Request::GetStatus => return u64_reply(u64::from(self.status)),
            Request::GetConfig { head, offset } => return self.get_config(head, offset),
            Request::GetVringBase(index) => {
                let num = u32::from(self.vring(u64::from(index))?.stop());
                return Ok(Reply::Payload(
                    VringState { index, num }.as_bytes().to_vec(),
                ));
            }
            // A frontend that comes back on the same connection says this again.
            Request::SetOwner => {}
            Request::SetFeatures(features) => self.set_features(features)?,
            Request::SetProtocolFeatures(features) => {
                let unknown = features & !PROTOCOL_FEATURES_SERVED.bits();
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
            Request::SetMemTable(regions) => self.set_memory(MemoryTable::from_regions(regions))?,
            Request::AddMemReg(region, fd) => {
                let table = self.memory.with(region, fd)?;
                self.set_memory(Ok(table))?;
            }
            Request::RemMemReg(region) => {
                let table = self.memory.without(region)?;
                self.set_memory(Ok(table))?;
            }
            Request::SetVringNum(v) => self.vring(u64::from(v.index))?.set_size(v.num)?,
            Request::SetVringBase(v) => self.vring(u64::from(v.index))?.set_base(v.num)?,
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
            Request::SetVringCall(index, fd) => self.vring(index)?.set_call(fd),
            Request::SetVringErr(index, fd) => self.vring(index)?.set_err(fd),
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
        }
        self.status = status;
        Ok(())
    }

    fn reset(&mut self) {
        for vring in &mut self.vrings {
            vring.reset();
        }
        self.features &= PROTOCOL_FEATURES;
        self.status = 0;
        self.device.reset();
    }

    /// Exchanges the memory under all queues. After a table that cannot be used there is none:
    /// the frontend believes that the old one is gone.
    fn set_memory(&mut self, table: Result<MemoryTable, MemoryError>) -> Result<(), Refusal> {
        self.pause_all();
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

    /// Changes what a ring runs on: it is drained, changed, and goes on if it can.
    fn change(&mut self, index: u64, change: impl FnOnce(&mut Vring)) -> Result<(), Refusal> {
        let (device, features, default) = (self.device, self.features, self.enabled_by_default());
        let vring = usize::try_from(index)
            .ok()
            .and_then(|i| self.vrings.get_mut(i))
            .ok_or(Refusal::NoQueue(index))?;
        vring.pause();
        change(vring);
        vring.start(device, &self.memory, features, default)
    }

    fn pause_all(&mut self) {
        for vring in &mut self.vrings {
            vring.pause();
        }
    }

    /// Starts every queue that is complete. One that cannot start does not keep the others back.
    fn start_all(&mut self) -> Result<(), Refusal> {
        let (device, features, default) = (self.device, self.features, self.enabled_by_default());
        let mut outcome = Ok(());
        for vring in &mut self.vrings {
            outcome = outcome.and(vring.start(device, &self.memory, features, default));
        }
        outcome
    }

    fn enabled_by_default(&self) -> bool {
        self.features & PROTOCOL_FEATURES == 0
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
