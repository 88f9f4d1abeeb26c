//! `guest-build check <elf>`: the build step's check, by hand.
#![forbid(unsafe_code)]

use guest_build::{CheckOptions, check};
use std::process::ExitCode;

const USAGE: &str = "\
Checks that an ELF file is a Paravane guest and contains no banned instruction.

Usage: guest-build check [--allow-banned PREFIX]... <ELF>

Options:
  --allow-banned PREFIX  excuse functions whose name starts with PREFIX (test guests only)
  -h, --help             print this";

fn main() -> ExitCode {
    match run(std::env::args().skip(1)) {
        Ok(said) => {
            println!("{said}");
            ExitCode::SUCCESS
        }
        Err(complaint) => {
            eprintln!("guest-build: {complaint}");
            ExitCode::FAILURE
        }
    }
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
    let bytes = std::fs::read(&path).map_err(|e| format!("cannot read {path}: {e}"))?;
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
