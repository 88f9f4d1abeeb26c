//! Locks on images, byte for byte as QEMU takes them: who writes is alone, readers share.
//!
//! A lock belongs to a description of the image that was opened for it alone, and goes with the
//! last that holds that: this process, one that it was handed to, or the host, which finishes what
//! a killed process left in flight ([`RawFile::hold`]). So whoever gets a lock after a kill meets no
//! late write. Readers do not exclude each other, and are not kept from late reads.
//!
//! [`RawFile::hold`]: crate::engine::RawFile::hold
#![allow(unsafe_code)]
// UNSAFETY: fcntl with a lock, which no safe wrapper among the dependencies takes.

use crate::limits::{LOCK_RETRY_MILLIS, LOCK_WAIT_MILLIS, MAX_BACKING_DEPTH};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// First byte of those that say what a user does, one for each permission.
const DOES: i64 = 100;
/// First byte of those that say what a user does not let others do.
const FORBIDS: i64 = 200;
/// Numbers of permissions: reading what is consistent, and writing.
const READ: i64 = 0;
const WRITE: i64 = 1;

/// What an image is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    /// Read, while nobody writes.
    Read,
    /// Written, by nobody else.
    Write,
}

impl Use {
    /// Permissions that it takes.
    fn does(self) -> &'static [i64] {
        match self {
            Use::Read => &[READ],
            Use::Write => &[READ, WRITE],
        }
    }
}

/// A lock on an image, held while this exists.
#[derive(Debug)]
pub(super) struct ImageLock {
    file: File,
    how: Use,
}

impl ImageLock {
    /// Locks an image. One that is in use may be about to be free: waits a moment for that. `None`
    /// where the file system has no locks. The error is a sentence.
    pub(super) fn take(path: &Path, how: Use) -> Result<Option<ImageLock>, String> {
        let shown = path.display();
        let ImageLock { file, how } = ImageLock::later(path, how)?;
        let deadline = Instant::now() + Duration::from_millis(LOCK_WAIT_MILLIS);
        loop {
            match lock(&file, how) {
                Ok(true) => return Ok(Some(ImageLock { file, how })),
                Ok(false) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(LOCK_RETRY_MILLIS));
                }
                Ok(false) => {
                    return Err(match how {
                        Use::Write => format!(
                            "the disk image {shown} is in use by another program; a writer must \
                             be alone (--read-only shares with readers, --no-lock does not ask)"
                        ),
                        Use::Read => format!(
                            "the disk image {shown} is being written by another program \
                             (--no-lock does not ask)"
                        ),
                    });
                }
                Err(error) => {
                    tracing::warn!("cannot lock the disk image {shown}: {error}");
                    return Ok(None);
                }
            }
        }
    }

    /// A lock that will be another process's.
    pub(super) fn later(path: &Path, how: Use) -> Result<ImageLock, String> {
        match open(path) {
            Ok(file) => Ok(ImageLock { file, how }),
            Err(error) => Err(format!(
                "cannot open the disk image {}: {error}",
                path.display()
            )),
        }
    }

    /// Unlocks for everybody who holds this: nothing is in flight, and nobody goes on.
    pub(super) fn release(&self) {
        // One that was never taken is as good.
        let _ = unlock(&self.file, self.how);
    }

    /// The lock, for another process too.
    pub(super) fn hand_over(&self) -> io::Result<OwnedFd> {
        Ok(self.file.try_clone()?.into())
    }

    /// Takes the lock that another process held on the same image, or one of its own if there was
    /// none. A file system without locks is no hindrance, as it is none at a fresh start. The error
    /// is a sentence.
    pub(super) fn take_over(&mut self, held: &[File]) -> Result<(), String> {
        let cannot = |error: io::Error| format!("cannot lock the disk image: {error}");
        let identity = |file: &File| file.metadata().map(|m| (m.dev(), m.ino()));
        let ours = identity(&self.file).map_err(cannot)?;
        for file in held {
            if identity(file).map_err(cannot)? == ours {
                self.file = file.try_clone().map_err(cannot)?;
                return Ok(());
            }
        }
        match lock(&self.file, self.how) {
            Ok(true) => Ok(()),
            Ok(false) => Err("the disk image is in use by another program".into()),
            Err(error) => {
                tracing::warn!("cannot lock the disk image: {error}");
                Ok(())
            }
        }
    }

    /// Locks a qcow2 image's backing files, which are only read, down to the last.
    pub(super) fn take_backing(image: &Path) -> Result<Vec<ImageLock>, String> {
        let mut locks = Vec::new();
        let mut next = backing_of(image);
        while let Some(path) = next.filter(|_| locks.len() < MAX_BACKING_DEPTH as usize) {
            locks.extend(ImageLock::take(&path, Use::Read)?);
            next = backing_of(&path);
        }
        Ok(locks)
    }
}

/// Opens what may not be an image at all: a pipe would be waited for.
fn open(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    options.read(true).custom_flags(flags).open(path)
}

/// The file that a qcow2 image names as its base, if it is one and names a file.
fn backing_of(image: &Path) -> Option<PathBuf> {
    let file = open(image).ok()?;
    let mut header = [0; 20];
    file.read_exact_at(&mut header, 0).ok()?;
    let [b'Q', b'F', b'I', 0xfb, _, _, _, _, at @ .., l0, l1, l2, l3] = header else {
        return None;
    };
    let len = u32::from_be_bytes([l0, l1, l2, l3]);
    // The format's own limit.
    let mut name = vec![
        0;
        usize::try_from(len)
            .ok()
            .filter(|len| (1..1024).contains(len))?
    ];
    file.read_exact_at(&mut name, u64::from_be_bytes(at)).ok()?;
    let name = String::from_utf8(name).ok()?;
    let folder = image.parent()?;
    let path = folder.join(name.strip_prefix("file:").unwrap_or(&name));
    path.exists().then_some(path)
}

