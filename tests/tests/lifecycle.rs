//! VMs come and go: many in one process, dropped in any state, killed with their VMM.

use paravane_tests::{
    accels, alive, alone, blank_image, children_of, disk, patience, skipped, suite_vm, ticking_vmm,
    wait_until,
};
use std::fs;
use std::process::Command;
use std::sync::{Mutex, mpsc};
use std::time::{Duration, Instant};
use vmm_core::{
    Accel, BuildError, ExitReason, FaultClass, Image, ImageError, NetConfig, SandboxReport,
    Violation, VmBuilder, VmError,
};

#[test]
fn many_vms_in_one_process() {
    let _alone = alone();
    for accel in accels().unwrap() {
        let vms: Vec<_> = (0..8)
            .map(|_| {
                suite_vm("life.exit_code", accel)
                    .unwrap()
                    .build()
                    .unwrap()
                    .run()
                    .unwrap()
            })
            .collect();
        for vm in vms {
            assert_eq!(vm.wait_timeout(patience(60)).unwrap().code(), Some(42));
        }
    }
}

#[test]
fn dropping_leaves_nothing_behind() {
    let _alone = alone();
    let descriptors = || fs::read_dir("/proc/self/fd").unwrap().count();
    let threads = || fs::read_dir("/proc/self/task").unwrap().count();
    for accel in accels().unwrap() {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("disk.img");
        blank_image(&image).unwrap();
        let make = |case| {
            suite_vm(case, accel)
                .unwrap()
                .block(disk(&image, &[]))
                .boot_deadline(Duration::from_secs(3600))
                .build()
                .unwrap()
        };
        // What is opened once per process is open after the first VM.
        drop(make("life.spin"));
        let before = (descriptors(), threads());
        for round in 0..10 {
            let vm = make("life.spin");
            if round % 3 > 0 {
                let handle = vm.run().unwrap();
                if round % 3 > 1 {
                    std::thread::sleep(Duration::from_millis(5));
                    handle.pause().unwrap();
                }
                drop(handle);
            }
        }
        wait_until("threads are left", || threads() <= before.1);
        assert_eq!(descriptors(), before.0, "{accel}: descriptors are left");
        let left: Vec<u32> = children_of(std::process::id())
            .into_iter()
            .filter(|p| alive(*p))
            .collect();
        assert!(left.is_empty(), "{accel}: children are left: {left:?}");
    }
}

#[test]
fn a_boot_deadline_waits_for_a_paused_guest() {
    for accel in accels().unwrap() {
        // The deadline is to be far off when the VM is paused, however slow this host is now.
        let paused = (0..6).find_map(|tries| {
            let deadline = Duration::from_millis(500 << tries);
            let vm = VmBuilder::new(Image::from_bytes(guest_images::INERT).unwrap())
                .accel(accel)
                .boot_deadline(deadline)
                .build()
                .unwrap()
                .run()
                .unwrap();
            vm.pause().is_ok().then_some((vm, deadline))
        });
        let (vm, deadline) = paused.expect("not paused in time");
        std::thread::sleep(deadline * 2);
        assert!(vm.exit().is_none(), "{accel}: {:?}", vm.exit());
        vm.resume().unwrap();
        let reason = vm.wait_timeout(patience(30)).expect("the deadline passed");
        let late = matches!(
            reason,
            ExitReason::Violation(Violation::NeverStarted { .. })
        );
        assert!(late, "{accel}: {reason:?}");
    }
}

#[test]
fn a_killed_vmm_leaves_no_child() {
    let _alone = alone();
    for accel in accels().unwrap() {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("disk.img");
        blank_image(&image).unwrap();
        let mut vmm = ticking_vmm(accel, &image, 0).unwrap();
        let children = children_of(vmm.id());
        // A backend, and on process the guest itself.
        assert_eq!(
            children.len(),
            if accel == Accel::Process { 2 } else { 1 },
            "{accel}"
        );
        assert!(children.iter().all(|child| alive(*child)));
        vmm.kill().unwrap();
        vmm.wait().unwrap();
        wait_until("children outlive the VMM", || {
            !children.iter().any(|child| alive(*child))
        });
    }
}

