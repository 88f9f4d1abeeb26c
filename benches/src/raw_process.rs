//! The floor on process: two processes that hand a word to and fro, a process that only maps, and
//! the system calls that the gate's bodies make, made barely.
#![allow(unsafe_code)]
// UNSAFETY: fork, futexes, posix_spawn and mappings by hand, which is what is to be measured.

use crate::sample::ticks;
use anyhow::{Context, Result, bail};
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering};

include!("../floor/list.rs");

impl SpawnPlan {
    /// What the child is told, as bytes; `None` for more mappings than fit.
    fn list(&self) -> Option<Vec<u8>> {
        let mut list = List {
            count: u32::try_from(self.maps.len()).ok()?,
            ..Default::default()
        };
        for (index, map) in self.maps.iter().enumerate() {
            *list.maps.get_mut(index)? = Map {
                at: map.at,
                len: map.len,
                offset: map.offset,
                // The memories follow the list.
                fd: u32::try_from(LIST_FD + 1 + map.memory).ok()?,
                prot: u32::try_from(map.prot).ok()?,
            };
        }
        let mut bytes = Vec::new();
        bytes.extend(list.ready.to_le_bytes());
        bytes.extend(list.count.to_le_bytes());
        for map in &list.maps {
            for word in [map.at, map.len, map.offset] {
                bytes.extend(word.to_le_bytes());
            }
            bytes.extend(map.fd.to_le_bytes());
            bytes.extend(map.prot.to_le_bytes());
        }
        Some(bytes)
    }
}

/// The floor's program.
static CHILD: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/floor"));

fn check(result: i64) -> Result<i64> {
    if result < 0 {
        Err(io::Error::last_os_error().into())
    } else {
        Ok(result)
    }
}

fn memfd(name: &std::ffi::CStr, len: u64) -> Result<File> {
    // SAFETY: a valid name; the descriptor is fresh and nobody else's.
    let file = unsafe {
        let fd = check(libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC).into())?;
        File::from_raw_fd(RawFd::try_from(fd)?)
    };
    file.set_len(len)?;
    Ok(file)
}

/// A shared mapping of a whole memfd.
struct Shared {
    at: *mut u8,
    len: usize,
    file: File,
}

impl Shared {
    fn new(name: &std::ffi::CStr, len: u64) -> Result<Shared> {
        let file = memfd(name, len)?;
        let len = usize::try_from(len)?;
        // SAFETY: a fresh mapping.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error()).context("mmap");
        }
        let at = at.cast();
        Ok(Shared { at, len, file })
    }

    /// The first word.
    #[allow(clippy::cast_ptr_alignment, reason = "mappings begin at a page")]
    fn word(&self) -> &AtomicU32 {
        // SAFETY: page-aligned, inside the mapping, and only ever used as an atomic.
        unsafe { &*self.at.cast::<AtomicU32>() }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: our own mapping.
        unsafe { libc::munmap(self.at.cast(), self.len) };
    }
}

fn wait(word: &AtomicU32, expected: u32) {
    let none = std::ptr::null::<libc::timespec>();
    // SAFETY: the word outlives the call; every result means "look again".
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAIT,
            expected,
            none,
        )
    };
}

fn wake(word: &AtomicU32) {
    // SAFETY: waking touches no memory.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, 1) };
}

const ANSWERED: u32 = 0;
const CALLED: u32 = 1;

/// Where this thread may run.
fn affinity() -> libc::cpu_set_t {
    // SAFETY: the set lives here; zeroes are an empty one.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &raw mut set);
        set
    }
}

fn set_affinity(set: &libc::cpu_set_t) {
    // SAFETY: the set lives until the call returns.
    unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), std::ptr::from_ref(set)) };
}

/// Another process that hands a word over and waits until it comes back, for ever.
///
/// Both are kept on one CPU while they do: the best that a bare hand-off can be. Left to the
/// scheduler it is now this, now ten times as much, and would make any bar easy to meet.
pub(crate) struct HandOff {
    page: Shared,
    allowed: libc::cpu_set_t,
    one: libc::cpu_set_t,
    pid: libc::pid_t,
}

