//! Plain system calls, for hosts that refuse io_uring.

use super::buffer::AlignedBuffer;
use super::inline::Inline;
use super::sleep::Sleeper;
use super::transfer::{Direction, Transfer, chain_error};
use super::{Operation, RawFile, WakeSources};
use std::io;
use std::sync::Arc;
use vm_memory::GuestMemoryMmap;

/// Everything is over when `start` returns.
#[derive(Debug)]
pub struct SyncEngine {
    file: Arc<RawFile>,
    memory: Arc<GuestMemoryMmap>,
    transfer: Transfer,
    sleeper: Sleeper,
}

impl SyncEngine {
    /// An engine on `file`.
    pub fn new(
        file: Arc<RawFile>,
        memory: Arc<GuestMemoryMmap>,
        wake: WakeSources<'_>,
    ) -> io::Result<SyncEngine> {
        Ok(SyncEngine {
            file,
            memory,
            transfer: Transfer::default(),
            sleeper: Sleeper::new(wake)?,
        })
    }

    /// Through a buffer of our own, for what O_DIRECT does not take.
    fn bounce(&mut self, operation: Operation<'_>) -> io::Result<()> {
        match operation {
            Operation::Write {
                chain,
                from,
                offset,
                len,
            } => self
                .file
                .write_partial(&self.memory, chain, from, offset, len),
            Operation::Read { chain, offset, len } => {
                let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
                let (start, size) = self.file.around(offset, len);
                let mut buffer = AlignedBuffer::new(usize::try_from(size).map_err(invalid)?);
                let need = offset - start + len;
                self.transfer
                    .prepare_buffer(Direction::Read, buffer.get_mut(), start, need);
                self.transfer.run(self.file.file())?;
                let skip = usize::try_from(offset - start).map_err(invalid)?;
                let end = usize::try_from(need).map_err(invalid)?;
                let data = buffer.get().get(skip..end).unwrap_or_default();
                chain.write_at(&self.memory, 0, data).map_err(chain_error)
            }
            _ => Ok(()),
        }
    }
}

impl Inline for SyncEngine {
    fn run(&mut self, operation: Operation<'_>) -> io::Result<()> {
        match operation {
            Operation::Flush => self.file.flush(),
            Operation::Discard { offset, len } => self.file.discard(offset, len),
            Operation::SecureErase { offset, len } => self.file.secure_erase(offset, len),
            Operation::WriteZeroes { offset, len, unmap } => {
                self.file.write_zeroes(offset, len, unmap)
            }
            Operation::Read { .. } | Operation::Write { .. } => {
                self.transfer
                    .prepare(&self.memory, operation)
                    .map_err(chain_error)?;
                if self.transfer.is_aligned(self.file.align()) {
                    self.transfer.run(self.file.file())
                } else {
                    self.bounce(operation)
                }
            }
        }
    }

    fn sleeper(&mut self) -> io::Result<&mut Sleeper> {
        Ok(&mut self.sleeper)
    }
}
