//! A vCPU's thread: runs the guest, carries out what it asks for, until the VM ends.

use super::shared::Shared;
use super::turns::Place;
use crate::accel::{Reporter, Vcpu, VcpuExit};
use crate::fault::ExitReason;
use std::sync::Arc;

/// Says that the thread is done, however it ends.
struct Done<'a> {
    shared: &'a Shared,
    slot: usize,
}

impl Drop for Done<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // Only the embedder's own code (a call handler, a log sink) can panic here.
            let error = std::io::Error::other("a handler of the embedder's panicked");
            self.shared.finish(ExitReason::Host(Arc::new(error)));
        }
        self.shared.turns.done(self.slot);
    }
}

pub(super) fn main(shared: &Shared, index: u32, make: impl FnOnce() -> Option<Box<dyn Vcpu>>) {
    let slot = usize::try_from(index).unwrap_or(usize::MAX);
    let _done = Done { shared, slot };
    let Some(mut vcpu) = make() else { return };
    if let Some(state) = shared.turns.wait_for_start(slot) {
        let span = tracing::debug_span!("vcpu", index);
        let _entered = span.enter();
        match vcpu.start(&state) {
            Ok(()) => run(shared, index, slot, vcpu.as_mut()),
            Err(error) => shared.host_error(error),
        }
    }
}

fn run(shared: &Shared, index: u32, slot: usize, vcpu: &mut dyn Vcpu) {
    let counters = &shared.counters;
    while shared.turns.turn(slot, Place::Running) {
        let exit = match vcpu.run() {
            Ok(exit) => exit,
            Err(error) => {
                shared.finish(ExitReason::Host(Arc::new(error)));
                return;
            }
        };
        if matches!(exit, VcpuExit::Interrupted) {
            shared.kick_seen(slot);
        }
        if matches!(exit, VcpuExit::Gone) || !shared.turns.turn(slot, Place::Serving) {
            return;
        }
        match exit {
            VcpuExit::Call(frame) => {
                counters.exits_call.add(1);
                shared.call(index, frame);
            }
            VcpuExit::Idle => counters.exits_idle.add(1),
            VcpuExit::Doorbell(doorbell) => {
                counters.exits_doorbell.add(1);
                shared.doorbell(doorbell);
            }
            VcpuExit::Exit(code) => {
                counters.exits_other.add(1);
                shared.finish(ExitReason::Exited(code));
            }
            VcpuExit::Fault(fault) => shared.fault(fault),
            VcpuExit::Violation(violation) => shared.violation(violation),
            VcpuExit::Interrupted => counters.exits_interrupted.add(1),
            VcpuExit::Gone => return,
        }
    }
}
