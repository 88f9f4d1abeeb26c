//! Two drivers, two hosts with a wire between them, and network stacks on both ends.

use super::*;
use crate::net::{EmbassyDevice, SmolDevice};
use crate::platform::Platform;
use alloc::vec;
use core::task::{Context, Waker};
use embassy_net_driver::{Driver, HardwareAddress, LinkState, RxToken as _, TxToken as _};
use pv_abi::virtio::net::{gso, header_flag, status};
use smoltcp::iface::{Config, Interface, SocketSet};
use smoltcp::phy::Device;
use smoltcp::socket::tcp;
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, IpAddress, IpCidr};

/// Takes what one host was sent to the other; whether anything was. A frame of which the checksum is
/// left undone stays so: there is no wire.
fn carry(from: &Fake, to: &Fake) -> usize {
    let sent = core::mem::take(&mut from.host().card.sent);
    let count = sent.len();
    for (header, data) in sent {
        deliver(
            to,
            Delivery {
                header,
                ..Delivery::honest(&data)
            },
        );
    }
    count
}

struct End {
    fake: &'static Fake,
    device: SmolDevice<Fake>,
    interface: Interface,
    sockets: SocketSet<'static>,
    socket: smoltcp::iface::SocketHandle,
}

fn end(features: u64, last: u8) -> End {
    let (fake, receiver, transmitter) = card(features);
    let mut device = SmolDevice::new(receiver, transmitter);
    let address = EthernetAddress([2, 0, 0, 0, 0, last]);
    let mut interface = Interface::new(Config::new(address.into()), &mut device, Instant::ZERO);
    interface.update_ip_addrs(|addresses| {
        let own = IpCidr::new(IpAddress::v4(10, 0, 0, last), 24);
        addresses.push(own).expect("room for one");
    });
    let buffer = || tcp::SocketBuffer::new(vec![0; 200_000]);
    let mut sockets = SocketSet::new(vec![]);
    let socket = sockets.add(tcp::Socket::new(buffer(), buffer()));
    End {
        fake,
        device,
        interface,
        sockets,
        socket,
    }
}

impl End {
    fn socket(&mut self) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(self.socket)
    }

    fn poll(&mut self, now: Instant) {
        self.interface
            .poll(now, &mut self.device, &mut self.sockets);
        self.device.flush();
        self.fake.run_host();
    }
}

/// Sends so many bytes from one end to the other and back; the headers that were seen, as
/// (frames, frames with a checksum left undone, frames to be cut).
fn echo(features: [u64; 2], len: usize, batching: bool, kill: bool) -> (usize, usize, usize) {
    let (mut client, mut server) = (end(features[0], 1), end(features[1], 2));
    client.device.set_batching(batching);
    server.device.set_batching(batching);
    server.socket().listen(80).expect("a port");
    let remote = (IpAddress::v4(10, 0, 0, 2), 80);
    let context = client.interface.context();
    let socket = client.sockets.get_mut::<tcp::Socket<'_>>(client.socket);
    socket.connect(context, remote, 49_152).expect("a socket");
    let data = pattern(1, len);
    let (mut sent, mut back) = (0, Vec::new());
    let mut seen = (0, 0, 0);
    for step in 0..40_000i64 {
        let now = Instant::from_millis(step);
        if sent < len && client.socket().can_send() {
            sent += client.socket().send_slice(&data[sent..]).expect("open");
        }
        client.poll(now);
        count(client.fake, &mut seen);
        carry(client.fake, server.fake);
        server.poll(now);
        let mut buffer = vec![0; 50_000];
        let echo = server.socket();
        while echo.can_recv() && echo.send_capacity() - echo.send_queue() > buffer.len() {
            let count = echo.recv_slice(&mut buffer).expect("open");
            assert_eq!(echo.send_slice(&buffer[..count]), Ok(count));
        }
        server.poll(now);
        carry(server.fake, client.fake);
        client.poll(now);
        while client.socket().can_recv() {
            let count = client.socket().recv_slice(&mut buffer).expect("open");
            back.extend_from_slice(&buffer[..count]);
        }
        if kill && step % 37 == 5 && step < 200 {
            client.fake.host().die();
            server.fake.host().die();
        }
        if back.len() == len {
            assert!(back == data);
            for end in [&client, &server] {
                assert_eq!(end.device.dropped(), (0, 0));
                assert_eq!(end.device.error(), None);
            }
            return seen;
        }
    }
    panic!("{} of {len} bytes came back", back.len());
}

fn count(fake: &Fake, seen: &mut (usize, usize, usize)) {
    for (header, _) in &fake.host().card.sent {
        seen.0 += 1;
        seen.1 += usize::from(header.flags == header_flag::NEEDS_CSUM);
        seen.2 += usize::from(header.gso_type == gso::TCPV4);
    }
}

