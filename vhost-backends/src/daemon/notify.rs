//! Tells the service manager how far this is (sd_notify(3)).

use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// A connection to the service manager, if there is one. Opened before the sandbox, in which there
/// are neither paths nor sockets to open.
#[derive(Debug)]
pub(super) struct Notify(Option<UnixDatagram>);

impl Notify {
    /// As `NOTIFY_SOCKET` says. The error is a sentence.
    pub(super) fn from_environment() -> Result<Notify, String> {
        let Some(name) = std::env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty()) else {
            return Ok(Notify(None));
        };
        let cannot = |error: std::io::Error| format!("cannot reach NOTIFY_SOCKET: {error}");
        let bytes = name.as_encoded_bytes();
        let address = match bytes.strip_prefix(b"@") {
            Some(name) => SocketAddr::from_abstract_name(name),
            None => SocketAddr::from_pathname(&name),
        };
        let socket = UnixDatagram::unbound().map_err(cannot)?;
        socket
            .connect_addr(&address.map_err(cannot)?)
            .map_err(cannot)?;
        // A manager that does not read must not stop a disk.
        socket.set_nonblocking(true).map_err(cannot)?;
        Ok(Notify(Some(socket)))
    }

    /// Everything is served from now on.
    pub(super) fn ready(&self, count: usize, devices: &str) {
        self.send(&format!("READY=1\nSTATUS=serving {count} {devices}\n"));
    }

    /// This process serves what another one did.
    pub(super) fn taken_over(&self) {
        self.send(&format!("MAINPID={}\n", std::process::id()));
    }

    /// Nothing new is served any more.
    pub(super) fn stopping(&self) {
        self.send("STOPPING=1\n");
    }

    fn send(&self, state: &str) {
        if let Some(socket) = &self.0 {
            // A manager that is gone has nobody to tell.
            let _ = socket.send(state.as_bytes());
        }
    }
}
