//! Pauses, stops and starts of a vCPU's thread.

use crate::accel::StartState;
use crate::turns::{Place, Turns};
use loom::cell::Cell;
use loom::sync::Arc;
use loom::thread;

/// The vCPU of a model; the first one would look at the clock.
const VCPU: usize = 1;

/// The turns, and what a vCPU's thread has in its hands while it runs its guest, and while it
/// serves it: loom complains of any access that another may be at the same time with.
struct Machine {
    turns: Turns,
    run: Cell<u32>,
    served: Cell<u32>,
}

impl Machine {
    fn new() -> Arc<Machine> {
        Arc::new(Machine {
            turns: Turns::new(2),
            run: Cell::new(0),
            served: Cell::new(0),
        })
    }

    /// A vCPU's thread: as in `vm/vcpu.rs`, with a guest that wants something so many times.
    fn vcpu(&self, times: u32, deferring: bool) {
        if self.turns.wait_for_start(VCPU).is_some() {
            for _ in 0..times {
                if !self.turns.turn(VCPU, Place::Running) {
                    break;
                }
                add_one(&self.run);
                if !self.turns.turn(VCPU, Place::Serving) {
                    break;
                }
                add_one(&self.served);
                if deferring {
                    // A call that the embedder answers later: meanwhile nothing is in its hands.
                    self.turns.defer(VCPU);
                    if !self.turns.turn(VCPU, Place::Serving) {
                        break;
                    }
                    add_one(&self.served);
                }
            }
        }
        self.turns.done(VCPU);
    }

    /// Waits as who pauses a VM does; loom finds it out if nobody ends the wait.
    fn wait_halted(&self, frozen: bool) {
        while !self.turns.wait_for(|turns| turns.halted(frozen), None) {}
    }
}

fn add_one(cell: &Cell<u32>) {
    cell.set(cell.get() + 1);
}

fn spawn(machine: &Arc<Machine>, times: u32, deferring: bool) -> thread::JoinHandle<()> {
    let own = Arc::clone(machine);
    thread::spawn(move || own.vcpu(times, deferring))
}

#[test]
fn a_halted_vcpu_neither_runs_nor_serves() {
    crate::explore(|| {
        let machine = Machine::new();
        assert!(machine.turns.start(VCPU, StartState));
        let vcpu = spawn(&machine, 2, false);
        // Twice: a vCPU that was halted and goes on is one that runs.
        for _ in 0..2 {
            machine.turns.want_pause();
            machine.wait_halted(false);
            add_one(&machine.run);
            add_one(&machine.served);
            machine.turns.resume();
        }
        vcpu.join().unwrap();
        assert_eq!((machine.run.get(), machine.served.get()), (4, 4));
    });
}

#[test]
fn nothing_is_served_for_a_guest_that_is_frozen() {
    crate::explore(|| {
        let machine = Machine::new();
        assert!(machine.turns.start(VCPU, StartState));
        let vcpu = spawn(&machine, 2, true);
        machine.turns.want_pause();
        // What freezes the guest leaves its thread where it is: in `Running`, perhaps.
        machine.wait_halted(true);
        add_one(&machine.served);
        machine.turns.resume();
        vcpu.join().unwrap();
        assert_eq!(machine.served.get(), 5);
    });
}

#[test]
fn a_stop_ends_a_vcpu_wherever_it_is() {
    crate::explore(|| {
        let machine = Machine::new();
        machine.turns.done(0);
        let vcpu = spawn(&machine, 1, false);
        let other = Arc::clone(&machine);
        let starter = thread::spawn(move || {
            other.turns.start(VCPU, StartState);
            other.turns.want_pause();
        });
        machine.turns.stop();
        while !machine.turns.wait_for(Turns::all_done, None) {}
        // All that it did is seen by who waited for it.
        assert!(machine.served.get() <= machine.run.get());
        vcpu.join().unwrap();
        starter.join().unwrap();
        assert!(machine.turns.stopped(), "a pause does not undo a stop");
    });
}

#[test]
fn a_vcpu_is_started_once() {
    crate::explore(|| {
        let machine = Machine::new();
        let vcpu = spawn(&machine, 0, false);
        let other = Arc::clone(&machine);
        let second = thread::spawn(move || other.turns.start(VCPU, StartState));
        let first = machine.turns.start(VCPU, StartState);
        assert_ne!(first, second.join().unwrap());
        vcpu.join().unwrap();
    });
}
