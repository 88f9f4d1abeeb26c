//! What the host is told: who runs where, and how a file's pages are kept.
#![allow(unsafe_code)]
// UNSAFETY: a thread's affinity and advice on a file are system calls without a safe wrapper among
// the dependencies.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// The processors of this process, shared out.
#[derive(Clone, Debug)]
pub(crate) struct Processors {
    frontend: Vec<usize>,
    servers: Vec<usize>,
}

impl Processors {
    /// The first one for the frontend, the others for the servers. With one only, or if not
    /// `apart`, everybody has all of them.
    pub(crate) fn share_out(apart: bool) -> io::Result<Processors> {
        let all = affinity()?;
        Ok(match all.split_first() {
            Some((first, rest)) if apart && !rest.is_empty() => Processors {
                frontend: vec![*first],
                servers: rest.to_vec(),
            },
            _ => Processors {
                frontend: all.clone(),
                servers: all,
            },
        })
    }

    /// Starts a process where servers run; the calling thread is moved to where the frontend does.
    pub(crate) fn in_server<T>(&self, start: impl FnOnce() -> T) -> io::Result<T> {
        set_affinity(&self.servers)?;
        let started = start();
        set_affinity(&self.frontend)?;
        Ok(started)
    }
}

impl std::fmt::Display for Processors {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "frontend on processors {:?}, servers and fio on {:?}",
            self.frontend, self.servers
        )
    }
}

fn affinity() -> io::Result<Vec<usize>> {
    // SAFETY: all-zero is a valid set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set is as long as is said, and lives through the call.
    if unsafe { libc::sched_getaffinity(0, size_of_val(&set), &mut set) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let most = 8 * size_of_val(&set);
    // SAFETY: CPU_ISSET looks at a bit of the set; the index is below its size.
    Ok((0..most)
        .filter(|at| unsafe { libc::CPU_ISSET(*at, &set) })
        .collect())
}

fn set_affinity(processors: &[usize]) -> io::Result<()> {
    // SAFETY: all-zero is a valid set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    for at in processors {
        // SAFETY: the index came out of a set of the same size.
        unsafe { libc::CPU_SET(*at, &mut set) };
    }
    // SAFETY: the set is as long as is said, and lives through the call.
    match unsafe { libc::sched_setaffinity(0, size_of_val(&set), &set) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Drops a file's pages, and lets those that are read from now on come one by one.
pub(crate) fn drop_pages(file: &File) -> io::Result<()> {
    for advice in [libc::POSIX_FADV_DONTNEED, libc::POSIX_FADV_RANDOM] {
        // SAFETY: no pointer is passed.
        match unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, advice) } {
            0 => {}
            code => return Err(io::Error::from_raw_os_error(code)),
        }
    }
    Ok(())
}
