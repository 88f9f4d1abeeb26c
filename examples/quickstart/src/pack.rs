//! From a plan to an image, with the digest of every file on the way.

use crate::image::{self, Geometry, Partition, Volume};
use crate::interrupt;
use crate::limits::COPY_BUFFER;
use crate::scan::{Plan, PlannedFile};
use anyhow::{Context, Result, bail};
use quickstart_fs::manifest::{self, DIGEST};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

/// What a volume holds: the path of each file, and its digest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Contents {
    /// Digests by path.
    pub digests: BTreeMap<String, [u8; DIGEST]>,
    /// Bytes of all files.
    pub bytes: u64,
}

/// How far packing has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Directory entries made, of all files and folders.
    pub entries: usize,
    /// Bytes copied.
    pub bytes: u64,
}

/// Packs what `plan` says into `image`.
///
/// # Errors
///
/// When the image cannot be written, or a file changes while it is read so that it no longer fits.
pub fn pack(plan: &Plan, image: &File, mut progress: impl FnMut(Progress)) -> Result<Contents> {
    let geometry = Geometry::for_plan(plan)?;
    image::format(image, geometry).context("cannot make the disk image: is the disk full?")?;
    let volume = image::mount(image.try_clone()?).context("cannot mount the new disk image")?;
    let mut done = Progress::default();
    let targets = make_entries(plan, &volume, |entries| {
        done.entries = entries;
        progress(done);
    })?;
    let mut contents = Contents::default();
    let mut buffer = vec![0; COPY_BUFFER];
    for (file, target) in targets {
        let digest = copy(file, target, &mut buffer, &mut |count| {
            done.bytes += count;
            progress(done);
        })?;
        contents.digests.insert(file.path.clone(), digest);
    }
    contents.bytes = done.bytes;
    volume
        .unmount()
        .context("cannot write the disk image: is the disk full?")?;
    Ok(contents)
}

/// Makes every entry before there is any data: a directory then lies in one piece, and finding a
/// file in it does not take the guest all over the disk.
fn make_entries<'plan, 'volume>(
    plan: &'plan Plan,
    volume: &'volume Volume,
    mut made: impl FnMut(usize),
) -> Result<Vec<(&'plan PlannedFile, Target<'volume>)>> {
    let mut folders = HashMap::from([("", volume.root_dir())]);
    let mut below: HashMap<&str, Vec<Entry<'plan>>> = HashMap::new();
    let paths = plan.folders.iter().map(|path| (path.as_str(), None));
    let files = plan
        .files
        .iter()
        .map(|file| (file.path.as_str(), Some(file)));
    for (path, file) in paths.chain(files) {
        let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
        below
            .entry(parent)
            .or_default()
            .push(Entry { path, name, file });
    }
    let mut targets = Vec::with_capacity(plan.files.len());
    let mut count = 0;
    for parent in [""]
        .into_iter()
        .chain(plan.folders.iter().map(String::as_str))
    {
        let mut entries = below.remove(parent).unwrap_or_default();
        // A short name that FAT makes up (`ALONGN~1`) must not be one that an entry has by right:
        // the crate would take the two for the same.
        entries.sort_by_key(|entry| !entry.may_be_short());
        let folder = folders
            .remove(parent)
            .context("folders are planned before what is in them")?;
        for entry in entries {
            interrupt::check()?;
            let error = || format!("cannot make {} in the disk image", entry.path);
            match entry.file {
                None => {
                    let made = folder.create_dir(entry.name).with_context(error)?;
                    folders.insert(entry.path, made);
                }
                Some(file) => {
                    let made = folder.create_file(entry.name).with_context(error)?;
                    targets.push((file, made));
                }
            }
            count += 1;
            made(count);
        }
    }
    Ok(targets)
}

type Target<'volume> = fatfs::File<'volume, Partition>;

struct Entry<'plan> {
    path: &'plan str,
    name: &'plan str,
    file: Option<&'plan PlannedFile>,
}

impl Entry<'_> {
    /// Whether the name could be one that FAT makes up for a longer one.
    fn may_be_short(&self) -> bool {
        const SHORT: usize = 8 + 1 + 3;
        self.name.len() <= SHORT && self.name.contains('~')
    }
}

fn write_error(file: &PlannedFile) -> String {
    format!("cannot write {} into the disk image", file.path)
}

fn copy(
    file: &PlannedFile,
    mut target: Target<'_>,
    buffer: &mut [u8],
    done: &mut impl FnMut(u64),
) -> Result<[u8; DIGEST]> {
    let read_error = || format!("cannot read {}", file.source.display());
    let write_error = || write_error(file);
    let mut source = File::open(&file.source).with_context(read_error)?;
    let mut hasher = Sha256::new();
    loop {
        interrupt::check()?;
        let count = source.read(buffer).with_context(read_error)?;
        if count == 0 {
            break;
        }
        hasher.update(&buffer[..count]);
        target
            .write_all(&buffer[..count])
            .with_context(write_error)?;
        done(count as u64);
    }
    target.flush().with_context(write_error)?;
    Ok(hasher.finalize().into())
}

/// Takes the image in `path` for another run: every file of it is read, and the manifest of the
/// last run is deleted, lest it pass for that of a guest that writes none.
///
/// # Errors
///
/// When the image cannot be read or written.
pub fn take(path: &Path) -> Result<Contents> {
    let volume = image::open(path, true)?;
    let contents = crate::verify::walk(&volume)?;
    delete_manifest(&volume)
        .with_context(|| format!("cannot delete the old manifest {}", manifest::NAME))?;
    volume.unmount().context("cannot write the disk image")?;
    Ok(contents)
}

fn delete_manifest(volume: &Volume) -> Result<()> {
    let root = volume.root_dir();
    for entry in root.iter() {
        let entry = entry?;
        if !entry.file_name().eq_ignore_ascii_case(manifest::NAME) {
            continue;
        }
        if entry.is_dir() {
            bail!("it is a folder");
        }
        return Ok(root.remove(&entry.file_name())?);
    }
    Ok(())
}
