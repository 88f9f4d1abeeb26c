//! Starting the stub: vfork-style, from a memfd, with nothing of the embedder's but one socket.
#![allow(unsafe_code)]
// UNSAFETY: clone, socketpair, memfd_create and everything that the child does before it executes the stub.

use super::wire;
use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::sync::OnceLock;

static STUB: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/stub"));

/// The name under which the process appears.
const NAME: &CStr = c"pv-guest";
/// Stack of the child until it executes the stub.
const CHILD_STACK: usize = 32 << 10;

/// Makes the file that is executed, unless there is one.
///
/// # Errors
/// Why no executable file can be had on this host.
pub(in crate::accel) fn prepare() -> io::Result<()> {
    executable().map(|_| ())
}

/// A file from which the stub can be executed, made once.
fn executable() -> io::Result<&'static File> {
    static FILE: OnceLock<File> = OnceLock::new();
    if let Some(file) = FILE.get() {
        return Ok(file);
    }
    let file = match executable_memfd() {
        Ok(mut file) => {
            file.write_all(STUB)?;
            let seals = libc::F_SEAL_WRITE | libc::F_SEAL_GROW | libc::F_SEAL_SHRINK;
            // SAFETY: a memfd of ours, which is not mapped anywhere.
            if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } < 0 {
                return Err(io::Error::last_os_error());
            }
            file
        }
        Err(_) => {
            let mut file = executable_temporary()?;
            file.write_all(STUB)?;
            // A file that is open for writing cannot be executed (ETXTBSY), so execute another
            // opening. A memfd can, and needs no /proc.
            File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?
        }
    };
    Ok(FILE.get_or_init(|| file))
}

