//! The VMM's side of a stub: started, spoken to, and ended.

use super::watch::{Guest, Watch};
use super::wire::{self, Setup};
use super::{futex, spawn, supervisor};
use crate::limits::STUB_READY_TIMEOUT;
use crate::own_thread;
use std::io;
use std::os::fd::RawFd;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Pause before descriptors are sent again that the kernel did not take.
const SEND_PAUSE: Duration = Duration::from_micros(200);

/// A process that is going to be a guest, and the thread that watches it.
pub(crate) struct Stub {
    pub(super) watch: Arc<Watch>,
    /// Its socket, until the guest may run.
    socket: Option<Arc<UnixDatagram>>,
    supervisor: Option<JoinHandle<()>>,
    layers: Option<u32>,
    spare: bool,
}

/// A message without anything behind it.
pub(super) fn message(kind: u32, value: u32) -> [u8; size_of::<wire::Head>()] {
    (u64::from(kind) | u64::from(value) << 32).to_le_bytes()
}

impl Stub {
    /// Starts one, on a thread of its own; returns before the process is there.
    ///
    /// `ended` is called on that thread when the process has ended.
    pub(super) fn start(trace: bool, ended: impl FnOnce() + Send + 'static) -> io::Result<Stub> {
        let (own, stubs) = spawn::sockets()?;
        own.set_nonblocking(true)?;
        let (watch, socket) = (Arc::new(Watch::default()), Arc::new(own));
        let (watched, tell) = (Arc::clone(&watch), Arc::clone(&socket));
        let supervisor = own_thread::start("pv-supervisor", move || {
            supervisor::run(stubs, tell, trace, &watched);
            ended();
        })?;
        Ok(Stub {
            watch,
            socket: Some(socket),
            supervisor: Some(supervisor),
            layers: None,
            spare: false,
        })
    }

    /// Waits until it has confined itself, and marks it as a spare one.
    ///
    /// # Errors
    /// When it ends before, or takes too long.
    pub(super) fn confined(mut self) -> io::Result<Stub> {
        self.watch.process()?;
        if let Some(socket) = &self.socket {
            socket.set_nonblocking(false)?;
            socket.set_read_timeout(Some(STUB_READY_TIMEOUT))?;
            let layers = self.hear().map_err(io::Error::other)?;
            socket.set_nonblocking(true)?;
            (self.layers, self.spare) = (Some(layers), true);
        }
        Ok(self)
    }

    /// Whether it was made before its VM was.
    pub(super) fn is_spare(&self) -> bool {
        self.spare
    }

    pub(super) fn has_ended(&self) -> bool {
        self.watch.gone.load(Ordering::Acquire)
    }

    /// Tells it what to become, and whose its end is.
    ///
    /// # Errors
    /// When it has ended, or does not take what it is sent.
    pub(super) fn hand_over(&self, guest: Guest, setup: &[u8], fds: &[RawFd]) -> io::Result<()> {
        let ended = || io::Error::from(io::ErrorKind::BrokenPipe);
        let socket = self.socket.as_ref().ok_or_else(ended)?;
        if !self.watch.adopt(guest) {
            return Err(ended());
        }
        let total = u32::try_from(fds.len()).map_err(io::Error::other)?;
        let mut first = message(wire::SETUP, total).to_vec();
        first.extend_from_slice(setup);
        let mut bytes: &[u8] = &first;
        let more = message(wire::MORE, 0);
        let deadline = Instant::now() + STUB_READY_TIMEOUT;
        for fds in fds.chunks(wire::FDS_AT_ONCE) {
            loop {
                match socket.send_with_fds(&[bytes], fds) {
                    Ok(_) => break,
                    // The kernel bounds what one user has in flight; it is on its way elsewhere.
                    Err(error)
                        if error.errno() == libc::ETOOMANYREFS && Instant::now() < deadline =>
                    {
                        std::thread::sleep(SEND_PAUSE);
                    }
                    Err(error) => return Err(error.into()),
                }
            }
            bytes = &more;
        }
        Ok(())
    }

    /// Waits until its first vCPU is parked, behind the filter; from then on the guest may run.
    ///
    /// # Errors
    /// Why it cannot.
    pub(super) fn arm(&mut self, ready: &AtomicU32) -> Result<(), String> {
        self.watch.process().map_err(|error| error.to_string())?;
        let parked = wait_ready(ready, &self.watch.gone, STUB_READY_TIMEOUT);
        let heard = match self.layers {
            Some(layers) => Ok(layers),
            None => self.hear(),
        };
        if !parked {
            // What it said last is why; a spare one has said nothing yet.
            let why = heard.and_then(|_| self.hear());
            return Err(why
                .err()
                .unwrap_or_else(|| "it was not ready in time".into()));
        }
        self.layers = Some(heard?);
        if !self.watch.arm() {
            return Err("it ended before it was used".into());
        }
        self.socket = None;
        Ok(())
    }

