//! The system-call filter: the whole list.
//!
//! Calls on the way of a request carry no condition on their arguments, so that the kernel decides
//! them from a bitmap and never runs the program.

use super::SeccompMode;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, apply_filter,
};

/// What serving a disk takes, whatever the arguments.
const CALLS: &[libc::c_long] = &[
    // Requests.
    libc::SYS_io_uring_enter,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_fdatasync,
    libc::SYS_fsync,
    libc::SYS_fallocate,
    libc::SYS_lseek,
    libc::SYS_epoll_wait,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_futex,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_sched_yield,
    // Queues that start and stop.
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_register,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_eventfd2,
    // A peer that is looked for again.
    libc::SYS_timerfd_settime,
    // Connections.
    libc::SYS_accept4,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_shutdown,
    libc::SYS_close,
    // What came over them: memory, and logs that the frontend keeps for us.
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_memfd_create,
    libc::SYS_ftruncate,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    // Threads. The other filter answers `clone3`, which must pass this one for that.
    libc::SYS_clone3,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_rt_sigprocmask,
    // The C library takes a signal of its own when the first thread starts.
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigreturn,
    libc::SYS_restart_syscall,
    libc::SYS_sigaltstack,
    libc::SYS_sched_getaffinity,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_getrandom,
];

/// `ioctl` requests: non-blocking sockets, and what block devices and taps are asked.
const IOCTLS: &[u64] = &[
    libc::FIONBIO,
    crate::net::port::TAP_LATE_IOCTLS[0],
    crate::net::port::TAP_LATE_IOCTLS[1],
    0x1277,      // BLKDISCARD
    0x127d,      // BLKSECDISCARD
    0x127f,      // BLKZEROOUT
    0x8008_1272, // BLKGETSIZE64
];

/// `fcntl` commands: duplicates, flags, seals and locks.
const FCNTLS: &[libc::c_int] = &[
    libc::F_DUPFD_CLOEXEC,
    libc::F_GETFD,
    libc::F_SETFD,
    libc::F_GETFL,
    libc::F_SETFL,
    libc::F_ADD_SEALS,
    libc::F_GET_SEALS,
    libc::F_OFD_SETLK,
    libc::F_OFD_GETLK,
];

/// Installs the filter in this thread and those that it starts from now on.
pub(super) fn install(mode: SeccompMode) -> Result<String, String> {
    let refuse = match mode {
        SeccompMode::None => return Ok("none".into()),
        SeccompMode::Kill => SeccompAction::KillProcess,
        SeccompMode::Log => SeccompAction::Log,
    };
    let build = || -> Result<[BpfProgram; 2], BackendError> {
        // `clone3` keeps its flags in memory, where a filter cannot look. The C library takes
        // `clone` where there is none.
        let no_clone3 = SeccompFilter::new(
            [(libc::SYS_clone3, vec![])].into_iter().collect(),
            SeccompAction::Allow,
            SeccompAction::Errno(libc::ENOSYS as u32),
            TargetArch::x86_64,
        )?;
        let mut rules: Vec<_> = CALLS.iter().map(|call| (*call, vec![])).collect();
        rules.extend(conditional()?);
        let listed = SeccompFilter::new(
            rules.into_iter().collect(),
            refuse,
            SeccompAction::Allow,
            TargetArch::x86_64,
        )?;
        Ok([no_clone3.try_into()?, listed.try_into()?])
    };
    // The list is the last, since it does not have the call that installs another.
    for program in build().map_err(|error| error.to_string())? {
        apply_filter(&program).map_err(|error| error.to_string())?;
    }
    let listed = CALLS.len() + conditional().map_or(0, |rules| rules.len());
    let action = if mode == SeccompMode::Kill {
        "kill"
    } else {
        "log"
    };
    Ok(format!("{action}, {listed} calls allowed"))
}

type Rules = Vec<(libc::c_long, Vec<SeccompRule>)>;

