//! Streams, taps and interfaces of the host: frames both ways, from inside the sandbox.
#![allow(unsafe_code)]
// UNSAFETY: packet sockets, a tap and a network namespace of its own; signals to the daemon's child.

use super::support::net::{NetFront, TIMEOUT};
use super::support::process::{Daemon, connect, netd, stats};
use super::{PLAIN, frame, front, port};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

/// One frame, as a stream socket carries it.
fn stream_frame(stream: &mut UnixStream) -> Vec<u8> {
    let mut length = [0; 4];
    stream.read_exact(&mut length).unwrap();
    let mut bytes = vec![0; u32::from_be_bytes(length) as usize];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

#[test]
fn a_streams_peer_goes_and_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| -> PathBuf { dir.path().join(name) };
    let listener = UnixListener::bind(path("peer")).unwrap();
    let args = port(&path("a"), 1, &format!("stream={}", path("peer").display()));
    let daemon = Daemon::start(netd().args(&args));
    let mut front = front(&path("a"));
    for round in 0..3usize {
        // The daemon comes by itself, from inside its sandbox.
        let mut peer = accept(&listener);
        for len in [14, 60, 1514, 40_000, 65_550] {
            while front.in_flight(0) < 31 {
                assert!(front.offer_receive(0, 4096));
            }
            let bytes = frame(9, 1, len + round % 2);
            let bytes = &bytes[..len];
            // In two parts, so that the daemon sees half a frame first.
            let whole = [&(len as u32).to_be_bytes()[..], bytes].concat();
            let (first, second) = whole.split_at(whole.len() / 3);
            peer.write_all(first).unwrap();
            std::thread::sleep(Duration::from_millis(5));
            peer.write_all(second).unwrap();
            assert!(front.receive(0).1 == bytes, "{len} bytes to the guest");
            let reader = std::thread::spawn(move || {
                let got = stream_frame(&mut peer);
                (peer, got)
            });
            front.send(1, &PLAIN, bytes);
            let (again, got) = reader.join().unwrap();
            assert!(got == bytes, "{len} bytes from the guest");
            peer = again;
        }
        if round == 1 {
            // What no frame can be: the connection is given up.
            peer.write_all(&[0xff; 4]).unwrap();
            assert_eq!(peer.read(&mut [0]).unwrap(), 0);
        }
    }
    drop(front);
    assert_eq!(daemon.end(), (Some(0), String::new()));
}

/// Waits for the daemon to connect.
fn accept(listener: &UnixListener) -> UnixStream {
    listener.set_nonblocking(true).unwrap();
    let deadline = Instant::now() + TIMEOUT;
    let peer = loop {
        match listener.accept() {
            Ok((stream, _)) => break stream,
            Err(_) => assert!(Instant::now() < deadline, "it does not connect"),
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    peer.set_nonblocking(false).unwrap();
    peer.set_read_timeout(Some(TIMEOUT)).unwrap();
    peer
}

/// The process that connects: the daemon's first child.
fn connecting(daemon: &Daemon) -> libc::pid_t {
    let pid = daemon.0.id();
    let list = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    let pids = list.split_ascii_whitespace();
    pids.map(|pid| pid.parse().unwrap()).min().unwrap()
}

fn signal(pid: libc::pid_t, signal: libc::c_int) {
    // SAFETY: takes no pointer; the process is the daemon's, which has not been waited for.
    assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
}

#[test]
fn who_connects_to_a_streams_peer_holds_nobody_up() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| -> PathBuf { dir.path().join(name) };
    let listener = UnixListener::bind(path("peer")).unwrap();
    let args = port(&path("a"), 1, &format!("stream={}", path("peer").display()));
    let mut daemon = Daemon::quiet(netd().args(&args));
    let first = accept(&listener);
    let helper = connecting(&daemon);
    let mut guest = front(&path("a"));
    for round in 0..3u8 {
        // It does not answer, while the peer is gone for longer than any answer is waited for; the
        // queue stops and starts all the same.
        signal(helper, libc::SIGSTOP);
        if round == 0 {
            first.shutdown(std::net::Shutdown::Both).unwrap();
        }
        std::thread::sleep(Duration::from_millis(600));
        drop(guest);
        guest = front(&path("a"));
        guest.send(1, &PLAIN, &frame(9, 1, 60));
        signal(helper, libc::SIGCONT);
        // One connection, and the answer to it is not another's.
        let mut peer = accept(&listener);
        assert!(guest.offer_receive(0, 2048));
        let bytes = frame(1, round, 100);
        peer.write_all(&100u32.to_be_bytes()).unwrap();
        peer.write_all(&bytes).unwrap();
        assert_eq!(guest.receive(0).1, bytes);
        guest.send(1, &PLAIN, &frame(9, round, 200));
        assert_eq!(stream_frame(&mut peer), frame(9, round, 200));
        assert!(listener.accept().is_err(), "a second connection");
    }
    // It ends with the daemon, and with what that had asked for last.
    signal(helper, libc::SIGSTOP);
    drop(listener);
    std::thread::sleep(Duration::from_millis(300));
    daemon.kill();
    signal(helper, libc::SIGCONT);
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let stat = std::fs::read_to_string(format!("/proc/{helper}/stat"));
        // What nobody reaps is over as well.
        if stat.is_err() || stat.unwrap().contains(") Z ") {
            break;
        }
        assert!(Instant::now() < deadline, "it outlives the daemon");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_streams_peer_that_takes_no_more_is_away() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| -> PathBuf { dir.path().join(name) };
    let listener = UnixListener::bind(path("peer")).unwrap();
    // SAFETY: takes no pointer.
    let full = unsafe { libc::listen(std::os::fd::AsRawFd::as_raw_fd(&listener), 0) };
    assert_eq!(full, 0);
    let _waiting = UnixStream::connect(path("peer")).unwrap();
    let args = port(&path("a"), 1, &format!("stream={}", path("peer").display()));
    for ends in [true, false] {
        let daemon = Daemon::start(netd().args(&args));
        let mut guest = front(&path("a"));
        guest.send(1, &PLAIN, &frame(9, 1, 60));
        if !ends {
            drop(listener.accept().unwrap());
            let mut peer = accept(&listener);
            // Not before it has the connection.
            peer.write_all(&[0, 0, 0, 60]).unwrap();
            peer.write_all(&frame(1, 9, 60)).unwrap();
            assert!(guest.offer_receive(0, 2048));
            assert_eq!(guest.receive(0).1, frame(1, 9, 60));
        }
        drop(guest);
        assert_eq!(daemon.end(), (Some(0), String::new()));
        if !ends {
            return;
        }
    }
}

#[test]
fn a_stream_that_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| -> PathBuf { dir.path().join(name) };
    let args = port(
        &path("a"),
        1,
        &format!("stream-listen={}", path("peer").display()),
    );
    let daemon = Daemon::start(netd().args(&args));
    let mut front = front(&path("a"));
    for round in 0..3usize {
        assert!(front.offer_receive(0, 4096));
        let mut peer = connect(&path("peer"));
        let bytes = frame(1, 9, 100 + round);
        let length = (bytes.len() as u32).to_be_bytes();
        peer.write_all(&[&length[..], &bytes].concat()).unwrap();
        assert_eq!(front.receive(0).1, bytes);
        front.send(1, &PLAIN, &bytes);
        assert_eq!(stream_frame(&mut peer), bytes);
    }
    drop(front);
    assert_eq!(daemon.end(), (Some(0), String::new()));
    assert!(!path("peer").exists());
}

