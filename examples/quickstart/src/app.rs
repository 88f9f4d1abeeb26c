//! The whole job, from the command line to the report.

use crate::cli::Args;
use crate::pack::{Contents, pack, read_contents};
use crate::report::Report;
use crate::run::{self, GuestRun};
use crate::scan::Plan;
use crate::verify::verify;
use anyhow::{Context, Result, bail};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use sha2::{Digest, Sha256};
use std::borrow::Cow;
use std::fs::{self, File};
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use tempfile::{NamedTempFile, TempPath};

/// Does what the command line says.
///
/// # Errors
///
/// In one sentence, with its causes.
pub fn run(args: &Args) -> Result<Report> {
    let guest = guest_image(args)?;
    let disk = Prepared::new(args)?;
    let outcome = run::run_guest(&GuestRun {
        elf: &guest,
        disk: disk.path(),
        accel: args.accel,
        vcpus: args.vcpus,
        memory: args.memory,
        timeout: args.timeout,
    })?;
    let found = outcome.report;
    verify(disk.path(), &disk.contents)?;
    let files = disk.contents.digests.len() as u64;
    if (found.files, found.bytes) != (files, disk.contents.bytes) {
        bail!(
            "the guest reports {} files and {} bytes, and there are {files} and {}",
            found.files,
            found.bytes,
            disk.contents.bytes
        );
    }
    let digest = Sha256::digest(&guest);
    Ok(Report {
        accel: outcome.accel,
        guest: digest.iter().map(|byte| format!("{byte:02x}")).collect(),
        boot: outcome.boot,
        files,
        bytes: found.bytes,
        hashing: std::time::Duration::from_nanos(found.hash_ns),
        requests: found.requests,
        exits: outcome.exits,
        kicks: outcome.kicks,
        skipped: disk.skipped,
    })
}

fn guest_image(args: &Args) -> Result<Cow<'static, [u8]>> {
    let Some(path) = &args.guest else {
        return Ok(Cow::Borrowed(guest_images::QUICKSTART));
    };
    let bytes =
        fs::read(path).with_context(|| format!("cannot read the guest {}", path.display()))?;
    Ok(Cow::Owned(bytes))
}

/// A disk image that is ready for the guest.
struct Prepared {
    place: Place,
    contents: Contents,
    skipped: usize,
}

enum Place {
    /// Deleted when this is dropped.
    Scratch(TempPath),
    Kept(PathBuf),
}

impl Prepared {
    fn new(args: &Args) -> Result<Self> {
        match (&args.disk, &args.folder) {
            (Some(disk), Some(_)) if disk.exists() => bail!(
                "{} exists: remove it, or leave out FOLDER to use it as it is",
                disk.display()
            ),
            (Some(disk), None) if disk.exists() => Self::take(disk),
            (disk, folder) => {
                let own = Path::new(env!("CARGO_MANIFEST_DIR"));
                let root = own.ancestors().nth(2).unwrap_or(own);
                let folder = folder.clone().unwrap_or_else(|| root.join("docs"));
                Self::make(&folder, disk.as_deref(), args.skip)
            }
        }
    }

    /// Uses an image that is there.
    fn take(path: &Path) -> Result<Self> {
        if !path.is_file() {
            bail!("{} is not a file: give a disk image", path.display());
        }
        let contents = read_contents(path)?;
        eprintln!(
            "taking {}: {} files, {}",
            path.display(),
            contents.digests.len(),
            HumanBytes(contents.bytes)
        );
        Ok(Prepared {
            place: Place::Kept(path.into()),
            contents,
            skipped: 0,
        })
    }

    fn make(folder: &Path, disk: Option<&Path>, skip: bool) -> Result<Self> {
        if let Some(disk) = disk.filter(|disk| lies_in(disk, folder)) {
            bail!(
                "{} lies in the folder itself: put it elsewhere",
                disk.display()
            );
        }
        let plan = Plan::scan(folder)?;
        if !plan.problems.is_empty() && !skip {
            bail!(
                "{}: remove what cannot be packed, or leave it out with --skip",
                plan.problem_summary()
            );
        }
        for problem in &plan.problems {
            eprintln!("left out: {problem}");
        }
        if plan.files.is_empty() {
            bail!(
                "{} holds no file to pack: give a folder with files",
                folder.display()
            );
        }
        let (file, place) = match disk {
            None => {
                let scratch = NamedTempFile::with_prefix("paravane-quickstart-");
                let scratch = scratch.context("cannot make a temporary file for the disk image")?;
                let (file, path) = scratch.into_parts();
                (file, Place::Scratch(path))
            }
            Some(path) => {
                let file = File::options()
                    .read(true)
                    .write(true)
                    .create_new(true)
                    .open(path);
                let file = file.with_context(|| format!("cannot create {}", path.display()))?;
                (file, Place::Kept(path.into()))
            }
        };
        let packed = pack_with_progress(folder, &plan, &file);
        if let (Err(_), Place::Kept(path)) = (&packed, &place) {
            // Half an image is no use to anybody, and in the way of the next attempt.
            let _ = fs::remove_file(path);
        }
        Ok(Prepared {
            place,
            contents: packed?,
            skipped: plan.problems.len(),
        })
    }

    fn path(&self) -> &Path {
        match &self.place {
            Place::Scratch(path) => path,
            Place::Kept(path) => path,
        }
    }
}

fn pack_with_progress(folder: &Path, plan: &Plan, image: &File) -> Result<Contents> {
    let summary = format!(
        "packing {}: {} files, {}",
        folder.display(),
        plan.files.len(),
        HumanBytes(plan.bytes())
    );
    eprintln!("{summary}");
    if !std::io::stderr().is_terminal() {
        return pack(plan, image, |_| {});
    }
    let style = "{bar:40} {bytes}/{total_bytes}{msg}";
    let bar = ProgressBar::new(plan.bytes());
    if let Ok(style) = ProgressStyle::with_template(style) {
        bar.set_style(style);
    }
    let total = plan.files.len() + plan.folders.len();
    let contents = pack(plan, image, |done| {
        bar.set_position(done.bytes);
        if done.entries < total {
            bar.set_message(format!(", {}/{total} entries", done.entries));
        } else if !bar.message().is_empty() {
            bar.set_message("");
        }
    });
    bar.finish_and_clear();
    contents
}

/// Whether `path`, which need not exist, lies somewhere below `folder`.
fn lies_in(path: &Path, folder: &Path) -> bool {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    match (parent.canonicalize(), folder.canonicalize()) {
        (Ok(parent), Ok(folder)) => parent.starts_with(folder),
        _ => false,
    }
}
