//! NBD servers that go away: requests wait, are sent again in their order, and fail after their time.

mod support;

#[path = "support/front.rs"]
mod front;
#[path = "support/raw.rs"]
mod raw;

use front::{BLOCK, DATA, Front, Op};
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use support::load::Verified;
use support::nbd::NbdServer;
use support::process::{Daemon, TIMEOUT, blkd, stats};
use support::{FEATURES, Frontend, pattern, serve_store};
use vhost_backends::engine::NbdStore;

const MIB: usize = 1 << 20;

/// `pv-blkd`, in its sandbox, on the server at `nbd`.
fn daemon(folder: &Path, nbd: &Path, more: &[&str]) -> Daemon {
    let mut command = blkd();
    command.arg("--nbd").arg(format!("unix:{}", nbd.display()));
    command.arg("--socket-path").arg(folder.join("blk.sock"));
    command.arg("--stats-socket").arg(folder.join("stats"));
    Daemon::start(command.args(more))
}

#[test]
fn a_server_that_comes_back_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (nbd, image) = (folder.path().join("nbd"), folder.path().join("image"));
    std::fs::write(&image, vec![0; 16 * MIB]).unwrap();
    let Some(mut server) = NbdServer::nbdkit(&nbd, &image) else {
        return;
    };
    let daemon = daemon(folder.path(), &nbd, &["--num-queues", "2"]);
    let socket = folder.path().join("blk.sock");
    let mut front = Frontend::connect(&socket, FEATURES, 2, 64, MIB);
    let mut load = Verified::new();
    load.round(&mut front);
    let fds = daemon.fds();
    let done = AtomicBool::new(false);
    let (over, ended) = std::sync::mpsc::channel::<()>();
    std::thread::scope(|scope| {
        let (done, server, nbd, image) = (&done, &mut server, &nbd, &image);
        scope.spawn(move || {
            for round in 0..6 {
                std::thread::sleep(Duration::from_millis(100));
                server.0.kill().unwrap();
                server.0.wait().unwrap();
                std::thread::sleep(Duration::from_millis(50 * round));
                *server = NbdServer::nbdkit(nbd, image).unwrap();
            }
            done.store(true, Ordering::SeqCst);
            // nbdkit ends with the thread that started it.
            let _ = ended.recv_timeout(TIMEOUT);
        });
        while !done.load(Ordering::SeqCst) {
            load.round(&mut front);
        }
        load.round(&mut front);
        drop(over);
    });
    let errors = stats(&folder.path().join("stats"))["disks"][0]["errors"].clone();
    for (class, count) in errors.as_object().unwrap() {
        assert_eq!(*count, 0, "{class}");
    }
    println!(
        "{} writes and {} reads verified over 6 losses",
        load.written, load.read
    );
    // Lost while nothing is asked of it: that costs nothing, and is made good with the next.
    drop(server);
    std::thread::sleep(Duration::from_millis(100));
    let ticks = || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", daemon.0.id())).unwrap();
        let rest = stat.rsplit_once(')').unwrap().1;
        let fields = rest.split_whitespace().skip(11).take(2);
        fields
            .map(|field| field.parse::<u64>().unwrap())
            .sum::<u64>()
    };
    let before = ticks();
    std::thread::sleep(Duration::from_millis(500));
    assert!(ticks() - before <= 2, "it spins");
    let server = NbdServer::nbdkit(&nbd, &image).unwrap();
    load.round(&mut front);
    daemon.wait_for_fds(fds);
    drop(front);
    let (code, said) = daemon.end();
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("answers again"), "{said}");
    drop(server);
}

