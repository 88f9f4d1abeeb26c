//! The block device (virtio 1.3 §5.2) over vhost-user: another process serves its queues.
//!
//! [`link`] keeps a backend behind the device: it spawns or connects, shakes hands, notices loss
//! and starts over. [`frontend`] turns activation and reset into vhost-user messages. The memory
//! table that a backend gets holds this device's arena and nothing else.

mod deadline;
mod frontend;
pub(crate) mod link;
mod spawn;

use crate::limits::DEFAULT_ARENA;
use std::path::PathBuf;
use std::process::Command;

pub(crate) use link::Link;

/// How a backend is reached.
pub(crate) enum Source {
    /// The VMM starts the process and supervises it.
    Spawn(Box<dyn Fn() -> Command + Send + Sync>),
    /// Somebody else runs it; this is its listening socket.
    Socket(PathBuf),
}

/// A block device and the vhost-user backend that serves it.
pub struct BlockConfig {
    pub(crate) source: Source,
    pub(crate) name: String,
    pub(crate) queues: u16,
    pub(crate) queue_size: u16,
    pub(crate) arena: u64,
}

impl std::fmt::Debug for BlockConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let source = match &self.source {
            Source::Spawn(_) => "spawned".to_owned(),
            Source::Socket(path) => path.display().to_string(),
        };
        f.debug_struct("BlockConfig")
            .field("source", &source)
            .field("name", &self.name)
            .field("queues", &self.queues)
            .field("arena", &self.arena)
            .finish_non_exhaustive()
    }
}

impl BlockConfig {
    fn new(source: Source) -> BlockConfig {
        BlockConfig {
            source,
            name: "disk".into(),
            queues: 1,
            queue_size: 256,
            arena: DEFAULT_ARENA,
        }
    }

    /// A backend that the VMM starts, supervises, and starts again when it dies.
    ///
    /// `command` makes the command each time; `--fd 3`, a connected vhost-user socket, is added to
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
    pub fn spawn(command: impl Fn() -> Command + Send + Sync + 'static) -> BlockConfig {
        BlockConfig::new(Source::Spawn(Box::new(command)))
    }

    /// A backend that somebody else runs and that listens on this socket.
    ///
    /// It must have stopped touching the old queues before it accepts a new connection (`pv-blkd`
    /// drains first), because the guest's requests are submitted again then.
    pub fn socket(path: impl Into<PathBuf>) -> BlockConfig {
        BlockConfig::new(Source::Socket(path.into()))
    }

    /// The name that the guest sees: up to 32 bytes of UTF-8, "disk" if none is given.
    pub fn name(mut self, name: impl Into<String>) -> BlockConfig {
        self.name = name.into();
        self
    }

    /// Queues, 1 to 32; 1 if none is given. The backend must serve as many.
    pub fn queues(mut self, queues: u16) -> BlockConfig {
        self.queues = queues;
        self
    }

    /// Most entries in each queue, a power of two up to 1024; 256 if none is given.
    pub fn queue_size(mut self, size: u16) -> BlockConfig {
        self.queue_size = size;
        self
    }

    /// Bytes of the arena in which rings and buffers lie; rounded up to 2 MiB, 8 MiB if none given.
    pub fn arena(mut self, bytes: u64) -> BlockConfig {
        self.arena = bytes;
        self
    }
}