#[test]
fn controls_after_the_end_say_so() {
    let _alone = alone();
    for accel in accels().unwrap() {
        let vm = suite_vm("life.exit_code", accel)
            .unwrap()
            .build()
            .unwrap()
            .run()
            .unwrap();
        assert_eq!(vm.wait_timeout(patience(60)).unwrap().code(), Some(42));
        assert!(matches!(
            vm.pause(),
            Err(VmError::Ended(ExitReason::Exited(42)))
        ));
        assert!(matches!(
            vm.resume(),
            Err(VmError::Ended(ExitReason::Exited(42)))
        ));
        vm.stop();
        assert_eq!(
            vm.exit().unwrap().code(),
            Some(42),
            "the first reason stays"
        );
        assert!(matches!(
            vm.console_input(b"x"),
            Err(VmError::NoDevice("console"))
        ));
    }
}

#[test]
fn a_paused_guest_does_not_execute() {
    let _alone = alone();
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    for accel in accels().unwrap() {
        let ticks = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&ticks);
        let vm = suite_vm("life.ticker", accel)
            .unwrap()
            .call(5, move |call| {
                counted.fetch_add(1, Ordering::SeqCst);
                call.finish(Ok(0));
            })
            .build()
            .unwrap()
            .run()
            .unwrap();
        for _ in 0..5 {
            let before = ticks.load(Ordering::SeqCst);
            wait_until("no ticks", || ticks.load(Ordering::SeqCst) > before + 2);
            vm.pause().unwrap();
            // A call that was on its way may still be carried out.
            std::thread::sleep(Duration::from_millis(10));
            let halted = ticks.load(Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(50));
            assert_eq!(ticks.load(Ordering::SeqCst), halted, "{accel}");
            vm.resume().unwrap();
        }
    }
}

#[test]
fn pausing_twice_and_with_an_unanswered_call() {
    let _alone = alone();
    use std::sync::Arc;
    for accel in accels().unwrap() {
        let vm = suite_vm("life.spin", accel)
            .unwrap()
            .build()
            .unwrap()
            .run()
            .unwrap();
        let started = Instant::now();
        vm.pause().unwrap();
        vm.pause().unwrap();
        vm.resume().unwrap();
        vm.resume().unwrap();
        vm.pause().unwrap();
        assert!(
            started.elapsed() < patience(5),
            "{accel}: {:?}",
            started.elapsed()
        );
        drop(vm);

        // The embedder answers the guest's call only after it has paused the VM.
        let waiting = Arc::new(Mutex::new(None));
        let kept = Arc::clone(&waiting);
        let vm = suite_vm("call.embedder_later", accel).unwrap();
        let vm = vm.call(2, move |call| *kept.lock().unwrap() = Some(call));
        let vm = vm.build().unwrap().run().unwrap();
        wait_until("the call", || waiting.lock().unwrap().is_some());
        vm.pause().unwrap();
        let call = waiting.lock().unwrap().take().unwrap();
        call.finish(Ok(14));
        std::thread::sleep(Duration::from_millis(20));
        assert!(vm.exit().is_none(), "{accel}: a paused guest went on");
        vm.resume().unwrap();
        // A limit past the end of time is none.
        assert_eq!(
            vm.wait_timeout(Duration::MAX).unwrap().code(),
            Some(0),
            "{accel}"
        );
    }
}

