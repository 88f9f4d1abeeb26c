//! Ends that are seen from outside the VM: by its threads and its process.
//!
//! In a test program of their own, because they look at what else this process has.

use paravane_tests::{accels, alone, children_of, patience, suite_vm, wait_until};
use std::fs;
use std::process::Command;
use vmm_core::{Accel, ExitReason, Spares, Violation, VmError};

#[test]
fn a_guest_process_that_is_killed_says_so_every_time() {
    let _alone = alone();
    for _ in 0..30 {
        let vm = suite_vm("life.spin", Accel::Process).unwrap().vcpus(1);
        let vm = vm.build().unwrap().run().unwrap();
        let guest = *children_of(std::process::id())
            .first()
            .expect("the guest's process");
        Command::new("kill")
            .args(["-9", &guest.to_string()])
            .status()
            .unwrap();
        match vm.wait_timeout(patience(30)).expect("in time") {
            ExitReason::Violation(Violation::ProcessEnded { how }) => assert_eq!(how, "signal 9"),
            other => panic!("{other:?}"),
        }
    }
}

/// Sends the guest's process a signal from outside.
fn send(guest: u32, signal: &str) {
    let sent = Command::new("kill")
        .args([signal, &guest.to_string()])
        .status();
    assert!(sent.unwrap().success(), "{signal}");
}

/// Whether the process is stopped, by job control or its tracer.
fn is_stopped(process: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
    matches!(
        stat.rsplit(") ").next().unwrap().as_bytes(),
        [b't' | b'T', ..]
    )
}

#[test]
fn a_guest_that_was_stopped_from_outside_pauses_and_goes_on() {
    let _alone = alone();
    for self_reported in [false, true] {
        let vm = suite_vm("life.spin", Accel::Process).unwrap();
        let vm = if self_reported {
            vm.self_reported_faults()
        } else {
            vm
        };
        let vm = vm.build().unwrap().run().unwrap();
        let guest = *children_of(std::process::id())
            .first()
            .expect("the guest's process");
        for round in 0..3 {
            send(guest, "-STOP");
            wait_until("the stop", || is_stopped(guest));
            vm.pause().unwrap();
            assert!(is_stopped(guest), "{self_reported}: {round}");
            vm.resume().unwrap();
            wait_until("it does not go on", || !is_stopped(guest));
            // And one that was let go from outside is stopped anew.
            send(guest, "-STOP");
            wait_until("the stop", || is_stopped(guest));
            send(guest, "-CONT");
            wait_until("it does not go on", || !is_stopped(guest));
            vm.pause().unwrap();
            wait_until("it is not stopped", || is_stopped(guest));
            vm.resume().unwrap();
            wait_until("it does not go on", || !is_stopped(guest));
        }
        assert!(vm.exit().is_none(), "{:?}", vm.exit());
    }
}

