//! Backends that are not supervised, backends in this process, and backends that do not play by the
//! rules.

use paravane_tests::{accels, blank_image, block_device, patience, pv_blkd, suite_vm};
use std::io::Read;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use vhost_backends::session::{self, Device, FrontendLink, QueueSetup, QueueWorker};
use vmm_core::{BlockConfig, BuildError, ExitReason, Image, VmBuilder, VmEvent};

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
                let over = back.load(Ordering::SeqCst) == done;
                if done < KILLS && over {
                    counted.fetch_add(1, Ordering::SeqCst);
                    killed.lock().unwrap().kill_and_restart();
                }
                call.finish(Ok(u64::from(done >= KILLS && over)));
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

fn build_with(disk: BlockConfig) -> Result<(), String> {
    let image = Image::from_bytes(guest_images::SUITE).unwrap();
    match VmBuilder::new(image).block(disk).build() {
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
        let error = build_with(BlockConfig::socket(&socket)).expect_err(what);
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
    let error = build_with(BlockConfig::socket(&socket)).expect_err("a silent backend");
    assert!(error.contains("GET_FEATURES"), "{error}");
    assert!(started.elapsed() >= Duration::from_secs(1));
    assert!(started.elapsed() < patience(60));
}

#[test]
fn a_backend_of_this_process_that_never_answers_is_given_up() {
    let (release, held) = std::sync::mpsc::channel::<()>();
    let held = Mutex::new(held);
    let started = Instant::now();
    let silent = BlockConfig::in_process(move |_| {
        // Not even when its stream is closed.
        let _ = held.lock().unwrap().recv();
        Ok(())
    });
    let error = build_with(silent).expect_err("a silent backend");
    assert!(error.contains("has not answered within"), "{error}");
    assert!(started.elapsed() < patience(60));
    drop(release);
}

#[test]
fn a_listener_for_events_that_panics_ends_its_vm() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.img");
    blank_image(&image).unwrap();
    for accel in accels().unwrap() {
        let vm = suite_vm("life.spin", accel).unwrap();
        let vm = vm
            .block(paravane_tests::disk(&image, &[]))
            .on_event(|_| panic!("in a listener"));
        let vm = vm.build().unwrap().run().unwrap();
        let daemon = vm.backend_pids()[0].to_string();
        let killed = Command::new("kill").args(["-9", &daemon]).status();
        assert!(killed.unwrap().success());
        let reason = vm.wait_timeout(patience(30)).expect("its end");
        assert!(
            matches!(&reason, ExitReason::Host(e) if e.to_string().contains("panicked")),
            "{accel}: {reason:?}"
        );
    }
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

/// A disk of this process, and how many of its backends run now.
fn counted_disk(image: &Path) -> (BlockConfig, Arc<AtomicU64>) {
    struct Running(Arc<AtomicU64>);
    impl Drop for Running {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::SeqCst);
        }
    }
    blank_image(image).unwrap();
    let device = block_device(image, false).unwrap();
    let running = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&running);
    let serve = move |stream| {
        count.fetch_add(1, Ordering::SeqCst);
        let _running = Running(Arc::clone(&count));
        session::serve(&*device, stream)
    };
    (
        BlockConfig::in_process(serve).queues(2).name("disk"),
        running,
    )
}

#[test]
fn a_backend_of_this_process_ends_with_its_vm() {
    for accel in accels().unwrap() {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("disk.img");
        let vm = |case: &str, disk| suite_vm(case, accel).unwrap().block(disk);
        let build = |case: &str| {
            let (disk, running) = counted_disk(&image);
            (vm(case, disk).build().unwrap(), running)
        };

        let (built, running) = build("block.identify");
        assert_eq!(running.load(Ordering::SeqCst), 1);
        drop(built);
        assert_eq!(running.load(Ordering::SeqCst), 0, "{accel}: never run");

        let (built, running) = build("block.identify");
        let handle = built.run().unwrap();
        let reason = handle.wait_timeout(patience(30)).expect("in time");
        assert_eq!(reason.code(), Some(0), "{reason}");
        assert_eq!(handle.backend_pids(), [0]);
        drop(handle);
        assert_eq!(running.load(Ordering::SeqCst), 0, "{accel}: at its end");

        let (built, running) = build("life.spin");
        let handle = built.run().unwrap();
        handle.stop();
        drop(handle);
        assert_eq!(running.load(Ordering::SeqCst), 0, "{accel}: stopped");

        // Another device cannot be had, so that there is no VM.
        let (disk, running) = counted_disk(&image);
        let bad = BlockConfig::in_process(|_| Err(std::io::Error::other("no disk")));
        vm("block.identify", disk).block(bad).build().unwrap_err();
        assert_eq!(running.load(Ordering::SeqCst), 0, "{accel}: not built");
    }
}

