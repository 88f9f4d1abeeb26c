//! The block driver as the disk of the file system work.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::fmt;
use guest_sdk::block::{self, BlockQueue, Completion, Request, Token};
use guest_sdk::flat::Flat;
use guest_sdk::platform::{DmaBuf, OutOfArena};
use quickstart_fs::disk::Disk;
use quickstart_fs::limits::{CHUNK, SECTOR};

/// A block queue with reads in flight.
pub struct DriverDisk {
    queue: BlockQueue<Flat>,
    /// Requests of the reads that were started, oldest first.
    started: VecDeque<Token>,
    /// Completions that came before their turn.
    early: Vec<Completion>,
    /// Buffers of whole requests, used again and again.
    spare: Vec<DmaBuf>,
    /// Bytes in one request: a chunk, or less where the device takes no more.
    request_bytes: usize,
    requests: u64,
}

/// What can go wrong with the disk.
#[derive(Debug)]
pub enum Error {
    /// The device refused or failed a request.
    Device(block::Error),
    /// The arena has no room for the reads in flight.
    Arena(OutOfArena),
    /// The buffer of a read did not come back.
    Lost,
}

impl fmt::Debug for DriverDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DriverDisk")
            .field("queue", &self.queue)
            .field("requests", &self.requests)
            .finish_non_exhaustive()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Device(source) => write!(f, "{source}"),
            Error::Arena(source) => write!(f, "{source}"),
            Error::Lost => f.write_str("a read did not come back"),
        }
    }
}

impl core::error::Error for Error {}

impl From<block::Error> for Error {
    fn from(source: block::Error) -> Self {
        Error::Device(source)
    }
}

impl DriverDisk {
    /// A disk behind this queue.
    pub fn new(queue: BlockQueue<Flat>) -> Self {
        let most = queue.device().geometry().max_bytes;
        DriverDisk {
            queue,
            started: VecDeque::new(),
            early: Vec::new(),
            spare: Vec::new(),
            request_bytes: most.min(CHUNK),
            requests: 0,
        }
    }

    /// Requests made so far.
    pub fn requests(&self) -> u64 {
        self.requests
    }

    /// The completion of the oldest request.
    fn next(&mut self) -> Result<Completion, Error> {
        let token = self.started.pop_front().ok_or(Error::Lost)?;
        if let Some(at) = self.early.iter().position(|early| early.token == token) {
            return Ok(self.early.swap_remove(at));
        }
        loop {
            // Without a limit: the driver has its own for a device that stays away.
            if self.queue.wait_for(1, None)? == 0 {
                return Err(Error::Lost);
            }
            while let Some(completion) = self.queue.poll()? {
                if completion.token == token {
                    return Ok(completion);
                }
                self.early.push(completion);
            }
        }
    }
}

impl Disk for DriverDisk {
    type Error = Error;

    fn sectors(&self) -> u64 {
        self.queue.capacity()
    }

    fn start_read(&mut self, sector: u64, length: usize) -> Result<(), Error> {
        for at in (0..length).step_by(self.request_bytes) {
            let part = self.request_bytes.min(length - at);
            let spare = (part == self.request_bytes).then(|| self.spare.pop());
            let buf = match spare.flatten() {
                Some(buf) => buf,
                None => self.queue.alloc(part).map_err(Error::Arena)?,
            };
            let sector = sector + (at / SECTOR) as u64;
            let submitted = self.queue.submit(Request::Read { sector, buf });
            let token = submitted.map_err(|refused| refused.error)?;
            self.started.push_back(token);
            self.requests += 1;
        }
        Ok(())
    }

    fn kick(&mut self) {
        self.queue.kick();
    }

    fn finish_read(&mut self, into: &mut [u8]) -> Result<(), Error> {
        let mut outcome = Ok(());
        for part in into.chunks_mut(self.request_bytes) {
            let completion = self.next()?;
            match (completion.result, completion.buf) {
                (Ok(()), Some(buf)) if buf.len() == part.len() => {
                    buf.read(0, part);
                    if buf.len() == self.request_bytes {
                        self.spare.push(buf);
                    }
                }
                (Ok(()), _) => outcome = Err(Error::Lost),
                (Err(error), _) => outcome = Err(error.into()),
            }
        }
        outcome
    }

    fn write(&mut self, sector: u64, from: &[u8]) -> Result<(), Error> {
        self.requests += from.len().div_ceil(self.request_bytes) as u64;
        Ok(self.queue.write_blocking(sector, from)?)
    }

    fn flush(&mut self) -> Result<(), Error> {
        self.requests += 1;
        Ok(self.queue.flush()?)
    }
}
