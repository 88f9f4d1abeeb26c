//! A disk, a server and a real frontend (the crate `virtio-driver`), with a limit on every wait.
#![allow(unsafe_code, dead_code)]
// UNSAFETY: the frontend takes raw buffers.

pub(crate) mod daemon;
pub(crate) mod load;
pub(crate) mod nbd;
pub(crate) mod process;
pub(crate) mod site;

use process::TIMEOUT;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use vhost_backends::block::{BlockDevice, BlockOptions};
use vhost_backends::engine::{FileOptions, RawFile, Store};
use vhost_backends::session::{Server, ServerHandle};
use virtio_driver::{
    VhostUser, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkTransport, VirtioFeatureFlags,
};
use vm_memory::FileOffset;
use vm_memory::mmap::MmapRegion;

pub(crate) struct Disk {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) image: PathBuf,
    pub(crate) socket: PathBuf,
}

impl Disk {
    pub(crate) fn new(bytes: u64) -> Disk {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("disk.img");
        File::create(&image).unwrap().set_len(bytes).unwrap();
        let socket = dir.path().join("blk.sock");
        Disk { dir, image, socket }
    }

    pub(crate) fn serve(
        &self,
        options: FileOptions,
        queues: u16,
    ) -> (ServerHandle, Arc<BlockDevice>) {
        let file = RawFile::open(&self.image, options).unwrap();
        let device = Arc::new(BlockDevice::new(file, BlockOptions::with_queues(queues)));
        let listener = UnixListener::bind(&self.socket).unwrap();
        let handle = Server::spawn(device.clone(), listener).unwrap();
        (handle, device)
    }
}

/// Serves any store on a socket in `dir`.
pub(crate) fn serve_store(
    dir: &Path,
    store: Arc<dyn Store>,
    queues: u16,
) -> (PathBuf, ServerHandle, Arc<BlockDevice>) {
    let socket = dir.join("store.sock");
    let _ = std::fs::remove_file(&socket);
    let device = Arc::new(BlockDevice::on(store, BlockOptions::with_queues(queues)));
    let listener = UnixListener::bind(&socket).unwrap();
    let handle = Server::spawn(device.clone(), listener).unwrap();
    (socket, handle, device)
}

pub(crate) const FEATURES: u64 = VirtioFeatureFlags::VERSION_1.bits()
    | VirtioFeatureFlags::RING_EVENT_IDX.bits()
    | VirtioFeatureFlags::RING_INDIRECT_DESC.bits()
    | VirtioBlkFeatureFlags::MQ.bits()
    | VirtioBlkFeatureFlags::FLUSH.bits()
    | VirtioBlkFeatureFlags::DISCARD.bits()
    | VirtioBlkFeatureFlags::WRITE_ZEROES.bits();

/// A connected frontend with shared buffers.
pub(crate) struct Frontend {
    pub(crate) queues: Vec<VirtioBlkQueue<'static, usize>>,
    pub(crate) transport: Box<VirtioBlkTransport>,
    pub(crate) buffers: MmapRegion,
}

impl Frontend {
    pub(crate) fn connect(
        socket: &Path,
        features: u64,
        queues: usize,
        size: u16,
        bytes: usize,
    ) -> Frontend {
        let deadline = Instant::now() + TIMEOUT;
        while !socket.exists() {
            assert!(Instant::now() < deadline, "no socket");
            std::thread::sleep(Duration::from_millis(2));
        }
        let watchdog = watchdog();
        // The path is there a moment before anybody listens on it, and a stale one goes before that.
        let vhost = loop {
            match VhostUser::new(socket.to_str().unwrap(), features) {
                Err(error)
                    if matches!(
                        error.kind(),
                        std::io::ErrorKind::ConnectionRefused | std::io::ErrorKind::NotFound
                    ) =>
                {
                    assert!(Instant::now() < deadline, "nobody listens");
                    std::thread::sleep(Duration::from_millis(2));
                }
                vhost => break vhost.unwrap(),
            }
        };
        let mut transport = Box::new(vhost) as Box<VirtioBlkTransport>;
        let queues = VirtioBlkQueue::setup_queues(&mut *transport, queues, size).unwrap();
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(bytes as u64).unwrap();
        let fd = file.as_raw_fd();
        let buffers = MmapRegion::from_file(FileOffset::new(file, 0), bytes).unwrap();
        transport
            .map_mem_region(buffers.as_ptr() as usize, bytes, fd, 0)
            .unwrap();
        drop(watchdog);
        Frontend {
            queues,
            transport,
            buffers,
        }
    }

