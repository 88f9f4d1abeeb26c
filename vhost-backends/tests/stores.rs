//! Every store under the same verified workload, with a frontend that is not ours.

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use support::nbd::NbdServer;
use support::process::{Daemon, blkd, limit_file_size};
use support::{FEATURES, Frontend, pattern, serve_store};
use vhost_backends::engine::{
    BlockingStore, FileOptions, MemoryStore, NbdAddress, NbdError, NbdStore, NullStore, Qcow2Disk,
    RawFile, Store, create_overlay,
};
use virtio_driver::VirtioFeatureFlags;

const MIB: usize = 1 << 20;
const DISK: usize = 8 * MIB;

/// What the disk holds before the workload.
fn base_content() -> Vec<u8> {
    let mut content = pattern(1000, 3 * MIB);
    content.resize(DISK, 0);
    content
}

/// Random requests of every kind, several at a time, against a model. The model at the end.
fn workload(store: Arc<dyn Store>, before: Vec<u8>, seed: u64) -> Vec<u8> {
    workload_on(FEATURES, store, before, seed)
}

fn workload_on(features: u64, store: Arc<dyn Store>, before: Vec<u8>, seed: u64) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let (socket, server, device) = serve_store(dir.path(), store, 1);
    let mut front = Frontend::connect(&socket, features, 1, 64, 2 * MIB);
    let mut model = before;
    let mut random = seed;
    let mut next = |below: usize| {
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) as usize % below
    };
    for round in 0..150u64 {
        // Ranges of one round do not overlap: each has its own part of the disk.
        let lanes = 8;
        let lane = DISK / lanes;
        let mut discarded = Vec::new();
        let mut expected: Vec<Option<(usize, Vec<u8>)>> = vec![None; lanes];
        for (slot, wanted) in expected.iter_mut().enumerate() {
            let sectors = 1 + next(128);
            let len = sectors * 512;
            let at = slot * lane + next((lane - len) / 512) * 512;
            let buffer = slot * 128 * 1024;
            match next(10) {
                0..=3 => {
                    let data = pattern(round * 100 + slot as u64, len);
                    front.fill(buffer, &data);
                    front.write(0, at as u64, buffer, len, slot);
                    model[at..at + len].copy_from_slice(&data);
                }
                4..=6 => {
                    front.read(0, at as u64, buffer, len, slot);
                    *wanted = Some((buffer, model[at..at + len].to_vec()));
                }
                7 => {
                    let unmap = next(2) == 1;
                    front.queues[0]
                        .write_zeroes(at as u64, len as u64, unmap, slot)
                        .unwrap();
                    model[at..at + len].fill(0);
                }
                8 => {
                    front.queues[0]
                        .discard(at as u64, len as u64, slot)
                        .unwrap();
                    discarded.push((at, len));
                }
                _ => front.queues[0].flush(slot).unwrap(),
            }
            if next(3) == 0 {
                front.kick(0);
            }
        }
        front.kick(0);
        for _ in 0..lanes {
            let (slot, ret) = front.complete(0);
            assert_eq!(ret, 0, "round {round}, slot {slot}");
        }
        for (buffer, data) in expected.iter().flatten() {
            let same = front.bytes(*buffer, data.len()) == *data;
            assert!(same, "round {round}, buffer {buffer:#x}");
        }
        for (at, len) in discarded {
            // What it reads as now is not promised, so it is written.
            let data = pattern(round, len);
            assert_eq!(front.write_sync(0, at as u64, &data), 0);
            model[at..at + len].copy_from_slice(&data);
        }
    }
    for (i, chunk) in model.chunks(MIB).enumerate() {
        let (ret, data) = front.read_sync(0, (i * MIB) as u64, MIB);
        assert_eq!(ret, 0);
        assert!(data == chunk, "MiB {i}");
    }
    // On a packed ring this frontend insists on a used length that counts every writable byte,
    // which a request that failed does not have.
    if features & VirtioFeatureFlags::RING_PACKED.bits() == 0 {
        assert_ne!(front.read_sync(0, DISK as u64, 512).0, 0, "past the end");
    }
    drop(front);
    server.stop().unwrap();
    assert_eq!(device.stats().host_errors, 0);
    model
}

fn base_file(dir: &Path) -> PathBuf {
    let path = dir.join("base.img");
    std::fs::write(&path, base_content()).unwrap();
    path
}