#[test]
fn tcp_echo_between_two_drivers() {
    let len = 1_000_000;
    let (plain, undone, cut) = echo([feature::MRG_RXBUF; 2], len, false, false);
    assert!(plain > len / 1460);
    assert_eq!((undone, cut), (0, 0));
    let sums = feature::MRG_RXBUF | feature::CSUM | feature::GUEST_CSUM;
    let (frames, undone, cut) = echo([sums; 2], len, true, false);
    // All but the ARP frames.
    assert!(frames > len / 1460 && frames - undone < 10);
    assert_eq!(cut, 0);
    let (frames, _, cut) = echo([ALL; 2], len, true, false);
    assert!(cut > 0 && frames < plain, "{frames} frames, {cut} cut");
}

#[test]
fn tcp_survives_backends_that_die() {
    for features in [feature::MRG_RXBUF, ALL] {
        echo([features; 2], 300_000, true, true);
    }
}

#[test]
fn the_stack_is_told_what_the_device_does() {
    for (features, software, large) in [
        (0, true, false),
        (feature::CSUM, false, false),
        (feature::CSUM | feature::HOST_TSO4, false, true),
    ] {
        let (_fake, receiver, transmitter) = card(features);
        let capabilities = SmolDevice::new(receiver, transmitter).capabilities();
        assert_eq!(capabilities.max_transmission_unit, 1514);
        assert_eq!(capabilities.checksum.tcp.tx(), software);
        assert!(!capabilities.checksum.tcp.rx(), "it is done before");
        assert!(capabilities.checksum.ipv4.tx() && capabilities.checksum.ipv4.rx());
        assert_eq!(capabilities.segmentation.tcpv4.is_some(), large);
        assert!(capabilities.segmentation.tcpv6.is_none());
    }
}

/// A frame with a wrong checksum that no device vouches for never reaches the stack.
#[test]
fn wrong_checksums_are_dropped_and_counted() {
    let (mut client, mut server) = (end(0, 1), end(0, 2));
    server.socket().listen(80).expect("a port");
    let context = client.interface.context();
    let socket = client.sockets.get_mut::<tcp::Socket<'_>>(client.socket);
    socket
        .connect(context, (IpAddress::v4(10, 0, 0, 2), 80), 49_152)
        .expect("a socket");
    for step in 0..20 {
        let now = Instant::from_millis(step * 1000);
        client.poll(now);
        for (_, data) in &mut client.fake.host().card.sent {
            if data[12..14] == [8, 0] {
                data[50] ^= 1;
            }
        }
        carry(client.fake, server.fake);
        server.poll(now);
        carry(server.fake, client.fake);
        client.poll(now);
    }
    assert!(server.device.dropped().0 > 3);
    assert_eq!(server.socket().state(), tcp::State::Listen);
}

#[test]
fn the_embassy_driver_passes_frames_and_wakes() {
    use core::sync::atomic::{AtomicU32, Ordering};
    struct Count(AtomicU32);
    impl std::task::Wake for Count {
        fn wake(self: alloc::sync::Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }
    let (fake, receiver, transmitter) = card(feature::MRG_RXBUF | feature::CSUM);
    let event = receiver.event();
    let mut device = EmbassyDevice::new(receiver, transmitter);
    let wakes = alloc::sync::Arc::new(Count(AtomicU32::new(0)));
    let waker = Waker::from(alloc::sync::Arc::clone(&wakes));
    let mut context = Context::from_waker(&waker);
    let mac = [0x52, 0x54, 0, 1, 2, 3];
    assert_eq!(device.hardware_address(), HardwareAddress::Ethernet(mac));
    assert_eq!(device.capabilities().max_transmission_unit, 1514);
    assert!(matches!(device.link_state(&mut context), LinkState::Up));
    assert!(device.receive(&mut context).is_none());
    deliver(fake, Delivery::honest(&pattern(1, 3000)));
    fake.run_host();
    assert!(fake.take_event(event), "the queue was armed");
    assert_eq!(wakes.0.load(Ordering::Relaxed), 0);
    device.nic().process();
    assert_eq!(wakes.0.load(Ordering::Relaxed), 1, "once for one task");
    let (incoming, outgoing) = device.receive(&mut context).expect("a frame");
    incoming.consume(|data| assert_eq!(data, pattern(1, 3000)));
    outgoing.consume(90, |data| data.copy_from_slice(&pattern(2, 90)));
    fake.run_host();
    assert_eq!(fake.host().card.sent[0].1, pattern(2, 90));
    let token = device.transmit(&mut context).expect("room");
    token.consume(60, |data| data.fill(1));
    fake.host().set_card(status::ANNOUNCE, 1500);
    assert!(matches!(device.link_state(&mut context), LinkState::Down));
    assert_eq!(device.error(), None);
}
