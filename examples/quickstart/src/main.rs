//! `quickstart`: see `--help`, and the library beside this for how it is done.
#![forbid(unsafe_code)]

use anyhow::{Context, Result};
use clap::Parser;
use quickstart::report::{say, say_usage};
use quickstart::{app, cli, interrupt, run};
use std::ffi::OsStr;
use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    // Started again under another name, this program is the block backend.
    let name = std::env::args_os().next().unwrap_or_default();
    if Path::new(&name).file_name() == Some(OsStr::new(run::BACKEND)) {
        return vhost_backends::pv_blkd_main(std::env::args_os());
    }
    match quickstart() {
        Ok(code) => code,
        Err(error) => match interrupt::caught() {
            // Whatever failed did so because of that, or does not matter any more.
            Some(signal) => {
                say(format_args!("quickstart: interrupted"));
                interrupt::end_by(signal);
                ExitCode::FAILURE
            }
            None => {
                say(format_args!("quickstart: {error:#}"));
                ExitCode::FAILURE
            }
        },
    }
}

fn quickstart() -> Result<ExitCode> {
    let args = match cli::Args::try_parse() {
        Ok(args) => args,
        Err(error) => {
            let code = say_usage("quickstart", &error).context("cannot print the help")?;
            return Ok(ExitCode::from(code));
        }
    };
    interrupt::watch().context("cannot take over SIGINT, SIGTERM and SIGHUP")?;
    let report = app::run(&args)?;
    report.print().context("cannot print the result")?;
    Ok(ExitCode::SUCCESS)
}
