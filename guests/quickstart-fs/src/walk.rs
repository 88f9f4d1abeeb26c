//! The FAT volume: every file is hashed, then the manifest is written.

use crate::cache::{Cache, CacheError};
use crate::disk::Disk;
use crate::limits::{HASH_BUFFER, LONG_NAME, MAX_DEPTH, OPEN_FILES, SECTOR};
use crate::manifest;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;
use core::cell::RefCell;
use core::fmt;
use core::ops::ControlFlow;
use embedded_sdmmc::{
    Block, BlockCount, BlockDevice, BlockIdx, LfnBuffer, Mode, RawDirectory, RawFile, RawVolume,
    ShortFileName, TimeSource, Timestamp, VolumeIdx, VolumeManager,
};
use sha2::{Digest, Sha256};

/// What was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Files hashed.
    pub files: u64,
    /// Folders entered, the root left out.
    pub folders: u64,
    /// Bytes hashed.
    pub bytes: u64,
    /// Nanoseconds from the first to the last file.
    pub hash_ns: u64,
}

/// Why the work could not be done.
#[derive(Debug)]
pub enum WalkError<E: core::error::Error + 'static> {
    /// The volume is damaged, full, or of a kind that cannot be mounted.
    Volume(embedded_sdmmc::Error<CacheError<E>>),
    /// The disk failed while the last changes were written.
    Flush(CacheError<E>),
    /// Folders are nested too deep.
    TooDeep,
    /// A file ended before its length.
    Short,
}

impl<E: core::error::Error + 'static> fmt::Display for WalkError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            WalkError::Volume(source) => write!(f, "the FAT volume: {source}"),
            WalkError::Flush(source) => write!(f, "flushing: {source}"),
            WalkError::TooDeep => write!(f, "folders are nested deeper than {MAX_DEPTH}"),
            WalkError::Short => f.write_str("a file ended before its length"),
        }
    }
}

impl<E: core::error::Error + 'static> core::error::Error for WalkError<E> {}

/// Mounts the first partition, hashes every file, writes the manifest, and flushes.
///
/// `now_ns` is a clock, `wall` the time that the manifest's directory entry gets.
///
/// # Errors
///
/// When the disk fails or the volume is damaged. What was written before stays.
pub fn hash_volume<D: Disk>(
    disk: D,
    now_ns: impl Fn() -> u64,
    wall: Timestamp,
) -> Result<(Summary, D), WalkError<D::Error>> {
    let (manager, volume, root) = mount(disk, wall)?;
    let mode = Mode::ReadWriteCreateOrTruncate;
    let manifest = manager.open_file_in_dir(root, manifest::NAME, mode);
    let manifest = manifest.map_err(WalkError::Volume)?;
    let start = now_ns();
    let mut walk = Walk {
        manager: &manager,
        buffer: vec![0; HASH_BUFFER],
        manifest,
        lines: String::new(),
        summary: Summary::default(),
    };
    walk.folders(root)?;
    walk.summary.hash_ns = now_ns().saturating_sub(start);
    walk.write_lines()?;
    let summary = walk.summary;
    manager.close_file(manifest).map_err(WalkError::Volume)?;
    manager.close_dir(root).map_err(WalkError::Volume)?;
    manager.close_volume(volume).map_err(WalkError::Volume)?;
    let (device, _) = manager.free();
    let mut cache = device.0.into_inner();
    cache.flush().map_err(WalkError::Flush)?;
    Ok((summary, cache.into_disk()))
}

/// Mounts the first partition; the volume and its root folder are open then.
pub(crate) fn mount<D: Disk>(
    disk: D,
    wall: Timestamp,
) -> Result<(Manager<D>, RawVolume, RawDirectory), WalkError<D::Error>> {
    let device = Sectors(RefCell::new(Cache::new(disk)));
    let manager = Manager::new_with_limits(device, Wall(wall), 0);
    let volume = manager
        .open_raw_volume(VolumeIdx(0))
        .map_err(WalkError::Volume)?;
    let root = manager.open_root_dir(volume).map_err(WalkError::Volume)?;
    Ok((manager, volume, root))
}

/// Seconds since the Unix epoch as FAT writes them down: from 1980 to 2107.
pub fn timestamp(seconds: u64) -> Timestamp {
    const DAY: u64 = 86_400;
    let second = seconds % DAY;
    // Days to a date in the proleptic Gregorian calendar, in eras of 400 years from March 0000.
    let days = seconds / DAY + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * from_march + 2) / 5;
    let month = (from_march + 2) % 12;
    let year = era * 400 + year_of_era + u64::from(month < 2);
    // Every value is in range by construction, but for the year.
    let byte = |value: u64| u8::try_from(value).unwrap_or(0);
    Timestamp {
        year_since_1970: byte(year.clamp(1980, 2107) - 1970),
        zero_indexed_month: byte(month),
        zero_indexed_day: byte(day),
        hours: byte(second / 3600),
        minutes: byte(second / 60 % 60),
        seconds: byte(second % 60),
    }
}

pub(crate) type Manager<D> = VolumeManager<Sectors<D>, Wall, { MAX_DEPTH + 1 }, OPEN_FILES, 1>;
pub(crate) type VolumeResult<T, D> =
    Result<T, embedded_sdmmc::Error<CacheError<<D as Disk>::Error>>>;

struct Walk<'a, D: Disk> {
    manager: &'a Manager<D>,
    buffer: Vec<u8>,
    manifest: RawFile,
    /// Lines of the manifest that are not in the file yet.
    lines: String,
    summary: Summary,
}

