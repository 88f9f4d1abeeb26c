//! The guest of the README.
#![no_std]
#![no_main]

use guest_sdk::flat::Boot;
use guest_sdk::log::info;

guest_sdk::entry!(main);

fn main(boot: &Boot) {
    info!("hello from a guest on {}", boot.accel());
}
