//! The signals that end a daemon, as a descriptor.
#![allow(unsafe_code)]
// UNSAFETY: signalfd and the signal mask are system calls without a safe wrapper here.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

/// What asks for an end, and whether it does so too where whoever started this ignores it: nohup(1)
/// wants to keep it from a hang-up.
const ENDS: [(libc::c_int, bool); 4] = [
    (libc::SIGTERM, true),
    (libc::SIGINT, true),
    (libc::SIGHUP, false),
    (libc::SIGQUIT, false),
];

/// Blocks the signals that ask for an end in this thread and the ones it starts, and gives a
/// descriptor that is readable once one of them came. Also ignores SIGXFSZ, so that writing past a
/// file size limit is an error of that write and not the end of the process.
pub(super) fn stop_on_term() -> io::Result<OwnedFd> {
    // SAFETY: the set is initialised by sigemptyset before anything reads it, and an action of all
    // zeroes is a valid one; all calls get
    // pointers to it or null where that is allowed.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for (signal, always) in ENDS {
            let mut action: libc::sigaction = std::mem::zeroed();
            if libc::sigaction(signal, std::ptr::null(), &mut action) != 0 {
                return Err(io::Error::last_os_error());
            }
            if always || action.sa_sigaction != libc::SIG_IGN {
                libc::sigaddset(&mut set, signal);
            }
        }
        let code = libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        if code != 0 {
            return Err(io::Error::from_raw_os_error(code));
        }
        if libc::signal(libc::SIGXFSZ, libc::SIG_IGN) == libc::SIG_ERR {
            return Err(io::Error::last_os_error());
        }
        let fd = libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(OwnedFd::from_raw_fd(fd))
    }
}
