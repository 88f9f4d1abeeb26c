//! Measuring TCP between two guests: a source sends for some seconds, a sink counts.

use crate::Failure;
use crate::net::{Network, Turn, close};
use alloc::vec;
use alloc::vec::Vec;
use guest_sdk::abi::call::number::EMBEDDER;
use guest_sdk::flat::Boot;
use guest_sdk::log::info;
use guest_sdk::platform::Platform;
use http_serve::calls::{MEASURE_PORT, MEASURED_CALL, READY_CALL};
use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::tcp;
use smoltcp::wire::Ipv4Address;

/// Bytes that wait in each direction: several segments of 64 KiB, and no more than the card's receive
/// buffers hold, so that a sender that fills the window overruns nobody.
const WINDOW: usize = 256 << 10;
/// The source's own port.
const SOURCE_PORT: u16 = 49_152;

fn socket(sockets: &mut SocketSet<'_>) -> SocketHandle {
    let buffer = || tcp::SocketBuffer::new(vec![0; WINDOW]);
    let mut socket = tcp::Socket::new(buffer(), buffer());
    socket.set_nagle_enabled(false);
    sockets.add(socket)
}

fn report(boot: &Boot, bytes: u64, nanoseconds: u64, sent: bool) -> Result<(), Failure> {
    info!("{bytes} bytes in {nanoseconds} ns");
    let args = [bytes, nanoseconds, sent.into(), 0, 0, 0];
    boot.platform().call(EMBEDDER + MEASURED_CALL, args)?;
    Ok(())
}

/// Takes what one peer sends until that closes.
pub(crate) fn sink(boot: &Boot, mut network: Network) -> Result<(), Failure> {
    let mut sockets = SocketSet::new(Vec::new());
    let handle = socket(&mut sockets);
    let listening = sockets
        .get_mut::<tcp::Socket<'_>>(handle)
        .listen(MEASURE_PORT);
    listening.map_err(|error| alloc::format!("cannot listen: {error}"))?;
    boot.platform().call(EMBEDDER + READY_CALL, [0; 6])?;
    let (mut bytes, mut first) = (0u64, None);
    let span = network.run(&mut sockets, |sockets, now| {
        let socket = sockets.get_mut::<tcp::Socket<'_>>(handle);
        let mut turn = Turn::Idle;
        while socket.can_recv() {
            first.get_or_insert(now);
            let taken = socket.recv(|data| (data.len(), data.len()));
            bytes += taken.unwrap_or(0) as u64;
            turn = Turn::Busy;
        }
        if first.is_some() && !socket.may_recv() {
            socket.close();
            return Ok(Turn::Done(now.saturating_sub(first.unwrap_or(now))));
        }
        Ok(turn)
    })?;
    drain(&mut network, &mut sockets, handle)?;
    report(boot, bytes, span, false)
}

/// Sends to `peer=` for `seconds=`.
pub(crate) fn source(boot: &Boot, mut network: Network) -> Result<(), Failure> {
    let peer = boot.argument("peer").unwrap_or("");
    let peer: Ipv4Address = peer.parse().map_err(|_| "peer= is no address")?;
    let seconds = boot.argument("seconds").unwrap_or("5");
    let seconds: u64 = seconds.parse().map_err(|_| "seconds= is no number")?;
    let mut sockets = SocketSet::new(Vec::new());
    let handle = socket(&mut sockets);
    let connecting = sockets.get_mut::<tcp::Socket<'_>>(handle).connect(
        network.interface().context(),
        (peer, MEASURE_PORT),
        SOURCE_PORT,
    );
    connecting.map_err(|error| alloc::format!("cannot connect: {error}"))?;
    let (mut bytes, mut first) = (0u64, None);
    let span = network.run(&mut sockets, |sockets, now| {
        let socket = sockets.get_mut::<tcp::Socket<'_>>(handle);
        if !socket.is_open() {
            return Err("the peer refused the connection".into());
        }
        let mut turn = Turn::Idle;
        let span = now.saturating_sub(first.unwrap_or(now));
        let over = span >= seconds.saturating_mul(1_000_000_000);
        while !over && socket.can_send() {
            first.get_or_insert(now);
            // What is sent does not matter, and is what the buffer holds.
            let sent = socket.send(|room| (room.len(), room.len()));
            bytes += sent.unwrap_or(0) as u64;
            turn = Turn::Busy;
        }
        if over && close(socket) {
            return Ok(Turn::Done(span));
        }
        Ok(turn)
    })?;
    drain(&mut network, &mut sockets, handle)?;
    report(boot, bytes, span, true)
}

/// Waits until the connection is closed on both sides, at most a few seconds.
fn drain(
    network: &mut Network,
    sockets: &mut SocketSet<'_>,
    handle: SocketHandle,
) -> Result<(), Failure> {
    let limit = network.now_ns() + 3_000_000_000;
    network.run(sockets, |sockets, now| {
        let state = sockets.get_mut::<tcp::Socket<'_>>(handle).state();
        let over = matches!(state, tcp::State::Closed | tcp::State::TimeWait);
        Ok(if over || now > limit {
            Turn::Done(())
        } else {
            Turn::Idle
        })
    })
}
