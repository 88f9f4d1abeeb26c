//! The image after the guest: every file again, and the manifest against what was packed.

use crate::image::{self, Volume};
use crate::interrupt;
use crate::limits::COPY_BUFFER;
use crate::pack::Contents;
use anyhow::{Context, Result, bail};
use quickstart_fs::manifest;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

/// Opens the image again and checks every file and every line of the manifest.
///
/// # Errors
///
/// Names the first difference.
pub fn verify(image: &Path, expected: &Contents) -> Result<()> {
    let volume = image::open(image, false)?;
    let found = walk(&volume)?;
    same(expected, &found).context("the disk image has changed")?;
    let listed = read_manifest(&volume)?;
    let listed = Contents {
        digests: listed,
        bytes: expected.bytes,
    };
    same(expected, &listed).context("the guest's manifest is wrong")
}

fn same(expected: &Contents, found: &Contents) -> Result<()> {
    for (path, digest) in &expected.digests {
        match found.digests.get(path) {
            None => bail!("{path} is missing"),
            Some(other) if other != digest => bail!("{path} has another hash"),
            Some(_) => {}
        }
    }
    let extra = found
        .digests
        .keys()
        .find(|path| !expected.digests.contains_key(*path));
    if let Some(path) = extra {
        bail!("{path} was not there before");
    }
    Ok(())
}

/// Reads every file of a volume, the manifest left out.
///
/// # Errors
///
/// When it cannot be read.
pub fn walk(volume: &Volume) -> Result<Contents> {
    let mut contents = Contents::default();
    let mut buffer = vec![0; COPY_BUFFER];
    let mut open = vec![(volume.root_dir(), String::new())];
    while let Some((folder, path)) = open.pop() {
        for entry in folder.iter() {
            let entry = entry.with_context(|| format!("cannot list /{path} of the disk image"))?;
            let name = entry.file_name();
            if name == "." || name == ".." {
                continue;
            }
            let full = format!("{path}{name}");
            if entry.is_dir() {
                open.push((entry.to_dir(), full + "/"));
                continue;
            }
            if full.eq_ignore_ascii_case(manifest::NAME) {
                continue;
            }
            let mut file = entry.to_file();
            let mut hasher = Sha256::new();
            loop {
                interrupt::check()?;
                let count = file.read(&mut buffer);
                let count = count.with_context(|| format!("cannot read {full} of the image"))?;
                if count == 0 {
                    break;
                }
                hasher.update(&buffer[..count]);
                contents.bytes += count as u64;
            }
            contents.digests.insert(full, hasher.finalize().into());
        }
    }
    Ok(contents)
}

fn read_manifest(volume: &Volume) -> Result<BTreeMap<String, [u8; manifest::DIGEST]>> {
    let mut text = String::new();
    volume
        .root_dir()
        .open_file(manifest::NAME)
        .and_then(|mut file| file.read_to_string(&mut text))
        .with_context(|| format!("the guest left no readable manifest {}", manifest::NAME))?;
    let mut listed = BTreeMap::new();
    for (number, line) in text.lines().enumerate() {
        let Some((digest, path)) = manifest::parse_line(line) else {
            bail!("line {} of the guest's manifest is malformed", number + 1);
        };
        if listed.insert(path.to_owned(), digest).is_some() {
            bail!("{path} is twice in the guest's manifest");
        }
    }
    Ok(listed)
}
