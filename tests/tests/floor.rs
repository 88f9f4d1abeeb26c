//! Hosts that lack something: what is needed is named before anything is built, and what is not is
//! reported. Each host is a process that is kept from some system calls.

use paravane_tests::{accels, beside, skipped};
use std::process::{Command, Output};
use vmm_core::Accel;

/// A case of the suite's guest where these things are denied.
fn run(accel: Accel, case: &str, denials: &[&str]) -> Output {
    Command::new(beside("case-under-test").unwrap())
        .args([accel.name(), case])
        .args(denials)
        .output()
        .unwrap()
}

#[test]
fn what_the_host_lacks_is_named() {
    let common: [(&[&str], &str); 3] = [
        (&["memfd_create"], "memfd_create with seals"),
        (&["pidfd_open"], "pidfd_open"),
        (&["close_range"], "close_range"),
    ];
    let on_kvm: [(&[&str], &str); 1] = [(&["epoll_pwait2"], "epoll_pwait2")];
    let on_process: [(&[&str], &str); 2] = [
        (&["seccomp"], "seccomp filters"),
        (
            &["executable-memfd", "temporary-file"],
            "a place for an executable file",
        ),
    ];
    for accel in accels().unwrap() {
        let own = match accel {
            Accel::Kvm => &on_kvm[..],
            _ => &on_process[..],
        };
        for (denials, named) in common.iter().chain(own) {
            let output = run(accel, "life.exit_code", denials);
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(1), "{accel} {named}: {said}");
            let begins =
                format!("Error: the {accel} accel cannot be used: this host lacks {named}");
            let first = said.lines().next().unwrap_or_default();
            assert!(first.starts_with(&begins), "{said}");
            // And what to do about it.
            let advised = [
                "allow it in the seccomp profile",
                "or later",
                "vm.memfd_noexec",
            ];
            assert!(advised.iter().any(|a| first.contains(a)), "{said}");
        }
    }
}

#[test]
fn layers_that_the_host_refuses_are_reported() {
    if !accels().unwrap().contains(&Accel::Process) {
        return skipped("layers of a sandbox: PV_ACCEL leaves the process accel out");
    }
    let hosts: [(&[&str], &[&str]); 5] = [
        (&[], &[]),
        (&["unshare"], &["a user namespace", "IPC, UTS and cgroup"]),
        (&["landlock"], &["Landlock"]),
        (&["ptrace"], &["ptrace"]),
        (
            &["unshare", "landlock", "ptrace", "executable-memfd"],
            &["a user namespace", "Landlock", "ptrace"],
        ),
    ];
    for (denials, layers) in hosts {
        for (case, end) in [
            ("life.exit_code", "the guest exited with code 42\n"),
            ("fault.null", "the guest Page fault on vCPU 0"),
        ] {
            let output = run(Accel::Process, case, denials);
            let said = String::from_utf8_lossy(&output.stdout);
            let errors = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{denials:?}: {errors}");
            for layer in layers {
                let line = format!("missing: {layer}");
                assert!(said.contains(&line), "{denials:?}: {said}");
            }
            assert!(said.contains(end), "{denials:?}: {said}");
            let own_word = case == "fault.null" && denials.contains(&"ptrace");
            let marked = said.lines().any(|line| line == "self-reported");
            assert_eq!(marked, own_word, "{denials:?}: {said}");
        }
    }
}
