//! What real frontends say, replayed. A file of `tests/recorded` has a message a line: who sends
//! it (`>` the frontend), request, flags, payload in hexadecimal or `-`, kinds of descriptors. Those of
//! Cloud Hypervisor, Firecracker and crosvm were not heard, but written down as their sources have them.

mod support {
    pub(crate) mod process;
    pub(crate) mod raw;
}

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use support::process::{Daemon, blkd};
use support::raw::{Client, Counting, LOG_ALL, PACKED, PROTOCOL, event, memory};
use vhost_backends::session::SessionEnd;

/// Bytes of a file of memory: more than any recorded region needs; never touched.
const MEMORY: u64 = 256 << 20;
const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const GET_VRING_BASE: u32 = 11;
const SET_STATUS: u32 = 39;

#[derive(Debug)]
struct Said {
    frontend: bool,
    request: u32,
    flags: u32,
    payload: Vec<u8>,
    kinds: Vec<String>,
}

fn parse(text: &str) -> Vec<Said> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let hex = fields[3].trim_start_matches('-');
            let payload = (0..hex.len() / 2)
                .map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap())
                .collect();
            Said {
                frontend: fields[0] == ">",
                request: fields[1].parse().unwrap(),
                flags: fields[2].parse().unwrap(),
                payload,
                kinds: fields[4..].iter().map(|kind| kind.to_string()).collect(),
            }
        })
        .collect()
}

fn first_word(payload: &[u8]) -> u64 {
    u64::from_ne_bytes(payload[..8].try_into().unwrap())
}

/// Says one message, with descriptors of the recorded kinds; the other ends are kept.
fn say(client: &Client, message: &Said, kept: &mut Vec<UnixStream>) {
    let files: Vec<File> = message
        .kinds
        .iter()
        .map(|kind| match kind.as_str() {
            "memory" => memory(MEMORY),
            "event" => event(),
            _ => {
                let (ours, theirs) = UnixStream::pair().unwrap();
                kept.push(ours);
                File::from(OwnedFd::from(theirs))
            }
        })
        .collect();
    let fds: Vec<&File> = files.iter().collect();
    client.send(message.request, message.flags, &message.payload, &fds);
}

/// Says what the frontend said. Every answer has the recorded shape, acknowledgements say the
/// same, and at its best `queues` queues run.
fn replay(text: &str, queues: usize) {
    let said = parse(text);
    let offered = said
        .iter()
        .find(|s| !s.frontend && s.request == GET_FEATURES);
    let device = Arc::new(Counting {
        more_features: first_word(&offered.unwrap().payload) & !(PROTOCOL | PACKED | LOG_ALL),
        ..Counting::default()
    });
    let mut client = Client::connect(device.clone());
    let mut most = 0;
    let mut kept = Vec::new();
    let mut accepted = 0;
    for (n, message) in said.iter().enumerate() {
        if message.frontend {
            say(&client, message, &mut kept);
            if message.request == SET_FEATURES {
                accepted = first_word(&message.payload);
            }
            continue;
        }
        let (request, _, payload) = client.receive().expect("the session hung up");
        assert_eq!(request, message.request, "message {n}");
        assert_eq!(
            payload.len(),
            message.payload.len(),
            "{request}, message {n}"
        );
        if payload.len() == 8 && message.payload == [0; 8] && request != GET_VRING_BASE {
            assert_eq!(payload, [0; 8], "{request}, message {n}");
        }
        // An answer says that all before it was dealt with.
        most = most.max(device.running());
    }
    // As SET_STATUS zero, disable and GET_VRING_BASE end it, nothing runs; or it runs until the
    // hang-up.
    let ended = said
        .iter()
        .any(|s| s.request == GET_VRING_BASE || s.request == SET_STATUS);
    client.query_u64(17);
    most = most.max(device.running());
    assert_eq!(device.running(), if ended { 0 } else { queues });
    assert!(most == queues || device.opened.load(Ordering::SeqCst) >= queues);
    assert_eq!(device.last.lock().unwrap().unwrap().2, accepted);
    assert_eq!(client.close(), SessionEnd::HangUp);
    assert_eq!(device.running(), 0);
}

#[test]
fn qemu_blk() {
    replay(include_str!("recorded/qemu-blk.txt"), 1);
}

#[test]
fn qemu_net() {
    replay(include_str!("recorded/qemu-net.txt"), 2);
}

#[test]
fn virtio_driver() {
    replay(include_str!("recorded/virtio-driver.txt"), 1);
}

#[test]
fn vmm_core() {
    replay(include_str!("recorded/vmm-core.txt"), 1);
}

#[test]
fn cloud_hypervisor() {
    replay(include_str!("recorded/cloud-hypervisor.txt"), 2);
    replay(include_str!("recorded/cloud-hypervisor-again.txt"), 2);
}

#[test]
fn firecracker() {
    replay(include_str!("recorded/firecracker.txt"), 1);
}

#[test]
fn crosvm() {
    replay(include_str!("recorded/crosvm.txt"), 1);
}

/// The program that is run, in its sandbox: whatever the answers make it do, its filter knows. A
/// second connection is served as the first.
#[test]
fn the_daemon_in_its_sandbox_answers_all_of_them() {
    for text in [
        include_str!("recorded/qemu-blk.txt"),
        include_str!("recorded/qemu-net.txt"),
        include_str!("recorded/virtio-driver.txt"),
        include_str!("recorded/vmm-core.txt"),
        include_str!("recorded/cloud-hypervisor.txt"),
        include_str!("recorded/cloud-hypervisor-again.txt"),
        include_str!("recorded/firecracker.txt"),
        include_str!("recorded/crosvm.txt"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("blk.sock");
        let mut daemon = Daemon::quiet(blkd().arg("--socket-path").arg(&socket).args([
            "--memory",
            "8M",
            "--num-queues",
            "2",
        ]));
        for _ in 0..2 {
            let mut client = Client::over(daemon.connect(&socket));
            let mut kept = Vec::new();
            for (n, message) in parse(text).iter().enumerate() {
                if message.frontend {
                    say(&client, message, &mut kept);
                    continue;
                }
                let Some((request, _, _)) = client.receive() else {
                    panic!("message {n}: {:?}", daemon.wait_status());
                };
                assert_eq!(request, message.request, "message {n}");
            }
            assert_eq!(client.query_u64(17), 2);
        }
        assert!(daemon.ended().is_none());
    }
}
