//! What a session says about the device beside its queues.

use super::support::net::{Buffer, CTRL, MRG, NetFront, TIMEOUT};
use super::support::raw;
use super::{BASE, MAC, PLAIN, device, frame};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use vhost_backends::net::port::{Loopback, Port};
use vhost_backends::net::{Drop, Frame, Inlet, Mac, NetDevice, NetOptions, Offloads};

#[test]
fn the_link_goes_down_and_up() {
    let device = device(Loopback::default());
    let mut front = NetFront::start(device.clone(), BASE, 2);
    assert!(front.offer_receive(0, 2048));
    let status = |front: &mut NetFront| {
        let ask = [6u32.to_le_bytes(), 2u32.to_le_bytes(), [0; 4]].concat();
        let reply = front.client.query(24, &[&ask[..], &[0; 2]].concat());
        u16::from_le_bytes([reply[12], reply[13]])
    };
    assert_eq!(status(&mut front), 1);
    device.set_link(false).unwrap();
    assert_eq!(status(&mut front), 0);
    front.send(1, &PLAIN, &frame(MAC, MAC, 60));
    assert_eq!(device.stats().snapshot().dropped(Drop::LinkDown), 1);
    device.set_link(true).unwrap();
    device.announce().unwrap();
    assert_eq!(status(&mut front), 3);
    front.send(1, &PLAIN, &frame(MAC, MAC, 60));
    assert_eq!(front.receive(0).1, frame(MAC, MAC, 60));
}

#[test]
fn qemus_order_of_messages() {
    let device = device(Loopback::default());
    let mut client = raw::Client::connect(device);
    // Queues are enabled before anything was negotiated, eight times.
    for round in 0..8u32 {
        client.send(18, 1, &raw::pair(round % 3, 1), &[]);
    }
    assert_ne!(client.query_u64(1), 0);
    let config = 1 << 9;
    let protocol = client.query_u64(15);
    assert_eq!(protocol & config, 0, "QEMU asks before SET_OWNER");
    client.send(16, 1, &protocol.to_ne_bytes(), &[]);
    client.send(3, 1, &[], &[]);
    assert_ne!(client.query_u64(15) & config, 0, "others ask after it");
    assert!(client.set(20, &1500u64.to_ne_bytes(), &[]), "an MTU");
    assert!(!client.set(20, &0u64.to_ne_bytes(), &[]), "none");
    assert!(
        client.set(19, &[0x52, 0x54, 0, 0, 0, 1, 0, 0], &[]),
        "announce"
    );
    assert!(!client.set(19, &[0; 6], &[]), "too short");
    assert!(client.set(39, &1u64.to_ne_bytes(), &[]), "a status");
    assert_eq!(client.query_u64(40), 1);
}

#[test]
fn a_status_of_zero_is_a_reset() {
    let device = device(Loopback::default());
    let mut front = NetFront::start(device, BASE | CTRL, 3);
    let mac = |front: &mut NetFront| {
        let ask = [0u32.to_le_bytes(), 6u32.to_le_bytes(), [0; 4]].concat();
        front.client.query(24, &[&ask[..], &[0; 6]].concat())[12..].to_vec()
    };
    let other = [0x52, 0x54, 0, 0, 0, 9];
    assert_eq!(front.command(2, &[&[1, 1], &other]), 0);
    assert!(front.client.set(39, &15u64.to_ne_bytes(), &[]));
    assert_eq!(mac(&mut front), other);
    assert!(front.client.set(39, &0u64.to_ne_bytes(), &[]));
    assert_eq!(mac(&mut front), MAC.0);
}

#[test]
fn who_announces_a_guest_keeps_to_its_link_and_limits() {
    let device = device(Loopback::default());
    let mut front = NetFront::start(device.clone(), BASE, 2);
    let mut announce = || {
        let mac = [0x52, 0x54, 0, 0, 0, 1, 0, 0];
        assert!(front.client.set(19, &mac, &[]));
        device.stats().snapshot()
    };
    let first = announce();
    assert_eq!(first.dropped(Drop::NoBuffer), 1, "it comes back");
    device.set_link(false).unwrap();
    let down = announce();
    assert_eq!(
        (down.dropped(Drop::LinkDown), down.dropped(Drop::NoBuffer)),
        (1, 1)
    );
    device.set_link(true).unwrap();
    let limits = vhost_backends::limit::Limits {
        iops: 1,
        ..Default::default()
    };
    device.limiter().set(limits);
    device.limiter().charge_many(1000, 0);
    let held = announce();
    assert_eq!(
        (held.dropped(Drop::Limited), held.dropped(Drop::NoBuffer)),
        (1, 1)
    );
}

