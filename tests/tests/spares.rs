//! Spare processes: the same confinement as a VM's own, and nothing that happens to them is a VM's
//! trouble. On process alone; kvm has none.

use paravane_tests::{
    accels, alive, alone, blank_image, children_of, patience, skipped, suite_vm, ticking_vmm,
    wait_until,
};
use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};
use vmm_core::{Accel, ExitReason, Spares, VmHandle};

/// Whether the process accel is wanted; says so where it is not.
fn wanted() -> bool {
    let wanted = accels().unwrap().contains(&Accel::Process);
    if !wanted {
        skipped("spare processes: PV_ACCEL leaves the process accel out");
    }
    wanted
}

#[allow(unsafe_code)]
fn send(pid: u32, signal: libc::c_int) {
    // SAFETY: a signal to a child of this process that the library has not waited for, or to nobody.
    unsafe { libc::kill(pid.cast_signed(), signal) };
}

fn full(count: usize) -> Spares {
    let spares = Spares::new(count).unwrap();
    assert!(spares.wait_full(patience(30)), "{:?}", spares.counts());
    spares
}

fn vm(case: &str, spares: Option<&Spares>) -> VmHandle {
    let builder = suite_vm(case, Accel::Process).unwrap();
    let builder = match spares {
        Some(spares) => builder.spares(spares),
        None => builder,
    };
    builder.build().unwrap().run().unwrap()
}

fn exits(vm: &VmHandle) {
    let end = vm.wait_timeout(patience(60));
    assert_eq!(end.as_ref().and_then(ExitReason::code), Some(42), "{end:?}");
}

/// What each descriptor of a process is, without its inode.
fn open(pid: u32) -> Vec<String> {
    let mut open: Vec<String> = fs::read_dir(format!("/proc/{pid}/fd"))
        .into_iter()
        .flatten()
        .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
        .map(|link| link.to_string_lossy().into_owned())
        .map(|link| link.split(['[', ']']).take(2).collect())
        .map(|link: String| {
            link.trim_end_matches(|c: char| c.is_ascii_digit())
                .to_owned()
        })
        .collect();
    open.sort();
    open
}

/// Children that run the library's stub, or were it, and have such a descriptor.
fn of_kind(has: &str) -> Vec<u32> {
    let mut found = children_of(std::process::id());
    found.retain(|pid| {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        let has = || open(*pid).iter().any(|what| what.contains(has));
        name == "pv-guest\n" && alive(*pid) && has()
    });
    found
}

/// The spare processes that wait: they have their socket.
fn waiting() -> Vec<u32> {
    of_kind("socket:")
}

/// What the kernel says of a guest's process that is the same for all guests.
fn confinement(pid: u32) -> BTreeMap<String, String> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let names = [
        "NoNewPrivs",
        "Seccomp",
        "Seccomp_filters",
        "CapInh",
        "CapPrm",
        "CapEff",
        "CapBnd",
        "CapAmb",
        "Uid",
        "Gid",
        "Groups",
        "SigBlk",
        "SigIgn",
        "Threads",
        "CoreDumping",
    ];
    let mut all: BTreeMap<String, String> = status
        .lines()
        .filter_map(|line| line.split_once(':'))
        .filter(|(name, _)| names.contains(name))
        .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
        .collect();
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    all.insert("limits".into(), limits);
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let maps = maps.lines().map(|line| {
        // Addresses, protection and file, without its inode.
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        format!("{} {} {:?}", words[0], words[1], words.get(5))
    });
    all.insert("maps".into(), maps.collect::<Vec<_>>().join("\n"));
    all.insert("descriptors".into(), open(pid).join("\n"));
    // Whether each is another one than ours.
    for kind in ["user", "ipc", "uts", "cgroup", "net", "mnt", "pid"] {
        let of = |pid: u32| fs::read_link(format!("/proc/{pid}/ns/{kind}")).ok();
        let own = of(pid).is_some_and(|ns| Some(ns) != of(std::process::id()));
        all.insert(format!("own {kind} namespace"), own.to_string());
    }
    all
}

