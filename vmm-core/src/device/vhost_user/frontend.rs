//! One connection to a backend: handshake, activation, reset, and its configuration read again.

use super::deadline::Deadline;
use super::notices::Notices;
use super::{Model, Served};
use crate::device::{Backend, DeviceIo, Offer, QueueConfig, Setup};
use crate::limits::{BACKEND_DEADLINE, REFRESH_DEADLINE};
use pv_abi::status::Status;
use pv_abi::virtio::feature;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Error as Refused, Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};

/// Bits 24 to 49, which are about rings and transports: virtio 1.3 §2.2.
const ABOUT_TRANSPORT: u64 = ((1 << 50) - 1) & !((1 << 24) - 1);
/// Of these, the ones that this transport and the ABI's queue set-up can do; not packed rings, an IOMMU,
/// data in doorbells, or the reset of a single queue, nor what vhost-user has for the frontend alone.
const TRANSPORT: u64 =
    feature::INDIRECT_DESC | feature::EVENT_IDX | feature::VERSION_1 | feature::IN_ORDER;
/// Virtio features that a guest can be given over this frontend: those of the device's kind as well.
const PASSED_ON: u64 = !ABOUT_TRANSPORT | TRANSPORT;
/// Protocol features that this frontend has a use for.
const WANTED: VhostUserProtocolFeatures = VhostUserProtocolFeatures::CONFIG
    .union(VhostUserProtocolFeatures::MQ)
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::BACKEND_REQ)
    .union(VhostUserProtocolFeatures::RESET_DEVICE)
    .union(VhostUserProtocolFeatures::MTU)
    .union(VhostUserProtocolFeatures::RARP);

/// The version that every message says.
const VERSION: u32 = 1;
/// The MTU that the guest is told.
const NET_SET_MTU: u32 = 20;
/// The network is to learn where a card is now; a backend may ask the guest to say so as well.
const SEND_RARP: u32 = 19;

/// A backend that has shaken hands.
pub(super) struct VhostUser {
    frontend: Frontend,
    stream: UnixStream,
    protocol: VhostUserProtocolFeatures,
    model: Arc<dyn Model>,
    served: Served,
    active: usize,
}

impl VhostUser {
    /// Shakes hands over a connected socket.
    pub(super) fn handshake(
        stream: UnixStream,
        model: Arc<dyn Model>,
    ) -> io::Result<(VhostUser, Offer, Option<Notices>)> {
        let _span = tracing::debug_span!("handshake").entered();
        let deadline = Deadline::start(&stream, BACKEND_DEADLINE)?;
        VhostUser::shake(stream, model).map_err(|error| {
            if !deadline.has_passed() {
                return error;
            }
            let text =
                format!("the backend has not answered within {BACKEND_DEADLINE:?} ({error})");
            io::Error::new(io::ErrorKind::TimedOut, text)
        })
    }