/// The workload on raw files, through the page cache and past it.
fn raw_files_with(features: u64, seed: u64) {
    for direct in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let path = base_file(dir.path());
        let options = FileOptions {
            read_only: false,
            direct,
        };
        let store = Arc::new(RawFile::open(&path, options).unwrap());
        let model = workload_on(features, store, base_content(), seed);
        assert!(std::fs::read(&path).unwrap() == model);
    }
}

#[test]
fn raw_files() {
    raw_files_with(FEATURES, 1);
}

/// The same on packed rings, with and without what makes them fast.
#[test]
fn raw_files_on_packed_rings() {
    let packed = FEATURES | VirtioFeatureFlags::RING_PACKED.bits();
    let fast = VirtioFeatureFlags::RING_EVENT_IDX | VirtioFeatureFlags::RING_INDIRECT_DESC;
    raw_files_with(packed, 60);
    raw_files_with(packed & !fast.bits(), 61);
}

#[test]
fn memory() {
    let store = Arc::new(MemoryStore::new(DISK as u64).unwrap());
    let model = workload(store.clone(), vec![0; DISK], 2);
    // It outlives its frontends.
    workload(store, model, 3);
}

#[test]
fn null_takes_everything() {
    let dir = tempfile::tempdir().unwrap();
    let store = Arc::new(NullStore::new(DISK as u64));
    let (socket, server, device) = serve_store(dir.path(), store, 1);
    let mut front = Frontend::connect(&socket, FEATURES, 1, 64, MIB);
    assert_eq!(front.write_sync(0, 0, &pattern(1, 4096)), 0);
    // The buffer stays as it was.
    assert_eq!(front.read_sync(0, 0, 512), (0, vec![0xee; 512]));
    assert_ne!(front.read_sync(0, DISK as u64, 512).0, 0);
    drop(front);
    server.stop().unwrap();
    assert_eq!(device.stats().requests, 3);
}

#[test]
fn overlays_share_a_base() {
    let dir = tempfile::tempdir().unwrap();
    let base = base_file(dir.path());
    for direct in [false, true] {
        let options = FileOptions {
            read_only: false,
            direct,
        };
        let mut models = Vec::new();
        let overlays = [1, 2].map(|n| dir.path().join(format!("{direct}-{n}.qcow2")));
        for (n, overlay) in overlays.iter().enumerate() {
            create_overlay(overlay, &base, false).unwrap();
            assert!(create_overlay(overlay, &base, false).is_err(), "exists");
            let disk = Qcow2Disk::open_overlay(overlay, &base, false, options).unwrap();
            let store = Arc::new(BlockingStore::new(disk));
            models.push(workload(store, base_content(), 10 + n as u64));
        }
        assert!(std::fs::read(&base).unwrap() == base_content());
        for (overlay, model) in overlays.iter().zip(models) {
            // By the base that it names itself, this time.
            let disk = Qcow2Disk::open(overlay, options).unwrap();
            workload(Arc::new(BlockingStore::new(disk)), model, 20);
            check_image(overlay);
        }
    }
}

#[test]
fn an_overlay_that_cannot_be_made_is_not_left() {
    let dir = tempfile::tempdir().unwrap();
    // An image has 1023 bytes for its base's name.
    let deep = (0..5).fold(dir.path().to_owned(), |dir, _| dir.join("d".repeat(250)));
    std::fs::create_dir_all(&deep).unwrap();
    let overlay = dir.path().join("overlay");
    create_overlay(&overlay, &base_file(&deep), false).unwrap_err();
    assert!(!overlay.exists());
    // And where no more may be written, in the daemon.
    let mut daemon = blkd();
    limit_file_size(&mut daemon, 64 << 10);
    daemon.arg("--socket-path").arg(dir.path().join("socket"));
    daemon.arg("--blk-file").arg(base_file(dir.path()));
    let daemon = Daemon::start(daemon.arg("--overlay").arg(&overlay));
    let (code, said) = daemon.wait();
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("cannot make the overlay"), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(!overlay.exists());
}