#[test]
fn memory_that_can_be_cut_off_is_refused_where_others_depend_on_it() {
    for needed in [false, true] {
        let mut options = NetOptions::with_mac(MAC);
        options.sealed_memory = needed;
        let port = Arc::new(Loopback::default());
        let device = Arc::new(NetDevice::new(port, options));
        // It has brought sealed memory already.
        let mut front = NetFront::start(device, BASE, 2);
        let size = 1 << 20;
        let unsealed = tempfile::tempfile_in("/dev/shm").unwrap();
        unsealed.set_len(size).unwrap();
        let mut table = raw::pair(1, 0);
        table.extend(raw::words(&[0x4000_0000, size, 0x7f00_0000_0000, 0]));
        assert_eq!(front.client.set(5, &table, &[&unsealed]), !needed);
        assert!(front.client.set(5, &table, &[&raw::memory(size)]));
    }
}

/// The frontend's end of the device's own channel.
fn own_channel(front: &mut NetFront) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(TIMEOUT)).unwrap();
    let theirs = std::fs::File::from(std::os::fd::OwnedFd::from(theirs));
    assert!(front.client.set(21, &[], &[&theirs]));
    ours
}

/// Takes word of a change of configuration, and confirms it.
fn told(channel: &mut UnixStream) {
    let mut head = [0; 12];
    channel.read_exact(&mut head).unwrap();
    let [request, flags, size] =
        [0, 4, 8].map(|at| u32::from_ne_bytes(head[at..at + 4].try_into().unwrap()));
    assert_eq!((request, size), (2, 0), "a change of configuration");
    if flags & 8 != 0 {
        let reply: [u32; 5] = [request, 1 | 4, 8, 0, 0];
        let bytes = reply.map(u32::to_ne_bytes).concat();
        channel.write_all(&bytes).unwrap();
    }
}

fn status(front: &mut NetFront) -> u16 {
    let ask = [6u32.to_le_bytes(), 2u32.to_le_bytes(), [0; 4]].concat();
    let reply = front.client.query(24, &[&ask[..], &[0; 2]].concat());
    u16::from_le_bytes([reply[12], reply[13]])
}

#[test]
fn who_was_asked_to_announce_itself_is_not_asked_again() {
    let device = device(Loopback::default());
    let mut front = NetFront::start(device.clone(), BASE | CTRL, 3);
    let mut ours = own_channel(&mut front);
    for _ in 0..3 {
        let asked = device.clone();
        let asking = std::thread::spawn(move || asked.announce());
        told(&mut ours);
        asking.join().unwrap().unwrap();
        assert_eq!(status(&mut front), 3);
        // Acknowledged before the command comes back; the frontend is told after that.
        assert_eq!(front.command(2, &[&[3, 0]]), 0);
        assert_eq!(status(&mut front), 1);
        told(&mut ours);
        // Again: there is nothing to tell.
        assert_eq!(front.command(2, &[&[3, 0]]), 0);
    }
    drop(front);
    assert_eq!(ours.read(&mut [0]).unwrap(), 0, "something else was said");
}

/// A guest that was moved (`SEND_RARP`).
const MOVED: (u32, [u8; 8]) = (19, [0x52, 0x54, 0, 0, 0, 1, 0, 0]);

