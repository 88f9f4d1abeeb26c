//! Tries, inside the sandbox, what it must refuse: each attempt in a process of its own.
//!
//! An attempt must be harmless where it is *not* refused, by root and without a sandbox too: it is
//! carried out then.
#![allow(unsafe_code)]
// UNSAFETY: fork, wait, and the calls that are tried.

use super::Sandbox;
use std::fmt;
use std::io;

/// One thing that a backend has no reason to do.
#[derive(Clone, Copy, Debug)]
pub struct Probe {
    /// The system call.
    pub name: &'static str,
    attempt: fn() -> libc::c_long,
}

/// How an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was carried out.
    Allowed,
    /// It failed with this errno.
    Refused(i32),
    /// The process that tried was ended by this signal.
    Killed(i32),
    /// The sandbox itself could not be entered.
    NotEntered,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Outcome::Allowed => f.write_str("ALLOWED"),
            Outcome::Refused(errno) => {
                write!(f, "refused: {}", io::Error::from_raw_os_error(*errno))
            }
            Outcome::Killed(libc::SIGSYS) => f.write_str("killed (SIGSYS)"),
            Outcome::Killed(signal) => write!(f, "killed by signal {signal}"),
            Outcome::NotEntered => f.write_str("the sandbox could not be entered"),
        }
    }
}

/// Exit code of a process that did not get into the sandbox; no errno has this number.
const NOT_ENTERED: i32 = 254;

const PROBES: [Probe; 10] = [
    Probe {
        name: "open",
        // SAFETY: the string ends with a zero.
        attempt: || unsafe { libc::open(c"/".as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) }.into(),
    },
    Probe {
        name: "openat2",
        attempt: || {
            let how = [0u64; 3];
            // SAFETY: the string ends with a zero; `how` has the size that is given.
            unsafe {
                libc::syscall(
                    libc::SYS_openat2,
                    libc::AT_FDCWD,
                    c"/".as_ptr(),
                    how.as_ptr(),
                    size_of_val(&how),
                )
            }
        },
    },
    Probe {
        name: "socket",
        // SAFETY: no pointer.
        attempt: || unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_STREAM, 0) }.into(),
    },
    Probe {
        name: "execve",
        attempt: || {
            let arguments = [c"pv-blkd".as_ptr(), c"--version".as_ptr(), std::ptr::null()];
            let environment = [std::ptr::null()];
            // SAFETY: strings and lists end with a zero.
            unsafe {
                libc::execve(
                    c"/proc/self/exe".as_ptr(),
                    arguments.as_ptr(),
                    environment.as_ptr(),
                )
            }
            .into()
        },
    },
    Probe {
        name: "fork",
        attempt: || {
            // SAFETY: there is one thread; the child ends at once.
            match unsafe { libc::fork() } {
                // SAFETY: ends the process.
                0 => unsafe { libc::_exit(0) },
                pid => pid.into(),
            }
        },
    },
    Probe {
        name: "ptrace",
        // Attached without a stop, and detached when the process that tries ends.
        // SAFETY: attaching takes no pointer.
        attempt: || unsafe { libc::ptrace(libc::PTRACE_SEIZE, libc::getppid(), 0usize, 0usize) },
    },
    Probe {
        name: "kill",
        // SAFETY: signal 0 sends nothing.
        attempt: || unsafe { libc::kill(libc::getppid(), 0) }.into(),
    },
    Probe {
        name: "mount",
        attempt: || {
            // No such file system exists: nothing is mounted even where mounting is allowed.
            // SAFETY: strings end with a zero; null is no data.
            let code = unsafe {
                libc::mount(
                    c"none".as_ptr(),
                    c"/".as_ptr(),
                    c"paravane-no-such-file-system".as_ptr(),
                    0,
                    std::ptr::null(),
                )
            };
            // Whoever may mount is told that it does not exist; others that they may not.
            match io::Error::last_os_error().raw_os_error() {
                Some(libc::ENODEV) => 0,
                _ => code.into(),
            }
        },
    },
    Probe {
        name: "unshare",
        // SAFETY: no pointer.
        attempt: || unsafe { libc::unshare(libc::CLONE_NEWUSER) }.into(),
    },
    Probe {
        name: "mmap(exec)",
        attempt: || {
            // SAFETY: a fresh anonymous mapping.
            let at = unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    4096,
                    libc::PROT_READ | libc::PROT_EXEC,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                    -1,
                    0,
                )
            };
            if at == libc::MAP_FAILED { -1 } else { 0 }
        },
    },
];

/// Tries everything, in this order. The calling process must have one thread, and stays outside.
pub fn probe_all(sandbox: Sandbox) -> io::Result<Vec<(Probe, Outcome)>> {
    PROBES
        .iter()
        .map(|probe| Ok((*probe, try_in_child(sandbox, *probe)?)))
        .collect()
}

fn try_in_child(sandbox: Sandbox, probe: Probe) -> io::Result<Outcome> {
    // SAFETY: this process has one thread, so the child may do anything; it never returns.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let code = match sandbox.enter() {
            Err(_) => NOT_ENTERED,
            Ok(_) if (probe.attempt)() >= 0 => 0,
            Ok(_) => io::Error::last_os_error().raw_os_error().unwrap_or(1),
        };
        // SAFETY: ends the child without the parent's clean-up.
        unsafe { libc::_exit(code) }
    }
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut status = 0;
    // SAFETY: `status` is valid; the child is ours and waited for here only.
    if unsafe { libc::waitpid(pid, &mut status, 0) } != pid {
        return Err(io::Error::last_os_error());
    }
    Ok(if libc::WIFSIGNALED(status) {
        Outcome::Killed(libc::WTERMSIG(status))
    } else {
        match libc::WEXITSTATUS(status) {
            0 => Outcome::Allowed,
            NOT_ENTERED => Outcome::NotEntered,
            errno => Outcome::Refused(errno),
        }
    })
}
