//! `quickstart`: see `--help`, and the library beside this for how it is done.
#![forbid(unsafe_code)]

use clap::Parser;
use quickstart::{app, cli, run};
use std::ffi::OsStr;
use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    // Started again under another name, this program is the block backend.
    let name = std::env::args_os().next().unwrap_or_default();
    if Path::new(&name).file_name() == Some(OsStr::new(run::BACKEND)) {
        return vhost_backends::pv_blkd_main(std::env::args_os());
    }
    match app::run(&cli::Args::parse()) {
        Ok(report) => {
            print!("{report}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("quickstart: {error:#}");
            ExitCode::FAILURE
        }
    }
}