#[test]
fn a_guest_that_was_moved_is_announced_and_asked_to_do_so_itself() {
    const ANNOUNCE: u64 = 1 << 21;
    let device = device(Loopback::default());
    let announced = || device.stats().snapshot().dropped(Drop::NoBuffer);
    // No control queue to say that it is done, no such feature: it is not asked.
    for (features, queues) in [(BASE | CTRL, 2), (BASE | CTRL & !ANNOUNCE, 3)] {
        let before = announced();
        let mut front = NetFront::start(device.clone(), features, queues);
        assert!(front.client.set(MOVED.0, &MOVED.1, &[]));
        assert_eq!(status(&mut front), 1);
        assert_eq!(announced(), before + 1, "it came back and found no buffer");
    }
    for round in 0..3 {
        let mut front = NetFront::start(device.clone(), BASE | CTRL, 3);
        let mut ours = own_channel(&mut front);
        // What was asked for and not done before stays, and is no news.
        assert_eq!(status(&mut front), if round == 0 { 1 } else { 3 });
        for _ in 0..2 {
            let before = announced();
            assert!(front.client.set(MOVED.0, &MOVED.1, &[]));
            assert_eq!(status(&mut front), 3);
            assert_eq!(announced(), before + 1);
        }
        if round == 0 {
            // Once for both.
            told(&mut ours);
        }
        assert_eq!(front.command(2, &[&[3, 0]]), 0);
        assert_eq!(status(&mut front), 1);
        told(&mut ours);
        assert!(front.client.set(MOVED.0, &MOVED.1, &[]));
        told(&mut ours);
        assert_eq!(status(&mut front), 3);
        drop(front);
        assert_eq!(ours.read(&mut [0]).unwrap(), 0, "something else was said");
    }
}

#[test]
fn a_frontend_that_listens_to_nothing_has_one_thread_to_tell_it() {
    let device = device(Loopback::default());
    let mut front = NetFront::start(device.clone(), BASE | CTRL, 3);
    let mut ours = own_channel(&mut front);
    let tellers = || {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        let name = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("comm"));
        let names = tasks.map(|task| name(task.unwrap()).unwrap_or_default());
        names.filter(|name| name.trim() == "net-notice").count()
    };
    let mut most = 0;
    for _ in 0..50 {
        assert!(front.client.set(MOVED.0, &MOVED.1, &[]));
        assert_eq!(front.command(2, &[&[3, 0]]), 0);
        most = most.max(tellers());
    }
    // Those of other tests in this process have one each.
    assert!((1..=4).contains(&most), "{most} threads");
    // What was put together is told, in the end.
    told(&mut ours);
    told(&mut ours);
}

/// Panics at a frame that begins with a zero, and gives back all others.
#[derive(Debug, Default)]
struct Fragile(Loopback);

impl Port for Fragile {
    fn attach(&self, guest: &Arc<Inlet>, mac: Mac) {
        self.0.attach(guest, mac);
    }

    fn offloads(&self) -> Offloads {
        self.0.offloads()
    }

    fn send(&self, pair: u16, frames: &[Frame<'_>]) -> usize {
        if frames.iter().any(|frame| frame.destination().0[0] == 0) {
            // One that says nothing on standard error.
            std::panic::resume_unwind(Box::new("as the test wants"));
        }
        self.0.send(pair, frames)
    }
}

#[test]
fn a_queue_that_panics_ends_its_session_and_no_more() {
    let device = device(Fragile::default());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("net.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let server = vhost_backends::session::Server::spawn(device.clone(), listener).unwrap();
    for _ in 0..3 {
        let stream = UnixStream::connect(&path).unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        let mut front = NetFront::on(raw::Client::over(stream), BASE | MRG, 2);
        assert!(front.offer_receive(0, 2048));
        front.send(1, &PLAIN, &frame(MAC, MAC, 100));
        assert_eq!(front.receive(0).1, frame(MAC, MAC, 100));
        let fatal = [&PLAIN[..], &[0; 60]].concat();
        let at = front.place(fatal.len());
        front.memory.fill(at, &fatal);
        let len = fatal.len() as u32;
        let buffer = Buffer {
            at,
            len,
            writable: false,
        };
        front.offer(1, &[buffer]).unwrap();
        front.kick(1);
        // The frontend hears of it by the end of the connection, not by silence.
        assert_eq!(front.client.stream.read(&mut [0]).unwrap(), 0);
    }
    server.stop().unwrap();
}

#[test]
fn frames_in_flight_are_not_logged() {
    let mut client = raw::Client::connect(device(Loopback::default()));
    client.send(3, 1, &[], &[]);
    let inflight = 1 << 12;
    assert_eq!(client.query_u64(15) & inflight, 0);
}
