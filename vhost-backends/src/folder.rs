//! The lock of a folder: what several programs of this crate do with the names in it, they do one
//! after the other.
//!
//! It is an advisory lock on the folder itself, so no file is left of it. Other programs neither take
//! nor know it.

use crate::limits::{FOLDER_LOCK_MILLIS, LOCK_RETRY_MILLIS};
use std::fs::{File, TryLockError};
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

/// Holds a folder while this exists, where the host has such locks.
#[derive(Debug)]
pub(crate) struct FolderLock(Option<File>);

impl FolderLock {
    /// Locks the folder of this file. Where that cannot be opened or has no locks, there is none.
    ///
    /// # Errors
    /// [`io::ErrorKind::TimedOut`]: another program has held it for [`FOLDER_LOCK_MILLIS`].
    pub(crate) fn around(path: &Path) -> io::Result<FolderLock> {
        let Ok(folder) = File::open(folder_of(path)) else {
            return Ok(FolderLock(None));
        };
        let deadline = Instant::now() + Duration::from_millis(FOLDER_LOCK_MILLIS);
        loop {
            match folder.try_lock() {
                Ok(()) => return Ok(FolderLock(Some(folder))),
                Err(TryLockError::Error(_)) => return Ok(FolderLock(None)),
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(LOCK_RETRY_MILLIS));
                }
                Err(TryLockError::WouldBlock) => {
                    return Err(io::Error::new(
                        io::ErrorKind::TimedOut,
                        "another program has locked its folder",
                    ));
                }
            }
        }
    }

    /// Makes what was done to names in the folder last, where it can be opened.
    pub(crate) fn sync(&self) -> io::Result<()> {
        self.0.as_ref().map_or(Ok(()), File::sync_all)
    }
}

/// The folder that a file is in.
pub(crate) fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_after_the_other_and_not_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let first = FolderLock::around(&path).unwrap();
        let refused = FolderLock::around(&path).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::TimedOut);
        let second = std::thread::scope(|scope| {
            let waiting = scope.spawn(|| FolderLock::around(&path).map(drop));
            std::thread::sleep(Duration::from_millis(50));
            drop(first);
            waiting.join().unwrap()
        });
        second.unwrap();
        // Where there is no folder, whoever uses it finds out.
        FolderLock::around(Path::new("/nonexistent/file")).unwrap();
        assert_eq!(folder_of(Path::new("file")), Path::new("."));
        assert_eq!(folder_of(Path::new("/a/file")), Path::new("/a"));
    }
}
