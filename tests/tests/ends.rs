//! Ends that are seen from outside the VM: by its threads and its process.
//!
//! In a test program of their own, because they look at what else this process has.

use paravane_tests::{accels, alone, children_of, patience, suite_vm, wait_until};
use std::fs;
use std::process::Command;
use vmm_core::{Accel, ExitReason, Violation};

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
