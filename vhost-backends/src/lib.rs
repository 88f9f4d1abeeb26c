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

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!("the host side of Paravane is for Linux on x86-64");

pub mod adapter;
pub mod block;
pub mod daemon;
pub mod engine;
pub mod limit;
pub mod limits;
mod readiness;
pub mod ring;
pub mod sandbox;
pub mod session;
pub mod stats;

pub use daemon::pv_blkd_main;