    fn shake(
        stream: UnixStream,
        model: Arc<dyn Model>,
    ) -> io::Result<(VhostUser, Offer, Option<Notices>)> {
        let kept = stream.try_clone()?;
        let mut frontend = Frontend::from_stream(stream, u64::from(model.queues()));
        frontend.set_owner().map_err(step("SET_OWNER"))?;
        let offered = frontend.get_features().map_err(step("GET_FEATURES"))?;
        if offered & feature::VERSION_1 == 0 {
            return Err(io::Error::other(
                "the backend does not offer VIRTIO_F_VERSION_1",
            ));
        }
        if offered & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            return Err(io::Error::other(
                "the backend does not offer protocol features",
            ));
        }
        let mut protocol = WANTED
            & frontend
                .get_protocol_features()
                .map_err(step("GET_PROTOCOL_FEATURES"))?;
        if !protocol.contains(VhostUserProtocolFeatures::CONFIG) {
            // What it would tell is a change of configuration.
            protocol.remove(VhostUserProtocolFeatures::BACKEND_REQ);
        }
        frontend
            .set_protocol_features(protocol)
            .map_err(step("SET_PROTOCOL_FEATURES"))?;
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        let queues = if protocol.contains(VhostUserProtocolFeatures::MQ) {
            frontend.get_queue_num().map_err(step("GET_QUEUE_NUM"))?
        } else {
            1
        };
        // Before the configuration is read: a change after that will be told.
        let notices = if protocol.contains(VhostUserProtocolFeatures::BACKEND_REQ) {
            let (notices, theirs) = Notices::channel()?;
            match frontend.set_backend_request_fd(&theirs) {
                Ok(()) => Some(notices),
                Err(error) => {
                    // It can be done without, if it was only refused.
                    tracing::debug!(%error, "SET_BACKEND_REQ_FD");
                    None
                }
            }
        } else {
            None
        };
        let config = if protocol.contains(VhostUserProtocolFeatures::CONFIG) {
            Some(read_config(&mut frontend, model.config_lens())?)
        } else {
            None
        };
        let served = Served {
            features: offered & PASSED_ON,
            queues,
            config,
            tells: notices.is_some(),
        };
        let offer = model.offer(&served)?;
        let backend = VhostUser {
            frontend,
            stream: kept,
            protocol,
            model,
            served,
            active: 0,
        };
        if let Some(mtu) = backend.model.mtu()
            && protocol.contains(VhostUserProtocolFeatures::MTU)
        {
            backend.say(NET_SET_MTU, u64::from(mtu)).map_err(|error| {
                io::Error::other(format!("vhost-user NET_SET_MTU to {mtu}: {error}"))
            })?;
        }
        Ok((backend, offer, notices))
    }

    /// Sends a message of eight bytes that the `vhost` crate has no call for, inside a deadline.
    fn say(&self, request: u32, value: u64) -> io::Result<()> {
        let ack = self.protocol.contains(VhostUserProtocolFeatures::REPLY_ACK);
        let flags = VERSION
            | if ack {
                VhostUserHeaderFlag::NEED_REPLY.bits()
            } else {
                0
            };
        let head = |flags: u32| [request, flags, 8].map(u32::to_ne_bytes).concat();
        let message = [head(flags), value.to_ne_bytes().to_vec()].concat();
        (&self.stream).write_all(&message)?;
        if !ack {
            return Ok(());
        }
        let mut answer = [0; 20];
        (&self.stream).read_exact(&mut answer)?;
        let done = [
            head(VERSION | VhostUserHeaderFlag::REPLY.bits()),
            0u64.to_ne_bytes().to_vec(),
        ];
        if answer.as_slice() == done.concat() {
            Ok(())
        } else {
            Err(io::Error::other("refused"))
        }
    }

    fn start(&mut self, setup: &Setup, io: &DeviceIo) -> io::Result<()> {
        // Some features are the VMM's own business, and not the backend's.
        let features = setup.features & self.served.features
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        self.frontend
            .set_features(features)
            .map_err(step("SET_FEATURES"))?;
        let file = io
            .arena
            .region
            .file()
            .ok_or_else(|| io::Error::other("arena has no file"))?;
        // The backend only ever sees guest-physical addresses, never a pointer of this process.
        let arena = VhostUserMemoryRegionInfo {
            guest_phys_addr: io.arena.gpa,
            memory_size: io.arena.region.len(),
            userspace_addr: io.arena.gpa,
            mmap_offset: 0,
            mmap_handle: file.as_raw_fd(),
        };
        self.frontend
            .set_mem_table(&[arena])
            .map_err(step("SET_MEM_TABLE"))?;
        for (index, queue) in setup.queues.iter().enumerate() {
            self.start_queue(index, queue, io)?;
        }
        Ok(())
    }

    fn start_queue(&mut self, index: usize, queue: &QueueConfig, io: &DeviceIo) -> io::Result<()> {
        let event = io.event_base + u32::try_from(index).map_err(io::Error::other)?;
        let missing = || io::Error::other("a queue has no eventfd");
        let call = io.events.call(event).ok_or_else(missing)?;
        let kick = io.events.doorbell(event).ok_or_else(missing)?;
        let config = VringConfigData {
            queue_max_size: queue.size,
            queue_size: queue.size,
            flags: 0,
            desc_table_addr: queue.desc,
            used_ring_addr: queue.used,
            avail_ring_addr: queue.avail,
            log_addr: None,
        };
        let frontend = &mut self.frontend;
        frontend
            .set_vring_num(index, queue.size)
            .map_err(step("SET_VRING_NUM"))?;
        frontend
            .set_vring_addr(index, &config)
            .map_err(step("SET_VRING_ADDR"))?;
        frontend
            .set_vring_base(index, 0)
            .map_err(step("SET_VRING_BASE"))?;
        frontend
            .set_vring_call(index, call)
            .map_err(step("SET_VRING_CALL"))?;
        frontend
            .set_vring_kick(index, kick)
            .map_err(step("SET_VRING_KICK"))?;
        // From here on the ring may be served, so a reset must stop it.
        self.active = index + 1;
        frontend
            .set_vring_enable(index, true)
            .map_err(step("SET_VRING_ENABLE"))
    }

    /// Nothing that the driver has set shall meet the next one: filters, pairs, the write cache.
    fn forget_driver(&mut self) -> io::Result<()> {
        match self.frontend.reset_device() {
            Ok(()) => Ok(()),
            Err(vhost::Error::VhostUserProtocol(Refused::BackendInternalError)) => {
                // The rings are stopped all the same, which is what a reset promises.
                tracing::debug!("the backend refuses RESET_DEVICE");
                Ok(())
            }
            Err(error) => Err(step("RESET_DEVICE")(error)),
        }
    }

    /// Makes the link notice that this connection is of no more use.
    fn hang_up(&self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

fn read_config(frontend: &mut Frontend, lens: &[usize]) -> io::Result<Vec<u8>> {
    let mut last = None;
    for &len in lens {
        let size = u32::try_from(len).map_err(io::Error::other)?;
        match frontend.get_config(0, size, VhostUserConfigFlags::WRITABLE, &vec![0; len]) {
            Ok((_, config)) => return Ok(config),
            Err(error) => last = Some(error),
        }
    }
    Err(last.map_or_else(|| io::Error::other("GET_CONFIG"), step("GET_CONFIG")))
}

/// What went wrong with this message; [`io::ErrorKind::UnexpectedEof`] where the backend hung up.
fn step(message: &'static str) -> impl FnOnce(vhost::Error) -> io::Error {
    move |error| {
        let hung_up = matches!(
            error,
            vhost::Error::VhostUserProtocol(
                Refused::Disconnected | Refused::PartialMessage | Refused::SocketBroken(_)
            )
        );
        let kind = if hung_up {
            io::ErrorKind::UnexpectedEof
        } else {
            io::ErrorKind::Other
        };
        io::Error::new(kind, format!("vhost-user {message}: {error}"))
    }
}

impl Backend for VhostUser {
    fn activate(&mut self, setup: &Setup, io: &DeviceIo) -> io::Result<()> {
        let _deadline = Deadline::start(&self.stream, BACKEND_DEADLINE)?;
        self.start(setup, io).inspect_err(|_| self.hang_up())
    }

    fn reset(&mut self) -> io::Result<()> {
        let _deadline = Deadline::start(&self.stream, BACKEND_DEADLINE)?;
        let active = std::mem::take(&mut self.active);
        for index in 0..active {
            // GET_VRING_BASE stops the ring; its reply says that the backend is done with it.
            self.frontend
                .set_vring_enable(index, false)
                .and_then(|()| self.frontend.get_vring_base(index))
                .map_err(step("GET_VRING_BASE"))
                .inspect_err(|_| self.hang_up())?;
        }
        if active > 0
            && self
                .protocol
                .contains(VhostUserProtocolFeatures::RESET_DEVICE)
        {
            self.forget_driver().inspect_err(|_| self.hang_up())?;
        }
        Ok(())
    }

    fn config_write(&mut self, offset: u32, bytes: &[u8]) -> Result<(), Status> {
        if !self.protocol.contains(VhostUserProtocolFeatures::CONFIG) {
            return Err(Status::NotSupported);
        }
        let deadline = Deadline::start(&self.stream, BACKEND_DEADLINE);
        let _deadline = deadline.map_err(|_| Status::HostError)?;
        self.frontend
            .set_config(offset, VhostUserConfigFlags::WRITABLE, bytes)
            .map_err(|_| Status::NotSupported)
    }

    fn offer(&mut self) -> io::Result<Option<Offer>> {
        if self.served.config.is_none() {
            return Ok(None);
        }
        let _deadline = Deadline::start(&self.stream, REFRESH_DEADLINE)?;
        let config = read_config(&mut self.frontend, self.model.config_lens());
        self.served.config = Some(config.inspect_err(|_| self.hang_up())?);
        self.model
            .offer(&self.served)
            .map(Some)
            .inspect_err(|_| self.hang_up())
    }

    fn announce(&mut self, mac: [u8; 6]) -> io::Result<()> {
        if !self.protocol.contains(VhostUserProtocolFeatures::RARP) {
            return Ok(());
        }
        let _deadline = Deadline::start(&self.stream, BACKEND_DEADLINE)?;
        let [a, b, c, d, e, f] = mac;
        self.say(SEND_RARP, u64::from_ne_bytes([a, b, c, d, e, f, 0, 0]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_is_offered_what_this_transport_can_do() {
        let passed: Vec<u32> = (0..64).filter(|bit| PASSED_ON & 1 << bit != 0).collect();
        let own: Vec<u32> = (0..24).chain([28, 29, 32, 35]).chain(50..64).collect();
        assert_eq!(passed, own);
    }
}
