//! vhost-user device backends for any VMM.
//!
//! What a request passes through, in order:
//!
//! | module | what happens there |
//! |---|---|
//! | [`daemon`] | command line, socket, signals; connection after connection |
//! | [`session`] | the frontend's messages become memory, rings and running queues |
//! | [`ring`] | a descriptor chain becomes one owned, checked value |
//! | [`block`] | a chain becomes a typed request; a result becomes a status byte |
//! | [`net`] | a chain becomes a frame, on its way to a port; frames come back |
//! | [`engine`] | bytes come from and go to the disk |
//! | [`adapter`] | lets a `VhostUserBackend` be served by [`session`] |
//! | [`limit`] | how many requests and bytes a device may take each second |
//! | [`stats`] | what was done, how long it took, what went wrong |
//! | [`sandbox`] | what a daemon gives up once everything is open |
//! | [`limits`] | every bound, with its reason |
//!
//! [`ring`] and [`block`]'s parser know nothing of sockets: a VMM uses them in-process.
//!
//! ```no_run
//! use std::{os::unix::net::UnixListener, path::Path, sync::Arc};
//! use vhost_backends::block::{BlockDevice, BlockOptions};
//! use vhost_backends::engine::{FileOptions, RawFile};
//! use vhost_backends::session::Server;
//!
//! let file = RawFile::open(Path::new("disk.img"), FileOptions::default())?;
//! let device = Arc::new(BlockDevice::new(file, BlockOptions::with_queues(1)));
//! let server = Server::spawn(device, UnixListener::bind("blk.sock")?)?;
//! // ... frontends come and go ...
//! server.stop()?;
//! # Ok::<(), std::io::Error>(())
//! ```
//!
//! # A backend of one's own
//!
//! [`session::Device`] is what a session needs: features, configuration, and a worker for each
//! queue. Messages, memory, feature negotiation, reconnects and draining are the session's. This is
//! a whole entropy device (virtio 1.3 §5.4):
//!
//! ```no_run
//! use std::{fs::File, io, io::Read, os::fd::AsRawFd, os::unix::net::UnixListener, sync::Arc, thread};
//! use vhost_backends::ring::{Completion, DeviceRing};
//! use vhost_backends::session::{Device, QueueSetup, QueueStop, QueueWorker, Server};
//! use vmm_sys_util::epoll::{ControlOperation::Add, Epoll, EpollEvent, EventSet};
//! use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
//!
//! struct Entropy;
//! struct Worker(EventFd, thread::JoinHandle<QueueStop>, QueueStop);
//!
//! impl Device for Entropy {
//!     fn queue_count(&self) -> u16 { 1 }
//!     fn features(&self) -> u64 { 1 << 32 | 1 << 29 } // VERSION_1, EVENT_IDX
//!     fn config(&self) -> Vec<u8> { Vec::new() }
//!     fn open_queue(&self, setup: QueueSetup) -> io::Result<Box<dyn QueueWorker>> {
//!         let (stop, epoll) = (EventFd::new(EFD_NONBLOCK)?, Epoll::new()?);
//!         let edge = EventSet::IN | EventSet::EDGE_TRIGGERED; // the kick is never read
//!         epoll.ctl(Add, setup.kick.as_raw_fd(), EpollEvent::new(edge, 0))?;
//!         epoll.ctl(Add, stop.as_raw_fd(), EpollEvent::new(EventSet::IN, 1))?;
//!         let first = QueueStop { ring: setup.ring.save(), retired: None };
//!         let thread = thread::Builder::new().spawn(move || serve(setup, &epoll))?;
//!         Ok(Box::new(Worker(stop, thread, first)))
//!     }
//! }
//!
//! fn serve(QueueSetup { mut ring, kick: _kick, call, .. }: QueueSetup, epoll: &Epoll) -> QueueStop {
//!     let memory = Arc::clone(ring.memory());
//!     let mut random = File::open("/dev/urandom").ok();
//!     let mut events = [EpollEvent::default(); 2];
//!     loop {
//!         while let Ok(Some(chain)) = ring.pop() { // a ring that breaks a rule gives no more
//!             let mut bytes = vec![0; chain.writable_len().min(4096) as usize];
//!             let read = random.as_mut().is_some_and(|file| file.read_exact(&mut bytes).is_ok());
//!             let done = read && chain.write_at(&memory, 0, &bytes).is_ok();
//!             let written = if done { bytes.len() as u32 } else { 0 };
//!             ring.complete(&[Completion { head: chain.head(), written }]);
//!             if ring.should_signal() { call.signal() }
//!         }
//!         if ring.arm() { continue } // more came meanwhile
//!         let count = epoll.wait(-1, &mut events).unwrap_or(0); // interrupted: looks again
//!         if events.iter().take(count).any(|event| event.data() == 1) {
//!             return QueueStop { ring: ring.save(), retired: ring.retired() };
//!         }
//!     }
//! }
//!
//! impl QueueWorker for Worker {
//!     fn stop(self: Box<Self>) -> QueueStop {
//!         self.0.write(1).ok(); // full means readable
//!         self.1.join().unwrap_or(self.2)
//!     }
//! }
//!
//! let server = Server::spawn(Arc::new(Entropy), UnixListener::bind("rng.sock")?)?;
//! // ... until it is enough ...
//! server.stop()?;
//! # Ok::<(), io::Error>(())
//! ```
//!
//! A program that serves what it does not trust also confines itself, once all is open, with
//! [`sandbox::Sandbox::enter`].

// It may live in somebody else's process, and frontends are nobody's friends.
#![cfg_attr(
    not(test),
    deny(
        clippy::print_stdout,
        clippy::print_stderr,
        clippy::exit,
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic
    )
)]

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!("the host side of Paravane is for Linux on x86-64");

pub mod adapter;
pub mod block;
pub mod daemon;
mod dial;
pub mod engine;
mod folder;
pub mod limit;
pub mod limits;
pub mod net;
mod readiness;
pub mod ring;
pub mod sandbox;
pub mod session;
pub mod stats;

pub use daemon::{pv_blkd_main, pv_netd_main};
