//! Where a vCPU's thread waits for its guest at the least cost: looking, asleep, or elsewhere.
//!
//! In come the hand-off word and, with each call, the CPU that the guest says it runs on; out comes
//! whether there was something to see, or whether to sleep. On two CPUs a short look ([`look`])
//! spares both sides a wake-up. Where looking does not help, the two share a CPU or had better do,
//! and the thread moves to its guest ([`placement`]).

mod look;
mod placement;

use std::sync::atomic::AtomicU32;

/// What one vCPU's thread has learnt about its waits.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    look: look::Look,
    placement: placement::Placement,
}

impl Waiting {
    /// What the thread does once, before its first wait.
    pub(super) fn begin() {
        placement::serve_promptly();
    }

    /// The guest called; `hint` is the CPU that it says, and may be anything.
    pub(super) fn called(&mut self, hint: u32) {
        if !self.look.helps() {
            self.placement.look(hint);
        }
    }

    /// Looks for a moment whether the word changes from `state`; if not, to sleep is cheaper.
    pub(super) fn changes(&mut self, word: &AtomicU32, state: u32) -> bool {
        self.look.changes(word, state)
    }
}
