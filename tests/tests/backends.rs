//! Backends that are not supervised, and backends that do not play by the rules.

use paravane_tests::{accels, blank_image, patience, pv_blkd, suite_vm};
use std::io::Read;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use vmm_core::{BlockConfig, BuildError, Image, VmBuilder, VmEvent};

/// A `pv-blkd` that the test runs, as somebody else would.
struct Daemon {
    child: Child,
    socket: PathBuf,
    image: PathBuf,
}

impl Daemon {
    fn start(socket: &Path, image: &Path) -> Daemon {
        let child = Command::new(pv_blkd().unwrap())
            .arg("--socket-path")
            .arg(socket)
            .arg("--blk-file")
            .arg(image)
            .spawn()
            .unwrap();
        Daemon {
            child,
            socket: socket.into(),
            image: image.into(),
        }
    }

    fn kill_and_restart(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        *self = Daemon::start(&self.socket, &self.image);
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn an_unsupervised_backend_is_killed_and_restarted_under_load() {
    const KILLS: u64 = 10;
    for accel in accels().unwrap() {
        let folder = tempfile::tempdir().unwrap();
        let (socket, image) = (
            folder.path().join("blk.sock"),
            folder.path().join("disk.img"),
        );
        blank_image(&image).unwrap();
        let daemon = Arc::new(Mutex::new(Daemon::start(&socket, &image)));
        let (kills, back) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let (counted, reconnects) = (Arc::clone(&kills), Arc::clone(&back));
        let killed = Arc::clone(&daemon);
        let vm = suite_vm("soak.kill", accel)
            .unwrap()
            .block(BlockConfig::socket(&socket).name("disk"))
            .on_event(move |event| {
                if let VmEvent::BackendReconnected { .. } = event {
                    reconnects.fetch_add(1, Ordering::SeqCst);
                }
            })
            .call(7, move |call| {
                // One kill at a time: the next when the guest has its disk back.
                let done = counted.load(Ordering::SeqCst);
                if done < KILLS && back.load(Ordering::SeqCst) == done {
                    counted.fetch_add(1, Ordering::SeqCst);
                    killed.lock().unwrap().kill_and_restart();
                }
                call.finish(Ok(u64::from(done >= KILLS)));
            })
            .build()
            .unwrap()
            .run()
            .unwrap();
        let reason = vm.wait_timeout(patience(120)).expect("in time");
        assert_eq!(reason.code(), Some(0), "{reason}");
        let stats = vm.stats();
        assert_eq!(kills.load(Ordering::SeqCst), KILLS);
        assert!(stats.backend_reconnects >= KILLS, "{stats:?}");
        drop(vm);
        drop(daemon);
    }
}

fn build_with(socket: &Path) -> Result<(), String> {
    let image = Image::from_bytes(guest_images::SUITE).unwrap();
    match VmBuilder::new(image)
        .block(BlockConfig::socket(socket))
        .build()
    {
        Ok(_) => Ok(()),
        Err(BuildError::Backend { name, source }) => Err(format!("{name}: {source}")),
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn a_backend_that_says_nothing_or_nonsense_does_not_hang_the_build() {
    let folder = tempfile::tempdir().unwrap();
    let answers: [(&str, &[u8]); 4] = [
        ("hangs up", b""),
        ("nonsense", &[0xff; 64]),
        (
            "an answer to nothing",
            &[1, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        ),
        ("half an answer", &[1, 0, 0, 0]),
    ];
    for (what, answer) in answers {
        let socket = folder.path().join("backend.sock");
        let _ = std::fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).unwrap();
        let served = std::thread::spawn(move || {
            let (mut peer, _) = listener.accept().unwrap();
            let mut request = [0; 4096];
            let _ = peer.read(&mut request);
            let _ = std::io::Write::write_all(&mut peer, answer);
        });
        let started = Instant::now();
        let error = build_with(&socket).expect_err(what);
        assert!(error.starts_with("disk: "), "{what}: {error}");
        assert!(
            started.elapsed() < patience(60),
            "{what}: took {:?}",
            started.elapsed()
        );
        served.join().unwrap();
    }
}

#[test]
fn a_backend_that_never_answers_is_given_up() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("silent.sock");
    // Connections are accepted by the kernel and never served.
    let _listener = UnixListener::bind(&socket).unwrap();
    let started = Instant::now();
    let error = build_with(&socket).expect_err("a silent backend");
    assert!(error.contains("GET_FEATURES"), "{error}");
    assert!(started.elapsed() >= Duration::from_secs(1));
    assert!(started.elapsed() < patience(60));
}

/// Takes a connection and relays it to a real daemon, message by message, until it has passed on
/// `budget` bytes from the VMM; then it keeps the connection and says nothing more.
fn mute_after(socket: &Path, real: &Path, budget: usize) -> std::thread::JoinHandle<()> {
    use std::io::{IoSlice, IoSliceMut, Write};
    let listener = UnixListener::bind(socket).unwrap();
    let real = real.to_owned();
    std::thread::spawn(move || {
        let (vmm, _) = listener.accept().unwrap();
        let daemon = std::os::unix::net::UnixStream::connect(real).unwrap();
        let (mut answers, mut back) = (daemon.try_clone().unwrap(), vmm.try_clone().unwrap());
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = answers.read(&mut bytes) {
                let _ = back.write_all(&bytes[..count]);
            }
        });
        let mut passed = 0;
        let mut bytes = [0; 4096];
        // Descriptors are not relayed; what needs one is refused by the daemon, which is as good.
        while let Ok(count @ 1..) = (&vmm).read_vectored(&mut [IoSliceMut::new(&mut bytes)]) {
            passed += count;
            if passed <= budget {
                let _ = (&daemon).write_vectored(&[IoSlice::new(&bytes[..count])]);
            }
        }
    })
}

#[test]
fn stopping_does_not_wait_for_a_mute_backend() {
    for accel in accels().unwrap() {
        let folder = tempfile::tempdir().unwrap();
        let (real, image) = (
            folder.path().join("real.sock"),
            folder.path().join("disk.img"),
        );
        blank_image(&image).unwrap();
        let _daemon = Daemon::start(&real, &image);
        let deadline = Instant::now() + patience(20);
        while std::os::unix::net::UnixStream::connect(&real).is_err() {
            assert!(Instant::now() < deadline, "the daemon does not listen");
            std::thread::sleep(Duration::from_millis(5));
        }
        // Enough for the handshake, not for the activation.
        let socket = folder.path().join("mute.sock");
        let relay = mute_after(&socket, &real, 180);
        let vm = suite_vm("block.identify", accel)
            .unwrap()
            .block(BlockConfig::socket(&socket).name("disk"))
            .build()
            .unwrap()
            .run()
            .unwrap();
        // The guest is in the middle of bringing its disk up.
        std::thread::sleep(Duration::from_millis(300));
        assert!(vm.exit().is_none(), "{accel}: {:?}", vm.exit());
        let started = Instant::now();
        vm.stop();
        let reason = vm
            .wait_timeout(patience(5))
            .expect("it waits for the backend");
        assert!(matches!(reason, vmm_core::ExitReason::Stopped), "{reason}");
        drop(vm);
        assert!(
            started.elapsed() < patience(5),
            "{accel}: {:?}",
            started.elapsed()
        );
        relay.join().unwrap();
    }
}
