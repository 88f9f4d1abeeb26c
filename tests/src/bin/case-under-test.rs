//! One case of the suite's guest, in a process from which the host keeps something.
//!
//! Usage: `case-under-test ACCEL CASE [DENIAL...]`. Prints the layers of the sandbox that are missing
//! and how the guest ended; a VM that cannot be built is an error of this program.

use anyhow::{Context, bail};
use paravane_tests::{patience, suite_vm};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use vmm_core::ExitReason;

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let (Some(accel), Some(case)) = (args.next(), args.next()) else {
        bail!("usage: case-under-test ACCEL CASE [DENIAL...]");
    };
    // Before there are threads: they inherit it, and so do processes.
    for denial in args {
        deny(&denial)?;
    }
    let vm = suite_vm(&case, accel.parse()?)?.build()?.run()?;
    for layer in vm.sandbox_report().missing {
        println!("missing: {layer}");
    }
    let end = vm.wait_timeout(patience(60)).context("it does not end")?;
    match &end {
        ExitReason::Fault(fault) if fault.self_reported => println!("self-reported"),
        _ => {}
    }
    println!("the guest {end}");
    Ok(())
}

/// Has the host answer some system calls with an error, as containers and older kernels do.
fn deny(what: &str) -> anyhow::Result<()> {
    // Calls, and the flags in one of their arguments with which alone they are refused.
    let (calls, flags, errno): (&[libc::c_long], Option<(u8, u64)>, i32) = match what {
        "memfd_create" => (&[libc::SYS_memfd_create], None, libc::ENOSYS),
        "pidfd_open" => (&[libc::SYS_pidfd_open], None, libc::EPERM),
        "close_range" => (&[libc::SYS_close_range], None, libc::ENOSYS),
        "epoll_pwait2" => (&[libc::SYS_epoll_pwait2], None, libc::ENOSYS),
        "seccomp" => (&[libc::SYS_seccomp], None, libc::EINVAL),
        "unshare" => (&[libc::SYS_unshare], None, libc::EPERM),
        "landlock" => (&[libc::SYS_landlock_create_ruleset], None, libc::ENOSYS),
        "ptrace" => (&[libc::SYS_ptrace], None, libc::EPERM),
        "executable-memfd" => {
            let flag = u64::from(libc::MFD_EXEC);
            (&[libc::SYS_memfd_create], Some((1, flag)), libc::EACCES)
        }
        "temporary-file" => {
            let flag = u64::from(libc::O_TMPFILE.cast_unsigned());
            (&[libc::SYS_openat], Some((2, flag)), libc::EACCES)
        }
        _ => bail!("no denial is called {what:?}"),
    };
    let rules = match flags {
        None => Vec::new(),
        Some((argument, flags)) => {
            let set = SeccompCmpOp::MaskedEq(flags);
            let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Qword, set, flags)?;
            vec![SeccompRule::new(vec![condition])?]
        }
    };
    let program: BpfProgram = SeccompFilter::new(
        calls.iter().map(|call| (*call, rules.clone())).collect(),
        SeccompAction::Allow,
        SeccompAction::Errno(errno.cast_unsigned()),
        TargetArch::x86_64,
    )?
    .try_into()?;
    seccompiler::apply_filter(&program)?;
    Ok(())
}