#[test]
fn after_its_time_a_request_fails_and_later_ones_do_not() {
    let folder = tempfile::tempdir().unwrap();
    let (nbd, image) = (folder.path().join("nbd"), folder.path().join("image"));
    std::fs::write(&image, vec![0; MIB]).unwrap();
    for patience in ["1", "0"] {
        let Some(server) = NbdServer::nbdkit(&nbd, &image) else {
            return;
        };
        let daemon = daemon(folder.path(), &nbd, &["--nbd-retry", patience]);
        let mut front = Frontend::connect(&folder.path().join("blk.sock"), FEATURES, 1, 64, MIB);
        assert_eq!(front.write_sync(0, 0, &pattern(1, 4096)), 0);
        drop(server);
        let start = Instant::now();
        assert_ne!(front.read_sync(0, 0, 4096).0, 0);
        let took = start.elapsed();
        assert_eq!(
            took >= Duration::from_millis(900),
            patience == "1",
            "{took:?}"
        );
        assert_ne!(front.read_sync(0, 0, 4096).0, 0);
        if patience == "1" {
            let _server = NbdServer::nbdkit(&nbd, &image).unwrap();
            let deadline = Instant::now() + TIMEOUT;
            while front.read_sync(0, 0, 4096) != (0, pattern(1, 4096)) {
                assert!(Instant::now() < deadline, "it does not come back");
            }
        }
        drop(front);
        assert_eq!(daemon.end().0, Some(0));
    }
}

/// Without a log to leave it in, what waits is waited for, and no longer than a request waits at all.
#[test]
fn a_stop_waits_for_a_lost_server_as_long_as_a_request_does() {
    let folder = tempfile::tempdir().unwrap();
    let (nbd, image) = (folder.path().join("nbd"), folder.path().join("image"));
    std::fs::write(&image, vec![0; MIB]).unwrap();
    let Some(server) = NbdServer::nbdkit(&nbd, &image) else {
        return;
    };
    let daemon = daemon(folder.path(), &nbd, &["--nbd-retry", "1"]);
    let mut front = Frontend::connect(&folder.path().join("blk.sock"), FEATURES, 1, 64, MIB);
    assert_eq!(front.write_sync(0, 0, &pattern(1, 4096)), 0);
    drop(server);
    front.read(0, 0, 0, 4096, 3);
    front.kick(0);
    std::thread::sleep(Duration::from_millis(300));
    assert!(front.queues[0].completions().next().is_none(), "it waits");
    // The harness's own limit is what this must keep to.
    assert_eq!(daemon.end().0, Some(0));
    assert_ne!(front.complete(0), (3, 0));
}

/// A frontend with an in-flight log on a daemon whose server is lost, and a write that waits.
fn waiting(folder: &Path, packed: bool) -> Option<(Front, Daemon)> {
    let (nbd, image) = (folder.join("nbd"), folder.join("image"));
    std::fs::write(&image, vec![0; MIB]).unwrap();
    let server = NbdServer::nbdkit(&nbd, &image)?;
    let daemon = daemon(folder, &nbd, &[]);
    let mut front = Front::new(64, packed, true);
    front.connect(&folder.join("blk.sock"));
    front.negotiate(true).unwrap();
    front.start(front.base).unwrap();
    front.submit(0, Op::Flush, 0);
    front.notify();
    front.settle(1);
    drop(server);
    front.memory.fill(DATA + BLOCK, &pattern(5, BLOCK as usize));
    front.submit(1, Op::Write, 8);
    front.submit(2, Op::Flush, 0);
    front.notify();
    std::thread::sleep(Duration::from_millis(300));
    assert!(front.reap().is_empty(), "it waits");
    Some((front, daemon))
}

#[test]
fn a_ring_is_not_stopped_with_errors_while_its_server_may_come_back() {
    let folder = tempfile::tempdir().unwrap();
    let Some((mut front, daemon)) = waiting(folder.path(), false) else {
        return;
    };
    let (nbd, image) = (folder.path().join("nbd"), folder.path().join("image"));
    std::thread::scope(|scope| {
        let (over, ended) = std::sync::mpsc::channel::<()>();
        scope.spawn(move || {
            // Longer than a stop used to wait.
            std::thread::sleep(Duration::from_secs(3));
            let server = NbdServer::nbdkit(&nbd, &image);
            // nbdkit ends with the thread that started it.
            let _ = ended.recv_timeout(TIMEOUT);
            drop(server);
        });
        front.stop().unwrap();
        // With what the stop has drained, and without an error.
        assert_eq!(front.reap().len(), 2);
        drop(over);
    });
    let written = std::fs::read(folder.path().join("image")).unwrap();
    assert!(written[4096..8192] == pattern(5, BLOCK as usize));
    drop(front);
    assert_eq!(daemon.end().0, Some(0));
}

