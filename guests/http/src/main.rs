//! The web guest: serves the files of its disk over HTTP, and measures TCP between two of its kind.
//!
//! `role=serve` (the default), `role=source` or `role=sink` on the command line, with `ip=`, `gateway=`,
//! and for a source `peer=` and `seconds=`.
#![no_std]
#![no_main]

extern crate alloc;

mod measure;
mod net;
mod serve;

use alloc::boxed::Box;
use guest_sdk::flat::Boot;
use net::Network;

guest_sdk::entry!(main);

type Failure = Box<dyn core::error::Error>;

fn main(boot: &Boot) -> Result<(), Failure> {
    let network = Network::open(boot)?;
    match boot.argument("role").unwrap_or("serve") {
        "serve" => serve::serve(boot, network),
        "source" => measure::source(boot, network),
        "sink" => measure::sink(boot, network),
        role => Err(alloc::format!("role={role} is none of serve, source and sink").into()),
    }
}
