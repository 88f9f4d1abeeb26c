//! Back to the guest that sent it: for tests, and to measure the device alone.

use super::Port;
use crate::net::frame::{Frame, Mac};
use crate::net::offload::Offloads;
use crate::net::receive::Inlet;
use std::sync::{Arc, OnceLock};

/// Gives every frame back to its sender.
#[derive(Debug, Default)]
pub struct Loopback {
    guest: OnceLock<Arc<Inlet>>,
}

impl Port for Loopback {
    fn attach(&self, guest: &Arc<Inlet>, _mac: Mac) {
        // A second guest would be a mistake of the caller's; the first keeps it.
        let _ = self.guest.set(Arc::clone(guest));
    }

    fn offloads(&self) -> Offloads {
        Offloads::ALL
    }

    fn send(&self, _pair: u16, frames: &[Frame<'_>]) -> usize {
        if let Some(guest) = self.guest.get() {
            guest.deliver(&mut frames.iter());
        }
        frames.len()
    }
}
