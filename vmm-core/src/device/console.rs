//! The console (virtio 1.3 §5.3), served in this process: to any writer, from a bounded buffer.

use super::local::{ChainServer, LocalEndpoint, LocalQueues};
use super::{Backend, DeviceIo, Offer, Setup};
use crate::limits::{MAX_CONSOLE_CHAIN, MAX_CONSOLE_INPUT};
use crate::vm::events::signal;
use pv_abi::status::Status;
use pv_abi::virtio::feature;
use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};
use vhost_backends::ring::OwnedChain;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Queue 0 receives, queue 1 transmits (virtio 1.3 §5.3.2).
pub(crate) const QUEUES: u16 = 2;
const RECEIVE: usize = 0;

/// Where console output goes.
pub(crate) type Output = Arc<Mutex<dyn Write + Send>>;

pub(crate) fn offer() -> Offer {
    let features = feature::VERSION_1 | feature::EVENT_IDX | feature::INDIRECT_DESC;
    // cols, rows, max_nr_ports, emerg_wr: none of them is offered as a feature.
    Offer {
        features,
        config: vec![0; 12],
    }
}

/// Input on its way to the guest.
pub(crate) struct Input {
    bytes: Mutex<VecDeque<u8>>,
    arrived: EventFd,
}

impl Input {
    pub(crate) fn new() -> io::Result<Input> {
        let arrived = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Input {
            bytes: Mutex::default(),
            arrived,
        })
    }

    /// Queues bytes for the guest; returns how many there was room for.
    pub(crate) fn push(&self, bytes: &[u8]) -> io::Result<usize> {
        let mut queue = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = bytes
            .len()
            .min(MAX_CONSOLE_INPUT - queue.len().min(MAX_CONSOLE_INPUT));
        queue.extend(bytes.iter().take(taken));
        signal(&self.arrived)?;
        Ok(taken)
    }
}

pub(crate) struct Console {
    queues: LocalQueues,
    output: Output,
    input: Arc<Input>,
}

impl Console {
    pub(crate) fn new(endpoint: LocalEndpoint, output: Output, input: Arc<Input>) -> Console {
        Console {
            queues: LocalQueues::new(endpoint),
            output,
            input,
        }
    }
}

impl Backend for Console {
    fn activate(&mut self, setup: &Setup, io: &DeviceIo) -> io::Result<()> {
        let (output, input) = (&self.output, &self.input);
        self.queues.activate(setup, io, |index| {
            Ok(if index == RECEIVE {
                let arrived = input.arrived.try_clone()?;
                Box::new(Receive {
                    input: Arc::clone(input),
                    arrived,
                })
            } else {
                Box::new(Transmit {
                    output: Arc::clone(output),
                })
            })
        })
    }

    fn reset(&mut self) -> io::Result<()> {
        self.queues.reset();
        Ok(())
    }

    fn config_write(&mut self, _offset: u32, _bytes: &[u8]) -> Result<(), Status> {
        Err(Status::NotSupported)
    }
}

struct Receive {
    input: Arc<Input>,
    arrived: EventFd,
}

impl ChainServer for Receive {
    fn serve(&mut self, chain: &OwnedChain, memory: &GuestMemoryMmap) -> Option<u32> {
        let room = usize::try_from(chain.writable_len()).unwrap_or(usize::MAX);
        let mut queue = self
            .input
            .bytes
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if queue.is_empty() {
            return None;
        }
        let count = queue.len().min(room);
        let bytes: Vec<u8> = queue.drain(..count).collect();
        let written = chain.write_at(memory, 0, &bytes).is_ok();
        Some(if written {
            u32::try_from(bytes.len()).unwrap_or(0)
        } else {
            0
        })
    }

    fn extra(&self) -> Option<&EventFd> {
        Some(&self.arrived)
    }
}

struct Transmit {
    output: Output,
}

impl ChainServer for Transmit {
    fn serve(&mut self, chain: &OwnedChain, memory: &GuestMemoryMmap) -> Option<u32> {
        let len = usize::try_from(chain.readable_len()).unwrap_or(usize::MAX);
        let mut bytes = vec![0; len.min(MAX_CONSOLE_CHAIN)];
        if chain.read_at(memory, 0, &mut bytes).is_ok() {
            let mut output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
            // A writer that fails loses output; the guest is not to blame and goes on.
            if let Err(error) = output.write_all(&bytes).and_then(|()| output.flush()) {
                tracing::debug!(%error, "console output lost");
            }
        }
        Some(0)
    }
}
