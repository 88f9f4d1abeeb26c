//! One connection to a backend: handshake, activation, reset.

use super::deadline::Deadline;
use super::{Model, Served};
use crate::device::{Backend, DeviceIo, Offer, QueueConfig, Setup};
use crate::limits::BACKEND_DEADLINE;
use pv_abi::status::Status;
use pv_abi::virtio::feature;
use std::io;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};

/// `VHOST_F_LOG_ALL`.
const LOG_ALL: u64 = 1 << 26;
/// Virtio features that a guest can be given over this frontend.
///
/// Everything but packed rings, as the ABI's queue set-up describes split ones, and what is for the
/// frontend alone: the dirty log and the protocol features' own bit.
const PASSED_ON: u64 = !(feature::RING_PACKED | LOG_ALL | 1 << 30);
/// A backend that has shaken hands.
pub(super) struct VhostUser {
    frontend: Frontend,
    stream: UnixStream,
    protocol: VhostUserProtocolFeatures,
    active: usize,
}

impl VhostUser {
    /// Shakes hands over a connected socket.
    pub(super) fn handshake(
        stream: UnixStream,
        model: &dyn Model,
    ) -> io::Result<(VhostUser, Offer)> {
        let _deadline = Deadline::start(&stream, BACKEND_DEADLINE)?;
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
        let wanted = VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK;
        let protocol = wanted
            & frontend
                .get_protocol_features()
                .map_err(step("GET_PROTOCOL_FEATURES"))?;
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
        let config = if protocol.contains(VhostUserProtocolFeatures::CONFIG) {
            Some(read_config(&mut frontend, model.config_lens())?)
        } else {
            None
        };
        let offer = model.offer(&Served {
            features: offered & PASSED_ON,
            queues,
            config,
        })?;
        Ok((
            VhostUser {
                frontend,
                stream: kept,
                protocol,
                active: 0,
            },
            offer,
        ))
    }

    fn start(&mut self, setup: &Setup, io: &DeviceIo) -> io::Result<()> {
        let features = setup.features | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
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

fn step(message: &'static str) -> impl FnOnce(vhost::Error) -> io::Error {
    move |error| io::Error::other(format!("vhost-user {message}: {error}"))
}

impl Backend for VhostUser {
    fn activate(&mut self, setup: &Setup, io: &DeviceIo) -> io::Result<()> {
        let _deadline = Deadline::start(&self.stream, BACKEND_DEADLINE)?;
        self.start(setup, io).inspect_err(|_| self.hang_up())
    }

    fn reset(&mut self) -> io::Result<()> {
        let _deadline = Deadline::start(&self.stream, BACKEND_DEADLINE)?;
        for index in 0..std::mem::take(&mut self.active) {
            // GET_VRING_BASE stops the ring; its reply says that the backend is done with it.
            self.frontend
                .set_vring_enable(index, false)
                .and_then(|()| self.frontend.get_vring_base(index))
                .map_err(step("GET_VRING_BASE"))
                .inspect_err(|_| self.hang_up())?;
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
}
