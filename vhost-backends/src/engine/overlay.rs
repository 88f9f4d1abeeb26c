//! Overlays: qcow2 images that hold what differs from a base, which they name.
//!
//! One is made under another name first, so that a file with its own name is whole whatever happens
//! meanwhile. One is opened on the base that it was made on, and on no other: blocks that it does not
//! hold would be another disk's.

use super::{BlockingDisk, FileOptions, Qcow2Disk, RawFile};
use crate::folder::{FolderLock, folder_of};
use imago::file::File;
use imago::format::Format;
use imago::qcow2::{Qcow2, Qcow2CreateBuilder};
use imago::{FormatCreateBuilder, Storage, StorageCreateOptions};
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use tracing::subscriber::NoSubscriber;

/// Makes a qcow2 image that holds what differs from `base`, a raw file or a qcow2 image.
/// Fails if there is a file already; what could not be made is not left.
pub fn create_overlay(path: &Path, base: &Path, qcow2: bool) -> io::Result<()> {
    let base = base.canonicalize()?;
    let options = FileOptions {
        read_only: true,
        direct: false,
    };
    let len = if qcow2 {
        Qcow2Disk::open(&base, options)?.geometry().len
    } else {
        RawFile::open(&base, options)?.len()
    };
    // One at a time: the name in the making is always the same, so that of one that was cut short at
    // most one file is left, which the next replaces.
    let folder = FolderLock::around(path)?;
    if path.symlink_metadata().is_ok() {
        return Err(io::ErrorKind::AlreadyExists.into());
    }
    let making = in_the_making(path)?;
    remove_if_there(&making)?;
    let made = create(&making, &base, qcow2, len)
        .and_then(|()| fs::File::open(&making)?.sync_all())
        .and_then(|()| fs::rename(&making, path));
    made.inspect_err(|_| {
        // It was made here, and is no image.
        let _ = remove_if_there(&making);
    })?;
    folder.sync()
}

fn create(path: &Path, base: &Path, qcow2: bool, len: u64) -> io::Result<()> {
    let name = base
        .to_str()
        .ok_or_else(|| io::Error::other("the base's path is not text"))?;
    let file = File::create_open(StorageCreateOptions::new().filename(path).overwrite(false))?;
    let create = || {
        Qcow2CreateBuilder::<File>::new(file)
            .size(len)
            .backing(name.into(), format_name(qcow2).into())
            .create()
    };
    // The error says all: that an image in the making was not flushed is nobody's news.
    tracing::subscriber::with_default(NoSubscriber::new(), create)
}

/// `.NAME.new` beside it.
fn in_the_making(path: &Path) -> io::Result<PathBuf> {
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let mut hidden = OsString::from(".");
    hidden.push(name);
    hidden.push(".new");
    Ok(folder_of(path).join(hidden))
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Refuses an image that was not made on this base. One whose own base is not where it was may have
/// been moved together with it.
pub(super) fn check_base(
    image: &Qcow2<File>,
    path: &Path,
    base: &Path,
    format: Format,
) -> io::Result<()> {
    let refuse = |why: String| Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    let Some(named) = image.implicit_backing_file() else {
        return refuse("it is an image by itself, and was made on no base".into());
    };
    let own = folder_of(path).join(named.strip_prefix("file:").unwrap_or(named));
    let identity = |path: &Path| fs::metadata(path).map(|m| (m.dev(), m.ino()));
    match identity(&own) {
        Ok(own) if own == identity(base)? => {}
        Ok(_) => return refuse(format!("it was made on {}", own.display())),
        Err(error) => tracing::warn!(
            overlay = %path.display(),
            base = %own.display(),
            "the base that an overlay names is not there ({error}); using the one that was given"
        ),
    }
    let given = format_name(format == Format::Qcow2);
    match image.implicit_backing_format().map(String::as_str) {
        None => Ok(()),
        Some(own) if own == given || (own, given) == ("file", "raw") => Ok(()),
        Some(own) => refuse(format!(
            "it was made on a base of the format {own}, not {given} (--format)"
        )),
    }
}

fn format_name(qcow2: bool) -> &'static str {
    if qcow2 { "qcow2" } else { "raw" }
}