/// Runs `ip` with these words, in a network namespace of its own with everything else here.
fn ip(words: &str) {
    let status = Command::new("ip").args(words.split(' ')).status().unwrap();
    assert!(status.success(), "ip {words}");
}

/// Goes on in a network namespace of this thread's own; `false`: that is not allowed here.
fn own_network() -> bool {
    // SAFETY: unshare takes no pointer.
    let left = unsafe { libc::unshare(libc::CLONE_NEWNET) } == 0;
    let tools = Command::new("ip")
        .arg("link")
        .output()
        .is_ok_and(|o| o.status.success());
    if !left || !tools {
        println!("SKIPPED: network namespaces take root, and `ip` is needed");
    }
    left && tools
}

/// A packet socket on an interface of this thread's network.
fn packet_socket(name: &str) -> std::net::UdpSocket {
    use std::os::fd::FromRawFd;
    let name = std::ffi::CString::new(name).unwrap();
    // SAFETY: the name is a C string, the address is as long as is said, the descriptor is fresh.
    unsafe {
        let all = (libc::ETH_P_ALL as u16).to_be();
        let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW, i32::from(all));
        assert!(fd >= 0);
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = all;
        address.sll_ifindex = libc::if_nametoindex(name.as_ptr()) as i32;
        let len = size_of_val(&address) as u32;
        assert_eq!(libc::bind(fd, (&raw const address).cast(), len), 0);
        let socket = std::net::UdpSocket::from_raw_fd(fd);
        socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        socket
    }
}

/// The next frame with our type; the host's own are left out.
fn receive_ours(socket: &std::net::UdpSocket) -> Vec<u8> {
    use std::os::fd::AsRawFd;
    loop {
        let mut buffer = vec![0; 70_000];
        // SAFETY: the buffer is as long as is said.
        let n = unsafe {
            libc::recv(
                socket.as_raw_fd(),
                buffer.as_mut_ptr().cast(),
                buffer.len(),
                0,
            )
        };
        assert!(n > 0, "no frame");
        buffer.truncate(n as usize);
        if buffer[12..14] == [0x88, 0xb5] {
            return buffer;
        }
    }
}

fn send_raw(socket: &std::net::UdpSocket, bytes: &[u8]) {
    use std::os::fd::AsRawFd;
    // SAFETY: the bytes are as many as is said.
    let n = unsafe { libc::send(socket.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0) };
    assert_eq!(n, bytes.len() as isize);
}

