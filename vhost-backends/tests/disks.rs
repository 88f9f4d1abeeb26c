//! Every kind of disk that the daemon serves, in its sandbox.

mod support;

use support::nbd::NbdServer;
use support::process::{Daemon, blkd};
use support::{FEATURES, Frontend, pattern};

const MIB: usize = 1 << 20;

/// Requests of every kind, from two frontends in turn.
fn verified(arguments: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("blk.sock");
    let _daemon = Daemon::quiet(blkd().args(arguments).arg("--socket-path").arg(&socket));
    for round in 0..2u64 {
        let mut front = Frontend::connect(&socket, FEATURES, 1, 64, MIB);
        for i in 0..32u64 {
            let data = pattern(i + round, 65536);
            assert_eq!(front.write_sync(0, i * 131_072, &data), 0);
        }
        front.queues[0].flush(1).unwrap();
        front.queues[0].discard(65536, 65536, 2).unwrap();
        front.queues[0].write_zeroes(0, 65536, true, 3).unwrap();
        front.queues[0]
            .write_zeroes(131_072, 4096, false, 4)
            .unwrap();
        front.kick(0);
        for _ in 0..4 {
            assert_eq!(front.complete(0).1, 0, "{arguments:?}");
        }
        assert!(front.read_sync(0, 0, 65536) == (0, vec![0; 65536]));
        assert!(front.read_sync(0, 131_072, 4096) == (0, vec![0; 4096]));
        for i in 2..32u64 {
            let expected = (0, pattern(i + round, 65536));
            assert!(front.read_sync(0, i * 131_072, 65536) == expected);
        }
    }
}

#[test]
fn in_memory() {
    verified(&["--memory", "8M"]);
}

#[test]
fn images_and_overlays() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.img");
    std::fs::write(&base, pattern(1, 8 * MIB)).unwrap();
    let before = std::fs::read(&base).unwrap();
    let overlay = dir.path().join("overlay.qcow2");
    let (base, overlay) = (base.to_str().unwrap(), overlay.to_str().unwrap());
    // Made, then found.
    for _ in 0..2 {
        verified(&["--blk-file", base, "--overlay", overlay]);
    }
    verified(&["--blk-file", overlay, "--format", "qcow2"]);
    verified(&["--blk-file", overlay, "--format", "qcow2", "--direct"]);
    assert!(
        std::fs::read(base).unwrap() == before,
        "the base is as it was"
    );
    verified(&["--blk-file", base, "--direct"]);
    verified(&["--blk-file", base]);
}

#[test]
fn on_an_nbd_server() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("nbd.sock");
    let at = socket.to_str().unwrap();
    let Some(_server) = NbdServer::start("nbdkit", &["-f", "-U", at, "memory", "8M"], &socket)
    else {
        return;
    };
    verified(&["--nbd", &format!("unix:{}", socket.display())]);
}

/// What was acknowledged is there for whoever serves the image next, flushed or not: a guest does not
/// hear of a daemon that is killed and started again.
#[test]
fn a_qcow2_image_loses_nothing_with_its_daemon() {
    for killed in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("base"), pattern(1, 8 * MIB)).unwrap();
        let start = || {
            let mut command = blkd();
            command.arg("--blk-file").arg(at("base"));
            command.arg("--overlay").arg(at("overlay"));
            Daemon::start(command.arg("--socket-path").arg(at("blk.sock")))
        };
        for round in 0..3u64 {
            let mut daemon = start();
            let mut front = Frontend::connect(&at("blk.sock"), FEATURES, 1, 64, MIB);
            for i in 0..64u64 {
                if round > 0 {
                    let before = front.read_sync(0, i * 131_072, 4096);
                    assert!(
                        before == (0, pattern(round * 100 - 100 + i, 4096)),
                        "killed: {killed}, round {round}, block {i}"
                    );
                }
                let data = pattern(round * 100 + i, 4096);
                assert_eq!(front.write_sync(0, i * 131_072, &data), 0);
            }
            if killed {
                daemon.kill();
            } else {
                drop(front);
                assert_eq!(daemon.end().0, Some(0));
            }
        }
    }
}