fn executable_memfd() -> io::Result<File> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    let made = |flags| {
        // SAFETY: a valid name; the descriptor is fresh.
        let fd = unsafe { libc::memfd_create(NAME.as_ptr(), flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: nothing else owns it.
        Ok(unsafe { File::from_raw_fd(fd) })
    };
    match made(flags | libc::MFD_EXEC) {
        // Kernels before 6.3 do not know the flag, and do not need it. Where it is refused for another
        // reason, a memfd without it could not be executed.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => made(flags),
        other => other,
    }
}

/// Hosts that forbid executable memfds (`vm.memfd_noexec` = 2): an unlinked file.
fn executable_temporary() -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut last = io::Error::from_raw_os_error(libc::EACCES);
    for directory in ["/dev/shm", "/tmp", "/var/tmp"] {
        let mut options = std::fs::OpenOptions::new();
        let opened = options
            .read(true)
            .write(true)
            .mode(0o500)
            .custom_flags(libc::O_TMPFILE | libc::O_CLOEXEC)
            .open(directory);
        match opened.and_then(executes) {
            Ok(file) => return Ok(file),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// The file, unless it lies where nothing may be executed.
fn executes(file: File) -> io::Result<File> {
    // SAFETY: filled by the kernel before it is read; the descriptor is open.
    unsafe {
        let mut about: libc::statvfs = std::mem::zeroed();
        if libc::fstatvfs(file.as_raw_fd(), &raw mut about) < 0 {
            return Err(io::Error::last_os_error());
        }
        if about.f_flag & libc::ST_NOEXEC != 0 {
            return Err(io::Error::from_raw_os_error(libc::EACCES));
        }
    }
    Ok(file)
}

/// The started stub.
pub(super) struct Child {
    pub(super) pid: libc::pid_t,
    pub(super) pidfd: OwnedFd,
}

/// What the child needs between clone and exec; it lives on the parent's stack.
struct Plan {
    socket: RawFd,
    stub: RawFd,
    /// A number above both.
    aside: RawFd,
    parent: libc::pid_t,
    failed: libc::c_int,
}

/// The VMM's end of a stub's socket, and the stub's. It keeps the bounds of messages, and each end
/// notices that the other one is gone.
pub(super) fn sockets() -> io::Result<(UnixDatagram, OwnedFd)> {
    let mut ends = [0; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
    // SAFETY: room for two descriptors, which are fresh and owned by nobody else.
    unsafe {
        if libc::socketpair(libc::AF_UNIX, kind, 0, ends.as_mut_ptr()) < 0 {
            return Err(io::Error::last_os_error());
        }
        let [own, stub] = ends;
        Ok((UnixDatagram::from_raw_fd(own), OwnedFd::from_raw_fd(stub)))
    }
}

/// Starts the stub with its end of a socket.
///
/// The calling thread must live as long as the child shall: a parent-death signal fires when the
/// *thread* that started a process ends.
pub(super) fn start(socket: &OwnedFd) -> io::Result<Child> {
    let (stub, socket) = (executable()?.as_raw_fd(), socket.as_raw_fd());
    // SAFETY: getpid cannot fail.
    let parent = unsafe { libc::getpid() };
    let mut plan = Plan {
        socket,
        stub,
        aside: socket.max(stub).max(wire::SOCKET as RawFd + 1) + 1,
        parent,
        failed: 0,
    };
    let mut stack = vec![0u128; CHILD_STACK / size_of::<u128>()];
    // No handler of the embedder's may run in the child, which shares its memory until it execs.
    let old = block_all_signals();
    let flags = libc::CLONE_VM | libc::CLONE_VFORK;
    // SAFETY: the stack is the child's alone and outlives it: CLONE_VFORK suspends this thread
    // until the child has executed the stub or ended.
    let pid = unsafe {
        let top = stack.as_mut_ptr().add(stack.len());
        libc::clone(child, top.cast(), flags, (&raw mut plan).cast())
    };
    let error = io::Error::last_os_error();
    restore_signals(&old);
    if pid < 0 {
        return Err(error);
    }
    // The child wrote it through shared memory.
    // SAFETY: a plain read of a field of a live value.
    let failed = unsafe { (&raw const plan.failed).read_volatile() };
    if failed != 0 {
        reap(pid);
        return Err(io::Error::from_raw_os_error(failed));
    }
    // SAFETY: our own child, not waited for yet, so the number is still its own.
    let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    match RawFd::try_from(pidfd) {
        Ok(fd) if fd >= 0 => {
            // SAFETY: fresh, owned by nobody else; the kernel makes it close-on-exec.
            let pidfd = unsafe { OwnedFd::from_raw_fd(fd) };
            Ok(Child { pid, pidfd })
        }
        _ => {
            let error = io::Error::last_os_error();
            // SAFETY: our own child, not waited for.
            unsafe { libc::kill(pid, libc::SIGKILL) };
            reap(pid);
            Err(error)
        }
    }
}

fn reap(pid: libc::pid_t) {
    // SAFETY: waits for our own child; no status wanted.
    unsafe { libc::waitpid(pid, std::ptr::null_mut(), libc::__WALL) };
}

/// Runs in the child, on its own stack, in the parent's memory: async-signal-safe calls only.
extern "C" fn child(plan: *mut libc::c_void) -> libc::c_int {
    let plan: *mut Plan = plan.cast();
    // SAFETY: the parent is suspended and has left a valid plan; nothing is allocated or locked.
    unsafe {
        let errno = become_stub(&*plan);
        (&raw mut (*plan).failed).write_volatile(errno);
        libc::_exit(127)
    }
}

/// Returns only when something failed: the errno.
unsafe fn become_stub(plan: &Plan) -> libc::c_int {
    // SAFETY: system calls on plain values and on strings that the plan owns.
    unsafe {
        let errno = || *libc::__errno_location();
        if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) < 0 {
            return errno();
        }
        if libc::getppid() != plan.parent {
            return libc::ESRCH;
        }
        libc::setsid();
        let mut limit: libc::rlimit = std::mem::zeroed();
        if libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
        }
        // The child's table is its own: the socket, and until the exec the stub's file.
        let (to, file) = (wire::SOCKET as RawFd, wire::SOCKET as RawFd + 1);
        let ordered = libc::dup2(plan.stub, plan.aside) >= 0
            && libc::dup2(plan.socket, to) >= 0
            && libc::dup3(plan.aside, file, libc::O_CLOEXEC) >= 0
            && libc::syscall(libc::SYS_close_range, file + 1, u32::MAX, 0) >= 0;
        if !ordered {
            return errno();
        }
        let arguments = [NAME.as_ptr(), std::ptr::null()];
        let environment = [std::ptr::null::<libc::c_char>()];
        libc::syscall(
            libc::SYS_execveat,
            file,
            c"".as_ptr(),
            arguments.as_ptr(),
            environment.as_ptr(),
            libc::AT_EMPTY_PATH,
        );
        errno()
    }
}

fn block_all_signals() -> libc::sigset_t {
    // SAFETY: both sets live here.
    unsafe {
        let (mut all, mut old) = (std::mem::zeroed(), std::mem::zeroed());
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut old);
        old
    }
}

fn restore_signals(old: &libc::sigset_t) {
    // SAFETY: a set that pthread_sigmask filled.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, old, std::ptr::null_mut()) };
}
