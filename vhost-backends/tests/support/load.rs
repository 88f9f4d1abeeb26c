//! Load on two queues whose every byte is checked.
#![allow(dead_code)]

use super::{Frontend, pattern};

/// Blocks with what they should hold, checked at every read.
pub(crate) struct Verified {
    versions: Vec<u64>,
    next: u64,
    pub(crate) written: u64,
    pub(crate) read: u64,
}

impl Verified {
    const DEPTH: usize = 8;

    pub(crate) fn new() -> Verified {
        Verified {
            versions: vec![0; 1024],
            next: 1,
            written: 0,
            read: 0,
        }
    }

    fn block(version: u64, block: usize) -> Vec<u8> {
        match version {
            0 => vec![0; 4096],
            version => pattern(version << 16 | block as u64, 4096),
        }
    }

    /// A batch of writes and then of reads of any blocks, spread over both queues.
    pub(crate) fn round(&mut self, front: &mut Frontend) {
        let place = |n: u64| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as usize % 1024;
        for slot in 0..Verified::DEPTH {
            let block = place(self.next) / 8 * 8 + slot;
            self.versions[block] = self.next;
            self.next += 1;
            front.fill(slot * 4096, &Verified::block(self.versions[block], block));
            front.write(slot % 2, block as u64 * 4096, slot * 4096, 4096, slot);
        }
        self.finish(front);
        self.written += Verified::DEPTH as u64;
        let blocks: Vec<usize> = (0..Verified::DEPTH as u64)
            .map(|slot| place(self.next * 31 + slot))
            .collect();
        for (slot, block) in blocks.iter().enumerate() {
            front.fill(slot * 4096, &[0xee; 4096]);
            front.read(slot % 2, *block as u64 * 4096, slot * 4096, 4096, slot);
        }
        self.finish(front);
        for (slot, block) in blocks.into_iter().enumerate() {
            let expected = Verified::block(self.versions[block], block);
            assert!(front.bytes(slot * 4096, 4096) == expected, "block {block}");
        }
        self.read += Verified::DEPTH as u64;
    }

    fn finish(&self, front: &mut Frontend) {
        for queue in 0..2 {
            front.kick(queue);
            for _ in 0..Verified::DEPTH / 2 {
                assert_eq!(front.complete(queue).1, 0);
            }
        }
    }
}
