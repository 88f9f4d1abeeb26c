//! Buffers between the guest and the disk, for what O_DIRECT does not take as it is.

use super::buffer::AlignedBuffer;
use super::transfer::{Direction, Transfer, chain_error};
use super::{Operation, RawFile};
use crate::ring::OwnedChain;
use std::io;
use vm_memory::GuestMemoryMmap;

/// A buffer between the guest and the disk.
#[derive(Debug)]
pub(super) struct Bounce {
    buffer: AlignedBuffer,
    /// For a read: where its bytes go, the first of them in the buffer, and how many.
    target: Option<(OwnedChain, usize, usize)>,
}

impl Bounce {
    /// Puts a buffer between; `None` if it is done already.
    pub(super) fn new(
        file: &RawFile,
        memory: &GuestMemoryMmap,
        transfer: &mut Transfer,
        operation: Operation<'_>,
    ) -> io::Result<Option<Bounce>> {
        let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let (Operation::Read { offset, len, .. } | Operation::Write { offset, len, .. }) =
            operation
        else {
            return Ok(None);
        };
        let (start, size) = file.around(offset, len);
        if let Operation::Write { chain, from, .. } = operation
            && (start, size) != (offset, len)
        {
            // Reads a block, changes a part and writes it: rare enough to wait for it.
            file.write_partial(memory, chain, from, offset, len)?;
            return Ok(None);
        }
        let mut buffer = AlignedBuffer::new(usize::try_from(size).map_err(invalid)?);
        let skip = usize::try_from(offset - start).map_err(invalid)?;
        let bytes = usize::try_from(len).map_err(invalid)?;
        let (direction, target) = match operation {
            Operation::Read { chain, .. } => {
                (Direction::Read, Some((chain.clone(), skip, skip + bytes)))
            }
            Operation::Write { chain, from, .. } => {
                chain
                    .read_at(memory, from, buffer.get_mut())
                    .map_err(chain_error)?;
                (Direction::Write, None)
            }
            _ => return Ok(None),
        };
        // The last block may reach past the end of the file.
        let need = offset - start + len;
        transfer.prepare_buffer(direction, buffer.get_mut(), start, need);
        Ok(Some(Bounce { buffer, target }))
    }

    /// Gives the guest what was read.
    pub(super) fn deliver(&self, memory: &GuestMemoryMmap) -> io::Result<()> {
        let Some((chain, from, to)) = &self.target else {
            return Ok(());
        };
        let data = self.buffer.get().get(*from..*to).unwrap_or_default();
        chain.write_at(memory, 0, data).map_err(chain_error)
    }
}
