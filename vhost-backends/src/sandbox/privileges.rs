//! Namespaces, capabilities, and what else a process can give up about itself.
#![allow(unsafe_code)]
// UNSAFETY: unshare, capset, prctl and setrlimit are system calls without a safe wrapper here.

use std::io;

/// Version 3 of the capability structures: 64 capabilities in two words.
const CAPABILITY_VERSION: u32 = 0x2008_0522;
/// Capabilities are numbered from 0; the kernel refuses the first that it does not know.
const MOST_CAPABILITIES: libc::c_ulong = 64;
/// Heaps of the C library: one for each queue's thread at most, and few enough to stay small.
const MOST_HEAPS: libc::c_int = 8;

#[repr(C)]
struct CapHeader {
    version: u32,
    pid: libc::c_int,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapSet {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Leaves the namespaces that serving does not need. A user namespace of its own makes the others
/// available to everybody, and takes root's privileges over the host with it.
pub(super) fn unshare() -> Result<String, String> {
    let cheap = libc::CLONE_NEWNET | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
    let try_flags = |flags| {
        // SAFETY: unshare takes no pointer.
        match unsafe { libc::unshare(flags) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    match try_flags(libc::CLONE_NEWUSER | cheap) {
        Ok(()) => Ok("user, net, ipc, uts".into()),
        // Containers often refuse user namespaces and leave the rest to a privileged process.
        Err(first) => match try_flags(cheap) {
            Ok(()) => Ok("net, ipc, uts".into()),
            Err(_) => Err(first.to_string()),
        },
    }
}

/// Gives up every capability: bounding, ambient, inheritable, permitted, effective.
pub(super) fn drop_all() -> Result<String, String> {
    let mut bounded = true;
    for capability in 0..MOST_CAPABILITIES {
        match prctl(libc::PR_CAPBSET_DROP, capability) {
            Ok(()) => {}
            // One that this kernel does not have: all before it are done.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => break,
            // Not allowed to; without privileges there is nothing that the set could give back.
            Err(_) => {
                bounded = false;
                break;
            }
        }
    }
    // Old kernels do not have it, nor anything in it.
    let _ = prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL as _);
    let header = CapHeader {
        version: CAPABILITY_VERSION,
        pid: 0,
    };
    let none = [CapSet::default(); 2];
    // SAFETY: the header and both sets are valid for the call, in the layout of this version.
    if unsafe { libc::syscall(libc::SYS_capset, &raw const header, none.as_ptr()) } != 0 {
        return Err(io::Error::last_os_error().to_string());
    }
    // A crash must not write guest memory to the disk.
    let no_core = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the limit is valid for the call.
    let _ = unsafe { libc::setrlimit(libc::RLIMIT_CORE, &no_core) };
    Ok(if bounded {
        "none, bounding set empty".into()
    } else {
        "none".into()
    })
}

pub(super) fn no_new_privs() -> io::Result<String> {
    prctl(libc::PR_SET_NO_NEW_PRIVS, 1)?;
    Ok("on".into())
}

/// Fixes the number of heaps, which the C library would otherwise derive from files in `/sys` when
/// the second thread allocates. Keeps them from being cut short when much was freed, before which
/// it would read a file in `/proc`: large buffers are mappings of their own and are given back.
pub(super) fn settle_allocator() {
    // SAFETY: mallopt takes no pointer; there is one thread.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, MOST_HEAPS);
        libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX);
    }
}

fn prctl(option: libc::c_int, argument: libc::c_ulong) -> io::Result<()> {
    let zero: libc::c_ulong = 0;
    // SAFETY: none of the options used here takes a pointer.
    match unsafe { libc::prctl(option, argument, zero, zero, zero) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