#[test]
fn a_guest_in_a_spare_process_is_confined_as_in_its_own() {
    let _alone = alone();
    if !wanted() {
        return;
    }
    let look = |spares: Option<&Spares>| {
        let vm = vm("life.idle_forever", spares);
        let guests = of_kind("eventfd");
        assert_eq!(guests.len(), 1);
        (vm.sandbox_report(), confinement(guests[0]))
    };
    let (own, own_state) = look(None);
    let spares = full(1);
    let (spare, spare_state) = look(Some(&spares));
    assert_eq!((own.spare, spare.spare), (false, true));
    assert_eq!(own.layers, spare.layers);
    assert_eq!(own.missing, spare.missing);
    assert_eq!(own.claim, spare.claim);
    assert_eq!(own_state, spare_state);
    assert_eq!(spare_state["Seccomp"], "2");
    assert_eq!(spares.counts().taken, 1);
    // A VM that wants its faults from the guest's own process starts one without a tracer.
    let builder = suite_vm("life.exit_code", Accel::Process).unwrap();
    let builder = builder.spares(&spares).self_reported_faults();
    let vm = builder.build().unwrap().run().unwrap();
    exits(&vm);
    assert!(!vm.sandbox_report().spare);
}

#[test]
fn a_spare_process_has_a_socket_and_nothing_else() {
    let _alone = alone();
    if !wanted() {
        return;
    }
    let descriptors = || fs::read_dir("/proc/self/fd").unwrap().count();
    let threads = || fs::read_dir("/proc/self/task").unwrap().count();
    // What is opened once per process is open after the first.
    drop(full(1));
    let before = (descriptors(), threads());
    // A descriptor that programs would inherit is not a spare process's either.
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let spares = full(3);
    assert_eq!(descriptors(), before.0 + 2 + 3 * 2);
    drop((ours, theirs));
    let there = waiting();
    assert_eq!(there.len(), 3);
    for pid in &there {
        assert_eq!(open(*pid), ["socket:"]);
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        assert!(status.contains("NoNewPrivs:\t1"), "{status}");
    }
    assert_eq!(spares.counts().waiting, 3);
    drop(spares);
    assert_eq!(descriptors(), before.0);
    wait_until("threads are left", || threads() <= before.1);
    assert!(!there.iter().any(|pid| alive(*pid)));
    for count in [0, 65] {
        let error = Spares::new(count).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput, "{error}");
    }
}

#[test]
fn a_spare_process_that_is_killed_or_stopped_is_replaced() {
    let _alone = alone();
    if !wanted() {
        return;
    }
    let spares = full(2);
    for (round, signal) in (1..).zip([libc::SIGKILL, libc::SIGSTOP, libc::SIGSEGV, libc::SIGTERM]) {
        let before = waiting();
        for pid in &before {
            send(*pid, signal);
        }
        // Whether or not it has been noticed yet.
        let first = vm("life.exit_code", Some(&spares));
        exits(&first);
        wait_until("what was lost is not noticed", || {
            !before.iter().any(|pid| alive(*pid))
        });
        assert!(spares.wait_full(patience(30)), "{:?}", spares.counts());
        let second = vm("life.exit_code", Some(&spares));
        exits(&second);
        assert!(second.sandbox_report().spare);
        assert!(spares.wait_full(patience(30)));
        assert!(spares.counts().lost >= round, "{:?}", spares.counts());
    }
}