#[test]
fn an_overlay_that_was_cut_short_in_the_making_is_made_anew() {
    let dir = tempfile::tempdir().unwrap();
    let (base, overlay) = (base_file(dir.path()), dir.path().join("overlay"));
    let making = dir.path().join(".overlay.new");
    for _ in 0..2 {
        std::fs::write(&making, "half an image").unwrap();
        create_overlay(&overlay, &base, false).unwrap();
        assert!(!making.exists());
        check_image(&overlay);
        let exists = create_overlay(&overlay, &base, false).unwrap_err();
        assert_eq!(exists.kind(), std::io::ErrorKind::AlreadyExists);
        std::fs::remove_file(&overlay).unwrap();
    }
    // Killed at any moment, a daemon leaves none, or a whole one.
    for delay in 0..12 {
        let mut daemon = blkd();
        daemon.arg("--socket-path").arg(dir.path().join("socket"));
        daemon.arg("--blk-file").arg(&base);
        let mut daemon = Daemon::quiet(daemon.arg("--overlay").arg(&overlay));
        std::thread::sleep(std::time::Duration::from_millis(delay));
        daemon.kill();
        if overlay.exists() {
            Qcow2Disk::open_overlay(&overlay, &base, false, FileOptions::default()).unwrap();
            std::fs::remove_file(&overlay).unwrap();
        }
    }
}

#[test]
fn an_overlay_is_opened_on_its_own_base_alone() {
    let dir = tempfile::tempdir().unwrap();
    let base = base_file(dir.path());
    let at = |name: &str| dir.path().join(name);
    let (overlay, other, whole) = (at("overlay"), at("other"), at("whole"));
    std::fs::copy(&base, &other).unwrap();
    create_overlay(&overlay, &base, false).unwrap();
    create_overlay(&whole, &overlay, true).unwrap();
    let open = |path: &Path, base: &Path, qcow2: bool| {
        let opened = Qcow2Disk::open_overlay(path, base, qcow2, FileOptions::default());
        opened.map(drop).map_err(|error| error.to_string())
    };
    assert_eq!(open(&overlay, &base, false), Ok(()));
    assert_eq!(open(&whole, &overlay, true), Ok(()));
    let link = at("link");
    std::os::unix::fs::symlink(&base, &link).unwrap();
    assert_eq!(open(&overlay, &link, false), Ok(()), "the same file");
    for (path, wrong, qcow2, why) in [
        (&overlay, &other, false, "it was made on"),
        (&overlay, &whole, true, "it was made on"),
        (&whole, &base, false, "it was made on"),
        (&whole, &overlay, false, "of the format qcow2, not raw"),
    ] {
        let refused = open(path, wrong, qcow2).unwrap_err();
        assert!(refused.contains(why), "{refused}");
    }
    // In the daemon, in a sentence.
    let mut daemon = blkd();
    daemon.arg("--socket-path").arg(at("socket"));
    daemon.arg("--blk-file").arg(&other);
    let (code, said) = Daemon::start(daemon.arg("--overlay").arg(&overlay)).wait();
    assert_eq!(code, Some(1), "{said}");
    assert!(
        said.contains("cannot open the overlay") && said.contains("it was made on"),
        "{said}"
    );
    assert_eq!(said.lines().count(), 1, "{said}");
    // Both were moved: taken, and said.
    std::fs::rename(&base, at("moved")).unwrap();
    assert_eq!(open(&overlay, &at("moved"), false), Ok(()));
}

/// Asks qemu-img whether the image is sound, where it is installed.
fn check_image(path: &Path) {
    match Command::new("qemu-img").arg("check").arg(path).output() {
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            // 3: leaked clusters only, which cost space and nothing else.
            assert!(matches!(output.status.code(), Some(0 | 3)), "{said}");
        }
        Err(_) => println!("SKIPPED: no qemu-img to check the image with"),
    }
}

#[test]
fn an_overlay_on_an_overlay_and_a_loop_of_them() {
    let dir = tempfile::tempdir().unwrap();
    let base = base_file(dir.path());
    let middle = dir.path().join("middle.qcow2");
    let top = dir.path().join("top.qcow2");
    create_overlay(&middle, &base, false).unwrap();
    create_overlay(&top, &middle, true).unwrap();
    let disk = Qcow2Disk::open(&top, FileOptions::default()).unwrap();
    workload(Arc::new(BlockingStore::new(disk)), base_content(), 30);
    // The middle one is now the top one: a chain without an end.
    std::fs::remove_file(&middle).unwrap();
    std::os::unix::fs::symlink(&top, &middle).unwrap();
    Qcow2Disk::open(&top, FileOptions::default()).unwrap_err();
}