    pub(crate) fn buffer(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(offset + len <= self.buffers.size());
        self.buffers.as_ptr().wrapping_add(offset)
    }

    pub(crate) fn fill(&self, offset: usize, data: &[u8]) {
        let to = self.buffer(offset, data.len());
        // SAFETY: inside the mapping, which nothing else borrows.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), to, data.len()) };
    }

    pub(crate) fn bytes(&self, offset: usize, len: usize) -> Vec<u8> {
        let from = self.buffer(offset, len);
        let mut out = vec![0; len];
        // SAFETY: inside the mapping, which nothing else borrows.
        unsafe { std::ptr::copy_nonoverlapping(from, out.as_mut_ptr(), len) };
        out
    }

    pub(crate) fn read(&mut self, queue: usize, disk: u64, buffer: usize, len: usize, id: usize) {
        let to = self.buffer(buffer, len);
        // SAFETY: inside the mapping, which lives as long as the queues.
        unsafe { self.queues[queue].read_raw(disk, to, len, id) }.unwrap();
    }

    pub(crate) fn write(&mut self, queue: usize, disk: u64, buffer: usize, len: usize, id: usize) {
        let from = self.buffer(buffer, len);
        // SAFETY: inside the mapping, which lives as long as the queues.
        unsafe { self.queues[queue].write_raw(disk, from, len, id) }.unwrap();
    }

    pub(crate) fn kick(&mut self, queue: usize) {
        if self.queues[queue].avail_notif_needed() {
            self.transport
                .get_submission_notifier(queue)
                .notify()
                .unwrap();
        }
    }

    /// Waits for one completion: its context and result.
    pub(crate) fn complete(&mut self, queue: usize) -> (usize, i32) {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            if let Some(done) = self.queues[queue].completions().next() {
                return (done.context, done.ret);
            }
            assert!(Instant::now() < deadline, "no completion");
            std::thread::yield_now();
        }
    }

    pub(crate) fn write_sync(&mut self, queue: usize, disk: u64, data: &[u8]) -> i32 {
        self.fill(0, data);
        self.write(queue, disk, 0, data.len(), 1);
        self.kick(queue);
        self.complete(queue).1
    }

    pub(crate) fn read_sync(&mut self, queue: usize, disk: u64, len: usize) -> (i32, Vec<u8>) {
        self.fill(0, &vec![0xee; len]);
        self.read(queue, disk, 0, len, 1);
        self.kick(queue);
        let ret = self.complete(queue).1;
        (ret, self.bytes(0, len))
    }
}

pub(crate) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            x as u8
        })
        .collect()
}

pub(crate) fn open_fds() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// The number of open descriptors once it does not change any more.
pub(crate) fn settled_fds() -> usize {
    let mut last = open_fds();
    for _ in 0..50 {
        std::thread::sleep(Duration::from_millis(10));
        let now = open_fds();
        if now == last {
            return now;
        }
        last = now;
    }
    last
}

/// The frontend's own waits have no limit: ends the process if this is not dropped in time.
fn watchdog() -> std::sync::mpsc::Sender<()> {
    let (alive, watch) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        if watch.recv_timeout(TIMEOUT) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            eprintln!("the handshake did not end");
            std::process::abort();
        }
    });
    alive
}
