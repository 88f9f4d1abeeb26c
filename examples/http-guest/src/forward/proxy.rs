//! Connections of the host, each joined with one to the guest.

use super::wire::{Wire, accept};
use super::{Forwarded, GUEST, HOST};
use crate::limits::{CONNECTION_BUFFER, MAX_CONNECTIONS, SILENCE};
use anyhow::{Context, Result};
use http_serve::calls::HTTP_PORT;
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::socket::tcp;
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{EthernetAddress, IpCidr};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

/// This program's address on the guest's network.
const MAC: EthernetAddress = EthernetAddress([0x02, 0x50, 0x56, 0, 2, 2]);
/// First of the ports that connections to the guest come from.
const FIRST_PORT: u16 = 49_152;
/// Events that are taken at once; which they are does not matter.
const EVENTS: usize = 64;

/// Both sides.
pub(super) struct Proxy {
    events: Epoll,
    network: UnixListener,
    listener: TcpListener,
    wire: Wire,
    interface: Interface,
    sockets: SocketSet<'static>,
    connections: Vec<Connection>,
    next_port: u16,
    forwarded: Forwarded,
}

/// A client of the host, and its connection to the guest.
struct Connection {
    client: TcpStream,
    socket: SocketHandle,
    /// The client has said all, and the guest was told.
    client_done: bool,
    /// The guest has said all, and the client was told.
    guest_done: bool,
    /// The client takes no more.
    client_gone: bool,
}

impl Proxy {
    pub(super) fn new(
        network: UnixListener,
        listener: TcpListener,
        stop: &EventFd,
    ) -> Result<Proxy> {
        network.set_nonblocking(true)?;
        listener.set_nonblocking(true)?;
        let events = Epoll::new().context("cannot wait for sockets")?;
        let level = EventSet::IN;
        watch(&events, network.as_raw_fd(), level)?;
        watch(
            &events,
            listener.as_raw_fd(),
            level | EventSet::EDGE_TRIGGERED,
        )?;
        watch(&events, stop.as_raw_fd(), level)?;
        let mut wire = Wire::default();
        let mut config = Config::new(MAC.into());
        config.random_seed = std::process::id().into();
        let mut interface = Interface::new(config, &mut wire, Instant::now());
        interface.update_ip_addrs(|addresses| {
            // There is room for two.
            let _full = addresses.push(IpCidr::new(HOST.into(), 24)).is_err();
        });
        Ok(Proxy {
            events,
            network,
            listener,
            wire,
            interface,
            sockets: SocketSet::new(Vec::new()),
            connections: Vec::new(),
            next_port: FIRST_PORT,
            forwarded: Forwarded::default(),
        })
    }

    pub(super) fn forwarded(&self) -> Forwarded {
        self.forwarded
    }

    /// Waits for something to do, and does it.
    pub(super) fn turn(&mut self) {
        let delay = self.interface.poll_delay(Instant::now(), &self.sockets);
        let limit = delay.map_or(-1, |delay| {
            i32::try_from(delay.total_micros().div_ceil(1000)).unwrap_or(i32::MAX)
        });
        let mut events = [EpollEvent::default(); EVENTS];
        // Whatever it returns with: everything is looked at.
        let _count = self.events.wait(limit, &mut events).unwrap_or(0);
        if let Ok(stream) = accept(&self.network) {
            let both = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
            if watch(&self.events, stream.as_raw_fd(), both).is_ok() {
                self.wire.connect(stream);
            }
        }
        loop {
            self.accept();
            let mut moved = self.wire.read();
            let now = Instant::now();
            self.interface.poll(now, &mut self.wire, &mut self.sockets);
            for connection in &mut self.connections {
                let socket = self.sockets.get_mut(connection.socket);
                moved |= connection.pump(socket);
            }
            self.remove();
            self.interface.poll(now, &mut self.wire, &mut self.sockets);
            self.wire.write();
            if !moved {
                return;
            }
        }
    }

    /// Takes clients, as many as there is room for. The others wait in the listener's queue.
    fn accept(&mut self) {
        while self.connections.len() < MAX_CONNECTIONS {
            let Ok((client, _)) = self.listener.accept() else {
                return;
            };
            self.forwarded.connections += 1;
            if self.join(client).is_err() {
                self.forwarded.broken += 1;
            }
        }
    }