#[test]
fn a_backend_of_this_process_that_does_not_end_is_left_behind() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.img");
    blank_image(&image).unwrap();
    let device = block_device(&image, false).unwrap();
    let (release, held) = std::sync::mpsc::channel::<()>();
    let held = Mutex::new(held);
    let disk = BlockConfig::in_process(move |stream: UnixStream| {
        let outcome = session::serve(&*device, stream);
        // As one does whose file system hangs.
        let _ = held.lock().unwrap().recv();
        outcome
    });
    let accel = accels().unwrap().pop().unwrap();
    let vm = suite_vm("life.spin", accel).unwrap().block(disk);
    let vm = vm.build().unwrap().run().unwrap();
    let started = Instant::now();
    drop(vm);
    assert!(started.elapsed() < patience(10), "{:?}", started.elapsed());
    drop(release);
}

/// A disk that says all the time that it has another size, and has it.
struct Restless {
    disk: Arc<dyn Device>,
    reads: AtomicU64,
    link: Mutex<Option<Arc<FrontendLink>>>,
}

impl Device for Restless {
    fn queue_count(&self) -> u16 {
        self.disk.queue_count()
    }
    fn features(&self) -> u64 {
        self.disk.features()
    }
    fn config(&self) -> Vec<u8> {
        let mut config = self.disk.config();
        let reads = self.reads.fetch_add(1, Ordering::SeqCst);
        if let Some(lowest) = config.first_mut() {
            *lowest = lowest.wrapping_add(reads as u8);
        }
        config
    }
    fn set_frontend(&self, frontend: Option<Arc<FrontendLink>>) {
        *self.link.lock().unwrap() = frontend;
    }
    fn open_queue(&self, setup: QueueSetup) -> std::io::Result<Box<dyn QueueWorker>> {
        self.disk.open_queue(setup)
    }
}

#[test]
fn a_backend_that_changes_all_the_time_is_looked_at_now_and_then() {
    const PAUSE: Duration = Duration::from_millis(100);
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.img");
    blank_image(&image).unwrap();
    let disk = Arc::new(Restless {
        disk: block_device(&image, false).unwrap(),
        reads: AtomicU64::new(0),
        link: Mutex::new(None),
    });
    for accel in accels().unwrap() {
        let started = Instant::now();
        disk.reads.store(0, Ordering::SeqCst);
        let served = Arc::clone(&disk);
        let backend = BlockConfig::in_process(move |stream| session::serve(&*served, stream));
        let vm = suite_vm("life.spin", accel).unwrap().block(backend);
        let vm = vm.build().unwrap().run().unwrap();
        let link = disk.link.lock().unwrap().clone().expect("a channel");
        let over = AtomicBool::new(false);
        let told = std::thread::scope(|scope| {
            let flood = scope.spawn(|| {
                let mut told = 0;
                while !over.load(Ordering::SeqCst) {
                    link.config_changed().unwrap();
                    told += 1;
                }
                told
            });
            // The guest hears of changes, and everything else goes on.
            let deadline = Instant::now() + patience(30);
            while vm.stats().config_events < 10 {
                assert!(Instant::now() < deadline, "{:?}", vm.stats());
                vm.pause().unwrap();
                vm.resume().unwrap();
            }
            over.store(true, Ordering::SeqCst);
            flood.join().unwrap()
        });
        let (reads, events) = (disk.reads.load(Ordering::SeqCst), vm.stats().config_events);
        let most = started.elapsed().as_millis().div_ceil(PAUSE.as_millis()) as u64;
        println!("{accel}: {told} changes told, {reads} reads, {events} events, at most {most}");
        // And the ones of the handshake.
        assert!(reads <= most + 2 && events <= most + 2);
        assert_eq!(vm.stats().backend_losses, 0);
        vm.stop();
    }
}