#[test]
fn a_console_writer_that_blocks_holds_up_output_only() {
    let _alone = alone();
    for accel in accels().unwrap() {
        for case in ["console.held", "console.output"] {
            let (release, held) = mpsc::channel::<()>();
            let vm = suite_vm(case, accel).unwrap().rng();
            let vm = vm.console_callback(move |_| {
                let _ = held.recv();
            });
            let vm = vm.build().unwrap().run().unwrap();
            let started = Instant::now();
            if case == "console.held" {
                // It resets the console again and again, and ends.
                let reason = vm.wait_timeout(patience(30)).expect("in time");
                assert_eq!(reason.code(), Some(0), "{reason}");
            } else {
                assert!(vm.wait_timeout(Duration::from_millis(100)).is_none());
            }
            drop(vm);
            assert!(started.elapsed() < patience(30), "{accel}: {case}");
            drop(release);
        }
    }
}

#[test]
fn a_console_writer_that_panics_ends_its_own_vm_only() {
    let _alone = alone();
    for accel in accels().unwrap() {
        let vm = suite_vm("console.output", accel).unwrap();
        let vm = vm
            .console_callback(|_| panic!("in a writer"))
            .build()
            .unwrap()
            .run()
            .unwrap();
        let reason = vm.wait_timeout(patience(30)).unwrap();
        assert!(matches!(&reason, ExitReason::Host(e) if e.to_string().contains("panicked")));
    }
}

#[test]
fn bad_settings_are_refused_with_their_range() {
    let _alone = alone();
    let builder = || VmBuilder::new(Image::from_bytes(guest_images::SUITE).unwrap());
    let refused = |builder: VmBuilder| {
        let error = builder.build().unwrap_err();
        assert!(
            matches!(
                error,
                BuildError::OutOfRange { .. } | BuildError::MemoryTooSmall(_)
            ),
            "{error}"
        );
    };
    refused(builder().vcpus(0));
    refused(builder().vcpus(65));
    refused(builder().memory(0));
    refused(builder().memory(1 << 20));
    refused(builder().memory(u64::MAX));
    refused(builder().vcpus(64).memory(8 << 20));
    refused(builder().cmdline("x".repeat(2049)));
    assert!(builder().cmdline("x".repeat(2048)).build().is_ok());
    let disk = || paravane_tests::disk("/dev/null".as_ref(), &[]);
    refused(builder().block(disk().queues(0)));
    let card = || NetConfig::socket("/nowhere");
    refused(builder().net(card().queue_pairs(0)));
    refused(builder().net(card().queue_pairs(16)));
    refused(builder().net(card().mtu(67)));
    refused(builder().net(card().mac([1; 6])));
    refused(builder().block(disk().queues(33)));
    refused(builder().block(disk().queue_size(3)));
    refused(builder().block(disk().queue_size(2048)));
    refused(builder().block(disk().arena(5 << 30)));
    refused(builder().block(disk().name("x".repeat(33))));
    let twice = builder().call(1, drop).call(1, drop).build();
    assert!(matches!(twice, Err(BuildError::Registry(_))));
    let beyond = builder().call(256, drop).build();
    assert!(matches!(beyond, Err(BuildError::Registry(_))));
}

#[test]
fn backends_that_cannot_serve_are_named() {
    let _alone = alone();
    let builder = || VmBuilder::new(Image::from_bytes(guest_images::SUITE).unwrap());
    let failed = |config| match builder().block(config).build() {
        Err(BuildError::Backend { name, source }) => format!("{name}: {source}"),
        other => panic!("{other:?}"),
    };
    use vmm_core::BlockConfig;
    let missing = failed(BlockConfig::spawn(|| Command::new("/no/such/daemon")));
    assert!(missing.contains("/no/such/daemon"), "{missing}");
    let ends = failed(BlockConfig::spawn(|| Command::new("/bin/true")));
    let hung_up = "disk: the backend hung up before it was ready: ";
    assert_eq!(ends, format!("{hung_up}exit status: 0"));
    let panics = failed(BlockConfig::in_process(|_| panic!("a bug")));
    assert_eq!(panics, format!("{hung_up}it panicked: a bug"));
    let refuses = failed(BlockConfig::in_process(|_| {
        Err(std::io::Error::other("no disk"))
    }));
    assert_eq!(refuses, format!("{hung_up}no disk"));
    let no_file = failed(paravane_tests::disk("/no/such/image".as_ref(), &[]));
    assert!(
        no_file.starts_with(&format!("{hung_up}exit status: ")),
        "{no_file}"
    );
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("nobody.sock");
    let nobody = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    drop(nobody);
    let started = Instant::now();
    let refused = failed(BlockConfig::socket(&socket));
    assert!(refused.starts_with("disk: ") && started.elapsed() < Duration::from_secs(60));
    let image = folder.path().join("disk.img");
    blank_image(&image).unwrap();
    let queues = failed(paravane_tests::disk(&image, &[]).queues(3));
    assert!(queues.contains("--num-queues"), "{queues}");
}