    fn join(&mut self, client: TcpStream) -> io::Result<()> {
        client.set_nonblocking(true)?;
        client.set_nodelay(true)?;
        let interest =
            EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        watch(&self.events, client.as_raw_fd(), interest)?;
        let buffer = || tcp::SocketBuffer::new(vec![0; CONNECTION_BUFFER]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(None);
        let silence = u64::try_from(SILENCE.as_micros()).unwrap_or(u64::MAX);
        socket.set_timeout(Some(Duration::from_micros(silence)));
        let port = self.next_port;
        self.next_port = port.checked_add(1).unwrap_or(FIRST_PORT);
        let context = self.interface.context();
        let connecting = socket.connect(context, (GUEST, HTTP_PORT), port);
        connecting.map_err(|error| io::Error::other(error.to_string()))?;
        let socket = self.sockets.add(socket);
        self.connections.push(Connection {
            client,
            socket,
            client_done: false,
            guest_done: false,
            client_gone: false,
        });
        Ok(())
    }

    /// Removes the connections that are over.
    fn remove(&mut self) {
        let (sockets, forwarded) = (&mut self.sockets, &mut self.forwarded);
        self.connections.retain(|connection| {
            let socket = sockets.get::<tcp::Socket<'_>>(connection.socket);
            let over = match socket.state() {
                // A slow client may have something left to take.
                tcp::State::Closed => connection.client_gone || !socket.can_recv(),
                // What is left to do is waiting for what may be late; ports are not used again soon.
                tcp::State::TimeWait => connection.guest_done,
                _ => false,
            };
            if over {
                sockets.remove(connection.socket);
                forwarded.broken += u64::from(!connection.guest_done);
            }
            !over
        });
    }
}

impl Connection {
    /// Moves bytes as far as that goes; whether any were.
    fn pump(&mut self, socket: &mut tcp::Socket<'_>) -> bool {
        let mut moved = false;
        while !self.client_done && socket.can_send() {
            let client = &mut self.client;
            let read = socket.send(|room| match client.read(room) {
                Ok(count) => (count, Ok(count)),
                Err(error) => (0, Err(error)),
            });
            match read {
                Ok(Ok(0)) => {
                    self.client_done = true;
                    moved = true;
                }
                Ok(Ok(_)) => moved = true,
                Ok(Err(error)) if error.kind() == ErrorKind::WouldBlock => break,
                Ok(Err(error)) if error.kind() == ErrorKind::Interrupted => {}
                // The client is gone; nobody wants what the guest has to say.
                Ok(Err(_)) => return self.give_up(socket),
                Err(_) => break,
            }
        }
        // Not before the guest has everything: smoltcp 0.14 takes the FIN of a segment whose last
        // bytes did not fit into its window, and never asks for them again.
        if self.client_done && !self.client_gone && socket.send_queue() == 0 {
            let before = socket.state();
            socket.close();
            moved |= socket.state() != before;
        }
        while socket.can_recv() {
            let client = &mut self.client;
            let written = socket.recv(|data| match client.write(data) {
                Ok(count) => (count, Ok(count)),
                Err(error) => (0, Err(error)),
            });
            match written {
                Ok(Ok(count)) if count > 0 => moved = true,
                Ok(Err(error)) if error.kind() == ErrorKind::Interrupted => {}
                Ok(Err(error)) if error.kind() == ErrorKind::WouldBlock => break,
                Ok(_) => return self.give_up(socket),
                Err(_) => break,
            }
        }
        let connecting = matches!(
            socket.state(),
            tcp::State::SynSent | tcp::State::SynReceived
        );
        let said_all = !socket.may_recv() && !socket.can_recv() && !connecting;
        if said_all && !self.guest_done && socket.state() != tcp::State::Closed {
            self.guest_done = true;
            // It may have hung up already.
            let _gone = self.client.shutdown(Shutdown::Write).is_err();
            // Nothing here says more to a guest that listens no more.
            socket.close();
            moved = true;
        }
        moved
    }

    fn give_up(&mut self, socket: &mut tcp::Socket<'_>) -> bool {
        self.client_done = true;
        self.client_gone = true;
        socket.abort();
        true
    }
}

fn watch(events: &Epoll, fd: i32, interest: EventSet) -> io::Result<()> {
    events.ctl(ControlOperation::Add, fd, EpollEvent::new(interest, 0))
}
