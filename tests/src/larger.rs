//! A disk that is made larger while a guest uses it, whoever serves it.

use crate::{Backend, block_device, disk, patience};
use anyhow::{Context, anyhow, ensure};
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use vhost_backends::block::BlockDevice;
use vhost_backends::session;
use vmm_core::BlockConfig;

/// What makes a disk larger.
pub struct Larger {
    image: PathBuf,
    told: Told,
    growing: Mutex<Option<JoinHandle<anyhow::Result<String>>>>,
}

impl std::fmt::Debug for Larger {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Larger { image, .. } = self;
        f.debug_struct("Larger")
            .field("image", image)
            .finish_non_exhaustive()
    }
}

/// Who is told that the image has grown.
enum Told {
    /// The daemon behind this control socket.
    Daemon(PathBuf),
    /// The device in this process.
    Device(Arc<BlockDevice>),
}

impl Larger {
    /// A disk, and what makes it larger.
    ///
    /// # Errors
    /// When the image cannot be opened.
    pub fn disk(backend: Backend, image: &Path) -> anyhow::Result<(BlockConfig, Arc<Larger>)> {
        let (config, told) = match backend {
            Backend::Process => {
                let control = image.with_extension("control");
                let path = control.to_str().context("a plain path")?;
                let config = disk(image, &["--control-socket", path]);
                (config, Told::Daemon(control))
            }
            Backend::InProcess => {
                let device = block_device(image, false)?;
                let served = Arc::clone(&device);
                let serve = move |stream| session::serve(&*served, stream);
                let config = BlockConfig::in_process(serve).queues(2);
                (config, Told::Device(device))
            }
        };
        let larger = Larger {
            image: image.to_owned(),
            told,
            growing: Mutex::default(),
        };
        Ok((config, Arc::new(larger)))
    }

    /// Begins to make the disk so many bytes, and does not wait for it.
    pub fn begin(self: &Arc<Self>, len: u64) {
        let larger = Arc::clone(self);
        let thread = std::thread::spawn(move || larger.grow(len));
        if let Ok(mut growing) = self.growing.lock() {
            *growing = Some(thread);
        }
    }

    /// What the backend said about it, once it has.
    ///
    /// # Errors
    /// When nobody has begun, or the backend refused, or did not answer in time.
    pub fn said(&self) -> anyhow::Result<String> {
        let thread = self.growing.lock().ok().and_then(|mut slot| slot.take());
        let outcome = thread.context("nobody has begun")?.join();
        outcome.map_err(|_| anyhow!("a panic"))?
    }

    fn grow(&self, len: u64) -> anyhow::Result<String> {
        let image = File::options().write(true).open(&self.image)?;
        image.set_len(len)?;
        match &self.told {
            Told::Device(device) => Ok(device.resize()?.to_string()),
            Told::Daemon(control) => {
                let mut stream = UnixStream::connect(control)?;
                stream.set_read_timeout(Some(patience(30)))?;
                stream.write_all(b"PUT /disks/disk0/resize HTTP/1.0\r\n\r\n")?;
                let mut answer = String::new();
                stream.read_to_string(&mut answer)?;
                ensure!(answer.starts_with("HTTP/1.0 200 "), "{answer}");
                Ok(answer)
            }
        }
    }
}
