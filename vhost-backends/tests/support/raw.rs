//! A frontend that sends whatever it is told to, and a device that only counts.
#![allow(unsafe_code, dead_code)]
// UNSAFETY: an eventfd becomes a file, and so does a sealed memfd.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;
use vhost_backends::ring::{DeviceRing, Retire, RingState};
use vhost_backends::session::{
    Device, FrontendLink, QueueSetup, QueueStop, QueueWorker, Server, SessionEnd,
};
use vm_memory::mmap::MmapRegion;
use vm_memory::{AtomicAccess, Bytes, FileOffset, VolatileMemory};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

pub(crate) const NEED_REPLY: u32 = 1 << 3;
pub(crate) const VERSION: u32 = 1;
pub(crate) const EVENT_IDX: u64 = 1 << 29;
pub(crate) const PROTOCOL: u64 = 1 << 30;
pub(crate) const VERSION_1: u64 = 1 << 32;
pub(crate) const PACKED: u64 = 1 << 34;
pub(crate) const LOG_ALL: u64 = 1 << 26;
/// Index that a stopped counting queue reports, so that it can be seen on the wire.
pub(crate) const STOPPED_AT: u16 = 77;

#[derive(Debug, Default)]
pub(crate) struct Counting {
    pub(crate) opened: AtomicUsize,
    pub(crate) stopped: Arc<AtomicUsize>,
    pub(crate) last: Mutex<Option<(u16, RingState, u64)>>,
    pub(crate) frontend: Mutex<Option<Arc<FrontendLink>>>,
    /// Features beside the usual ones.
    pub(crate) more_features: u64,
    /// Queues that stop say that their ring broke a rule.
    pub(crate) retire: Arc<AtomicBool>,
    /// Memory and logs must be sealed.
    pub(crate) sealed: bool,
}

impl Counting {
    pub(crate) fn running(&self) -> usize {
        self.opened.load(Ordering::SeqCst) - self.stopped.load(Ordering::SeqCst)
    }
}

struct CountingQueue {
    stopped: Arc<AtomicUsize>,
    retire: Arc<AtomicBool>,
    next_used: u16,
    _setup: QueueSetup,
}

impl QueueWorker for CountingQueue {
    fn stop(self: Box<Self>) -> QueueStop {
        self.stopped.fetch_add(1, Ordering::SeqCst);
        QueueStop {
            ring: RingState {
                next_avail: STOPPED_AT,
                next_used: self.next_used,
            },
            retired: self
                .retire
                .load(Ordering::SeqCst)
                .then_some(Retire::BadHead { head: 1 }),
        }
    }
}

impl Device for Counting {
    fn queue_count(&self) -> u16 {
        2
    }

    fn features(&self) -> u64 {
        VERSION_1 | EVENT_IDX | self.more_features
    }

    fn needs_sealed_memory(&self) -> bool {
        self.sealed
    }

    fn set_frontend(&self, frontend: Option<Arc<FrontendLink>>) {
        *self.frontend.lock().unwrap() = frontend;
    }

    fn config(&self) -> Vec<u8> {
        (1..=60).collect()
    }

    fn open_queue(&self, setup: QueueSetup) -> io::Result<Box<dyn QueueWorker>> {
        self.opened.fetch_add(1, Ordering::SeqCst);
        *self.last.lock().unwrap() = Some((setup.index, setup.ring.save(), setup.features));
        Ok(Box::new(CountingQueue {
            stopped: self.stopped.clone(),
            retire: self.retire.clone(),
            next_used: setup.ring.save().next_used,
            _setup: setup,
        }))
    }
}

pub(crate) struct Client {
    pub(crate) stream: UnixStream,
    session: Option<JoinHandle<SessionEnd>>,
    stop: Option<File>,
}

impl Client {
    pub(crate) fn connect(device: Arc<dyn Device>) -> Client {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut client = Client::over(ours);
        // A pipe's end that never becomes readable while the other one is open.
        let (never, keep) = std::io::pipe().unwrap();
        let stop = std::os::fd::OwnedFd::from(never);
        let server = Server::new(device, stop);
        client.session = Some(std::thread::spawn(move || server.serve(theirs)));
        client.stop = Some(File::from(std::os::fd::OwnedFd::from(keep)));
        client
    }

    /// Of a session that runs somewhere else.
    pub(crate) fn over(stream: UnixStream) -> Client {
        let limit = Some(Duration::from_secs(10));
        stream.set_read_timeout(limit).unwrap();
        stream.set_write_timeout(limit).unwrap();
        Client {
            stream,
            session: None,
            stop: None,
        }
    }

    pub(crate) fn send(&self, request: u32, flags: u32, payload: &[u8], fds: &[&File]) {
        let raw: Vec<_> = fds.iter().map(|f| f.as_raw_fd()).collect();
        let bytes = message(request, flags, payload);
        self.stream.send_with_fds(&[&bytes[..]], &raw).unwrap();
    }

