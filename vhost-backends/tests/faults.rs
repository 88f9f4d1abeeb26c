//! Hosts that fail: each failure is an I/O status in the guest and a count, never an end.

mod support;

use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use support::{Disk, FEATURES, Frontend, pattern, serve_store};
use vhost_backends::engine::{
    BlockingDisk, BlockingStore, Engine, FileOptions, Finished, Geometry, Operation, Qcow2Disk,
    RawFile, Store, Token, Wake, WakeSources, create_overlay,
};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

const MIB: usize = 1 << 20;

/// A disk that does what it is told, which is mostly to fail.
#[derive(Debug)]
struct Faulty {
    /// Zero: all is well. Positive: an error number. Negative: a panic.
    fault: Arc<AtomicI32>,
}

impl Faulty {
    fn outcome(&self) -> io::Result<()> {
        match self.fault.load(Ordering::SeqCst) {
            0 => Ok(()),
            error if error > 0 => Err(io::Error::from_raw_os_error(error)),
            _ => panic!("as told"),
        }
    }
}

impl BlockingDisk for Faulty {
    fn geometry(&self) -> Geometry {
        Geometry::plain(MIB as u64)
    }
    fn read_at(&self, buf: &mut [u8], _offset: u64) -> io::Result<()> {
        buf.fill(7);
        self.outcome()
    }
    fn write_at(&self, _buf: &[u8], _offset: u64) -> io::Result<()> {
        self.outcome()
    }
    fn flush(&self) -> io::Result<()> {
        self.outcome()
    }
    fn discard(&self, _offset: u64, _len: u64) -> io::Result<()> {
        self.outcome()
    }
    fn write_zeroes(&self, _offset: u64, _len: u64, _unmap: bool) -> io::Result<()> {
        self.outcome()
    }
}

#[test]
fn every_error_of_every_request_is_a_status_and_a_count() {
    let dir = tempfile::tempdir().unwrap();
    let fault = Arc::new(AtomicI32::new(0));
    let disk = Faulty {
        fault: fault.clone(),
    };
    let (socket, server, device) = serve_store(dir.path(), Arc::new(BlockingStore::new(disk)), 1);
    let mut front = Frontend::connect(&socket, FEATURES, 1, 64, MIB);
    let mut failed = 0;
    for error in [0, libc::EIO, libc::ENOSPC, libc::EROFS, libc::ESTALE, -1] {
        fault.store(error, Ordering::SeqCst);
        let good = error == 0;
        let (ret, data) = front.read_sync(0, 0, 4096);
        assert_eq!(ret == 0, good, "read, {error}");
        // A failed read gives the guest nothing.
        assert_eq!(data, vec![if good { 7 } else { 0xee }; 4096]);
        assert_eq!(front.write_sync(0, 0, &[1; 512]) == 0, good, "{error}");
        front.queues[0].flush(1).unwrap();
        front.queues[0].discard(0, 512, 2).unwrap();
        front.queues[0].write_zeroes(0, 512, true, 3).unwrap();
        front.kick(0);
        for _ in 0..3 {
            assert_eq!(front.complete(0).1 == 0, good, "{error}");
        }
        failed += if good { 0 } else { 5 };
        assert_eq!(device.stats().host_errors, failed);
    }
    fault.store(0, Ordering::SeqCst);
    assert_eq!(front.read_sync(0, 0, 512).0, 0, "goes on afterwards");
    drop(front);
    server.stop().unwrap();
    let stats = device.stats();
    assert_eq!((stats.no_space, stats.not_writable), (5, 5));
}

/// A disk whose engine itself may fail, with requests in flight.
#[derive(Debug)]
struct Fragile {
    breaks: AtomicBool,
}

impl Store for Fragile {
    fn geometry(&self) -> Geometry {
        Geometry::plain(MIB as u64)
    }

    fn open_engine(
        self: Arc<Self>,
        _memory: Arc<GuestMemoryMmap>,
        wake: WakeSources<'_>,
    ) -> io::Result<Box<dyn Engine>> {
        let stop = Epoll::new()?;
        let event = EpollEvent::new(EventSet::IN, 0);
        stop.ctl(ControlOperation::Add, wake.stop.as_raw_fd(), event)?;
        Ok(Box::new(FragileEngine {
            stop,
            flying: Vec::new(),
            disk: self,
        }))
    }
}

