//! The whole job, from the command line to the report.

use crate::accel::Wanted;
use crate::cli::Args;
use crate::pack::{Contents, pack, take};
use crate::place::{Draft, Place};
use crate::report::{Report, say};
use crate::run::{self, GuestRun};
use crate::scan::Plan;
use crate::verify::verify;
use anyhow::{Context, Result, bail};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use quickstart_fs::count::Counted;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::IsTerminal;
use std::path::Path;
use vmm_core::{Image, ImageError};

/// Does what the command line says.
///
/// # Errors
///
/// In one sentence, with its causes.
pub fn run(args: &Args) -> Result<Report> {
    // First of all what costs nothing to look at.
    let accel = Wanted::new(args.accel)?;
    accel.check()?;
    let guest = guest_image(args)?;
    let disk = Prepared::new(args)?;
    let outcome = run::run_guest(&GuestRun {
        image: &guest,
        disk: disk.place.path(),
        accel,
        backend: args.backend,
        vcpus: args.vcpus,
        memory: args.memory,
        timeout: args.timeout,
    })?;
    let found = outcome.report;
    verify(disk.place.path(), &disk.contents)?;
    let files = disk.contents.digests.len() as u64;
    if (found.files, found.bytes) != (files, disk.contents.bytes) {
        bail!(
            "the guest reports {} files and {} bytes, and there are {files} and {}",
            found.files,
            found.bytes,
            disk.contents.bytes
        );
    }
    let digest = Sha256::digest(guest.bytes());
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

fn guest_image(args: &Args) -> Result<Image> {
    let image = match &args.guest {
        None => Image::from_bytes(guest_images::QUICKSTART),
        Some(path) => Image::open(path),
    };
    match image {
        Err(ImageError::Io { path, source }) => {
            Err(source).with_context(|| format!("cannot read the guest {path}"))
        }
        image => image.context("the guest is refused"),
    }
}

/// A disk image that is ready for the guest.
struct Prepared {
    place: Place,
    contents: Contents,
    skipped: usize,
}

impl Prepared {
    fn new(args: &Args) -> Result<Self> {
        match (&args.disk, &args.folder) {
            (Some(disk), Some(_)) if disk.exists() => bail!(
                "{} exists: remove it, or leave out FOLDER to use it as it is",
                disk.display()
            ),
            (Some(disk), None) if disk.exists() => Self::take(disk),
            (Some(disk), None) => bail!(
                "there is no disk image {}: name one that exists, or give a FOLDER to make it from",
                disk.display()
            ),
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
        let contents = take(path)?;
        say(format_args!(
            "taking {} as it is: {}, {}",
            path.display(),
            Counted(contents.digests.len() as u64, "file"),
            HumanBytes(contents.bytes)
        ));
        Ok(Prepared {
            place: Place::existing(path),
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
            say(format_args!("left out: {problem}"));
        }
        if plan.files.is_empty() {
            bail!(
                "{} holds no file to pack: give a folder with files",
                folder.display()
            );
        }
        let draft = disk.map_or_else(Draft::scratch, Draft::kept)?;
        let contents = pack_with_progress(folder, &plan, draft.file())?;
        let place = draft.finish()?;
        if let Some(disk) = disk {
            say(format_args!("made the disk image {}", disk.display()));
        }
        Ok(Prepared {
            place,
            contents,
            skipped: plan.problems.len(),
        })
    }
}

fn pack_with_progress(folder: &Path, plan: &Plan, image: &File) -> Result<Contents> {
    say(format_args!(
        "packing {}: {}, {}",
        folder.display(),
        Counted(plan.files.len() as u64, "file"),
        HumanBytes(plan.bytes())
    ));
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
