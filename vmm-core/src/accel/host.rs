//! What an accel needs of the host beside itself: looked for once, named where it is missing.
//!
//! Features are tried, not looked up by the kernel's version: a container's seccomp profile takes
//! away what a kernel has, and a vendor's older kernel may have it all. The version only decides what
//! is said to do about it.
#![allow(unsafe_code)]
// UNSAFETY: the system calls that are tried, most of which have no wrapper, and uname.

use super::{Accel, AccelError};
use std::ffi::CStr;
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::OnceLock;

/// The oldest kernel that this library is tested on: major and minor.
const OLDEST_TESTED: (u32, u32) = (6, 1);

/// Something of the host that an accel cannot do without.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum HostFeature {
    /// The instructions that guests are compiled for: x86-64-v2.
    CpuBaseline,
    /// `WRFSBASE` and its kin outside the kernel: FS base is the guest's.
    FsGsBase,
    /// `memfd_create` with seals, for arenas.
    SealedMemory,
    /// `pidfd_open` and `pidfd_send_signal`, for backends and the guest's process.
    Pidfd,
    /// `close_range` with `CLOSE_RANGE_CLOEXEC`, for what is started.
    CloseRange,
    /// `epoll_pwait2`, for idle vCPUs; kvm only.
    EpollPwait2,
    /// Seccomp filters that trap; process only.
    SeccompFilter,
    /// A file that may be executed: a memfd, or one on a file system without `noexec`; process only.
    ExecutableFile,
    /// `MADV_POPULATE_WRITE`, where the embedder wants memory prefaulted.
    PopulateWrite,
}

impl fmt::Display for HostFeature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            HostFeature::CpuBaseline => "a CPU with the instructions of x86-64-v2",
            HostFeature::FsGsBase => "WRFSBASE in user mode (Linux 5.9, and a CPU that has it)",
            HostFeature::SealedMemory => "memfd_create with seals (Linux 3.17)",
            HostFeature::Pidfd => "pidfd_open and pidfd_send_signal (Linux 5.3)",
            HostFeature::CloseRange => "close_range with CLOSE_RANGE_CLOEXEC (Linux 5.11)",
            HostFeature::EpollPwait2 => "epoll_pwait2 (Linux 5.11)",
            HostFeature::SeccompFilter => "seccomp filters that trap (Linux 4.14)",
            HostFeature::ExecutableFile => {
                "a place for an executable file: memfds, /dev/shm, /tmp and /var/tmp all refuse one"
            }
            HostFeature::PopulateWrite => "MADV_POPULATE_WRITE, to prefault memory (Linux 5.14)",
        })
    }
}

impl HostFeature {
    /// What to do about its absence under this kernel.
    fn advice(self, release: &str) -> String {
        match self {
            HostFeature::CpuBaseline | HostFeature::FsGsBase => {
                "use a newer CPU and kernel, or give the machine that this runs in all that its host's has"
                    .into()
            }
            HostFeature::ExecutableFile => {
                "set the sysctl vm.memfd_noexec to 1 or less, or mount one of them without noexec"
                    .into()
            }
            _ if parse(release).is_some_and(|version| version < OLDEST_TESTED) => {
                let (major, minor) = OLDEST_TESTED;
                format!("the kernel is {release}: use {major}.{minor} or later")
            }
            _ => format!(
                "the kernel is {release}, which has it unless it was built without: allow it in the \
                 seccomp profile that this program runs under, as containers do"
            ),
        }
    }

    /// An error that says so.
    pub(crate) fn lacked_by(self, accel: Accel, source: Option<io::Error>) -> AccelError {
        AccelError::HostLacks {
            accel,
            feature: self,
            advice: self.advice(&release()),
            source,
        }
    }

    fn look(self) -> Result<(), Option<io::Error>> {
        match self {
            HostFeature::CpuBaseline => cpu_baseline().map_err(|()| None),
            HostFeature::FsGsBase => fs_gs_base().map_err(|()| None),
            HostFeature::SealedMemory => sealed_memory().map_err(Some),
            HostFeature::Pidfd => pidfd().map_err(Some),
            HostFeature::CloseRange => close_range().map_err(Some),
            HostFeature::EpollPwait2 => epoll_pwait2().map_err(Some),
            HostFeature::SeccompFilter => seccomp_filter().map_err(Some),
            HostFeature::ExecutableFile => super::process::executable().map_err(Some),
            HostFeature::PopulateWrite => populate_write().map_err(Some),
        }
    }
}

/// Looks for all that this accel needs; what was found once is not looked for again.
///
/// # Errors
/// [`AccelError::HostLacks`] with the first that is missing.
pub(super) fn check(accel: Accel) -> Result<(), AccelError> {
    static KVM: OnceLock<()> = OnceLock::new();
    static PROCESS: OnceLock<()> = OnceLock::new();
    let common = [
        HostFeature::CpuBaseline,
        HostFeature::FsGsBase,
        HostFeature::SealedMemory,
        HostFeature::Pidfd,
        HostFeature::CloseRange,
    ];
    let (found, own): (_, &[HostFeature]) = match accel {
        Accel::Kvm => (&KVM, &[HostFeature::EpollPwait2]),
        Accel::Process => (
            &PROCESS,
            &[HostFeature::SeccompFilter, HostFeature::ExecutableFile],
        ),
    };
    if found.get().is_some() {
        return Ok(());
    }
    for feature in common.iter().chain(own) {
        require(*feature, accel)?;
    }
    found.get_or_init(|| ());
    Ok(())
}

