//! Builds the floor of the process accel's start: a static program that maps and signals.
//!
//! It is freestanding, so one call of `rustc` is enough, and nothing starts faster.

use std::env;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

fn main() -> ExitCode {
    println!("cargo::rerun-if-changed=floor");
    println!("cargo::rerun-if-changed=build.rs");
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default()).join("floor");
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let codegen = [
        "opt-level=2",
        "panic=abort",
        "overflow-checks=off",
        "debug-assertions=off",
        "strip=symbols",
        "relocation-model=static",
        "link-arg=-nostartfiles",
        "link-arg=-nostdlib",
        "link-arg=-static",
        "link-arg=-no-pie",
        "link-arg=-Wl,--build-id=none",
        "link-arg=-Wl,-z,noexecstack",
    ];
    let status = Command::new(&rustc)
        .args(["--edition", "2024", "--crate-type", "bin"])
        .args(["--crate-name", "floor"])
        .args(["--target", "x86_64-unknown-linux-gnu"])
        .args(codegen.iter().flat_map(|option| ["-C", option]))
        .arg("-o")
        .arg(&out)
        .arg("floor/child.rs")
        .env_remove("RUSTFLAGS")
        .status();
    match status {
        Ok(status) if status.success() => ExitCode::SUCCESS,
        Ok(status) => {
            eprintln!("building the floor's child failed: {status}");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("cannot run {}: {error}", rustc.display());
            ExitCode::FAILURE
        }
    }
}