fn receive_ours_front(front: &mut NetFront) -> Vec<u8> {
    loop {
        let (_, bytes) = front.receive(0);
        if bytes[12..14] == [0x88, 0xb5] {
            return bytes;
        }
        assert!(front.offer_receive(0, 2048));
    }
}

#[test]
fn a_tap_interface() {
    if !own_network() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let daemon = Daemon::start(netd().args(port(&socket, 1, "tap=pv0")));
    let mut front = front(&socket);
    ip("link set pv0 mtu 9000 up");
    let host = packet_socket("pv0");
    for round in 0..50usize {
        while front.in_flight(0) < 16 {
            assert!(front.offer_receive(0, 2048));
        }
        front.kick(0);
        // Some need several buffers.
        let len = 60 + round * 150;
        let bytes = frame(1, 9, len);
        send_raw(&host, &bytes);
        assert!(
            receive_ours_front(&mut front) == bytes,
            "{len} bytes to the guest"
        );
        let bytes = frame(9, 1, len);
        front.send(1, &PLAIN, &bytes);
        loop {
            // It sees its own frames too.
            let got = receive_ours(&host);
            if got[..6] == bytes[..6] {
                assert!(got == bytes, "{len} bytes from the guest");
                break;
            }
        }
    }
    drop(front);
    assert_eq!(daemon.end(), (Some(0), String::new()));
}

/// A tap interface of this thread's network, which it is to be written to with a header in front.
fn open_tap(name: &str) -> std::fs::File {
    use std::os::fd::AsRawFd;
    let path = "/dev/net/tun";
    let file = std::fs::File::options().read(true).write(true).open(path);
    let file = file.unwrap();
    let mut request = [0u8; 40];
    request[..name.len()].copy_from_slice(name.as_bytes());
    let flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as u16;
    request[16..18].copy_from_slice(&flags.to_ne_bytes());
    // SAFETY: TUNSETIFF takes an ifreq, which is 40 bytes.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), 0x4004_54ca, &raw mut request) };
    assert_eq!(done, 0, "a tap interface");
    file
}

#[test]
fn frames_that_a_header_has_no_words_for_are_lost_alone() {
    if !own_network() {
        return;
    }
    let mut tap = open_tap("pva");
    ip("link set pva up");
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let told = dir.path().join("stats");
    let mut args = port(&socket, 1, "interface=pva").to_vec();
    args.extend(["--stats-socket".into(), told.display().to_string()]);
    let daemon = Daemon::start(netd().args(&args));
    let mut front = front(&socket);
    let good = frame(1, 9, 100);
    // To be sent in IP fragments: the kernel takes that and cannot give it.
    let mut odd = frame(1, 9, 3042);
    odd[12..24].copy_from_slice(&[8, 0, 0x45, 0, 0x0b, 0xd4, 0, 1, 0, 0, 64, 17]);
    odd[38..40].copy_from_slice(&3008u16.to_be_bytes());
    let header = [1, 3, 42, 0, 0xe8, 3, 34, 0, 6, 0];
    for _ in 0..3 {
        while front.in_flight(0) < 16 {
            assert!(front.offer_receive(0, 2048));
        }
        front.kick(0);
        tap.write_all(&[&header[..], &odd].concat()).unwrap();
        tap.write_all(&[&[0; 10][..], &good].concat()).unwrap();
        assert_eq!(receive_ours_front(&mut front), good);
    }
    let said = stats(&told);
    println!("{}", said["ports"][0]["drops"]);
    assert_eq!(said["ports"][0]["drops"]["port_error"], 3);
    drop(front);
    assert_eq!(daemon.end(), (Some(0), String::new()));
}

#[test]
fn an_interface_of_the_host() {
    if !own_network() {
        return;
    }
    ip("link add pva type veth peer name pvb");
    ip("link set pva up");
    ip("link set pvb up");
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let daemon = Daemon::start(netd().args(port(&socket, 1, "interface=pva")));
    let mut front = front(&socket);
    let peer = packet_socket("pvb");
    for len in [60, 100, 1000, 1514] {
        while front.in_flight(0) < 16 {
            assert!(front.offer_receive(0, 2048));
        }
        front.kick(0);
        let bytes = frame(1, 9, len);
        send_raw(&peer, &bytes);
        assert_eq!(receive_ours_front(&mut front), bytes);
        let bytes = frame(9, 1, len);
        front.send(1, &PLAIN, &bytes);
        loop {
            let got = receive_ours(&peer);
            if got[..6] == bytes[..6] {
                assert_eq!(got, bytes);
                break;
            }
        }
    }
    // The kernel takes tags out of what comes.
    assert!(front.offer_receive(0, 2048));
    front.kick(0);
    let mut tagged = frame(1, 9, 200);
    tagged.splice(12..12, [0x81, 0, 0xe0, 5]);
    send_raw(&peer, &tagged);
    loop {
        let (_, got) = front.receive(0);
        if got[..6] == tagged[..6] {
            assert_eq!(got, tagged);
            break;
        }
        assert!(front.offer_receive(0, 2048));
    }
    drop(front);
    assert_eq!(daemon.end(), (Some(0), String::new()));
}
