//! Where an image lies: under a name to be kept, or without one for as long as it is needed.
//!
//! In comes where it is to be, out goes a file to pack into, and then a path for the backend. What
//! has a name has it from the moment on which the image is whole, and a file without one is gone
//! with its process, however that ends.

use anyhow::{Context, Result, bail};
use std::ffi::OsString;
use std::fs::{self, File, TryLockError};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use tempfile::TempPath;

/// Attempts to replace what an earlier run has left: each one fails only when another run is quicker.
const ATTEMPTS: usize = 3;

/// A whole image.
#[derive(Debug)]
pub struct Place {
    path: PathBuf,
    _scratch: Option<Scratch>,
}

/// What the image is lost with.
#[derive(Debug)]
struct Scratch {
    _name: Option<TempPath>,
    _file: File,
}

impl Place {
    /// An image that is there.
    pub fn existing(path: &Path) -> Self {
        Place {
            path: path.into(),
            _scratch: None,
        }
    }

    /// Where other programs of this user find it, for as long as this exists.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// An image in the making: lost when this is dropped.
#[derive(Debug)]
pub struct Draft {
    // Removed before the file's lock is.
    name: Option<TempPath>,
    goal: PathBuf,
    kept: bool,
    file: File,
}

impl Draft {
    /// One that will be scratch.
    ///
    /// # Errors
    ///
    /// When the folder for temporary files takes none.
    pub fn scratch() -> Result<Draft> {
        let unnamed = tempfile::tempfile().ok();
        let draft = unnamed.and_then(|file| Draft::unnamed(file).ok());
        draft.map_or_else(Draft::named, Ok)
    }

    /// In a file without a name, where others can open such a one.
    fn unnamed(file: File) -> io::Result<Draft> {
        let goal = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
        let again = File::options().read(true).write(true).open(&goal)?;
        if !same(&again.metadata()?, &file.metadata()?) {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(Draft {
            name: None,
            goal: goal.into(),
            kept: false,
            file,
        })
    }

    /// For file systems that lose a file with its name, and where /proc is another one's.
    fn named() -> Result<Draft> {
        let scratch = tempfile::NamedTempFile::with_prefix("paravane-quickstart-");
        let scratch = scratch.context("cannot make a temporary file for the disk image")?;
        let (file, name) = scratch.into_parts();
        Ok(Draft {
            goal: name.to_path_buf(),
            name: Some(name),
            kept: false,
            file,
        })
    }

    /// One that will be kept at `path`, which it gets once it is whole; `PATH.partial` before.
    ///
    /// # Errors
    ///
    /// When there is something at `path`, when another run is making the same image, and when the
    /// folder cannot be written.
    pub fn kept(path: &Path) -> Result<Draft> {
        if path.symlink_metadata().is_ok() {
            bail!("{} exists: remove it", path.display());
        }
        let mut partial = OsString::from(path);
        partial.push(".partial");
        let partial = PathBuf::from(partial);
        let busy = || format!("another run is making {}", path.display());
        for _ in 0..ATTEMPTS {
            let made = File::options()
                .read(true)
                .write(true)
                .create_new(true)
                .open(&partial);
            let file = match made {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    clear(&partial).with_context(busy)?;
                    continue;
                }
                Err(error) => {
                    return Err(error).with_context(|| format!("cannot create {}", path.display()));
                }
            };
            // Another run may have taken it for a leftover before it was locked.
            if !lock(&file)? || !still_there(&partial, &file) {
                bail!(busy());
            }
            let name = TempPath::try_from_path(&partial)?;
            return Ok(Draft {
                name: Some(name),
                goal: path.into(),
                kept: true,
                file,
            });
        }
        bail!(busy())
    }

