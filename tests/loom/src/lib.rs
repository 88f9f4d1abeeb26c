//! Files of the other crates whose threads meet without a lock, under the model checker `loom`.
//!
//! Each is included as it is; `cfg(loom)`, which only this crate has, gives it loom's atomics and
//! locks instead of the standard ones. What the files ask of their own crate stands here in small.
//! A model runs once for every order of steps and every value that the memory model lets a load see,
//! with at most `LOOM_MAX_PREEMPTIONS` switches at places where a thread could have gone on.
#![cfg(test)]

extern crate alloc;

mod block_on;
mod pauses;

/// `vmm-core`: whose turn it is.
#[path = "../../../vmm-core/src/vm/turns.rs"]
mod turns;

/// `guest-sdk`: running a future.
#[path = "../../../guest-sdk/src/platform/executor.rs"]
#[allow(unreachable_pub)]
mod executor;
/// `guest-sdk`: the wait under it.
#[path = "../../../guest-sdk/src/platform/waiter.rs"]
#[allow(unreachable_pub)]
mod waiter;
use block_on::Platform;
use waiter::Waiter;

/// Switches away from a thread that could have gone on, where `LOOM_MAX_PREEMPTIONS` does not say
/// otherwise. Nearly all races need two; with three threads, four take minutes.
const PREEMPTIONS: usize = 3;

/// Runs a model in every way there is, within the bound.
fn explore(model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound.get_or_insert(PREEMPTIONS);
    builder.check(model);
}

mod accel {
    /// Of no interest here.
    #[derive(Debug, Default)]
    pub(crate) struct StartState;
}

mod limits {
    use std::time::Duration;
    pub(crate) const RUN_LOOK: Duration = Duration::ZERO;
    pub(crate) const LOSS_POLL: Duration = Duration::ZERO;
}