    /// The layers that it says are in force.
    pub(super) fn layers(&self) -> u32 {
        self.layers.unwrap_or(0)
    }

    /// The layers in its next message, or why there are none.
    fn hear(&self) -> Result<u32, String> {
        let mut bytes = [0; size_of::<wire::Head>()];
        let got = self.socket.as_ref().map_or(Ok(0), |s| s.recv(&mut bytes));
        let word = u64::from_le_bytes(bytes);
        let (kind, value) = (word as u32, (word >> 32) as u32);
        match (got, kind) {
            (Ok(8), wire::CONFINED) => Ok(value),
            (Ok(8), wire::FAILED) => Err(why(value & 0xffff, value >> 16)),
            _ => Err(
                "it ended before it was ready; does this host allow seccomp filters (the \
                      system call seccomp with SECCOMP_FILTER_FLAG_TSYNC)?"
                    .into(),
            ),
        }
    }
}

fn why(step: u32, errno: u32) -> String {
    let step = match step {
        wire::STEP_MAP => "map guest memory",
        wire::STEP_CLONE => "start the vCPU threads",
        wire::STEP_GS_BASE => "set GS base",
        wire::STEP_SIGNALS => "install the fault handlers",
        _ => "take what it was sent",
    };
    let errno = i32::try_from(errno).unwrap_or(0);
    format!(
        "it could not {step}: {}",
        io::Error::from_raw_os_error(errno)
    )
}

impl Drop for Stub {
    fn drop(&mut self) {
        self.watch.ending.store(true, Ordering::Release);
        if let Ok(pidfd) = self.watch.process() {
            let _ = crate::pidfd::signal(&pidfd, libc::SIGKILL);
        }
        // The supervisor itself may hold the last reference, for the moment of a report.
        if let Some(supervisor) = self.supervisor.take()
            && supervisor.thread().id() != std::thread::current().id()
        {
            let _ = supervisor.join();
        }
    }
}

/// The set-up as the stub reads it: without the maps that there are none of.
pub(super) fn setup_bytes(setup: &Setup) -> Vec<u8> {
    // Field by field: the structure is plain integers, but it is not a zerocopy type, because the
    // stub compiles it without dependencies.
    let words = [
        u64::from(setup.vcpus) | u64::from(setup.map_count) << 32,
        u64::from(setup.event_fds) | u64::from(setup.kicks) << 32,
        setup.vcpu_pages,
        setup.park,
        setup.finish,
        setup.filter,
        setup.unmap_start,
        setup.unmap_end,
        setup.ready_offset,
        setup.fault_handler,
        setup.fault_stacks,
        setup.fault_stack_len,
    ];
    let maps = setup.maps.iter().take(setup.map_count as usize);
    let maps = maps.flat_map(|m| {
        [
            m.gpa,
            m.len,
            m.offset,
            u64::from(m.fd) | u64::from(m.populate) << 16 | u64::from(m.prot) << 32,
        ]
    });
    words
        .into_iter()
        .chain(setup.huge.into_iter().flatten())
        .chain(setup.holes)
        .chain(maps)
        .flat_map(u64::to_le_bytes)
        .collect()
}

/// Waits until the stub's first vCPU is parked. `false`: the process ended, or took too long.
fn wait_ready(word: &AtomicU32, gone: &AtomicBool, limit: Duration) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        let seen = word.load(Ordering::Acquire);
        // The word changes at death too, and after `gone`.
        if gone.load(Ordering::Acquire) {
            return false;
        }
        if seen != 0 {
            return true;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        futex::wait(word, 0, Some(left));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setup_is_what_the_stub_reads() {
        let map = wire::Map {
            gpa: 1,
            len: 2,
            offset: 3,
            fd: 4,
            populate: 6,
            prot: 5,
        };
        let setup = Setup {
            vcpus: 1,
            map_count: wire::MAX_MAPS as u32,
            event_fds: 0,
            kicks: 0,
            vcpu_pages: 0,
            park: 0,
            finish: 0,
            filter: 0,
            unmap_start: 0,
            unmap_end: 0,
            ready_offset: 0,
            fault_handler: 0,
            fault_stacks: 0,
            fault_stack_len: 0,
            huge: [[0; 2]; 2],
            holes: [0; wire::HOLE_WORDS],
            maps: [map; wire::MAX_MAPS],
        };
        assert_eq!(setup_bytes(&setup).len(), size_of::<Setup>());
        let fewer = Setup {
            map_count: 2,
            ..setup
        };
        let head = std::mem::offset_of!(Setup, maps);
        let bytes = setup_bytes(&fewer);
        assert_eq!(bytes.len(), head + 2 * size_of::<wire::Map>());
        assert_eq!(
            bytes.get(head + 32..head + 40),
            Some(&1u64.to_le_bytes()[..])
        );
        let last = 4u64 | 6 << 16 | 5 << 32;
        assert_eq!(
            bytes.get(head + 56..head + 64),
            Some(&last.to_le_bytes()[..])
        );
    }
}
