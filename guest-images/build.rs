//! Builds every package of `guests/` that has an image, and writes a constant for each.

use guest_build::{BuildError, GuestBuild, GuestWorkspace};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::{env, fs, io};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        // Cargo prints what a failed build script wrote: no Debug form, no panic.
        Err(error) => {
            eprintln!("{error}");
            let mut cause = error.source();
            while let Some(why) = cause {
                eprintln!("because: {why}");
                cause = why.source();
            }
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn std::error::Error>> {
    let own = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default());
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    let guests = own.join("../guests");
    // Seen before the first build, so that a failed one is tried again.
    println!(
        "cargo::rerun-if-changed={}",
        guests.join("Cargo.toml").display()
    );
    let workspace = GuestWorkspace::open(&guests)?;
    let mut text = String::new();
    let mut all = String::new();
    for package in workspace.packages().iter().filter(|package| package.image) {
        let name = &package.name;
        let path = build(&guests, name, &out)?;
        let constant = name.to_uppercase().replace('-', "_");
        writeln!(
            text,
            "/// The guest `{name}`, as an ELF image.\n\
             pub const {constant}: &[u8] = include_bytes!({path:?});\n\
             /// Where the guest `{name}` lies as a file, on the machine that built it.\n\
             pub const {constant}_PATH: &str = {path:?};"
        )?;
        writeln!(all, "    ({name:?}, {constant}),")?;
    }
    writeln!(
        text,
        "/// Every guest, with its name, in alphabetical order.\n\
         pub const ALL: &[(&str, &[u8])] = &[\n{all}];"
    )?;
    fs::write(out.join("images.rs"), text)?;
    Ok(())
}

/// Builds a guest and copies it to where the next build of another profile does not reach it.
fn build(guests: &Path, name: &str, out: &Path) -> Result<String, Box<dyn std::error::Error>> {
    let guest = GuestBuild::new(guests).package(name).build()?;
    guest.emit_rerun_if_changed();
    let path = out.join(format!("{name}.elf"));
    fs::write(&path, &guest.bytes).map_err(|source| write_error(&path, source))?;
    let path = path.into_os_string().into_string();
    Ok(path.map_err(|path| format!("the path {path:?} is not UTF-8: build elsewhere"))?)
}

fn write_error(path: &Path, source: io::Error) -> BuildError {
    BuildError::File {
        action: "write",
        path: path.into(),
        source,
    }
}
