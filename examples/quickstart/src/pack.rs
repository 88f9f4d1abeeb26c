//! From a plan to an image, with the digest of every file on the way.

use crate::image::{self, Geometry, Volume};
use crate::limits::COPY_BUFFER;
use crate::scan::{Plan, PlannedFile};
use anyhow::{Context, Result};
use quickstart_fs::manifest::DIGEST;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
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

/// Packs what `plan` says into `image`; `progress` is called with the bytes done.
///
/// # Errors
///
/// When the image cannot be written, or a file changes while it is read so that it no longer fits.
pub fn pack(plan: &Plan, image: &File, mut progress: impl FnMut(u64)) -> Result<Contents> {
    let geometry = Geometry::for_plan(plan)?;
    image::format(image, geometry).context("cannot make the disk image: is the disk full?")?;
    let volume = image::mount(image.try_clone()?).context("cannot mount the new disk image")?;
    let root = volume.root_dir();
    for folder in &plan.folders {
        root.create_dir(folder)
            .with_context(|| format!("cannot make the folder {folder} in the disk image"))?;
    }
    let mut contents = Contents::default();
    let mut buffer = vec![0; COPY_BUFFER];
    for file in &plan.files {
        let digest = copy(&volume, file, &mut buffer, &mut |count| {
            contents.bytes += count;
            progress(contents.bytes);
        })?;
        contents.digests.insert(file.path.clone(), digest);
    }
    drop(root);
    volume
        .unmount()
        .context("cannot write the disk image: is the disk full?")?;
    Ok(contents)
}

fn copy(
    volume: &Volume,
    file: &PlannedFile,
    buffer: &mut [u8],
    done: &mut impl FnMut(u64),
) -> Result<[u8; DIGEST]> {
    let read_error = || format!("cannot read {}", file.source.display());
    let write_error = || format!("cannot write {} into the disk image", file.path);
    let mut source = File::open(&file.source).with_context(read_error)?;
    let mut target = volume
        .root_dir()
        .create_file(&file.path)
        .with_context(write_error)?;
    let mut hasher = Sha256::new();
    loop {
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

/// Reads every file of the volume in `path`, the manifest left out.
///
/// # Errors
///
/// When the image cannot be read.
pub fn read_contents(path: &Path) -> Result<Contents> {
    let volume = image::open(path, false)?;
    crate::verify::walk(&volume)
}
