//! A stream socket as the port, and a peer that reads no more.

use super::support::net::{NetFront, TIMEOUT};
use super::{BASE, MAC, PLAIN, device, frame};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vhost_backends::net::port::{Stream, StreamAddress};
use vhost_backends::net::{Drop, NetDevice};

fn streamed() -> (Arc<NetDevice>, NetFront, UnixStream) {
    let (ours, peer) = UnixStream::pair().unwrap();
    peer.set_read_timeout(Some(TIMEOUT)).unwrap();
    let device = device(Stream::new(StreamAddress::Connected(ours)).unwrap());
    let front = NetFront::start(device.clone(), BASE, 2);
    (device, front, peer)
}

/// Sends until the peer's backlog is full.
fn overfill(device: &NetDevice, front: &mut NetFront) {
    while device.stats().snapshot().dropped(Drop::PortFull) == 0 {
        front.send(1, &PLAIN, &frame(MAC, MAC, 1500));
    }
}

#[test]
fn a_stream_whose_peer_reads_no_more_is_given_up() {
    for full in [false, true] {
        let (device, mut front, mut peer) = streamed();
        assert!(front.offer_receive(0, 2048));
        if full {
            overfill(&device, &mut front);
        }
        peer.shutdown(Shutdown::Read).unwrap();
        front.send(1, &PLAIN, &frame(MAC, MAC, 1500));
        let deadline = Instant::now() + TIMEOUT;
        while peer.write(&[0]).is_ok() {
            assert!(Instant::now() < deadline, "the connection goes on");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

#[test]
fn what_waits_for_a_streams_peer_goes_on_without_receive_buffers() {
    let (device, mut front, mut peer) = streamed();
    // It comes to a guest without a buffer.
    let hello = frame(MAC, MAC, 60);
    peer.write_all(&[&60u32.to_be_bytes()[..], &hello].concat())
        .unwrap();
    overfill(&device, &mut front);
    let sent = device.stats().snapshot().sent_frames;
    let mut all = vec![0; sent as usize * 1504];
    peer.read_exact(&mut all).unwrap();
    let each = [&1500u32.to_be_bytes()[..], &frame(MAC, MAC, 1500)].concat();
    assert!(all.chunks(1504).all(|got| got == each));
    assert!(front.offer_receive(0, 2048));
    front.kick(0);
    assert_eq!(front.receive(0).1, hello);
}