struct FragileEngine {
    disk: Arc<Fragile>,
    stop: Epoll,
    flying: Vec<Token>,
}

impl Engine for FragileEngine {
    fn start(&mut self, token: Token, _operation: Operation<'_>) -> Option<io::Result<()>> {
        self.flying.push(token);
        None
    }

    fn submit(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn reap(&mut self, finished: &mut Vec<Finished>) -> io::Result<Wake> {
        if self.flying.len() > 1 && self.disk.breaks.load(Ordering::SeqCst) {
            // One is over, and nothing is known of the others.
            let (token, result) = (self.flying.remove(0), Ok(()));
            finished.push(Finished { token, result });
            return Err(io::Error::from_raw_os_error(libc::EBADF));
        }
        if !self.disk.breaks.load(Ordering::SeqCst) {
            finished.extend(self.flying.drain(..).map(|token| Finished {
                token,
                result: Ok(()),
            }));
        }
        let seen = self.stop.wait(0, &mut [EpollEvent::default()])?;
        Ok(Wake { stop: seen > 0 })
    }

    fn wait(&mut self, finished: &mut Vec<Finished>) -> io::Result<Wake> {
        self.stop.wait(1, &mut [EpollEvent::default()])?;
        self.reap(finished)
    }

    fn has_finished(&mut self) -> bool {
        false
    }

    fn in_flight(&self) -> usize {
        self.flying.len()
    }
}

#[test]
fn a_failed_engine_loses_no_request() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Arc::new(Fragile {
        breaks: AtomicBool::new(true),
    });
    let (socket, server, device) = serve_store(dir.path(), disk.clone(), 1);
    let mut front = Frontend::connect(&socket, FEATURES, 1, 64, MIB);
    for id in 0..8 {
        front.read(0, 0, 4096 * id, 4096, id);
    }
    front.kick(0);
    let mut done: Vec<_> = (0..8).map(|_| front.complete(0)).collect();
    done.sort_unstable();
    let ids: Vec<usize> = done.iter().map(|(id, _)| *id).collect();
    assert_eq!(ids, (0..8).collect::<Vec<_>>());
    let good = done.iter().filter(|(_, ret)| *ret == 0).count();
    assert!(good <= 1, "{done:?}");
    // So does everything after it, and nothing hangs.
    for _ in 0..3 {
        assert_ne!(front.read_sync(0, 0, 512).0, 0);
    }
    drop(front);
    disk.breaks.store(false, Ordering::SeqCst);
    let mut front = Frontend::connect(&socket, FEATURES, 1, 64, MIB);
    assert_eq!(front.read_sync(0, 0, 512).0, 0, "a new start is a new try");
    drop(front);
    server.stop().unwrap();
    let stats = device.stats();
    // The engine's own failure, and each request's.
    assert_eq!(stats.host_errors, 1 + (8 - good as u64) + 3);
    assert_eq!(stats.requests, 8 + 3 + 1);
}

#[test]
fn a_deleted_image_is_served_and_a_truncated_one_counted() {
    for direct in [false, true] {
        let disk = Disk::new(MIB as u64);
        let options = FileOptions {
            read_only: false,
            direct,
        };
        let (server, device) = disk.serve(options, 1);
        let mut front = Frontend::connect(&disk.socket, FEATURES, 1, 64, MIB);
        let file = std::fs::File::options()
            .write(true)
            .open(&disk.image)
            .unwrap();
        std::fs::remove_file(&disk.image).unwrap();
        assert_eq!(front.write_sync(0, 8192, &pattern(1, 8192)), 0);
        assert_eq!(front.read_sync(0, 8192, 8192), (0, pattern(1, 8192)));
        file.set_len(12288).unwrap();
        assert_ne!(front.read_sync(0, 8192, 8192).0, 0);
        assert_eq!(front.read_sync(0, 8192, 4096).0, 0);
        drop(front);
        server.stop().unwrap();
        assert_eq!(device.stats().truncated, 1, "direct: {direct}");
    }
}

fn is_root() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    status
        .lines()
        .any(|line| line.starts_with("Uid:") && line.split_whitespace().nth(2) == Some("0"))
}