impl HandOff {
    pub(crate) fn start() -> Result<HandOff> {
        let page = Shared::new(c"hand-off", 4096)?;
        let allowed = affinity();
        // SAFETY: an empty set, and a number that it has room for.
        let one = unsafe {
            let mut one: libc::cpu_set_t = std::mem::zeroed();
            libc::CPU_SET(usize::try_from(libc::sched_getcpu())?, &mut one);
            one
        };
        // SAFETY: the child makes nothing but futex calls on the page, and ends with its parent.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            // SAFETY: plain system calls.
            unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
            set_affinity(&one);
            let word = page.word();
            loop {
                word.store(CALLED, Ordering::Release);
                wake(word);
                while word.load(Ordering::Acquire) == CALLED {
                    wait(word, CALLED);
                }
            }
        }
        if pid < 0 {
            return Err(io::Error::last_os_error()).context("fork");
        }
        Ok(HandOff {
            page,
            allowed,
            one,
            pid,
        })
    }

    /// Answers so many calls; the ticks that they take.
    pub(crate) fn serve(&self, count: u32) -> u64 {
        let word = self.page.word();
        set_affinity(&self.one);
        let start = ticks();
        for _ in 0..count {
            loop {
                let seen = word.load(Ordering::Acquire);
                if seen == CALLED {
                    break;
                }
                wait(word, seen);
            }
            word.store(ANSWERED, Ordering::Release);
            wake(word);
        }
        let taken = ticks() - start;
        set_affinity(&self.allowed);
        taken
    }
}

impl Drop for HandOff {
    fn drop(&mut self) {
        // SAFETY: our own child, not waited for yet.
        unsafe {
            libc::kill(self.pid, libc::SIGKILL);
            libc::waitpid(self.pid, std::ptr::null_mut(), 0);
        }
    }
}

/// `ppoll` that does not wait.
pub(crate) fn ppoll_once(entries: &mut [libc::pollfd]) -> Result<()> {
    let now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the entries and the limit live here.
    let r = unsafe {
        libc::syscall(
            libc::SYS_ppoll,
            entries.as_mut_ptr(),
            entries.len(),
            &raw const now,
            std::ptr::null::<libc::sigset_t>(),
            8,
        )
    };
    check(r).map(drop)
}

/// Adds one to an eventfd.
pub(crate) fn signal(fd: RawFd) {
    let one = 1u64;
    // SAFETY: eight bytes that live here. A full counter is a signal too.
    unsafe { libc::write(fd, (&raw const one).cast(), 8) };
}

/// An epoll over eventfds, and a look at it that does not wait.
pub(crate) struct Epoll(OwnedFd);

impl Epoll {
    pub(crate) fn new(fds: impl IntoIterator<Item = RawFd>) -> Result<Epoll> {
        // SAFETY: the descriptor is fresh and nobody else's; the event lives during each call.
        unsafe {
            let fd = check(libc::epoll_create1(libc::EPOLL_CLOEXEC).into())?;
            let epoll = OwnedFd::from_raw_fd(RawFd::try_from(fd)?);
            for fd in fds {
                let mut event = libc::epoll_event {
                    events: libc::EPOLLIN as u32,
                    u64: fd as u64,
                };
                let add = libc::EPOLL_CTL_ADD;
                check(libc::epoll_ctl(epoll.as_raw_fd(), add, fd, &raw mut event).into())?;
            }
            Ok(Epoll(epoll))
        }
    }

    /// Waits at most so many nanoseconds; how many are ready.
    pub(crate) fn wait(&self, limit_ns: i64) -> Result<usize> {
        let limit = libc::timespec {
            tv_sec: limit_ns / 1_000_000_000,
            tv_nsec: limit_ns % 1_000_000_000,
        };
        let mut ready = [libc::epoll_event { events: 0, u64: 0 }; 16];
        // SAFETY: room for 16 events; the limit lives here.
        let r = unsafe {
            libc::syscall(
                libc::SYS_epoll_pwait2,
                self.0.as_raw_fd(),
                ready.as_mut_ptr(),
                ready.len(),
                &raw const limit,
                std::ptr::null::<libc::sigset_t>(),
                0,
            )
        };
        Ok(usize::try_from(check(r)?)?)
    }
}

