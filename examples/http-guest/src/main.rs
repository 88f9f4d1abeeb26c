//! `http-guest`: see `--help`, and the library beside this for how it is done.
#![forbid(unsafe_code)]

use clap::Parser;
use http_guest::{app, cli, pair, vm};
use quickstart::interrupt;
use quickstart::report::{say, say_usage};
use std::ffi::OsStr;
use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    // Started again under another name, this program is one of the backends.
    let name = std::env::args_os().next().unwrap_or_default();
    match Path::new(&name).file_name().and_then(OsStr::to_str) {
        Some(vm::DISK_BACKEND) => return vhost_backends::pv_blkd_main(std::env::args_os()),
        Some(vm::NET_BACKEND) => {
            if let Err(error) = pair::end_with_parent() {
                say(format_args!("pv-netd: cannot end with its parent: {error}"));
                return ExitCode::FAILURE;
            }
            return vhost_backends::pv_netd_main(std::env::args_os());
        }
        _ => {}
    }
    let args = match cli::Args::try_parse() {
        Ok(args) => args,
        Err(error) => {
            // What nobody reads is no reason to fail in another way.
            return say_usage("http-guest", &error).map_or(ExitCode::SUCCESS, ExitCode::from);
        }
    };
    if let Err(error) = interrupt::watch() {
        say(format_args!("http-guest: cannot take over Ctrl-C: {error}"));
        return ExitCode::FAILURE;
    }
    match app::run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => match interrupt::caught() {
            // Whatever failed did so because of that, or does not matter any more.
            Some(signal) => {
                say(format_args!("http-guest: interrupted"));
                interrupt::end_by(signal);
                ExitCode::FAILURE
            }
            None => {
                say(format_args!("http-guest: {error:#}"));
                ExitCode::FAILURE
            }
        },
    }
}
