//! TCP of the host to TCP of the guest, without a privilege: a listener on 127.0.0.1 on one side, and
//! a TCP/IP stack of its own, whose wire is the stream socket of pv-netd, on the other.
//!
//! | file | what |
//! |---|---|
//! | `wire` | frames on the stream socket, as the device of the stack |
//! | `proxy` | connections: bytes from one side to the other until both have said all |

mod proxy;
mod wire;

use anyhow::{Context, Result};
use proxy::Proxy;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// The address at which the guest finds this program.
pub const HOST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// The guest's address.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);

/// A port forward that runs. It ends when this is dropped.
#[derive(Debug)]
pub struct Forward {
    thread: Option<JoinHandle<Forwarded>>,
    stop: Arc<Stop>,
}

/// What was forwarded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Forwarded {
    /// Connections.
    pub connections: u64,
    /// Those that ended before both sides had said all.
    pub broken: u64,
}

#[derive(Debug)]
struct Stop {
    wanted: AtomicBool,
    event: EventFd,
}

impl Forward {
    /// Forwards what comes to `listener` to the guest behind the program that connects to `socket`.
    ///
    /// # Errors
    ///
    /// When the socket cannot be made.
    pub fn start(socket: &Path, listener: TcpListener) -> Result<Forward> {
        let network = UnixListener::bind(socket)
            .with_context(|| format!("cannot listen on {}", socket.display()))?;
        let stop = Arc::new(Stop {
            wanted: AtomicBool::new(false),
            event: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
        });
        let mut proxy = Proxy::new(network, listener, &stop.event)?;
        let wanted = Arc::clone(&stop);
        let thread = std::thread::Builder::new().name("forward".into());
        let thread = thread.spawn(move || {
            // Ordering: Relaxed, the flag is all there is to see.
            while !wanted.wanted.load(Ordering::Relaxed) {
                proxy.turn();
            }
            proxy.forwarded()
        })?;
        Ok(Forward {
            thread: Some(thread),
            stop,
        })
    }

    /// Ends it; what was forwarded until then.
    pub fn stop(mut self) -> Forwarded {
        self.end()
    }

    fn end(&mut self) -> Forwarded {
        self.stop.wanted.store(true, Ordering::Relaxed);
        // It never blocks, and a full one wakes as well.
        let _woken = self.stop.event.write(1).is_ok();
        let thread = self.thread.take();
        thread.and_then(|t| t.join().ok()).unwrap_or_default()
    }
}

impl Drop for Forward {
    fn drop(&mut self) {
        self.end();
    }
}