#[test]
fn what_waits_for_a_lost_server_stays_in_the_log() {
    for packed in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let Some((mut front, first)) = waiting(folder.path(), packed) else {
            return;
        };
        assert_eq!(first.end().0, Some(0));
        assert!(front.reap().is_empty(), "neither done nor failed");
        let (nbd, image) = (folder.path().join("nbd"), folder.path().join("image"));
        let server = NbdServer::nbdkit(&nbd, &image).unwrap();
        let second = daemon(folder.path(), &nbd, &[]);
        front.connect(&folder.path().join("blk.sock"));
        front.negotiate(true).unwrap();
        front.start(front.forgetful_base()).unwrap();
        front.settle(2);
        let written = std::fs::read(&image).unwrap();
        assert!(written[4096..8192] == pattern(5, BLOCK as usize));
        // A frontend that hangs up, and comes back to the same daemon.
        drop(server);
        front
            .memory
            .fill(DATA + 3 * BLOCK, &pattern(6, BLOCK as usize));
        front.submit(3, Op::Write, 16);
        front.notify();
        std::thread::sleep(Duration::from_millis(300));
        assert!(front.reap().is_empty(), "it waits");
        front.connect(&folder.path().join("blk.sock"));
        front.negotiate(true).unwrap();
        front.start(front.forgetful_base()).unwrap();
        let _server = NbdServer::nbdkit(&nbd, &image).unwrap();
        front.settle(1);
        let written = std::fs::read(&image).unwrap();
        assert!(written[8192..12288] == pattern(6, BLOCK as usize));
        drop(front);
        assert_eq!(second.end().0, Some(0));
    }
}

/// A server that takes requests, answers some, and hangs up.
struct Fickle {
    /// What each connection was sent.
    heard: Arc<Mutex<Vec<Heard>>>,
}

/// Commands and offsets.
type Heard = Vec<(u16, u64)>;

impl Fickle {
    /// Answers as many requests of the first connection, the others with `error` or not at all, and
    /// all of the second.
    fn serve(
        listener: UnixListener,
        requests: usize,
        answered: usize,
        error: Option<u32>,
    ) -> Fickle {
        let heard = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&heard);
        std::thread::spawn(move || {
            for (round, stream) in listener.incoming().enumerate() {
                let mut stream = stream.unwrap();
                if greet(&mut stream).is_err() {
                    return;
                }
                log.lock().unwrap().push(Vec::new());
                let mut taken = 0;
                while let Ok(request) = take(&mut stream) {
                    taken += 1;
                    let (command, cookie, offset, len) = request;
                    log.lock().unwrap()[round].push((command, offset));
                    let error = if round > 0 || taken <= answered {
                        Some(0)
                    } else {
                        error
                    };
                    if let Some(error) = error {
                        let mut reply = 0x6744_6698u32.to_be_bytes().to_vec();
                        reply.extend(error.to_be_bytes());
                        reply.extend(cookie.to_be_bytes());
                        if command == 0 && error == 0 {
                            reply.extend(vec![7; len as usize]);
                        }
                        stream.write_all(&reply).unwrap();
                    }
                    if round == 0 && taken == requests {
                        break;
                    }
                }
            }
        });
        Fickle { heard }
    }
}

