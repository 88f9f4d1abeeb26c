//! Opens what a port's frames go to, before the sandbox is entered.
#![allow(unsafe_code)]
// UNSAFETY: descriptor numbers from the command line become owned descriptors.

use super::cli::OnePort;
use crate::daemon::{Connector, Sockets};
use crate::net::Mac;
use crate::net::port::{Interface, Loopback, Port, Stream, StreamAddress, Switch, Tap};
use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;

/// The switches of a daemon, by name.
#[derive(Debug, Default)]
pub(super) struct Switches {
    named: HashMap<String, Arc<Switch>>,
    stations: Vec<(String, Mac)>,
}

impl Switches {
    /// Opens a port's peer. The error is a sentence.
    pub(super) fn open_peer(
        &mut self,
        args: &OnePort,
        mac: Mac,
        sockets: &mut Sockets,
    ) -> Result<Arc<dyn Port>, String> {
        let peer = &args.peer;
        if let Some(name) = &peer.tap {
            let tap = Tap::open(name, args.queue_pairs)
                .map_err(|error| format!("cannot open the tap interface {name}: {error}"))?;
            return Ok(Arc::new(tap));
        }
        if let Some(fds) = &peer.tap_fd {
            let cannot = |error: io::Error| format!("cannot use --tap-fd: {error}");
            let fds: Vec<_> = fds
                .iter()
                .map(|fd| sockets.claim(*fd).and_then(|()| inherit(*fd)))
                .collect::<Result<_, _>>()?;
            return Ok(Arc::new(Tap::from_fds(fds).map_err(cannot)?));
        }
        if let Some(name) = &peer.switch {
            return self.join(name, mac);
        }
        if let Some(path) = &peer.stream {
            let shown = path.display();
            let cannot = |error: io::Error| format!("cannot reach {shown}: {error}");
            let connector = Connector::start(path).map_err(cannot)?;
            let dial = Box::new(move || connector.connect());
            let stream = Stream::new(StreamAddress::Connect(dial)).map_err(cannot)?;
            return Ok(Arc::new(stream));
        }
        if let Some(path) = &peer.stream_listen {
            let listener = sockets.listen(path, false)?;
            let stream = Stream::new(StreamAddress::Listen(listener))
                .map_err(|error| format!("cannot listen on {}: {error}", path.display()))?;
            return Ok(Arc::new(stream));
        }
        if let Some(name) = &peer.interface {
            let interface = Interface::open(name)
                .map_err(|error| format!("cannot open the interface {name}: {error}"))?;
            return Ok(Arc::new(interface));
        }
        Ok(Arc::new(Loopback::default()))
    }

    fn join(&mut self, name: &str, mac: Mac) -> Result<Arc<dyn Port>, String> {
        let station = (name.to_owned(), mac);
        if self.stations.contains(&station) {
            return Err(format!(
                "two ports of the switch {name} have the address {mac}"
            ));
        }
        self.stations.push(station);
        let switch = self.named.entry(name.to_owned()).or_default();
        match switch.port() {
            Some(port) => Ok(Arc::new(port)),
            None => Err(format!("the switch {name} has no more ports")),
        }
    }
}

fn inherit(fd: RawFd) -> Result<OwnedFd, String> {
    // SAFETY: fcntl takes no pointer here; it fails if the number is not an open descriptor.
    if fd < 3 || unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } != 0 {
        return Err(format!("--tap-fd {fd} is not an inherited descriptor"));
    }
    // SAFETY: it is open, whoever started this program passed it by number, and nothing else in it
    // uses that number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A local address that is the same for the same port of the same host.
pub(super) fn default_mac(name: &str, args: &OnePort) -> Mac {
    let mut hasher = DefaultHasher::new();
    // A host without one shares its addresses with others like it.
    let machine = std::fs::read_to_string("/etc/machine-id").unwrap_or_default();
    (machine, name, &args.socket.socket_path).hash(&mut hasher);
    let [a, b, c, d, e, ..] = hasher.finish().to_ne_bytes();
    Mac([0x02, a, b, c, d, e])
}
