//! The entropy device (virtio 1.3 §5.4), served in this process from the host's `getrandom`.

use super::local::{ChainServer, LocalEndpoint, LocalQueues};
use super::{Backend, DeviceIo, Offer, Setup};
use crate::limits::MAX_RNG_CHAIN;
use pv_abi::status::Status;
use pv_abi::virtio::feature;
use std::fs::File;
use std::io::{self, Read};
use vhost_backends::ring::OwnedChain;
use vm_memory::GuestMemoryMmap;

pub(crate) const QUEUES: u16 = 1;

pub(crate) fn offer() -> Offer {
    let features = feature::VERSION_1 | feature::EVENT_IDX | feature::INDIRECT_DESC;
    Offer {
        features,
        config: Vec::new(),
    }
}

pub(crate) struct Rng(LocalQueues);

impl Rng {
    pub(crate) fn new(endpoint: LocalEndpoint) -> Rng {
        Rng(LocalQueues::new(endpoint))
    }
}

impl Backend for Rng {
    fn activate(&mut self, setup: &Setup, io: &DeviceIo) -> io::Result<()> {
        self.0.activate(setup, io, |_| {
            Ok(Box::new(Source {
                file: File::open("/dev/urandom")?,
                buffer: Vec::new(),
            }))
        })
    }

    fn reset(&mut self) -> io::Result<()> {
        self.0.reset();
        Ok(())
    }

    fn config_write(&mut self, _offset: u32, _bytes: &[u8]) -> Result<(), Status> {
        Err(Status::NotSupported)
    }
}

struct Source {
    file: File,
    buffer: Vec<u8>,
}

impl ChainServer for Source {
    fn serve(&mut self, chain: &OwnedChain, memory: &GuestMemoryMmap) -> Option<u32> {
        let wanted = usize::try_from(chain.writable_len()).unwrap_or(usize::MAX);
        self.buffer.resize(wanted.min(MAX_RNG_CHAIN), 0);
        let filled = self.file.read_exact(&mut self.buffer);
        let written = filled.is_ok() && chain.write_at(memory, 0, &self.buffer).is_ok();
        // Nothing written is legal and tells the driver that there was nothing.
        Some(if written {
            u32::try_from(self.buffer.len()).unwrap_or(0)
        } else {
            0
        })
    }
}