fn greet(stream: &mut UnixStream) -> io::Result<()> {
    let mut hello = 0x4e42_444d_4147_4943u64.to_be_bytes().to_vec();
    hello.extend(0x4948_4156_454f_5054u64.to_be_bytes());
    hello.extend(3u16.to_be_bytes());
    stream.write_all(&hello)?;
    let mut head = [0; 4 + 16];
    stream.read_exact(&mut head)?;
    let len = u32::from_be_bytes(head[16..].try_into().unwrap());
    stream.read_exact(&mut vec![0; len as usize])?;
    let reply = |kind: u32, data: &[u8]| {
        let mut bytes = 0x0003_e889_0455_65a9u64.to_be_bytes().to_vec();
        for word in [7, kind, data.len() as u32] {
            bytes.extend(word.to_be_bytes());
        }
        bytes.extend(data);
        bytes
    };
    let mut export = 0u16.to_be_bytes().to_vec();
    export.extend((MIB as u64).to_be_bytes());
    // Flags are there, flush, trim, and several connections.
    export.extend((1u16 | 1 << 2 | 1 << 5 | 1 << 8).to_be_bytes());
    stream.write_all(&[reply(3, &export), reply(1, &[])].concat())
}

/// Command, cookie, offset and length; data is read and forgotten.
fn take(stream: &mut UnixStream) -> io::Result<(u16, u64, u64, u32)> {
    let mut head = [0; 28];
    stream.read_exact(&mut head)?;
    let command = u16::from_be_bytes(head[6..8].try_into().unwrap());
    let word = |at: usize| u64::from_be_bytes(head[at..at + 8].try_into().unwrap());
    let len = u32::from_be_bytes(head[24..].try_into().unwrap());
    if command == 1 {
        if len > 1 << 18 {
            // The socket is full by then, and an earlier answer has been seen.
            std::thread::sleep(Duration::from_millis(100));
        }
        stream.read_exact(&mut vec![0; len as usize])?;
    }
    Ok((command, word(8), word(16), len))
}

/// What the server at `path` has, which is dialled again when it goes.
fn redialling(path: &Path) -> NbdStore {
    let address = format!("unix:{}", path.display()).parse().unwrap();
    let store = NbdStore::connect(address, 1, false).unwrap();
    let path = path.to_owned();
    store.redialling(move || UnixStream::connect(&path), TIMEOUT)
}

#[test]
fn an_answer_may_come_while_a_later_writes_data_is_on_its_way() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("nbd");
    let fickle = Fickle::serve(UnixListener::bind(&path).unwrap(), 9, 9, None);
    let (socket, server, device) = serve_store(folder.path(), Arc::new(redialling(&path)), 1);
    let mut front = Frontend::connect(&socket, FEATURES, 1, 64, MIB);
    front.read(0, 0, 0, 4096, 0);
    front.write(0, 65536, 65536, 768 << 10, 1);
    front.kick(0);
    let mut done = [front.complete(0), front.complete(0)];
    done.sort_unstable();
    assert_eq!(done, [(0, 0), (1, 0)]);
    // On one connection, and each once.
    assert_eq!(*fickle.heard.lock().unwrap(), [[(0, 0), (1, 65536)]]);
    drop(front);
    server.stop().unwrap();
    assert_eq!(device.stats().host_errors, 0);
}

#[test]
fn what_a_server_refuses_because_it_goes_waits_for_the_next() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("nbd");
    let fickle = Fickle::serve(UnixListener::bind(&path).unwrap(), 1, 0, Some(108));
    let (socket, server, device) = serve_store(folder.path(), Arc::new(redialling(&path)), 1);
    let mut front = Frontend::connect(&socket, FEATURES, 1, 64, MIB);
    assert_eq!(front.write_sync(0, 0, &pattern(1, 4096)), 0);
    assert_eq!(*fickle.heard.lock().unwrap(), [[(1, 0)], [(1, 0)]]);
    drop(front);
    server.stop().unwrap();
    assert_eq!(device.stats().host_errors, 0);
}

#[test]
fn a_server_that_was_long_gone_while_nothing_was_asked_is_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let (nbd, image) = (folder.path().join("nbd"), folder.path().join("image"));
    std::fs::write(&image, vec![0; MIB]).unwrap();
    let Some(server) = NbdServer::nbdkit(&nbd, &image) else {
        return;
    };
    let daemon = daemon(folder.path(), &nbd, &["--nbd-retry", "5"]);
    let mut front = Frontend::connect(&folder.path().join("blk.sock"), FEATURES, 1, 64, MIB);
    assert_eq!(front.write_sync(0, 0, &pattern(1, 4096)), 0);
    drop(server);
    std::thread::sleep(Duration::from_millis(5500));
    let _server = NbdServer::nbdkit(&nbd, &image).unwrap();
    assert_eq!(front.read_sync(0, 0, 4096), (0, pattern(1, 4096)));
    drop(front);
    assert_eq!(daemon.end().0, Some(0));
}