#[test]
fn a_spare_process_may_die_at_any_moment_of_its_vms_build() {
    let _alone = alone();
    if !wanted() {
        return;
    }
    let spares = full(2);
    let (mut own, mut ended) = (0, 0);
    for round in 0..60 {
        assert!(spares.wait_full(patience(30)), "{:?}", spares.counts());
        // The one that is taken first, at every moment from before that to after the guest's start.
        let victim = waiting().into_iter().min().unwrap();
        let delay = Duration::from_micros(round * 8);
        let began = Instant::now();
        let vm = std::thread::scope(|scope| {
            scope.spawn(|| {
                while began.elapsed() < delay {
                    std::hint::spin_loop();
                }
                send(victim, libc::SIGKILL);
            });
            vm("life.exit_code", Some(&spares))
        });
        match vm.wait_timeout(patience(60)) {
            Some(reason) if reason.code() == Some(42) => {}
            // It was a guest by then.
            Some(reason @ ExitReason::Violation(_)) => {
                assert!(reason.to_string().contains("signal 9"), "{reason}");
                ended += 1;
            }
            other => panic!("{other:?}"),
        }
        own += u32::from(!vm.sandbox_report().spare);
    }
    let missed = spares.counts().missed;
    println!(
        "of 60: {own} started their own process, {missed} as none waited; {ended} guests were killed"
    );
    assert!(spares.wait_full(patience(30)), "{:?}", spares.counts());
    exits(&vm("life.exit_code", Some(&spares)));
}

#[test]
fn vms_outlive_the_spares_that_they_came_from() {
    let _alone = alone();
    if !wanted() {
        return;
    }
    let descriptors = || fs::read_dir("/proc/self/fd").unwrap().count();
    drop(vm("life.idle_forever", None));
    let before = descriptors();
    let spares = full(2);
    let vms: Vec<VmHandle> = (0..2)
        .map(|_| vm("life.idle_forever", Some(&spares)))
        .collect();
    assert!(vms.iter().all(|vm| vm.sandbox_report().spare));
    assert!(spares.wait_full(patience(30)));
    // A builder has a share in them.
    let builder = suite_vm("life.exit_code", Accel::Process).unwrap();
    let builder = builder.spares(&spares);
    drop(spares);
    assert_eq!(waiting().len(), 2);
    let last = builder.build().unwrap().run().unwrap();
    assert!(last.sandbox_report().spare);
    assert_eq!(waiting().len(), 0);
    exits(&last);
    for vm in &vms {
        assert!(vm.exit().is_none());
        vm.pause().unwrap();
        vm.resume().unwrap();
        vm.stop();
        assert!(matches!(
            vm.wait_timeout(patience(60)),
            Some(ExitReason::Stopped)
        ));
    }
    drop((vms, last));
    assert_eq!(descriptors(), before);
    assert!(!children_of(std::process::id()).into_iter().any(alive));
}

#[test]
fn many_vms_at_once_take_what_there_is_and_start_the_rest() {
    let _alone = alone();
    if !wanted() {
        return;
    }
    let descriptors = || fs::read_dir("/proc/self/fd").unwrap().count();
    drop(vm("life.exit_code", None));
    let before = descriptors();
    let spares = full(3);
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                for _ in 0..5 {
                    exits(&vm("life.exit_code", Some(&spares)));
                }
            });
        }
    });
    let counts = spares.counts();
    assert_eq!(counts.taken + counts.missed, 30, "{counts:?}");
    assert!(counts.taken >= 3 && counts.lost == 0, "{counts:?}");
    assert!(spares.wait_full(patience(30)));
    drop(spares);
    assert_eq!(descriptors(), before);
    assert!(!children_of(std::process::id()).into_iter().any(alive));
}

#[test]
fn spare_processes_die_with_the_vmm() {
    let _alone = alone();
    if !wanted() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.img");
    blank_image(&image).unwrap();
    let mut vmm = ticking_vmm(Accel::Process, &image, 3).unwrap();
    // The guest, its backend, and those that wait.
    wait_until("no spare processes", || children_of(vmm.id()).len() == 5);
    let children = children_of(vmm.id());
    vmm.kill().unwrap();
    vmm.wait().unwrap();
    wait_until("children outlive the VMM", || {
        !children.iter().any(|child| alive(*child))
    });
}
