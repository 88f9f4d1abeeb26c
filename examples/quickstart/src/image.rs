//! The image file: a disk with one FAT32 partition.

use crate::limits::{CLUSTER_SIZES, MAX_IMAGE, MIN_CLUSTERS};
use crate::scan::Plan;
use anyhow::{Context, Result, bail};
use fatfs::{FatType, FileSystem, FormatVolumeOptions, FsOptions};
use quickstart_fs::cache::Cache;
use quickstart_fs::disk::Disk;
use quickstart_fs::limits::{PARTITION_START, SECTOR};
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// The FAT volume of an image.
pub type Volume = FileSystem<Partition>;

/// Bytes of a directory entry (FAT specification §6).
const DIRECTORY_ENTRY: u64 = 32;
/// UTF-16 units of name that one long-name entry holds (FAT specification §7).
const UNITS_PER_ENTRY: usize = 13;
/// Partition type: FAT32, addressed by sector.
const FAT32_LBA: u8 = 0x0c;
/// Offset of the partition table in the first sector, and of the signature.
const PARTITION_TABLE: usize = 446;
const SIGNATURE: usize = 510;

/// How the volume will be laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes per cluster.
    pub cluster: u32,
    /// Sectors of the partition.
    pub sectors: u32,
}

impl Geometry {
    /// Room for everything in `plan` and for the manifest.
    ///
    /// # Errors
    ///
    /// When that is more than an image may have.
    pub fn for_plan(plan: &Plan) -> Result<Geometry> {
        // Of the manifest a line is 64 digits, two spaces, the path and a newline.
        let manifest: u64 = plan
            .files
            .iter()
            .map(|file| 67 + file.path.len() as u64)
            .sum();
        for cluster in CLUSTER_SIZES {
            let size = u64::from(cluster);
            let files: u64 = plan
                .files
                .iter()
                .map(|file| file.length.div_ceil(size))
                .sum();
            let mut needed = files + manifest.div_ceil(size) + folder_clusters(plan, size);
            // A few to spare: the volume's own bookkeeping, and files that grow meanwhile.
            needed += needed / 64 + 64;
            if needed < MIN_CLUSTERS && cluster > 512 {
                continue;
            }
            return Geometry::new(cluster, needed.max(MIN_CLUSTERS));
        }
        bail!("no cluster size fits the folder")
    }

    fn new(cluster: u32, clusters: u64) -> Result<Geometry> {
        let sector = SECTOR as u64;
        // Two tables of four bytes per cluster, and 64 sectors for what comes before them.
        let tables = 2 * ((clusters + 2) * 4).div_ceil(sector);
        let data = clusters * (u64::from(cluster) / sector);
        let sectors = 64 + tables + data;
        if (PARTITION_START + sectors) * sector > MAX_IMAGE {
            bail!(
                "the folder needs a disk of {} GiB, and {} GiB is the most: give a smaller one",
                ((PARTITION_START + sectors) * sector).div_ceil(1 << 30),
                MAX_IMAGE >> 30
            );
        }
        Ok(Geometry {
            cluster,
            sectors: u32::try_from(sectors).context("too many sectors for FAT32")?,
        })
    }
}

/// Clusters for directories.
fn folder_clusters(plan: &Plan, cluster: u64) -> u64 {
    let name = |path: &str| entries_of(path.rsplit('/').next().unwrap_or(path)) as u64;
    // Two more for `.` and `..`.
    let folders = plan.folders.iter().map(|path| name(path) + 2);
    let files = plan.files.iter().map(|file| name(&file.path));
    let bytes = folders.chain(files).sum::<u64>() * DIRECTORY_ENTRY;
    // Each folder, the root too, wastes at most one cluster.
    bytes.div_ceil(cluster) + 1 + plan.folders.len() as u64
}

/// Directory entries that a name takes: its long-name entries and a short one.
pub(crate) fn entries_of(name: &str) -> usize {
    name.encode_utf16().count().div_ceil(UNITS_PER_ENTRY) + 1
}

/// Writes partition table and empty volume into `file`, which becomes sparse.
///
/// # Errors
///
/// When the file cannot be written.
pub fn format(file: &File, geometry: Geometry) -> Result<()> {
    let sectors = PARTITION_START + u64::from(geometry.sectors);
    file.set_len(0)?;
    file.set_len(sectors * SECTOR as u64)?;
    file.write_all_at(&boot_sector(geometry), 0)?;
    let mut partition = Partition::new(file.try_clone()?, PARTITION_START, geometry.sectors)?;
    let options = FormatVolumeOptions::new()
        .bytes_per_cluster(geometry.cluster)
        .fat_type(FatType::Fat32)
        .total_sectors(geometry.sectors)
        .volume_label(*b"PARAVANE   ");
    fatfs::format_volume(&mut partition, options)?;
    partition.flush()?;
    Ok(())
}