#[test]
fn what_was_not_answered_is_sent_again_in_its_order() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("nbd");
    let fickle = Fickle::serve(UnixListener::bind(&path).unwrap(), 6, 2, None);
    let (socket, server, device) = serve_store(folder.path(), Arc::new(redialling(&path)), 1);
    let mut front = Frontend::connect(&socket, FEATURES, 1, 64, MIB);
    for slot in [0, 1, 2] {
        front.write(0, 8192 * slot as u64, 4096 * slot, 4096, slot);
    }
    front.queues[0].flush(3).unwrap();
    front.read(0, 65536, 4096 * 4, 4096, 4);
    front.queues[0].discard(131_072, 4096, 5).unwrap();
    front.kick(0);
    let mut done: Vec<(usize, i32)> = (0..6).map(|_| front.complete(0)).collect();
    done.sort_unstable();
    assert_eq!(done, (0..6).map(|slot| (slot, 0)).collect::<Vec<_>>());
    assert_eq!(front.bytes(4096 * 4, 4096), vec![7; 4096]);
    let heard = fickle.heard.lock().unwrap().clone();
    let all = [
        (1, 0),
        (1, 8192),
        (1, 16384),
        (3, 0),
        (0, 65536),
        (4, 131_072),
    ];
    assert_eq!(heard, [all.to_vec(), all[2..].to_vec()]);
    drop(front);
    server.stop().unwrap();
    assert_eq!(device.stats().host_errors, 0);
}

/// One disk's server that says nothing more, and whose requests cannot be left in a log.
#[test]
fn a_silent_server_holds_an_upgrade_up_for_a_moment() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let listener = UnixListener::bind(at("nbd")).unwrap();
    std::thread::spawn(move || {
        let mut silent = Vec::new();
        for mut stream in listener.incoming().flatten() {
            let _ = greet(&mut stream);
            silent.push(stream);
        }
    });
    let start = |take_over: bool| {
        let mut command = blkd();
        for (name, what) in [
            ("one", "null=1M".to_owned()),
            ("two", format!("nbd=unix:{}", at("nbd").display())),
        ] {
            let socket = at(name);
            command
                .arg("--disk")
                .arg(format!("socket={},{what}", socket.display()));
        }
        command.arg("--control-socket").arg(at("control"));
        if take_over {
            command.arg("--take-over").arg(at("control"));
        }
        Daemon::start(&mut command)
    };
    let daemon = start(false);
    let mut null = Frontend::connect(&at("one"), FEATURES, 1, 64, MIB);
    let mut front = Frontend::connect(&at("two"), FEATURES, 1, 64, MIB);
    front.read(0, 0, 0, 4096, 3);
    front.kick(0);
    let asked = Instant::now();
    let next = start(true);
    let (code, said) = next.wait();
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("hung up"), "{said}");
    assert_eq!(null.write_sync(0, 0, &pattern(1, 512)), 0);
    let took = asked.elapsed();
    assert!(took < Duration::from_secs(8), "held up: {took:?}");
    // One that does not even greet any more holds up whoever asks, and no disk.
    std::fs::remove_file(at("nbd")).unwrap();
    let _mute = UnixListener::bind(at("nbd")).unwrap();
    let asked = Instant::now();
    let (code, said) = start(true).wait();
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("does not answer in time"), "{said}");
    let took = asked.elapsed();
    assert!(took < Duration::from_secs(8), "held up: {took:?}");
    drop((null, front));
    daemon.signal(libc::SIGKILL);
    let (_, said) = daemon.wait();
    assert!(said.contains("disk1 did not stop in time"), "{said}");
}