#[test]
fn an_image_whose_data_is_in_another_file_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (image, top) = (dir.path().join("image"), dir.path().join("top"));
    create_overlay(&image, &base_file(dir.path()), false).unwrap();
    create_overlay(&top, &image, true).unwrap();
    let mut bytes = std::fs::read(&image).unwrap();
    // The last byte of the incompatible features of version 3.
    bytes[79] |= 1 << 2;
    std::fs::write(&image, bytes).unwrap();
    for read_only in [false, true] {
        let options = FileOptions {
            read_only,
            direct: false,
        };
        for path in [&image, &top] {
            let refused = Qcow2Disk::open(path, options).unwrap_err().to_string();
            assert!(refused.contains("external data file"), "{refused}");
        }
    }
}

fn nbd(socket: &Path, export: &str, queues: u16) -> Result<NbdStore, NbdError> {
    let address: NbdAddress = format!("unix:{}:{export}", socket.display()).parse()?;
    NbdStore::connect(address, queues, false)
}

#[test]
fn nbd_of_three_servers() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("nbd.sock");
    let at = socket.to_str().unwrap();
    for (n, program) in ["nbdkit", "qemu-nbd", "qemu-storage-daemon"]
        .into_iter()
        .enumerate()
    {
        let base = base_file(dir.path());
        let image = base.to_str().unwrap();
        let file = format!("driver=file,node-name=d,filename={image}");
        let listen = format!("addr.type=unix,addr.path={at}");
        let (arguments, export): (Vec<&str>, &str) = match program {
            "nbdkit" => (vec!["-f", "-U", at, "file", image], ""),
            "qemu-nbd" => (
                vec!["-k", at, "-f", "raw", "-x", "disk", "-t", "-e", "4", image],
                "disk",
            ),
            _ => {
                let export = "nbd,id=e,node-name=d,name=disk,writable=on";
                let all = vec!["--blockdev", &file, "--nbd-server", &listen];
                ([all, vec!["--export", export]].concat(), "disk")
            }
        };
        let Some(server) = NbdServer::start(program, &arguments, &socket) else {
            continue;
        };
        let store = Arc::new(nbd(&socket, export, 1).unwrap());
        let model = workload(store.clone(), base_content(), 40 + n as u64);
        // The same connection again, for the next frontend.
        workload(store, model, 50);
        let refused = nbd(&socket, "no such export", 1);
        if program != "nbdkit" {
            assert!(matches!(refused, Err(NbdError::Refused(_))), "{refused:?}");
        }
        drop(server);
    }
}

#[test]
fn nbd_server_that_dies_is_an_io_error() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("nbd.sock");
    let at = socket.to_str().unwrap();
    let Some(server) = NbdServer::start("nbdkit", &["-f", "-U", at, "memory", "8M"], &socket)
    else {
        return;
    };
    let store = Arc::new(nbd(&socket, "", 1).unwrap());
    let (socket, handle, device) = serve_store(dir.path(), store, 1);
    let mut front = Frontend::connect(&socket, FEATURES, 1, 64, MIB);
    assert_eq!(front.write_sync(0, 0, &pattern(1, 4096)), 0);
    drop(server);
    for _ in 0..3 {
        assert_ne!(front.write_sync(0, 0, &pattern(1, 4096)), 0);
    }
    drop(front);
    // The next frontend is served, with errors.
    let mut front = Frontend::connect(&socket, FEATURES, 1, 64, MIB);
    assert_ne!(front.read_sync(0, 0, 512).0, 0);
    drop(front);
    handle.stop().unwrap();
    assert!(device.stats().host_errors >= 4);
}

#[test]
fn nbd_addresses() {
    let parse = |text: &str| text.parse::<NbdAddress>();
    assert_eq!(parse("unix:/a/b").unwrap().export, "");
    let full = parse("unix:/a/b:c:d").unwrap();
    assert_eq!((full.socket.to_str(), &*full.export), (Some("/a/b"), "c:d"));
    for bad in ["", "/a/b", "unix:", "unix::x", "tcp:host"] {
        assert!(parse(bad).is_err(), "{bad}");
    }
    assert!(parse(&format!("unix:/a:{}", "x".repeat(4097))).is_err());
}
