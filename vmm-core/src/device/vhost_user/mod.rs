//! Devices that a vhost-user backend serves, whatever their kind.
//!
//! A [`Model`] is what one kind of device has of its own: queues, and what the guest is offered.
//! Everything else is here, once. [`link`] keeps a backend behind the device: it starts a process
//! ([`spawn`]) or a thread ([`thread`]) or connects, shakes hands, notices loss and starts over.
//! [`frontend`] turns activation and reset into messages, each conversation with a [`deadline`];
//! [`notices`] hears what the backend says by itself.
//! The memory table that a backend gets holds this device's arena and nothing else.

mod deadline;
mod frontend;
pub(crate) mod link;
mod notices;
mod spawn;
mod thread;

use crate::device::Offer;
use crate::limits::DEFAULT_ARENA;
use std::fmt::Debug;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

pub(crate) use link::Link;

/// Serves one connected vhost-user socket until its end.
pub(crate) type Serve = dyn Fn(UnixStream) -> io::Result<()> + Send + Sync;

/// How a backend is reached.
#[derive(Clone)]
pub(crate) enum Source {
    /// The VMM starts the process and supervises it.
    Spawn(Arc<dyn Fn() -> Command + Send + Sync>),
    /// Somebody else runs it; this is its listening socket.
    Socket(PathBuf),
    /// A thread of this process runs it.
    InProcess(Arc<Serve>),
}

impl Debug for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Source::Spawn(_) => f.write_str("Spawn"),
            Source::Socket(path) => f.debug_tuple("Socket").field(path).finish(),
            Source::InProcess(_) => f.write_str("InProcess"),
        }
    }
}

/// What one kind of device has of its own.
pub trait Model: Debug + Send + Sync + 'static {
    /// The virtio device ID.
    fn kind(&self) -> u32;
    /// Queues that the device has.
    fn queues(&self) -> u16;
    /// Lengths of configuration space that backends answer, the one to ask for first in front.
    fn config_lens(&self) -> &'static [usize];
    /// A setting that is out of its range: what it is, its value, least and most.
    fn check(&self) -> Result<(), (&'static str, u64, u64, u64)> {
        Ok(())
    }
    /// What the guest is offered, given what the backend offers.
    fn offer(&self, served: &Served) -> io::Result<Offer>;
    /// The MTU that the backend is told.
    fn mtu(&self) -> Option<u16> {
        None
    }
}

/// What a backend has said that it offers.
#[derive(Clone, Debug)]
pub struct Served {
    /// Virtio features, those left out that are for the frontend alone.
    pub(crate) features: u64,
    /// Queues.
    pub(crate) queues: u64,
    /// Configuration space, from a backend that has one.
    pub(crate) config: Option<Vec<u8>>,
    /// Whether it says when that changes.
    pub(crate) tells: bool,
}

impl Served {
    /// An error that says what to do, unless the backend serves so many queues.
    pub(crate) fn need_queues(&self, wanted: u16) -> io::Result<()> {
        if self.queues >= u64::from(wanted) {
            return Ok(());
        }
        Err(io::Error::other(format!(
            "the backend serves {} queues and the device has {wanted}; give the device fewer, or \
             the backend more (--num-queues)",
            self.queues
        )))
    }
}

/// A device and the vhost-user backend that serves it.
#[derive(Clone)]
pub struct DeviceConfig<M> {
    pub(crate) source: Source,
    pub(crate) name: String,
    pub(crate) queue_size: u16,
    pub(crate) arena: u64,
    pub(crate) model: M,
}

impl<M: Debug> Debug for DeviceConfig<M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DeviceConfig")
            .field("source", &self.source)
            .field("name", &self.name)
            .field("model", &self.model)
            .field("arena", &self.arena)
            .finish_non_exhaustive()
    }
}

impl<M: Model + Default> DeviceConfig<M> {
    fn new(source: Source) -> DeviceConfig<M> {
        let model = M::default();
        DeviceConfig {
            source,
            name: default_name(model.kind()).into(),
            queue_size: 256,
            arena: DEFAULT_ARENA,
            model,
        }
    }

