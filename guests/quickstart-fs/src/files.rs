//! Files by their paths, for reading.

use crate::disk::Disk;
use crate::limits::{MAX_DEPTH, MAX_INDEXED};
use crate::walk::{Manager, WalkError, list, mount};
use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use core::cell::RefCell;
use embedded_sdmmc::{Mode, RawDirectory, RawFile, ShortFileName, Timestamp};

/// A mounted volume and the index of its files.
pub struct Files<D: Disk> {
    manager: Manager<D>,
    root: RawDirectory,
    /// By path without a slash in front.
    index: BTreeMap<String, Place>,
    /// Files that are open, by path. The file system opens each of them once.
    open: RefCell<BTreeMap<String, Shared>>,
}

/// A file that is open for so many.
struct Shared {
    file: RawFile,
    users: usize,
}

/// Where a file is: the short names that lead to it, its own last, and its length.
struct Place {
    names: Vec<ShortFileName>,
    length: u32,
}

/// An open file. At most [`OPEN_FILES`](crate::limits::OPEN_FILES) different ones are; each is to be
/// closed as often as it was opened.
#[derive(Debug)]
pub struct OpenFile {
    path: String,
    file: RawFile,
    at: u32,
    left: u32,
}

impl OpenFile {
    /// Bytes that were not read yet.
    pub fn left(&self) -> u32 {
        self.left
    }
}

impl<D: Disk> Files<D> {
    /// Mounts the first partition and reads its folders.
    ///
    /// # Errors
    ///
    /// When the disk fails, the volume is damaged, or it holds more than can be indexed.
    pub fn mount(disk: D, now: Timestamp) -> Result<Self, WalkError<D::Error>> {
        let (manager, _volume, root) = mount(disk, now)?;
        let mut files = Files {
            manager,
            root,
            index: BTreeMap::new(),
            open: RefCell::default(),
        };
        files.read_folders()?;
        Ok(files)
    }

    /// Paths and lengths, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, u32)> {
        let places = self.index.iter();
        places.map(|(path, place)| (path.as_str(), place.length))
    }

    /// Opens the file at this path; `None` if there is none.
    ///
    /// # Errors
    ///
    /// When the disk fails, and when too many are open.
    pub fn open(&self, path: &str) -> Result<Option<OpenFile>, WalkError<D::Error>> {
        let Some(place) = self.index.get(path) else {
            return Ok(None);
        };
        let Some((name, folders)) = place.names.split_last() else {
            return Ok(None);
        };
        let mut open = self.open.borrow_mut();
        let file = match open.get_mut(path) {
            Some(shared) => {
                shared.users += 1;
                shared.file
            }
            None => {
                let file = self.within(folders, |folder| {
                    let opened = self.manager.open_file_in_dir(folder, name, Mode::ReadOnly);
                    opened.map_err(WalkError::Volume)
                })?;
                open.insert(path.into(), Shared { file, users: 1 });
                file
            }
        };
        Ok(Some(OpenFile {
            path: path.into(),
            file,
            at: 0,
            left: place.length,
        }))
    }

    /// Reads on; 0 at the end.
    ///
    /// # Errors
    ///
    /// When the disk fails, or the file ends before its length.
    pub fn read(&self, file: &mut OpenFile, into: &mut [u8]) -> Result<usize, WalkError<D::Error>> {
        let want = into.len().min(file.left as usize);
        if want == 0 {
            return Ok(0);
        }
        // Others may have read elsewhere in it.
        let sought = self.manager.file_seek_from_start(file.file, file.at);
        let read = sought.and_then(|()| self.manager.read(file.file, &mut into[..want]));
        let count = read.map_err(WalkError::Volume)?;
        if count == 0 {
            return Err(WalkError::Short);
        }
        let moved = u32::try_from(count).unwrap_or(u32::MAX).min(file.left);
        file.left -= moved;
        file.at += moved;
        Ok(count)
    }

    /// Closes a file.
    pub fn close(&self, file: OpenFile) {
        let mut open = self.open.borrow_mut();
        let Some(shared) = open.get_mut(&file.path) else {
            return;
        };
        shared.users -= 1;
        if shared.users == 0 {
            open.remove(&file.path);
            // It was read only: there is nothing that could fail to be written.
            let _closed = self.manager.close_file(file.file).is_ok();
        }
    }

    /// Runs `work` in the folder to which these names lead, and closes what that opened.
    fn within<T>(
        &self,
        names: &[ShortFileName],
        work: impl FnOnce(RawDirectory) -> Result<T, WalkError<D::Error>>,
    ) -> Result<T, WalkError<D::Error>> {
        let mut folder = self.root;
        let mut outcome = Ok(());
        for name in names {
            match self.manager.open_dir(folder, name) {
                Ok(next) => {
                    self.leave(folder);
                    folder = next;
                }
                Err(error) => {
                    outcome = Err(WalkError::Volume(error));
                    break;
                }
            }
        }
        let done = outcome.and_then(|()| work(folder));
        self.leave(folder);
        done
    }

    fn leave(&self, folder: RawDirectory) {
        if folder != self.root {
            let _closed = self.manager.close_dir(folder).is_ok();
        }
    }

    fn read_folders(&mut self) -> Result<(), WalkError<D::Error>> {
        // Names that lead to a folder, and its path with a slash behind.
        let mut folders = vec![(Vec::<ShortFileName>::new(), String::new())];
        while let Some((names, path)) = folders.pop() {
            let listing = self.within(&names, |folder| {
                list(&self.manager, folder).map_err(WalkError::Volume)
            })?;
            if names.len() >= MAX_DEPTH
                || self.index.len() + listing.files.len() + folders.len() > MAX_INDEXED
            {
                return Err(WalkError::TooDeep);
            }
            for (short, name) in listing.folders {
                folders.push((
                    [&names[..], &[short]].concat(),
                    [&path, name.as_str(), "/"].concat(),
                ));
            }
            for (short, name) in listing.files {
                let length = self.length(&names, &short)?;
                let place = Place {
                    names: [&names[..], &[short]].concat(),
                    length,
                };
                self.index.insert([&path, name.as_str()].concat(), place);
            }
        }
        Ok(())
    }

    fn length(
        &self,
        folders: &[ShortFileName],
        name: &ShortFileName,
    ) -> Result<u32, WalkError<D::Error>> {
        self.within(folders, |folder| {
            let entry = self.manager.find_directory_entry(folder, name);
            entry.map(|entry| entry.size).map_err(WalkError::Volume)
        })
    }
}

impl<D: Disk> core::fmt::Debug for Files<D> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Files")
            .field("files", &self.index.len())
            .finish_non_exhaustive()
    }
}