/// Looks for one feature, for this accel.
///
/// # Errors
/// [`AccelError::HostLacks`].
pub(crate) fn require(feature: HostFeature, accel: Accel) -> Result<(), AccelError> {
    feature
        .look()
        .map_err(|source| feature.lacked_by(accel, source))
}

fn cpu_baseline() -> Result<(), ()> {
    let all = is_x86_feature_detected!("sse3")
        && is_x86_feature_detected!("ssse3")
        && is_x86_feature_detected!("sse4.1")
        && is_x86_feature_detected!("sse4.2")
        && is_x86_feature_detected!("popcnt")
        && is_x86_feature_detected!("cmpxchg16b");
    all.then_some(()).ok_or(())
}

fn fs_gs_base() -> Result<(), ()> {
    /// In what the kernel says of the CPU to every program.
    const HWCAP2_FSGSBASE: libc::c_ulong = 2;
    // SAFETY: looks an entry of the auxiliary vector up.
    let known = unsafe { libc::getauxval(libc::AT_HWCAP2) };
    (known & HWCAP2_FSGSBASE != 0).then_some(()).ok_or(())
}

/// The result of a system call, or its error.
fn done(result: libc::c_long) -> io::Result<libc::c_int> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    libc::c_int::try_from(result).map_err(io::Error::other)
}

fn sealed_memory() -> io::Result<()> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: a valid name; the descriptor is fresh, and nothing else owns it.
    unsafe {
        let made = libc::memfd_create(c"pv-host".as_ptr(), flags);
        let file = OwnedFd::from_raw_fd(done(made.into())?);
        done(libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals).into())?;
    }
    Ok(())
}

fn pidfd() -> io::Result<()> {
    let own = crate::pidfd::open(std::process::id())?;
    // No signal: whether one could be sent.
    crate::pidfd::signal(&own, 0)
}

fn close_range() -> io::Result<()> {
    let flags = libc::CLOSE_RANGE_CLOEXEC;
    // SAFETY: plain values; no descriptor has that number.
    done(unsafe { libc::syscall(libc::SYS_close_range, u32::MAX, u32::MAX, flags) })?;
    Ok(())
}

fn epoll_pwait2() -> io::Result<()> {
    let mut event = libc::epoll_event { events: 0, u64: 0 };
    let none = std::ptr::null::<libc::c_void>();
    // SAFETY: room for one event; there is no such epoll, which is what it has to say.
    let result = unsafe {
        libc::syscall(
            libc::SYS_epoll_pwait2,
            -1,
            &raw mut event,
            1,
            none,
            none,
            0usize,
        )
    };
    match done(result) {
        Err(error) if error.raw_os_error() != Some(libc::EBADF) => Err(error),
        _ => Ok(()),
    }
}

fn seccomp_filter() -> io::Result<()> {
    for action in [libc::SECCOMP_RET_TRAP, libc::SECCOMP_RET_KILL_PROCESS] {
        let operation = libc::SECCOMP_GET_ACTION_AVAIL;
        // SAFETY: reads the action, and changes nothing.
        done(unsafe { libc::syscall(libc::SYS_seccomp, operation, 0, &raw const action) })?;
    }
    Ok(())
}

fn populate_write() -> io::Result<()> {
    // SAFETY: no bytes; whether the advice is known is looked at first.
    let result = unsafe { libc::madvise(std::ptr::null_mut(), 0, libc::MADV_POPULATE_WRITE) };
    done(result.into())?;
    Ok(())
}

/// The kernel's release, as `uname -r` says it.
fn release() -> String {
    // SAFETY: filled by the kernel before it is read, each field with a zero at its end.
    unsafe {
        let mut name: libc::utsname = std::mem::zeroed();
        if libc::uname(&raw mut name) < 0 {
            return "unknown".into();
        }
        let release = CStr::from_ptr((&raw const name.release).cast());
        release.to_string_lossy().into_owned()
    }
}

/// Major and minor of a release.
fn parse(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [HostFeature; 9] = [
        HostFeature::CpuBaseline,
        HostFeature::FsGsBase,
        HostFeature::SealedMemory,
        HostFeature::Pidfd,
        HostFeature::CloseRange,
        HostFeature::EpollPwait2,
        HostFeature::SeccompFilter,
        HostFeature::ExecutableFile,
        HostFeature::PopulateWrite,
    ];

    #[test]
    fn a_host_that_is_tested_on_lacks_nothing() {
        for feature in ALL {
            require(feature, Accel::Process).unwrap();
        }
    }

    #[test]
    fn releases_are_told_apart() {
        assert_eq!(parse("6.1.0-18-amd64"), Some((6, 1)));
        assert_eq!(parse("5.15.0"), Some((5, 15)));
        assert_eq!(parse("6.18-rc3"), Some((6, 18)));
        assert_eq!(parse("unknown"), None);
        assert!(parse(&release()).is_some(), "{}", release());
    }

    #[test]
    fn what_is_missing_is_said_with_what_to_do() {
        let error = |feature: HostFeature, release| AccelError::HostLacks {
            accel: Accel::Kvm,
            feature,
            advice: feature.advice(release),
            source: None,
        };
        let old = error(HostFeature::EpollPwait2, "5.4.0-42-generic").to_string();
        assert_eq!(
            old,
            "the kvm accel cannot be used: this host lacks epoll_pwait2 (Linux 5.11); the kernel is \
             5.4.0-42-generic: use 6.1 or later"
        );
        let confined = error(HostFeature::Pidfd, "6.12.1").to_string();
        assert!(confined.contains("seccomp profile"), "{confined}");
        for feature in ALL {
            let said = error(feature, "6.1.0").to_string();
            assert!(said.contains(&feature.to_string()), "{said}");
            assert_eq!(said.lines().count(), 1, "{said}");
        }
    }
}
