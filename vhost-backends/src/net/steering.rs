//! Which receive queue a frame goes to: that of the pair on which the guest last sent on the same
//! flow (virtio 1.3 §5.1.6.5.5).

use super::frame::{Frame, PEEK_LEN};
use super::offload::Layers;
use std::sync::atomic::{AtomicU8, Ordering};

/// Flows that are told apart.
const FLOWS: usize = 256;

/// The pair of each flow. Flows that share an entry share a queue.
#[derive(Debug)]
pub(super) struct Steering([AtomicU8; FLOWS]);

impl Default for Steering {
    fn default() -> Steering {
        Steering(std::array::from_fn(|_| AtomicU8::new(0)))
    }
}

impl Steering {
    /// The guest sent this frame on this pair's queue.
    pub(super) fn sent(&self, frame: &Frame<'_>, pair: u16) {
        // Pairs are few. Ordering: Relaxed, a hint.
        let pair = pair as u8;
        let entry = self.entry(frame);
        if entry.load(Ordering::Relaxed) != pair {
            entry.store(pair, Ordering::Relaxed);
        }
    }

    /// The pair, below `active`, whose receive queue this frame goes to.
    pub(super) fn queue_for(&self, frame: &Frame<'_>, active: u16) -> u16 {
        u16::from(self.entry(frame).load(Ordering::Relaxed)) % active.max(1)
    }

    fn entry(&self, frame: &Frame<'_>) -> &AtomicU8 {
        let [first, ..] = &self.0;
        self.0.get(flow(&frame.start())).unwrap_or(first)
    }
}

/// A hash of addresses and ports that is the same in both directions.
fn flow(start: &[u8; PEEK_LEN]) -> usize {
    let Some(layers) = Layers::of(start) else {
        return 0;
    };
    let at = layers.network;
    // Without options and extension headers: with them, the ports are other bytes, but of the
    // same flow the same ones.
    let (from, to) = if layers.v6 { (8, 40) } else { (12, 20) };
    let bytes = start.get(at + from..(at + to + 4).min(PEEK_LEN));
    let mut sum = 0u32;
    for pair in bytes.unwrap_or_default().chunks_exact(2) {
        sum = sum.wrapping_add(u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    }
    let mixed = sum.wrapping_mul(0x9e37_79b1);
    (mixed >> 24) as usize % FLOWS
}