/// A folder whose files are done and whose own folders are not.
struct Level {
    folder: RawDirectory,
    below: Vec<(ShortFileName, String)>,
    /// Bytes of path that lead here.
    path: usize,
}

/// What a folder holds: short names, by which things are opened, and names as people wrote them.
#[derive(Default)]
pub(crate) struct Listing {
    pub(crate) files: Vec<(ShortFileName, String)>,
    pub(crate) folders: Vec<(ShortFileName, String)>,
}

/// What is in a folder.
pub(crate) fn list<D: Disk>(
    manager: &Manager<D>,
    folder: RawDirectory,
) -> VolumeResult<Listing, D> {
    let mut storage = [0; LONG_NAME];
    let mut long = LfnBuffer::new(&mut storage);
    let mut listing = Listing::default();
    manager.iterate_dir_lfn(folder, &mut long, |entry, name| {
        let attributes = entry.attributes;
        let is_dot =
            entry.name == ShortFileName::this_dir() || entry.name == ShortFileName::parent_dir();
        if !attributes.is_volume() && !is_dot {
            let name = name.map_or_else(|| entry.name.to_string(), ToString::to_string);
            let list = match attributes.is_directory() {
                true => &mut listing.folders,
                false => &mut listing.files,
            };
            list.push((entry.name, name));
        }
        ControlFlow::Continue(())
    })?;
    Ok(listing)
}

impl<D: Disk> Walk<'_, D> {
    /// All of the tree, without recursion: guests have small stacks.
    fn folders(&mut self, root: RawDirectory) -> Result<(), WalkError<D::Error>> {
        let mut path = String::new();
        let mut levels = vec![self.enter(root, &path)?];
        while let Some(level) = levels.last_mut() {
            path.truncate(level.path);
            let Some((short, name)) = level.below.pop() else {
                let done = level.folder;
                levels.pop();
                if !levels.is_empty() {
                    self.manager.close_dir(done).map_err(WalkError::Volume)?;
                }
                continue;
            };
            if levels.len() > MAX_DEPTH {
                return Err(WalkError::TooDeep);
            }
            let parent = levels.last().map_or(root, |level| level.folder);
            let opened = self.manager.open_dir(parent, short);
            let folder = opened.map_err(WalkError::Volume)?;
            path.push_str(&name);
            path.push('/');
            self.summary.folders += 1;
            levels.push(self.enter(folder, &path)?);
        }
        Ok(())
    }

    /// Hashes the files of a folder; what is left to do is its folders.
    fn enter(&mut self, folder: RawDirectory, path: &str) -> Result<Level, WalkError<D::Error>> {
        let mut listing = list(self.manager, folder).map_err(WalkError::Volume)?;
        for (short, name) in &listing.files {
            if path.is_empty() && name.eq_ignore_ascii_case(manifest::NAME) {
                continue;
            }
            let mode = Mode::ReadOnly;
            let opened = self.manager.open_file_in_dir(folder, short, mode);
            let file = opened.map_err(WalkError::Volume)?;
            let digest = self.hash(file);
            self.manager.close_file(file).map_err(WalkError::Volume)?;
            let full = [path, name].concat();
            manifest::push_line(&mut self.lines, &digest?, &full);
            self.summary.files += 1;
            if self.lines.len() >= HASH_BUFFER {
                self.write_lines()?;
            }
        }
        listing.folders.reverse();
        Ok(Level {
            folder,
            below: listing.folders,
            path: path.len(),
        })
    }

    fn write_lines(&mut self) -> Result<(), WalkError<D::Error>> {
        let written = self.manager.write(self.manifest, self.lines.as_bytes());
        self.lines.clear();
        written.map_err(WalkError::Volume)
    }

    fn hash(&mut self, file: RawFile) -> Result<[u8; manifest::DIGEST], WalkError<D::Error>> {
        let length = self.manager.file_length(file).map_err(WalkError::Volume)?;
        let mut left = u64::from(length);
        let mut hasher = Sha256::new();
        while left > 0 {
            let read = self.manager.read(file, &mut self.buffer);
            let count = read.map_err(WalkError::Volume)?;
            if count == 0 {
                return Err(WalkError::Short);
            }
            hasher.update(&self.buffer[..count]);
            left = left.saturating_sub(count as u64);
        }
        self.summary.bytes += u64::from(length);
        Ok(hasher.finalize().into())
    }
}

pub(crate) struct Wall(Timestamp);

impl TimeSource for Wall {
    fn get_timestamp(&self) -> Timestamp {
        self.0
    }
}

/// The cache, seen as the file system sees a disk.
pub(crate) struct Sectors<D: Disk>(RefCell<Cache<D>>);

impl<D: Disk> BlockDevice for Sectors<D> {
    type Error = CacheError<D::Error>;

    fn read(&self, blocks: &mut [Block], start: BlockIdx) -> Result<(), Self::Error> {
        let mut cache = self.0.borrow_mut();
        for (i, block) in (0u64..).zip(blocks) {
            // A sector lies in one chunk, so one step copies it whole.
            cache.read(
                (u64::from(start.0) + i) * SECTOR as u64,
                &mut block.contents,
            )?;
        }
        Ok(())
    }

    fn write(&self, blocks: &[Block], start: BlockIdx) -> Result<(), Self::Error> {
        let mut cache = self.0.borrow_mut();
        for (i, block) in (0u64..).zip(blocks) {
            cache.write((u64::from(start.0) + i) * SECTOR as u64, &block.contents)?;
        }
        Ok(())
    }

    fn num_blocks(&self) -> Result<BlockCount, Self::Error> {
        let sectors = self.0.borrow().sectors();
        Ok(BlockCount(u32::try_from(sectors).unwrap_or(u32::MAX)))
    }
}