/// One mapping of the bare process.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ChildMap {
    /// Index of the memory.
    pub(crate) memory: usize,
    pub(crate) at: u64,
    pub(crate) len: u64,
    pub(crate) offset: u64,
    pub(crate) prot: i32,
}

/// What the bare process is to have: memories, each a memfd, and the child's mappings of them.
#[derive(Clone, Debug)]
pub(crate) struct SpawnPlan {
    pub(crate) memories: Vec<u64>,
    pub(crate) maps: Vec<ChildMap>,
}

/// The floor's program as a file that can be executed.
pub(crate) fn executable() -> Result<CString> {
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;
    let path = std::env::temp_dir().join(format!("paravane-floor-{}", std::process::id()));
    let mut file = File::create(&path)?;
    file.write_all(CHILD)?;
    file.set_permissions(std::fs::Permissions::from_mode(0o700))?;
    Ok(CString::new(path.into_os_string().into_encoded_bytes())?)
}

/// A bare process that has mapped everything and said so.
pub(crate) struct Spawned {
    pid: libc::pid_t,
    list: Shared,
    _memories: Vec<Shared>,
}

impl Spawned {
    /// Makes and maps the memories, starts the program, and waits for its word.
    pub(crate) fn start(executable: &CString, plan: &SpawnPlan) -> Result<Spawned> {
        let list = Shared::new(c"list", 4096)?;
        let bytes = plan.list().context("too many mappings")?;
        // SAFETY: at most a page, checked by the structure's fixed size; nobody else maps it yet.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), list.at, bytes.len().min(list.len));
        }
        let memories = plan
            .memories
            .iter()
            .map(|len| Shared::new(c"memory", *len))
            .collect::<Result<Vec<_>>>()?;
        let files = std::iter::once(&list.file).chain(memories.iter().map(|m| &m.file));
        let fds: Vec<RawFd> = files.map(AsRawFd::as_raw_fd).collect();
        let pid = spawn(executable, &fds)?;
        let spawned = Spawned {
            pid,
            list,
            _memories: memories,
        };
        while spawned.list.word().load(Ordering::Acquire) == 0 {
            wait(spawned.list.word(), 0);
        }
        Ok(spawned)
    }
}

impl Drop for Spawned {
    fn drop(&mut self) {
        // SAFETY: our own child, not waited for yet.
        unsafe {
            libc::kill(self.pid, libc::SIGKILL);
            libc::waitpid(self.pid, std::ptr::null_mut(), 0);
        }
    }
}

/// `posix_spawn` with these descriptors, from the list's number on.
fn spawn(executable: &CString, fds: &[RawFd]) -> Result<libc::pid_t> {
    let high = fds.iter().copied().max().unwrap_or(0) + 1;
    // SAFETY: the actions are initialised before use and destroyed after; strings and arrays live.
    unsafe {
        let mut actions = std::mem::zeroed();
        libc::posix_spawn_file_actions_init(&raw mut actions);
        // By way of numbers above all of them, so that none is overwritten before it is used.
        for (fd, to) in fds.iter().zip(high..) {
            libc::posix_spawn_file_actions_adddup2(&raw mut actions, *fd, to);
        }
        for (from, to) in (high..).zip((LIST_FD as RawFd..).take(fds.len())) {
            libc::posix_spawn_file_actions_adddup2(&raw mut actions, from, to);
        }
        let arguments = [executable.as_ptr().cast_mut(), std::ptr::null_mut()];
        let environment = [std::ptr::null_mut()];
        let mut pid = 0;
        let error = libc::posix_spawn(
            &raw mut pid,
            executable.as_ptr(),
            &raw const actions,
            std::ptr::null(),
            arguments.as_ptr(),
            environment.as_ptr(),
        );
        libc::posix_spawn_file_actions_destroy(&raw mut actions);
        if error != 0 {
            bail!("posix_spawn: {}", io::Error::from_raw_os_error(error));
        }
        Ok(pid)
    }
}
