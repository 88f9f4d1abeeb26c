//! `guest-build check <elf>`: the build step's check, by hand.
#![forbid(unsafe_code)]

mod limits;

use guest_build::{CheckOptions, check};
use limits::MAX_ELF_LEN;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::process::ExitCode;

const USAGE: &str = "\
Checks that an ELF file is a Paravane guest and contains no banned instruction.

Usage: guest-build check [--allow-banned PREFIX]... <ELF>

Options:
  --allow-banned PREFIX  excuse functions whose name starts with PREFIX (test guests only)
  -h, --help             print this";

fn main() -> ExitCode {
    match run(std::env::args().skip(1)) {
        Ok(said) => match tell(&said) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => complain(&format!("cannot write to standard output: {error}")),
        },
        Err(complaint) => complain(&complaint),
    }
}

fn tell(said: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{said}")?;
    out.flush()
}

fn complain(complaint: &str) -> ExitCode {
    // Whoever closed standard error wants the code alone.
    let _ = writeln!(io::stderr(), "guest-build: {complaint}");
    ExitCode::FAILURE
}

fn run(mut args: impl Iterator<Item = String>) -> Result<String, String> {
    const HINT: &str = "see guest-build --help";
    match args.next().as_deref() {
        Some("-h" | "--help") => return Ok(USAGE.to_owned()),
        Some("check") => {}
        Some(other) => return Err(format!("unknown command `{other}`; {HINT}")),
        None => return Err(format!("no command given; {HINT}")),
    }
    let mut options = CheckOptions::default();
    let mut path = None;
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "-h" | "--help" => return Ok(USAGE.to_owned()),
            "--allow-banned" => {
                let prefix = args.next().filter(|prefix| !prefix.is_empty());
                let prefix = prefix.ok_or(format!("--allow-banned needs a prefix; {HINT}"))?;
                options.allow_banned.push(prefix);
            }
            flag if flag.starts_with('-') => {
                return Err(format!("unknown option `{flag}`; {HINT}"));
            }
            _ if path.is_some() => return Err(format!("one ELF file at a time; {HINT}")),
            _ => path = Some(arg),
        }
    }
    let path = path.ok_or(format!("no ELF file given; {HINT}"))?;
    let bytes = read(&path)?;
    let report = check(&bytes, &options).map_err(|e| format!("{path} is refused: {e}"))?;
    Ok(format!(
        "{path}: {} functions, {} instructions, {} excused, {} KiB of memory, entry {:#x}",
        report.functions,
        report.instructions,
        report.excused,
        report.memory.div_ceil(1024),
        report.entry,
    ))
}

/// Reads an ordinary file of bearable size: a device or a pipe may have no end.
fn read(path: &str) -> Result<Vec<u8>, String> {
    let cannot = |error: io::Error| format!("cannot read {path}: {error}");
    let too_large = || {
        format!(
            "{path} is larger than {} MiB: no guest is",
            MAX_ELF_LEN >> 20
        )
    };
    let found = fs::metadata(path).map_err(cannot)?;
    if !found.is_file() {
        return Err(format!("{path} is not a file: give the guest's ELF file"));
    }
    if found.len() > MAX_ELF_LEN {
        return Err(too_large());
    }
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(cannot)?;
    // Some files of /proc have no length and much to say, and others grow.
    let mut file = file.take(MAX_ELF_LEN + 1);
    file.read_to_end(&mut bytes).map_err(cannot)?;
    if bytes.len() as u64 > MAX_ELF_LEN {
        return Err(too_large());
    }
    Ok(bytes)
}
