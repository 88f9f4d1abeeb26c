//! What one operation in flight is at, and the submission entry of what is left of it.

use crate::engine::bounce::Bounce;
use crate::engine::transfer::{Direction, Transfer};
use io_uring::{opcode, squeue, types};

/// Index of the registered descriptor.
const FIXED: types::Fixed = types::Fixed(0);

#[derive(Debug, Default)]
pub(super) struct Slot {
    pub(super) busy: bool,
    pub(super) work: Work,
    pub(super) transfer: Transfer,
}

/// What a slot is at.
#[derive(Debug, Default)]
pub(super) enum Work {
    /// The slot's transfer, of guest memory.
    #[default]
    Direct,
    /// The slot's transfer, of this buffer.
    Bounced(Bounce),
    Flush,
    Discard(Range),
    /// Zeroes by the file system; where it cannot, by writing them.
    WriteZeroes(Range, bool),
    /// Zeroes that are written; the slot's transfer is of the engine's zeroes.
    Zeroing(Range),
    /// A call that the thread aside makes.
    Aside,
}

/// Bytes of the disk.
#[derive(Clone, Copy, Debug)]
pub(super) struct Range {
    pub(super) offset: u64,
    pub(super) len: u64,
}

impl Slot {
    /// The entry of what is left to do; `None` if it is not the ring's.
    pub(super) fn entry(&self) -> Option<squeue::Entry> {
        Some(match &self.work {
            Work::Flush => opcode::Fsync::new(FIXED)
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
            Work::Discard(range) | Work::WriteZeroes(range, true) => {
                fallocate(range, libc::FALLOC_FL_PUNCH_HOLE)
            }
            Work::WriteZeroes(range, false) => fallocate(range, libc::FALLOC_FL_ZERO_RANGE),
            Work::Direct | Work::Bounced(_) | Work::Zeroing(_) => transfer_entry(&self.transfer),
            Work::Aside => return None,
        })
    }
}

/// The file keeps its size.
fn fallocate(range: &Range, mode: i32) -> squeue::Entry {
    opcode::Fallocate::new(FIXED, range.len)
        .offset(range.offset)
        .mode(mode | libc::FALLOC_FL_KEEP_SIZE)
        .build()
}

fn transfer_entry(transfer: &Transfer) -> squeue::Entry {
    let offset = transfer.offset();
    match (transfer.iovecs(), transfer.direction()) {
        ([one], Direction::Read) if u32::try_from(one.iov_len).is_ok() => {
            opcode::Read::new(FIXED, one.iov_base.cast(), one.iov_len as u32)
                .offset(offset)
                .build()
        }
        ([one], Direction::Write) if u32::try_from(one.iov_len).is_ok() => {
            opcode::Write::new(FIXED, one.iov_base.cast(), one.iov_len as u32)
                .offset(offset)
                .build()
        }
        (many, Direction::Read) => opcode::Readv::new(FIXED, many.as_ptr(), many.len() as u32)
            .offset(offset)
            .build(),
        (many, Direction::Write) => opcode::Writev::new(FIXED, many.as_ptr(), many.len() as u32)
            .offset(offset)
            .build(),
    }
}