    /// A backend that the VMM starts, supervises, and starts again when it dies.
    ///
    /// `command` makes the command each time; `--fd N`, a connected vhost-user socket, is added to
    /// it (the vhost-user specification's backend program conventions).
    ///
    /// ```
    /// use std::process::Command;
    /// let disk = vmm_core::BlockConfig::spawn(|| {
    ///     let mut command = Command::new("pv-blkd");
    ///     command.args(["--blk-file", "disk.img"]);
    ///     command
    /// });
    /// # let _ = disk;
    /// ```
    pub fn spawn(command: impl Fn() -> Command + Send + Sync + 'static) -> DeviceConfig<M> {
        DeviceConfig::new(Source::Spawn(Arc::new(command)))
    }

    /// A backend that somebody else runs and that listens on this socket.
    ///
    /// It must have stopped touching the old queues before it accepts a new connection (`pv-blkd`
    /// drains first), because the guest's requests are submitted again then.
    pub fn socket(path: impl Into<PathBuf>) -> DeviceConfig<M> {
        DeviceConfig::new(Source::Socket(path.into()))
    }

    /// A backend that a thread of this process runs.
    ///
    /// `serve` gets a connected vhost-user socket, serves it, and returns when the connection is
    /// over and nothing touches the arena any more; `vhost_backends::session::serve` does just
    /// that. It shares with the VMM what a process would share: the socket, the arena's file and
    /// the queues' eventfds. If it returns or panics while the VM runs, the backend is lost, and it
    /// is called again. A VM that ends hangs up and waits for it, at most two seconds. `serve` should
    /// return as soon as its stream is closed: where it has not answered in ten seconds at first, it is
    /// hung up on, `build` fails, and a `serve` that does not return keeps its thread.
    ///
    /// What it saves is a process; what it costs is the sandbox around it.
    ///
    /// ```no_run
    /// use std::{path::Path, sync::Arc};
    /// use vhost_backends::block::{BlockDevice, BlockOptions};
    /// use vhost_backends::engine::{FileOptions, RawFile};
    /// use vhost_backends::session;
    ///
    /// let file = RawFile::open(Path::new("disk.img"), FileOptions::default())?;
    /// let device = Arc::new(BlockDevice::new(file, BlockOptions::with_queues(1)));
    /// let disk = vmm_core::BlockConfig::in_process(move |stream| session::serve(&*device, stream));
    /// # let _ = disk;
    /// # Ok::<(), std::io::Error>(())
    /// ```
    pub fn in_process(
        serve: impl Fn(UnixStream) -> io::Result<()> + Send + Sync + 'static,
    ) -> DeviceConfig<M> {
        DeviceConfig::new(Source::InProcess(Arc::new(serve)))
    }

    /// The name that the guest sees: up to 32 bytes of UTF-8; "disk" or "net" if none is given.
    pub fn name(mut self, name: impl Into<String>) -> DeviceConfig<M> {
        self.name = name.into();
        self
    }

    /// Most entries in each queue, a power of two up to 1024; 256 if none is given.
    pub fn queue_size(mut self, size: u16) -> DeviceConfig<M> {
        self.queue_size = size;
        self
    }

    /// Bytes of the arena in which rings and buffers lie; rounded up to 2 MiB, 8 MiB if none given.
    pub fn arena(mut self, bytes: u64) -> DeviceConfig<M> {
        self.arena = bytes;
        self
    }

    /// The same, whatever the kind.
    pub(crate) fn any(self) -> Remote {
        DeviceConfig {
            source: self.source,
            name: self.name,
            queue_size: self.queue_size,
            arena: self.arena,
            model: Arc::new(self.model),
        }
    }
}

fn default_name(kind: u32) -> &'static str {
    match kind {
        pv_abi::device::kind::NET => "net",
        _ => "disk",
    }
}

/// A device of any kind, and its backend.
pub(crate) type Remote = DeviceConfig<Arc<dyn Model>>;