    /// What to pack into.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The image is whole.
    ///
    /// # Errors
    ///
    /// When its name has been taken meanwhile, or the disk fails.
    pub fn finish(self) -> Result<Place> {
        let Draft {
            name,
            goal,
            kept,
            file,
        } = self;
        match name {
            Some(name) if kept => {
                let error = || format!("cannot keep {}", goal.display());
                // A name that survives a power failure must not stand for bytes that do not.
                file.sync_all().with_context(error)?;
                let named = name.persist_noclobber(&goal).map_err(|failed| failed.error);
                named.with_context(error)?;
                Ok(Place::existing(&goal))
            }
            name => Ok(Place {
                path: goal,
                _scratch: Some(Scratch {
                    _name: name,
                    _file: file,
                }),
            }),
        }
    }
}

/// Removes what an earlier run has left, unless that run goes on.
fn clear(partial: &Path) -> Result<()> {
    let found = match partial.symlink_metadata() {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    if !found.is_file() {
        bail!("{} is not a file: remove it", partial.display());
    }
    let file = match File::open(partial) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).with_context(|| format!("{}", partial.display())),
    };
    if !lock(&file)? {
        bail!("{} is in use", partial.display());
    }
    if still_there(partial, &file) {
        fs::remove_file(partial).with_context(|| format!("{}", partial.display()))?;
    }
    Ok(())
}

/// Whether nobody else has the file; where files cannot be locked, that is believed.
fn lock(file: &File) -> io::Result<bool> {
    match file.try_lock() {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => Ok(true),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

fn still_there(path: &Path, file: &File) -> bool {
    match (path.symlink_metadata(), file.metadata()) {
        (Ok(named), Ok(opened)) => same(&named, &opened),
        _ => false,
    }
}

fn same(a: &fs::Metadata, b: &fs::Metadata) -> bool {
    (a.dev(), a.ino()) == (b.dev(), b.ino())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn names(dir: &Path) -> Vec<OsString> {
        let entries = fs::read_dir(dir).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_kept_image_has_its_name_when_it_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        fs::write(dir.path().join("disk.img.partial"), "left over, and longer").unwrap();
        let draft = Draft::kept(&path).unwrap();
        draft.file().write_all(b"whole").unwrap();
        assert_eq!(names(dir.path()), ["disk.img.partial"]);
        let said = format!("{:#}", Draft::kept(&path).unwrap_err());
        assert!(said.contains("another run is making"), "{said}");
        let place = draft.finish().unwrap();
        assert_eq!(names(dir.path()), ["disk.img"]);
        assert_eq!(fs::read(place.path()).unwrap(), b"whole");
        drop(place);
        assert_eq!(names(dir.path()), ["disk.img"]);
        Draft::kept(&path).unwrap_err();
    }

    #[test]
    fn a_draft_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        drop(Draft::kept(&path).unwrap());
        assert!(names(dir.path()).is_empty());
        // A name that was taken meanwhile is not taken over.
        let draft = Draft::kept(&path).unwrap();
        fs::write(&path, "somebody's").unwrap();
        draft.finish().unwrap_err();
        assert_eq!(names(dir.path()), ["disk.img"]);
        assert_eq!(fs::read(&path).unwrap(), b"somebody's");
    }

    #[test]
    fn what_is_no_leftover_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        let partial = dir.path().join("disk.img.partial");
        let other = dir.path().join("other");
        fs::write(&other, "somebody's").unwrap();
        std::os::unix::fs::symlink(&other, &partial).unwrap();
        let said = format!("{:#}", Draft::kept(&path).unwrap_err());
        assert!(said.contains("is not a file: remove it"), "{said}");
        assert_eq!(fs::read(&other).unwrap(), b"somebody's");
        assert_eq!(names(dir.path()), ["disk.img.partial", "other"]);
    }

    #[test]
    fn scratch_is_found_by_path_and_gone_with_its_owner() {
        for draft in [Draft::scratch().unwrap(), Draft::named().unwrap()] {
            draft.file().write_all(b"scratch").unwrap();
            let place = draft.finish().unwrap();
            let path = place.path().to_path_buf();
            assert_eq!(fs::read(&path).unwrap(), b"scratch");
            drop(place);
            File::open(&path).unwrap_err();
        }
    }
}