#[test]
fn a_signal_that_somebody_sent_is_not_the_guests() {
    let _alone = alone();
    let vm = suite_vm("life.spin", Accel::Process).unwrap();
    let vm = vm.build().unwrap().run().unwrap();
    let guest = *children_of(std::process::id())
        .first()
        .expect("the guest's process");
    if !vm
        .sandbox_report()
        .layers
        .iter()
        .any(|l| l.starts_with("ptrace"))
    {
        return paravane_tests::skipped("who sent a signal: ptrace is not to be had");
    }
    send(guest, "-SYS");
    match vm.wait_timeout(patience(30)).expect("in time") {
        ExitReason::Violation(Violation::ProcessEnded { how }) => assert_eq!(how, "signal 31"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_exit_stops_all_vcpus_without_being_waited_for() {
    let _alone = alone();
    let vcpus = || {
        let tasks = fs::read_dir("/proc/self/task").unwrap().flatten();
        tasks
            .filter_map(|task| fs::read_to_string(task.path().join("comm")).ok())
            .filter(|name| name.starts_with("pv-vcpu"))
            .count()
    };
    for accel in accels().unwrap() {
        let vm = suite_vm("smp.exit_from_secondary", accel)
            .unwrap()
            .build()
            .unwrap();
        let vm = vm.run().unwrap();
        wait_until("the exit", || vm.exit().is_some());
        wait_until("a vCPU thread goes on after the exit", || vcpus() == 0);
        assert_eq!(vm.wait().code(), Some(7));
    }
}

/// Does something in a forked copy of this process, which has half a minute for it. `true`: it went
/// well.
#[allow(unsafe_code)]
fn forked(what: impl FnOnce() -> bool) -> bool {
    // SAFETY: the child has this thread alone, uses what the library says it may, and leaves by `_exit`.
    let child = unsafe { libc::fork() };
    assert!(child >= 0);
    if child == 0 {
        // SAFETY: a plain number.
        unsafe { libc::alarm(30) };
        // A panic would go on as a second test runner.
        let well = std::panic::catch_unwind(std::panic::AssertUnwindSafe(what)).unwrap_or(false);
        // SAFETY: a plain number.
        unsafe { libc::_exit(i32::from(!well)) };
    }
    let mut status = 0;
    // SAFETY: a child of ours; the status is written.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    status == 0
}

#[test]
fn a_forked_copy_of_a_vm_harms_nobody_and_waits_for_nothing() {
    let _alone = alone();
    for accel in accels().unwrap() {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("disk.img");
        paravane_tests::blank_image(&image).unwrap();
        let make = || {
            let vm = suite_vm("life.spin", accel).unwrap();
            vm.console_callback(|_| ())
                .block(paravane_tests::disk(&image, &[]))
                .boot_deadline(std::time::Duration::from_secs(3600))
        };
        // The child takes its copy; the original stays.
        let mut vm = Some(make().build().unwrap().run().unwrap());
        let dropped = forked(|| {
            drop(vm.take());
            true
        });
        assert!(dropped, "{accel}: drop");
        let vm = vm.expect("still here");
        let answers = forked(|| {
            vm.stop();
            let other = |result| matches!(result, Err(VmError::OtherProcess(_)));
            let stats = vm.stats();
            other(vm.pause())
                && other(vm.resume())
                && other(vm.console_input(b"x").map(drop))
                && other(vm.set_link(0, true))
                && other(vm.read_private(pv_abi::layout::RAM_BASE, &mut [0]))
                && matches!(vm.wait(), ExitReason::Host(_))
                && matches!(vm.exit(), Some(ExitReason::Host(_)))
                && vm.device_state(0).is_none()
                && vm.memory_report().resident == 0
                && !format!("{vm:?} {stats:?} {:?}", vm.sandbox_report()).is_empty()
        });
        assert!(answers, "{accel}: answers");
        vm.pause().unwrap();
        vm.resume().unwrap();
        assert!(vm.exit().is_none(), "{accel}: {:?}", vm.exit());
        drop(vm);

        for run in [false, true] {
            let mut built = Some(make().build().unwrap());
            let harmless = forked(|| {
                let built = built.take().expect("built");
                !run || matches!(built.run(), Err(VmError::OtherProcess(_)))
            });
            assert!(harmless, "{accel}: before run, {run}");
            let vm = built.expect("still here").run().unwrap();
            vm.pause().unwrap();
            assert!(vm.exit().is_none(), "{accel}: {:?}", vm.exit());
        }
    }
    let spares = Spares::new(1).unwrap();
    assert!(spares.wait_full(patience(30)));
    let mut kept = Some((spares.clone(), spares));
    let harmless = forked(|| {
        let (spares, copy) = kept.take().expect("kept");
        let none = spares.counts().waiting == 0 && !spares.wait_full(patience(30));
        drop((spares, copy));
        none
    });
    assert!(harmless);
    assert_eq!(kept.expect("kept").0.counts().waiting, 1);
}