    /// One reply: request, flags, payload. `None`: the session hung up.
    pub(crate) fn receive(&mut self) -> Option<(u32, u32, Vec<u8>)> {
        let mut head = [0; 12];
        match self.stream.read_exact(&mut head) {
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return None,
            result => result.unwrap(),
        }
        let word = |i: usize| u32::from_ne_bytes(head[i * 4..][..4].try_into().unwrap());
        let mut payload = vec![0; word(2) as usize];
        self.stream.read_exact(&mut payload).unwrap();
        assert_eq!(word(1), VERSION | 4, "a reply's flags");
        Some((word(0), word(1), payload))
    }

    /// Sends a query and gives its payload.
    pub(crate) fn query(&mut self, request: u32, payload: &[u8]) -> Vec<u8> {
        self.send(request, VERSION, payload, &[]);
        let (number, _, payload) = self.receive().unwrap();
        assert_eq!(number, request);
        payload
    }

    pub(crate) fn query_u64(&mut self, request: u32) -> u64 {
        u64::from_ne_bytes(self.query(request, &[]).try_into().unwrap())
    }

    /// Sends a set with a wish for an answer; whether it was carried out.
    pub(crate) fn set(&mut self, request: u32, payload: &[u8], fds: &[&File]) -> bool {
        self.send(request, VERSION | NEED_REPLY, payload, fds);
        let (number, _, payload) = self.receive().unwrap();
        assert_eq!(number, request);
        u64::from_ne_bytes(payload.try_into().unwrap()) == 0
    }

    /// Features of a split ring without a log, and all protocol features.
    pub(crate) fn negotiate(&mut self) {
        let features = self.query_u64(1) & !(PACKED | LOG_ALL);
        self.send(2, VERSION, &features.to_ne_bytes(), &[]);
        let protocol = self.query_u64(15);
        self.send(16, VERSION, &protocol.to_ne_bytes(), &[]);
    }

    /// Tells the session to stop and waits for its end, with the connection still open.
    pub(crate) fn stop(mut self) -> SessionEnd {
        // A pipe without a writer is readable.
        drop(self.stop.take());
        self.session.take().unwrap().join().unwrap()
    }

    /// Hangs up and waits for the session's end.
    pub(crate) fn close(mut self) -> SessionEnd {
        self.stream.shutdown(std::net::Shutdown::Both).unwrap();
        self.session.take().unwrap().join().unwrap()
    }
}

/// A message, as it stands on the wire.
pub(crate) fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let head = [request, flags, payload.len() as u32].map(u32::to_ne_bytes);
    [head.as_flattened(), payload].concat()
}

pub(crate) fn words(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_ne_bytes()).collect()
}

pub(crate) fn pair(index: u32, num: u32) -> Vec<u8> {
    [index.to_ne_bytes(), num.to_ne_bytes()].concat()
}

/// A file of memory, sealed against shrinking.
pub(crate) fn memory(bytes: u64) -> File {
    memfd(bytes, 0, libc::F_SEAL_SHRINK).unwrap()
}

/// A file of memory with these flags beside the usual ones, and these seals.
pub(crate) fn memfd(bytes: u64, flags: u32, seals: i32) -> io::Result<File> {
    // SAFETY: the name is a C string; the descriptor is fresh and owned at once.
    let file = unsafe {
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | flags;
        match libc::memfd_create(c"memory".as_ptr(), flags) {
            fd @ 0.. => File::from_raw_fd(fd),
            _ => return Err(io::Error::last_os_error()),
        }
    };
    file.set_len(bytes)?;
    // SAFETY: F_ADD_SEALS takes no pointer.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } {
        0 => Ok(file),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Memory that a frontend shares with its backend, at offsets into its file.
pub(crate) struct Shared {
    pub(crate) file: File,
    map: MmapRegion,
}

impl Shared {
    pub(crate) fn new(bytes: u64) -> Shared {
        let file = memory(bytes);
        let all = FileOffset::new(file.try_clone().unwrap(), 0);
        let map = MmapRegion::from_file(all, bytes as usize).unwrap();
        Shared { file, map }
    }

    pub(crate) fn put<T: AtomicAccess>(&self, at: u64, value: T) {
        let slice = self.map.as_volatile_slice();
        slice.store(value, at as usize, Ordering::Release).unwrap();
    }

    pub(crate) fn get<T: AtomicAccess>(&self, at: u64) -> T {
        let slice = self.map.as_volatile_slice();
        slice.load(at as usize, Ordering::Acquire).unwrap()
    }

    pub(crate) fn fill(&self, at: u64, data: &[u8]) {
        let slice = self.map.as_volatile_slice();
        slice.write_slice(data, at as usize).unwrap();
    }

    pub(crate) fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        let slice = self.map.as_volatile_slice();
        slice.read_slice(&mut out, at as usize).unwrap();
        out
    }
}

/// Something to kick and call with.
pub(crate) fn event() -> File {
    let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    // SAFETY: it was just made, and is given away here.
    unsafe { File::from_raw_fd(event.into_raw_fd()) }
}