/// Whether the lock was taken.
fn lock(file: &File, how: Use) -> io::Result<bool> {
    let does = how.does();
    // Said first, asked afterwards: of two that come at once, at least one sees the other.
    for byte in does {
        set(file, DOES + byte, libc::F_RDLCK)?;
    }
    set(file, FORBIDS + WRITE, libc::F_RDLCK)?;
    let mut free = !is_taken(file, DOES + WRITE)?;
    for byte in does {
        free &= !is_taken(file, FORBIDS + byte)?;
    }
    if !free {
        unlock(file, how)?;
    }
    Ok(free)
}

fn unlock(file: &File, how: Use) -> io::Result<()> {
    for byte in how.does() {
        set(file, DOES + byte, libc::F_UNLCK)?;
    }
    set(file, FORBIDS + WRITE, libc::F_UNLCK)
}

fn set(file: &File, byte: i64, kind: libc::c_int) -> io::Result<()> {
    let lock = one_byte(byte, kind);
    // SAFETY: the lock is valid for the call.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether anybody else has locked this byte.
fn is_taken(file: &File, byte: i64) -> io::Result<bool> {
    let mut lock = one_byte(byte, libc::F_WRLCK);
    // SAFETY: the lock is valid for the call, which writes to it.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &mut lock) } {
        0 => Ok(i32::from(lock.l_type) != libc::F_UNLCK),
        _ => Err(io::Error::last_os_error()),
    }
}

fn one_byte(byte: i64, kind: libc::c_int) -> libc::flock {
    libc::flock {
        // The three kinds are 0, 1 and 2.
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writers_are_alone_and_readers_share() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        std::fs::write(&path, [0; 512]).unwrap();
        let open = || open(&path).unwrap();
        for (first, second, both) in [
            (Use::Read, Use::Read, true),
            (Use::Read, Use::Write, false),
            (Use::Write, Use::Read, false),
            (Use::Write, Use::Write, false),
        ] {
            let (a, b) = (open(), open());
            assert!(lock(&a, first).unwrap());
            assert_eq!(lock(&b, second).unwrap(), both, "{first:?} {second:?}");
            // What was refused is no hindrance, and the end of one is the end of its lock.
            drop(b);
            assert!(lock(&a, first).unwrap());
            drop(a);
            assert!(lock(&open(), second).unwrap());
        }
    }

    /// As a killed process leaves it: its descriptors are closed, its ring is being torn down.
    #[test]
    fn a_lock_lasts_as_long_as_what_is_in_flight() {
        use crate::engine::{FileOptions, RawFile, UringEngine, WakeSources};
        use crate::readiness::Event;
        use std::os::fd::AsFd;
        use std::sync::Arc;
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(4096).unwrap();
        let file = RawFile::open(image.path(), FileOptions::default()).unwrap();
        let held = ImageLock::take(image.path(), Use::Write).unwrap().unwrap();
        file.hold(held.hand_over().unwrap());
        let (kick, stop) = (Event::new().unwrap(), Event::new().unwrap());
        let wake = WakeSources {
            kick: kick.as_fd(),
            stop: stop.as_fd(),
        };
        let file = Arc::new(file);
        let memory = Arc::new(vm_memory::GuestMemoryMmap::new());
        let engine = match UringEngine::new(Arc::clone(&file), memory, wake) {
            Ok(engine) => engine,
            Err(error) => return println!("SKIPPED: no io_uring: {error}"),
        };
        file.held().clear();
        drop(held);
        let refused = ImageLock::take(image.path(), Use::Write).unwrap_err();
        assert!(refused.contains("in use"), "{refused}");
        drop(engine);
        assert!(ImageLock::take(image.path(), Use::Write).unwrap().is_some());
        // Where nothing is in flight, it can be given up at once.
        let held = ImageLock::take(image.path(), Use::Write).unwrap().unwrap();
        let _rest = held.hand_over().unwrap();
        held.release();
        let other = open(image.path()).unwrap();
        assert!(lock(&other, Use::Write).unwrap());
    }

    #[test]
    fn an_image_that_cannot_be_locked_is_taken_over() {
        let file = tempfile::NamedTempFile::new().unwrap();
        // Locks are refused on such a descriptor, as by a file system that has none.
        let mut options = File::options();
        let path_only = options.read(true).custom_flags(libc::O_PATH);
        let mut image = ImageLock {
            file: path_only.open(file.path()).unwrap(),
            how: Use::Write,
        };
        assert!(lock(&image.file, image.how).is_err());
        image.take_over(&[]).unwrap();
        let mut image = ImageLock::later(file.path(), Use::Write).unwrap();
        let _other = ImageLock::take(file.path(), Use::Write).unwrap();
        assert!(image.take_over(&[]).unwrap_err().contains("in use"));
    }

    #[test]
    fn a_backing_file_is_found_beside_its_image() {
        let dir = tempfile::tempdir().unwrap();
        let (base, image) = (dir.path().join("base"), dir.path().join("image"));
        std::fs::write(&base, vec![0; 1 << 20]).unwrap();
        crate::engine::create_overlay(&image, &base, false).unwrap();
        assert_eq!(ImageLock::take_backing(&image).unwrap().len(), 1);
        let writer = ImageLock::take(&base, Use::Write).unwrap();
        let refused = ImageLock::take_backing(&image).unwrap_err();
        assert!(refused.contains("being written"), "{refused}");
        drop(writer);
        assert!(ImageLock::take_backing(&base).unwrap().is_empty());
    }
}
