//! Which disk is served.

use super::lock::{ImageLock, Use};
use crate::daemon::connector::Connector;
use crate::engine::{
    BlockingStore, FileOptions, MemoryStore, NbdAddress, NbdStore, NullStore, Qcow2Disk, RawFile,
    Store, create_overlay,
};
use crate::limits::{HANDOVER_STOP_SECS, NBD_HANDSHAKE_SECS, NBD_RETRY_SECS};
use clap::{Args, ValueEnum};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Where the disk's bytes are.
#[derive(Args, Clone, Debug)]
#[group(multiple = false)]
pub(super) struct DiskArgs {
    /// The disk image: a raw file, a block device, or what --format says.
    #[arg(long, value_name = "PATH")]
    blk_file: Option<PathBuf>,
    /// An export of an NBD server: unix:PATH or unix:PATH:EXPORT.
    #[arg(long, value_name = "ADDRESS")]
    nbd: Option<NbdAddress>,
    /// A disk of this size in memory, gone with the program (512M, 4G).
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    memory: Option<u64>,
    /// A disk of this size that forgets what is written (512M, 4G).
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    null: Option<u64>,
}

/// How the disk is used.
#[derive(Args, Clone, Debug)]
pub(super) struct UseArgs {
    /// The image's format. It is never guessed: a guest could write another one's header.
    #[arg(long, value_enum, default_value_t, requires = "blk_file")]
    format: ImageFormat,
    /// Keep writes in this qcow2 file, and --blk-file as it is; made if it is not there.
    #[arg(long, value_name = "PATH", requires = "blk_file")]
    overlay: Option<PathBuf>,
    /// Refuse writes, and tell the guest so.
    #[arg(long)]
    pub(super) read_only: bool,
    /// Past the host's page cache (O_DIRECT).
    #[arg(long)]
    pub(super) direct: bool,
    /// Seconds that requests wait for an NBD server that is gone; then they are I/O errors. 60 if
    /// not given.
    #[arg(long, value_name = "SECONDS")]
    nbd_retry: Option<u64>,
    /// Do not ask whether another program uses the image, nor tell any that this one does.
    #[arg(long)]
    no_lock: bool,
}

/// A disk that was opened.
pub(super) struct Opened {
    pub(super) store: Arc<dyn Store>,
    /// The raw image that it is, if it is one.
    pub(super) raw: Option<Arc<RawFile>>,
    /// What keeps others from its images.
    pub(super) locks: Vec<ImageLock>,
    /// What it is, for another process to take it over; or why none can.
    pub(super) identity: Result<String, &'static str>,
}