/// Calls that are allowed for some arguments only.
fn conditional() -> Result<Rules, BackendError> {
    let thread = (libc::CLONE_VM | libc::CLONE_SIGHAND | libc::CLONE_THREAD) as u64;
    let not_executable = |argument| SeccompRule::new(vec![without(argument, libc::PROT_EXEC)?]);
    let each = |argument, values: Vec<u64>| {
        values
            .into_iter()
            .map(|value| SeccompRule::new(vec![is(argument, SeccompCmpOp::Eq, value)?]))
            .collect::<Result<Vec<_>, _>>()
    };
    Ok(vec![
        // Threads, and no processes.
        (
            libc::SYS_clone,
            vec![SeccompRule::new(vec![is(
                0,
                SeccompCmpOp::MaskedEq(thread),
                thread,
            )?])?],
        ),
        (libc::SYS_mmap, vec![not_executable(2)?]),
        (libc::SYS_mprotect, vec![not_executable(2)?]),
        (libc::SYS_ioctl, each(1, IOCTLS.to_vec())?),
        (
            libc::SYS_fcntl,
            each(
                1,
                FCNTLS
                    .iter()
                    .map(|c| u64::from(c.cast_unsigned()))
                    .collect(),
            )?,
        ),
        // Ending itself, and nobody else, by abort: seen from outside as what it is.
        (
            libc::SYS_tgkill,
            vec![SeccompRule::new(vec![
                is(0, SeccompCmpOp::Eq, u64::from(std::process::id()))?,
                is(
                    2,
                    SeccompCmpOp::Eq,
                    u64::from(libc::SIGABRT.cast_unsigned()),
                )?,
            ])?],
        ),
        // How long the backend's own channel to a frontend is waited for.
        (
            libc::SYS_setsockopt,
            socket_options(&[libc::SO_RCVTIMEO, libc::SO_SNDTIMEO])?,
        ),
        // Whether a socket that another daemon hands over is one.
        (
            libc::SYS_getsockopt,
            socket_options(&[libc::SO_DOMAIN, libc::SO_TYPE, libc::SO_ACCEPTCONN])?,
        ),
        // A thread's name.
        (
            libc::SYS_prctl,
            each(0, vec![u64::from(libc::PR_SET_NAME.cast_unsigned())])?,
        ),
    ])
}

/// Calls on one of these options of any socket.
fn socket_options(options: &[libc::c_int]) -> Result<Vec<SeccompRule>, BackendError> {
    let level = libc::SOL_SOCKET.cast_unsigned().into();
    let rule = |option: &libc::c_int| {
        SeccompRule::new(vec![
            is(1, SeccompCmpOp::Eq, level)?,
            is(2, SeccompCmpOp::Eq, option.cast_unsigned().into())?,
        ])
    };
    options.iter().map(rule).collect()
}

fn is(argument: u8, op: SeccompCmpOp, value: u64) -> Result<SeccompCondition, BackendError> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, op, value)
}

fn without(argument: u8, bit: libc::c_int) -> Result<SeccompCondition, BackendError> {
    let bit = u64::from(bit.cast_unsigned());
    is(argument, SeccompCmpOp::MaskedEq(bit), 0)
}

/// The list for a process that connects to what it was told before, again and again.
pub(crate) fn confine_connector() -> Result<(), String> {
    confine(&[
        libc::SYS_recvfrom,
        // The standard library looks whether what it closes is open.
        libc::SYS_fcntl,
        libc::SYS_socket,
        libc::SYS_connect,
        libc::SYS_sendmsg,
        libc::SYS_close,
        libc::SYS_munmap,
        libc::SYS_brk,
        libc::SYS_sigaltstack,
        libc::SYS_exit_group,
    ])
}

/// The list for a process that writes a byte, waits for one, looks at files and removes them.
pub(crate) fn confine_remover() -> Result<(), String> {
    confine(&[
        libc::SYS_read,
        libc::SYS_write,
        libc::SYS_statx,
        libc::SYS_newfstatat,
        libc::SYS_unlink,
        libc::SYS_close,
        libc::SYS_munmap,
        libc::SYS_brk,
        libc::SYS_sigaltstack,
        libc::SYS_exit_group,
    ])
}

/// Ends this process at any call that is not one of these.
fn confine(calls: &[libc::c_long]) -> Result<(), String> {
    let program: BpfProgram = SeccompFilter::new(
        calls.iter().map(|call| (*call, vec![])).collect(),
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        TargetArch::x86_64,
    )
    .and_then(TryInto::try_into)
    .map_err(|error: BackendError| error.to_string())?;
    apply_filter(&program).map_err(|error| error.to_string())
}