/// Ended with the test.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_full_file_system_is_an_io_error() {
    if !is_root() {
        println!("SKIPPED: only root can mount a small file system");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (socket, mount) = (dir.path().join("blk.sock"), dir.path().join("mnt"));
    std::fs::create_dir(&mount).unwrap();
    // The mount is in a namespace of its own, and gone with the daemon.
    let script = "mount -t tmpfs -o size=256k none \"$1\" && truncate -s 1M \"$1/disk\" && \
                  exec \"$2\" --blk-file \"$1/disk\" --socket-path \"$3\"";
    let child = Command::new("unshare")
        .args([
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-c",
            script,
            "sh",
        ])
        .arg(&mount)
        .arg(env!("CARGO_BIN_EXE_pv-blkd"))
        .arg(&socket)
        .stdin(Stdio::null())
        .spawn();
    let Ok(child) = child else {
        println!("SKIPPED: no unshare to mount a small file system with");
        return;
    };
    let mut child = Ended(child);
    while !socket.exists() {
        if child.0.try_wait().unwrap().is_some() {
            println!("SKIPPED: this host does not let a file system be mounted");
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let mut front = Frontend::connect(&socket, FEATURES, 1, 64, MIB);
    let mut outcomes = Vec::new();
    for i in 0..16u64 {
        let ret = front.write_sync(0, i * 65536, &pattern(i, 65536));
        outcomes.push(ret == 0);
    }
    assert!(outcomes[0] && outcomes.contains(&false), "{outcomes:?}");
    // What was acknowledged is there, and space that is given back can be used.
    for (i, _) in outcomes.iter().enumerate().filter(|(_, good)| **good) {
        let expected = (0, pattern(i as u64, 65536));
        assert!(front.read_sync(0, i as u64 * 65536, 65536) == expected);
    }
    front.queues[0].discard(0, MIB as u64, 1).unwrap();
    front.kick(0);
    assert_eq!(front.complete(0).1, 0);
    assert_eq!(front.write_sync(0, 15 * 65536, &pattern(1, 65536)), 0);
}

/// A block device on a file, detached with the test.
struct Loop(PathBuf);

impl Loop {
    fn attach(image: &Path, block: &str) -> Option<Loop> {
        let output = Command::new("losetup")
            .args(["--find", "--show", "--sector-size", block])
            .arg(image)
            .output()
            .ok()?;
        let path = String::from_utf8(output.stdout).ok()?;
        output
            .status
            .success()
            .then(|| Loop(path.trim().to_owned().into()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.0).status();
    }
}

#[test]
fn block_devices_show_their_blocks() {
    if !is_root() {
        println!("SKIPPED: only root can make a block device");
        return;
    }
    for block in [512u32, 4096] {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        std::fs::write(&image, vec![0; 4 * MIB]).unwrap();
        let Some(device) = Loop::attach(&image, &block.to_string()) else {
            println!("SKIPPED: no loop devices here");
            return;
        };
        for direct in [false, true] {
            let options = FileOptions {
                read_only: false,
                direct,
            };
            let file = RawFile::open(&device.0, options).unwrap();
            use vhost_backends::engine::Store;
            assert_eq!(file.geometry().logical_block, block);
            assert_eq!(file.geometry().len, 4 * MIB as u64);
            assert!(!file.geometry().secure_erase);
            let (socket, server, served) = serve_store(dir.path(), Arc::new(file), 1);
            let mut front = Frontend::connect(&socket, FEATURES, 1, 64, MIB);
            let data = pattern(u64::from(block), 65536);
            assert_eq!(front.write_sync(0, 65536, &data), 0);
            // Parts of a block, beside each other.
            for i in 0..8u64 {
                assert_eq!(front.write_sync(0, i * 512, &pattern(i, 512)), 0);
            }
            for i in 0..8u64 {
                assert_eq!(front.read_sync(0, i * 512, 512), (0, pattern(i, 512)));
            }
            assert!(front.read_sync(0, 65536, 65536) == (0, data));
            front.queues[0].write_zeroes(65536, 8192, true, 1).unwrap();
            front.queues[0].write_zeroes(73728, 8192, false, 2).unwrap();
            front.queues[0].discard(81920, 8192, 3).unwrap();
            front.kick(0);
            for _ in 0..3 {
                assert_eq!(front.complete(0).1, 0);
            }
            assert!(front.read_sync(0, 65536, 16384) == (0, vec![0; 16384]));
            drop(front);
            server.stop().unwrap();
            assert_eq!(served.stats().host_errors, 0);
        }
    }
}

#[test]
fn malformed_qcow2_is_an_error_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.img");
    std::fs::write(&base, pattern(5, MIB)).unwrap();
    let good = dir.path().join("good.qcow2");
    create_overlay(&good, &base, false).unwrap();
    let write = |path: &Path| -> io::Result<()> {
        let disk = Qcow2Disk::open(path, FileOptions::default())?;
        let mut buffer = vec![0; 65536];
        let mut outcome = Ok(());
        for at in [0, 65536, MIB as u64 - 65536] {
            outcome = outcome
                .and(disk.read_at(&mut buffer, at))
                .and(disk.write_at(&buffer, at));
        }
        outcome
            .and(disk.discard(0, 65536))
            .and(disk.flush())
            .and(disk.write_zeroes(0, 131_072, true))
    };
    write(&good).unwrap();
    let image = std::fs::read(&good).unwrap();
    let path = dir.path().join("bad.qcow2");
    let hosts = std::panic::take_hook();
    // The parser's panics are caught and become errors; their text is of no use here.
    std::panic::set_hook(Box::new(|_| {}));
    let (mut refused, mut survived) = (0, 0);
    let mut try_it = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        let write = std::panic::AssertUnwindSafe(|| write(&path));
        match std::panic::catch_unwind(write) {
            Ok(Ok(())) => survived += 1,
            // The store's threads catch these, as the test above shows.
            Ok(Err(_)) | Err(_) => refused += 1,
        }
    };
    // Each byte of the header and of the tables' first entries, to a few values.
    let tables = (0..image.len()).step_by(65536).flat_map(|at| at..at + 16);
    for at in (0..112).chain(tables).filter(|at| *at < image.len()) {
        for value in [0, 0x7f, 0x80, 0xff] {
            let mut bytes = image.clone();
            bytes[at] = value;
            try_it(&bytes);
        }
    }
    // Cut short.
    for len in [
        0, 1, 4, 71, 72, 103, 104, 511, 512, 65535, 65536, 131_072, 196_608,
    ] {
        try_it(&image[..len.min(image.len())]);
    }
    // Noise after a good magic and version.
    for seed in 0..64 {
        let mut bytes = pattern(seed, 4 * 65536);
        bytes[..8].copy_from_slice(&image[..8]);
        try_it(&bytes);
    }
    std::panic::set_hook(hosts);
    println!("{refused} refused, {survived} served");
    assert!(refused > 100 && survived > 0, "{refused} {survived}");
}

#[test]
fn a_block_device_that_becomes_read_only_is_counted_and_reads_go_on() {
    if !is_root() {
        println!("SKIPPED: only root can make a block device");
        return;
    }
    for direct in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        std::fs::write(&image, vec![0; MIB]).unwrap();
        let Some(device) = Loop::attach(&image, "512") else {
            println!("SKIPPED: no loop devices here");
            return;
        };
        let options = FileOptions {
            read_only: false,
            direct,
        };
        let file = RawFile::open(&device.0, options).unwrap();
        let (socket, server, served) = serve_store(dir.path(), Arc::new(file), 1);
        let mut front = Frontend::connect(&socket, FEATURES, 1, 64, MIB);
        assert_eq!(front.write_sync(0, 4096, &pattern(1, 4096)), 0);
        let set = |how: &str| {
            let status = Command::new("blockdev").arg(how).arg(&device.0).status();
            status.is_ok_and(|status| status.success())
        };
        if !set("--setro") {
            println!("SKIPPED: no blockdev to make a device read-only with");
            return;
        }
        assert_ne!(front.write_sync(0, 4096, &pattern(2, 4096)), 0);
        assert_eq!(front.read_sync(0, 4096, 4096), (0, pattern(1, 4096)));
        assert!(set("--setrw"));
        assert_eq!(front.write_sync(0, 4096, &pattern(3, 4096)), 0);
        drop(front);
        server.stop().unwrap();
        let stats = served.stats();
        assert_eq!(
            (stats.host_errors, stats.not_writable),
            (1, 1),
            "direct: {direct}"
        );
    }
}