impl Opened {
    fn new(store: Arc<dyn Store>, identity: Result<String, &'static str>) -> Opened {
        let locks = Vec::new();
        Opened {
            store,
            raw: None,
            locks,
            identity,
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum ImageFormat {
    /// The bytes of the disk, one after the other.
    #[default]
    Raw,
    /// QEMU's image format, versions 2 and 3, with backing files.
    Qcow2,
}

/// A number of bytes, with K, M, G or T for powers of 1024.
fn parse_size(text: &str) -> Result<u64, String> {
    let split = text.len() - usize::from(text.ends_with(|c: char| c.is_ascii_alphabetic()));
    let (number, unit) = text.split_at(split);
    let shift = match unit {
        "" => 0,
        "k" | "K" => 10,
        "m" | "M" => 20,
        "g" | "G" => 30,
        "t" | "T" => 40,
        _ => return Err("the unit is not K, M, G or T".into()),
    };
    let number: u64 = number.parse().map_err(|error| format!("{error}"))?;
    number
        .checked_mul(1 << shift)
        .filter(|bytes| i64::try_from(*bytes).is_ok())
        .ok_or_else(|| "too large".into())
}

impl DiskArgs {
    /// Whether any disk was named.
    pub(super) fn is_given(&self) -> bool {
        self.blk_file.is_some()
            || self.nbd.is_some()
            || self.memory.is_some()
            || self.null.is_some()
    }

    /// Opens it. `taking_over`: another process holds its locks, and will hand them over. The error
    /// is a sentence.
    pub(super) fn open(
        &self,
        how: &UseArgs,
        queues: u16,
        taking_over: bool,
    ) -> Result<Opened, String> {
        let options = FileOptions {
            read_only: how.read_only,
            direct: how.direct,
        };
        how.check(self)?;
        if let Some(path) = &self.blk_file {
            return match &how.overlay {
                _ if taking_over && !how.is_plain() => Err(IN_MEMORY.into()),
                Some(overlay) => open_overlay(overlay, path, how, options),
                None => open_image(path, how, options, taking_over),
            };
        }
        if let Some(address) = &self.nbd {
            // Whoever waits for an upgrade waits no longer than that for a disk of the old daemon.
            let patience = match taking_over {
                true => HANDOVER_STOP_SECS,
                false => NBD_HANDSHAKE_SECS,
            };
            let patience = Duration::from_secs(patience);
            let store = NbdStore::connect_within(patience, address.clone(), queues, how.read_only);
            let store = store.map_err(|error| {
                let shown = address.socket.display();
                format!("cannot use the NBD server at {shown}: {}", chained(&error))
            })?;
            let several = store.max_queues().is_none();
            let store = how.redialling(store, address)?;
            let identity = if several {
                Ok(format!("nbd {address:?}"))
            } else {
                Err("the NBD server allows one connection only")
            };
            return Ok(Opened::new(Arc::new(store), identity));
        }
        if let Some(bytes) = self.memory {
            let store = MemoryStore::new(bytes)
                .map_err(|error| format!("cannot make a disk in memory: {error}"))?;
            let identity = Err("a disk in memory is gone with its process");
            return Ok(Opened::new(Arc::new(store), identity));
        }
        match self.null {
            Some(bytes) => Ok(Opened::new(
                Arc::new(NullStore::new(bytes)),
                Ok(format!("null {bytes}")),
            )),
            None => Err(
                "--blk-file is needed, or --nbd, --memory or --null: which disk to serve".into(),
            ),
        }
    }
}

impl UseArgs {
    /// Whether all of it means something for this disk. The error is a sentence.
    fn check(&self, disk: &DiskArgs) -> Result<(), String> {
        let (file, nbd) = (disk.blk_file.is_some(), disk.nbd.is_some());
        // What is given, whether it means something, and for what it does.
        for (given, fits, flag, with) in [
            (self.format != ImageFormat::Raw, file, "--format", FILE),
            (self.overlay.is_some(), file, "--overlay", FILE),
            (
                self.read_only,
                file || nbd,
                "--read-only",
                "--blk-file or --nbd",
            ),
            (self.direct, file, "--direct", FILE),
            (self.no_lock, file, "--no-lock", FILE),
            (self.nbd_retry.is_some(), nbd, "--nbd-retry", "--nbd"),
        ] {
            if given && !fits && disk.is_given() {
                return Err(format!("{flag} is of no use without {with}"));
            }
        }
        Ok(())
    }

    /// From inside the sandbox, only another process can connect once more.
    fn redialling(&self, store: NbdStore, address: &NbdAddress) -> Result<NbdStore, String> {
        let seconds = self.nbd_retry.unwrap_or(NBD_RETRY_SECS);
        if seconds == 0 {
            return Ok(store);
        }
        let connector = Connector::start(&address.socket)
            .map_err(|error| format!("cannot start a process: {error}"))?;
        let patience = Duration::from_secs(seconds);
        Ok(store.redialling(move || connector.connect(), patience))
    }

    /// Locks an image, and the files under it if it is one of qcow2.
    fn lock(&self, path: &Path, how: Use, qcow2: bool) -> Result<Vec<ImageLock>, String> {
        if self.no_lock {
            return Ok(Vec::new());
        }
        let mut locks = Vec::from_iter(ImageLock::take(path, how)?);
        if qcow2 {
            locks.extend(ImageLock::take_backing(path)?);
        }
        Ok(locks)
    }

    /// A raw image by itself.
    fn is_plain(&self) -> bool {
        self.format == ImageFormat::Raw && self.overlay.is_none()
    }

    fn own(&self) -> Use {
        if self.read_only {
            Use::Read
        } else {
            Use::Write
        }
    }
}

/// The flag that names a file.
const FILE: &str = "--blk-file";
/// Parts of such an image are in this process's memory alone.
const IN_MEMORY: &str = "qcow2 images and overlays are not handed from process to process";

fn open_image(
    path: &Path,
    how: &UseArgs,
    options: FileOptions,
    taking_over: bool,
) -> Result<Opened, String> {
    let locks = if taking_over && !how.no_lock {
        vec![ImageLock::later(path, how.own())?]
    } else {
        how.lock(path, how.own(), how.format == ImageFormat::Qcow2)?
    };
    type Image = (Arc<dyn Store>, Option<Arc<RawFile>>);
    let store: std::io::Result<Image> = match how.format {
        ImageFormat::Raw => RawFile::open(path, options).map(|file| {
            let file = Arc::new(file);
            (Arc::clone(&file) as _, Some(file))
        }),
        ImageFormat::Qcow2 => Qcow2Disk::open(path, options)
            .map(|disk| (Arc::new(BlockingStore::new(disk)) as _, None)),
    };
    let identity = std::fs::metadata(path).map(|m| format!("image {}:{}", m.dev(), m.ino()));
    match store.and_then(|store| Ok((store, identity?))) {
        Ok(((store, raw), identity)) => Ok(Opened {
            store,
            raw,
            locks,
            identity: if how.is_plain() {
                Ok(identity)
            } else {
                Err(IN_MEMORY)
            },
        }),
        Err(error) => Err(format!(
            "cannot open the disk image {}: {error}",
            path.display()
        )),
    }
}

fn open_overlay(
    overlay: &Path,
    base: &Path,
    how: &UseArgs,
    options: FileOptions,
) -> Result<Opened, String> {
    let qcow2 = how.format == ImageFormat::Qcow2;
    let cannot = |what: &str, error: std::io::Error| {
        let (overlay, base) = (overlay.display(), base.display());
        format!("cannot {what} the overlay {overlay} on {base}: {error}")
    };
    let mut locks = how.lock(base, Use::Read, qcow2)?;
    if !overlay.exists() {
        match create_overlay(overlay, base, qcow2) {
            // By another program meanwhile, which has the lock or has gone.
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            made => made.map_err(|error| cannot("make", error))?,
        }
    }
    locks.extend(how.lock(overlay, how.own(), false)?);
    match Qcow2Disk::open_overlay(overlay, base, qcow2, options) {
        Ok(disk) => Ok(Opened {
            store: Arc::new(BlockingStore::new(disk)),
            raw: None,
            locks,
            identity: Err(IN_MEMORY),
        }),
        Err(error) => Err(cannot("open", error)),
    }
}

fn chained(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_size("3M"), Ok(3 << 20));
        assert_eq!(parse_size("1T"), Ok(1 << 40));
        for bad in [
            "",
            "M",
            "-1",
            "1X",
            "99999999999T",
            "9223372036854775808",
            "1é",
        ] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }
}
