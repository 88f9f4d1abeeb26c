//! qcow2 images with backing files, through the crate `imago`.
//!
//! An image names other files. A backing file is opened, never for writing; the chain of them
//! has a limit. Nothing is guessed about the image itself: it is qcow2 because its owner said so.
//!
//! Where blocks are is known from tables, which are kept in memory. Whatever changes them is over once
//! they are in the file too, as data is: a guest goes on, and knows nothing of it, after this process
//! was killed. Only a flush waits for the medium.

use super::file::check_kind;
use super::overlay::check_base;
use super::{BlockingDisk, FileOptions, Geometry};
use crate::limits::MAX_BACKING_DEPTH;
use imago::file::File;
use imago::format::Format;
use imago::format::gate::ImplicitOpenGate;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatDriverBuilder, Storage, StorageOpenOptions};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// A qcow2 image.
#[derive(Debug)]
pub struct Qcow2Disk {
    /// Changes of what is allocated where, other than by writing, exclude everything else.
    image: RwLock<FormatAccess<File>>,
    read_only: bool,
    tables: Tables,
}

/// How far the tables of an image are in its file.
#[derive(Debug, Default)]
struct Tables {
    /// Requests that may have changed them.
    changes: AtomicU64,
    /// How many of these are in the file.
    stored: Mutex<u64>,
}

impl Tables {
    /// The caller has changed them: returns when that is in the file. Several that come at a time are
    /// stored together.
    fn store(&self, image: &FormatAccess<File>) -> io::Result<()> {
        // Ordering: Release, with the Acquire of who stores: what is counted there was changed.
        let own = self.changes.fetch_add(1, Ordering::Release) + 1;
        let mut stored = self.stored.lock().unwrap_or_else(PoisonError::into_inner);
        if *stored < own {
            let all = self.changes.load(Ordering::Acquire);
            image.flush()?;
            *stored = all;
        }
        Ok(())
    }
}

impl Qcow2Disk {
    /// Opens an image and its backing files.
    pub fn open(path: &Path, options: FileOptions) -> io::Result<Qcow2Disk> {
        Qcow2Disk::open_on(path, None, options)
    }

    /// Opens an overlay on this base, which must be the one that it names, unless that is gone.
    pub fn open_overlay(
        path: &Path,
        base: &Path,
        qcow2: bool,
        options: FileOptions,
    ) -> io::Result<Qcow2Disk> {
        let format = if qcow2 { Format::Qcow2 } else { Format::Raw };
        Qcow2Disk::open_on(path, Some((base, format)), options)
    }

    fn open_on(
        path: &Path,
        base: Option<(&Path, Format)>,
        options: FileOptions,
    ) -> io::Result<Qcow2Disk> {
        check_kind(path)?;
        super::qcow2_check::check(&std::fs::File::open(path)?)?;
        let open = || {
            let how = StorageOpenOptions::new().direct(options.direct);
            // By hand: what the gate opens is never written.
            let file = File::open(how.clone().filename(path).write(!options.read_only))?;
            let mut builder = Qcow2::<File>::builder(file)
                .write(!options.read_only)
                .storage_open_options(how);
            if let Some((base, format)) = base {
                builder = builder.backing_path(base, format);
            }
            let image = builder.open(Gate { depth: 0 })?;
            if let Some((base, format)) = base {
                check_base(&image, path, base, format)?;
            }
            Ok::<_, io::Error>(image)
        };
        // The image's bytes are not trusted, and its parser is not ours.
        let image = catch_unwind(AssertUnwindSafe(open))
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "the image is malformed"))??;
        Ok(Qcow2Disk {
            image: RwLock::new(FormatAccess::new(image)),
            read_only: options.read_only,
            tables: Tables::default(),
        })
    }

    fn shared(&self) -> RwLockReadGuard<'_, FormatAccess<File>> {
        self.image.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn alone(&self) -> RwLockWriteGuard<'_, FormatAccess<File>> {
        self.image.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BlockingDisk for Qcow2Disk {
    fn geometry(&self) -> Geometry {
        let image = self.shared();
        let align = u32::try_from(image.req_align()).unwrap_or(0);
        let block = if align.is_power_of_two() {
            align.max(512)
        } else {
            512
        };
        Geometry {
            logical_block: block,
            physical_block: block.max(4096),
            ..Geometry::plain(image.size())
        }
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.shared().read(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let image = self.shared();
        image.write(buf, offset)?;
        self.tables.store(&image)
    }

    fn flush(&self) -> io::Result<()> {
        let image = self.shared();
        image.flush()?;
        image.sync()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut image = self.alone();
        match image.discard_to_any(offset, len) {
            // A hint.
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
            result => result.and_then(|()| self.tables.store(&image)),
        }
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        if unmap {
            let mut image = self.alone();
            image.discard_to_zero(offset, len)?;
            self.tables.store(&image)
        } else {
            let image = self.shared();
            image.write_zeroes(offset, len)?;
            self.tables.store(&image)
        }
    }
}

/// Decides about files that an image names.
struct Gate {
    depth: u32,
}

impl ImplicitOpenGate<File> for Gate {
    fn open_format<F: FormatDriverBuilder<File>>(
        &mut self,
        builder: F,
    ) -> io::Result<FormatAccess<File>> {
        if self.depth >= MAX_BACKING_DEPTH {
            return Err(io::Error::other("too many backing files; is there a loop?"));
        }
        let builder = builder.write(false);
        if !matches!(F::FORMAT, Format::Qcow2 | Format::Raw) {
            return Err(io::Error::other("a backing file is neither raw nor qcow2"));
        }
        if F::FORMAT == Format::Qcow2 {
            // Opened by its storage already; where it is known by path, its tables are checked.
            if let Some(path) = builder.get_image_path() {
                check_kind(&path)?;
                super::qcow2_check::check(&std::fs::File::open(path)?)?;
            }
        }
        let below = Gate {
            depth: self.depth + 1,
        };
        Ok(FormatAccess::new(builder.open(below)?))
    }

    fn open_storage(&mut self, options: StorageOpenOptions) -> io::Result<File> {
        let path = options
            .get_filename()
            .ok_or_else(|| io::Error::other("a file without a name"))?;
        check_kind(path)?;
        File::open(options.write(false))
    }
}
