//! The console (virtio 1.3 §5.3), served in this process: to any writer, from a bounded buffer.

use super::local::{ChainServer, LocalEndpoint, LocalQueues};
use super::output::{Desk, OutputThread};
use super::{Backend, DeviceIo, Offer, Setup};
use crate::limits::{MAX_CONSOLE_CHAIN, MAX_CONSOLE_INPUT};
use crate::vm::events::signal;
use pv_abi::status::Status;
use pv_abi::virtio::feature;
use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use vhost_backends::ring::OwnedChain;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Queue 0 receives, queue 1 transmits (virtio 1.3 §5.3.2).
pub(crate) const QUEUES: u16 = 2;
const RECEIVE: usize = 0;

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
    output: OutputThread,
    input: Arc<Input>,
}

impl Console {
    pub(crate) fn new(endpoint: LocalEndpoint, output: OutputThread, input: Arc<Input>) -> Console {
        Console {
            queues: LocalQueues::new(endpoint),
            output,
            input,
        }
    }
}

impl Backend for Console {
    fn activate(&mut self, setup: &Setup, io: &DeviceIo) -> io::Result<()> {
        let (desk, input) = (self.output.desk()?, &self.input);
        self.queues.activate(setup, io, |index| {
            Ok(if index == RECEIVE {
                let arrived = input.arrived.try_clone()?;
                Box::new(Receive {
                    input: Arc::clone(input),
                    arrived,
                })
            } else {
                let written = desk.written().try_clone()?;
                Box::new(Transmit {
                    desk: Arc::clone(&desk),
                    written,
                    bytes: Vec::new(),
                    given: false,
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
    desk: Arc<Desk>,
    written: EventFd,
    /// A chain's bytes that the writer has not been given yet.
    bytes: Vec<u8>,
    /// The chain that is kept is with the writer.
    given: bool,
}

impl ChainServer for Transmit {
    fn serve(&mut self, chain: &OwnedChain, memory: &GuestMemoryMmap) -> Option<u32> {
        if self.given {
            self.given = !self.desk.is_clear();
            return (!self.given).then_some(0);
        }
        if self.bytes.is_empty() {
            let len = usize::try_from(chain.readable_len()).unwrap_or(usize::MAX);
            self.bytes.resize(len.min(MAX_CONSOLE_CHAIN), 0);
            if self.bytes.is_empty() || chain.read_at(memory, 0, &mut self.bytes).is_err() {
                self.bytes.clear();
                return Some(0);
            }
        }
        // Busy with what a driver before a reset had said: later.
        self.given = self.desk.give(&mut self.bytes);
        None
    }

    fn extra(&self) -> Option<&EventFd> {
        Some(&self.written)
    }
}
