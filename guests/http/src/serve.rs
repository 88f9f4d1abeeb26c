//! Serving files.

use crate::Failure;
use crate::net::{Network, Turn, close};
use alloc::vec;
use alloc::vec::Vec;
use driver_disk::DriverDisk;
use guest_sdk::abi::call::number::EMBEDDER;
use guest_sdk::block;
use guest_sdk::flat::Boot;
use guest_sdk::log::{info, warn};
use guest_sdk::platform::Platform;
use http_serve::calls::{HTTP_PORT, READY_CALL};
use http_serve::connection::Connection;
use http_serve::site::Site;
use quickstart_fs::files::Files;
use quickstart_fs::limits::OPEN_FILES;
use quickstart_fs::walk::timestamp;
use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::tcp;
use smoltcp::time::Duration;

/// Connections at once; each may have a file open.
const CONNECTIONS: usize = OPEN_FILES;
/// Bytes of a connection that wait in each direction.
const RECEIVE: usize = 8 << 10;
const TRANSMIT: usize = 64 << 10;
/// A client that says nothing for so long makes room for another.
const SILENCE: Duration = Duration::from_secs(60);

/// A socket and the connection on it, if there is one.
struct Client {
    socket: SocketHandle,
    connection: Option<Connection>,
}

/// Serves the files of the first disk until the VM is stopped.
pub(crate) fn serve(boot: &Boot, mut network: Network) -> Result<(), Failure> {
    let platform = boot.platform();
    let disk = DriverDisk::new(block::open(platform, None)?);
    let now = timestamp(platform.wall_time().as_secs());
    let files = Files::mount(disk, now).map_err(|error| alloc::format!("the disk: {error}"))?;
    let mut site = Site::new(files);
    let mut sockets = SocketSet::new(Vec::new());
    let mut clients: Vec<_> = (0..CONNECTIONS)
        .map(|_| {
            let buffer = |len| tcp::SocketBuffer::new(vec![0; len]);
            let mut socket = tcp::Socket::new(buffer(RECEIVE), buffer(TRANSMIT));
            socket.set_nagle_enabled(false);
            socket.set_ack_delay(None);
            socket.set_timeout(Some(SILENCE));
            Client {
                socket: sockets.add(socket),
                connection: None,
            }
        })
        .collect();
    let (files, bytes) = site.totals();
    info!("serving {files} files, {bytes} bytes");
    platform.call(EMBEDDER + READY_CALL, [files, bytes, 0, 0, 0, 0])?;
    network.run(&mut sockets, |sockets, _now| {
        let mut turn = Turn::Idle;
        for client in &mut clients {
            if client.serve(sockets.get_mut(client.socket), &mut site)? {
                turn = Turn::Busy;
            }
        }
        Ok::<Turn<()>, Failure>(turn)
    })
}

impl Client {
    /// Moves bytes as far as that goes; whether any were.
    fn serve(
        &mut self,
        socket: &mut tcp::Socket<'_>,
        site: &mut Site<DriverDisk>,
    ) -> Result<bool, Failure> {
        if !socket.is_open() {
            self.let_go(site);
            socket
                .listen(HTTP_PORT)
                .map_err(|error| alloc::format!("cannot listen: {error}"))?;
            return Ok(true);
        }
        if !socket.may_send() && !socket.may_recv() {
            return Ok(false);
        }
        let connection = self.connection.get_or_insert_default();
        let mut moved = false;
        if socket.can_recv() {
            let wants = connection.wants();
            let received = socket.recv(|bytes| {
                let count = bytes.len().min(wants);
                connection.receive(&bytes[..count]);
                (count, count)
            });
            moved |= received.is_ok_and(|count| count > 0);
        }
        if socket.can_send() {
            let sent = socket.send(|room| match connection.send(site, room) {
                Ok(count) => (count, Ok(count)),
                Err(error) => (0, Err(error)),
            });
            match sent {
                Ok(Ok(count)) => moved |= count > 0,
                Ok(Err(error)) => {
                    warn!("a response breaks off: {error}");
                    socket.abort();
                    moved = true;
                }
                Err(_) => {}
            }
        }
        // The client has said all that it will, or is told that we have.
        if (connection.is_over() || (!socket.may_recv() && !moved)) && close(socket) {
            self.let_go(site);
        }
        Ok(moved)
    }

    fn let_go(&mut self, site: &Site<DriverDisk>) {
        if let Some(mut connection) = self.connection.take() {
            connection.finish(site);
        }
    }
}