#[test]
fn a_handler_that_panics_ends_its_own_vm_only() {
    let _alone = alone();
    for accel in accels().unwrap() {
        let suite = |case| suite_vm(case, accel).unwrap();
        // One that is there all the while.
        let beside = suite("life.spin").build().unwrap().run().unwrap();
        let builders = [
            (
                "call handler",
                suite("life.ticker").call(5, |_| panic!("in a handler")),
            ),
            (
                "log sink",
                suite("call.log_limits").log(|_, _| panic!("in a sink")),
            ),
        ];
        for (what, vm) in builders {
            let vm = vm.build().unwrap().run().unwrap();
            let reason = vm.wait_timeout(patience(30)).expect(what);
            assert!(
                matches!(&reason, ExitReason::Host(e) if e.to_string().contains("panicked")),
                "{accel}: {what}: {reason:?}"
            );
            let started = Instant::now();
            drop(vm);
            assert!(started.elapsed() < patience(10), "{accel}: {what}");
        }
        assert!(beside.exit().is_none(), "{accel}: {:?}", beside.exit());
        beside.pause().unwrap();
        let other = suite("call.nop").build().unwrap().run().unwrap();
        assert_eq!(other.wait_timeout(patience(30)).unwrap().code(), Some(0));
    }
}

#[test]
fn every_cut_of_a_real_image_is_refused() {
    let _alone = alone();
    let image = guest_images::FIRST_GUEST;
    let accepted = Image::from_bytes(image).unwrap();
    let last = accepted
        .segments()
        .iter()
        .map(|s| s.file.end)
        .max()
        .unwrap();
    // Every offset of the headers, then every page of the contents.
    for len in (0..4096.min(last)).chain((4096..last).step_by(509)) {
        let error = Image::from_bytes(&image[..len]).unwrap_err();
        assert!(!error.to_string().is_empty());
        assert!(!matches!(error, ImageError::Io { .. }));
    }
}

#[test]
fn faults_without_ptrace_are_reported_and_marked() {
    let _alone = alone();
    let cases = [
        ("fault.divide", FaultClass::Divide),
        ("fault.breakpoint", FaultClass::Breakpoint),
        ("fault.invalid_opcode", FaultClass::InvalidOpcode),
        ("fault.null", FaultClass::Page),
        ("fault.write_text", FaultClass::Page),
        ("fault.stack_overflow", FaultClass::Page),
        ("fault.stack_overflow_secondary", FaultClass::Page),
        ("fault.x87", FaultClass::FloatingPoint),
        ("banned.hlt", FaultClass::Forbidden),
    ];
    let run = |case| {
        let vm = suite_vm(case, Accel::Process)
            .unwrap()
            .self_reported_faults();
        let vm = vm.build().unwrap().run().unwrap();
        let report = vm.sandbox_report();
        assert!(
            report.missing.iter().any(|m| m.contains("self-reported")),
            "{report:?}"
        );
        vm.wait_timeout(patience(60)).unwrap()
    };
    for (case, class) in cases {
        match run(case) {
            ExitReason::Fault(fault) => {
                assert_eq!(fault.class, class, "{case}: {fault:?}");
                assert!(fault.self_reported, "{case}");
            }
            other => panic!("{case}: {other:?}"),
        }
    }
    let expected = ExitReason::Violation(Violation::SystemCall { number: 59 });
    assert_eq!(run("banned.syscall").to_string(), expected.to_string());
}