fn boot_sector(geometry: Geometry) -> [u8; SECTOR] {
    let mut sector = [0; SECTOR];
    let entry = &mut sector[PARTITION_TABLE..];
    // Cylinders, heads and sectors at their largest values: "see the sector numbers".
    entry[1..4].copy_from_slice(&[0xfe, 0xff, 0xff]);
    entry[4] = FAT32_LBA;
    entry[5..8].copy_from_slice(&[0xfe, 0xff, 0xff]);
    entry[8..12].copy_from_slice(&(PARTITION_START as u32).to_le_bytes());
    entry[12..16].copy_from_slice(&geometry.sectors.to_le_bytes());
    sector[SIGNATURE..].copy_from_slice(&[0x55, 0xaa]);
    sector
}

/// Opens the volume in the image's first partition.
///
/// # Errors
///
/// When the file is no such image.
pub fn open(path: &Path, writable: bool) -> Result<Volume> {
    let file = File::options().read(true).write(writable).open(path);
    let file = file.with_context(|| format!("cannot open the disk image {}", path.display()))?;
    mount(file).with_context(|| {
        format!(
            "{} is not a disk image with a FAT partition: leave out --disk, or name one that the \
             quickstart made",
            path.display()
        )
    })
}

pub(crate) fn mount(file: File) -> Result<Volume> {
    let mut sector = [0; SECTOR];
    file.read_exact_at(&mut sector, 0)?;
    if sector[SIGNATURE..] != [0x55, 0xaa] {
        bail!("it has no partition table");
    }
    let entry = &sector[PARTITION_TABLE..];
    let number =
        |at: usize| u32::from_le_bytes([entry[at], entry[at + 1], entry[at + 2], entry[at + 3]]);
    let (start, sectors) = (u64::from(number(8)), number(12));
    let end = (start + u64::from(sectors)) * SECTOR as u64;
    if start == 0 || sectors == 0 || end > file.metadata()?.len() {
        bail!("its first partition is empty or lies outside of it");
    }
    let partition = Partition::new(file, start, sectors)?;
    Ok(FileSystem::new(partition, FsOptions::new())?)
}

/// A partition as a stream, behind the same cache that the guest uses.
#[derive(Debug)]
pub struct Partition {
    cache: Cache<FileDisk>,
    start: u64,
    length: u64,
    position: u64,
}

impl Partition {
    fn new(file: File, start: u64, sectors: u32) -> io::Result<Self> {
        Ok(Partition {
            cache: Cache::new(FileDisk::new(file)?),
            start: start * SECTOR as u64,
            length: u64::from(sectors) * SECTOR as u64,
            position: 0,
        })
    }

    fn left(&self, wanted: usize) -> usize {
        let left = self.length.saturating_sub(self.position);
        usize::try_from(left).map_or(wanted, |left| left.min(wanted))
    }
}

impl Read for Partition {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let length = self.left(into.len());
        if length == 0 {
            return Ok(0);
        }
        let at = self.start + self.position;
        let count = self
            .cache
            .read(at, &mut into[..length])
            .map_err(io::Error::other)?;
        self.position += count as u64;
        Ok(count)
    }
}

impl Write for Partition {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        let length = self.left(from.len());
        if length == 0 {
            return Ok(0);
        }
        let at = self.start + self.position;
        let count = self
            .cache
            .write(at, &from[..length])
            .map_err(io::Error::other)?;
        self.position += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.cache.flush().map_err(io::Error::other)
    }
}

impl Seek for Partition {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(offset) => Some(offset),
            SeekFrom::Current(offset) => self.position.checked_add_signed(offset),
            SeekFrom::End(offset) => self.length.checked_add_signed(offset),
        };
        self.position = position.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.position)
    }
}

/// A file as the file system work's disk. Reads are done when they are finished.
#[derive(Debug)]
pub struct FileDisk {
    file: File,
    sectors: u64,
    started: VecDeque<u64>,
}

impl FileDisk {
    /// The disk in this file; a last, partial sector does not count.
    pub fn new(file: File) -> io::Result<Self> {
        let sectors = file.metadata()?.len() / SECTOR as u64;
        Ok(FileDisk {
            file,
            sectors,
            started: VecDeque::new(),
        })
    }
}

impl Disk for FileDisk {
    type Error = io::Error;

    fn sectors(&self) -> u64 {
        self.sectors
    }

    fn start_read(&mut self, sector: u64, _length: usize) -> io::Result<()> {
        self.started.push_back(sector);
        Ok(())
    }

    fn kick(&mut self) {}

    fn finish_read(&mut self, into: &mut [u8]) -> io::Result<()> {
        let sector = self
            .started
            .pop_front()
            .ok_or(io::ErrorKind::InvalidInput)?;
        self.file.read_exact_at(into, sector * SECTOR as u64)
    }

    fn write(&mut self, sector: u64, from: &[u8]) -> io::Result<()> {
        self.file.write_all_at(from, sector * SECTOR as u64)
    }

    fn flush(&mut self) -> io::Result<()> {
        // Stable storage is not promised to anybody here: the image is scratch until it is checked.
        Ok(())
    }
}