#[test]
fn the_sandbox_says_what_is_in_force() {
    let _alone = alone();
    let vm = suite_vm("life.idle_forever", Accel::Process)
        .unwrap()
        .build()
        .unwrap();
    let vm = vm.run().unwrap();
    let report = vm.sandbox_report();
    assert!(
        report.layers.iter().any(|l| l.starts_with("seccomp: ")),
        "{report:?}"
    );
    assert!(report.claim.ends_with("weaker than hardware KVM"));
    // What it says, the kernel says too.
    let guest = children_of(std::process::id()).into_iter().find(|pid| {
        fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name == "pv-guest\n")
    });
    let guest = guest.expect("the guest's process");
    let status = fs::read_to_string(format!("/proc/{guest}/status")).unwrap();
    let field = |name: &str| {
        let line = status
            .lines()
            .find(|l| l.starts_with(name))
            .unwrap_or_default();
        line.split_ascii_whitespace()
            .nth(1)
            .unwrap_or_default()
            .to_owned()
    };
    assert_eq!(field("Seccomp:"), "2");
    assert_eq!(field("NoNewPrivs:"), "1");
    assert_eq!(u64::from_str_radix(&field("CapEff:"), 16), Ok(0));
    // No file of the host's, no library, no stack of the stub's: guest memory and the gate.
    let maps = fs::read_to_string(format!("/proc/{guest}/maps")).unwrap();
    for line in maps.lines() {
        assert!(
            line.contains("/memfd:pv-") || line.contains("[vsyscall]"),
            "{line}"
        );
    }
    let open = fs::read_dir(format!("/proc/{guest}/fd")).unwrap();
    for entry in open {
        let target = fs::read_link(entry.unwrap().path()).unwrap();
        assert!(target.to_string_lossy().contains("[eventfd]"), "{target:?}");
    }
    outer_layers(guest, &report);
}

/// Limits, namespaces and Landlock of a guest's process: in force if the report says so, and the report
/// says so wherever this host has them for everybody.
fn outer_layers(guest: u32, report: &SandboxReport) {
    let limits = fs::read_to_string(format!("/proc/{guest}/limits")).unwrap();
    let core = limits.lines().find(|l| l.starts_with("Max core file size"));
    let core: Vec<_> = core.unwrap().split_ascii_whitespace().skip(4).collect();
    assert_eq!(core, ["0", "0", "bytes"], "{limits}");
    let says = |layer: &str| report.layers.iter().any(|l| l.contains(layer));
    assert!(says("no core dumps"), "{report:?}");
    let namespace = |pid: &str, kind: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}"));
    let guest = guest.to_string();
    for (layer, kinds) in [
        ("a user namespace", &["user"][..]),
        ("IPC, UTS and cgroup namespaces", &["ipc", "uts", "cgroup"]),
    ] {
        for kind in kinds {
            let ours = namespace("self", kind).unwrap();
            match namespace(&guest, kind) {
                Ok(its) => assert_eq!(its != ours, says(layer), "{kind}: {report:?}"),
                Err(error) => skipped(&format!("the {kind} namespace cannot be seen: {error}")),
            }
        }
        if !says(layer) {
            skipped(&format!("{layer}: this host refuses it"));
        }
    }
    // What a process is under is nowhere to be read; but where Landlock is, nobody is refused it.
    assert_eq!(says("Landlock"), landlock(), "{report:?}");
}

/// Whether this host's kernel has Landlock, switched on.
#[allow(unsafe_code)]
fn landlock() -> bool {
    // SAFETY: asks for the version: no structure is read.
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0, 0, 1) };
    if version <= 0 {
        skipped("Landlock: not in this host's kernel");
    }
    version > 0
}
