//! The guest of the README.
#![no_std]
#![no_main]

use guest_sdk::{block, flat::Boot, log::info};

guest_sdk::entry!(main);

fn main(boot: &Boot) -> Result<(), block::Error> {
    info!("hello from a guest on {}", boot.accel());
    if let Ok(mut disk) = block::open(boot.platform(), None) {
        let mut sector = [0; 512];
        disk.read_blocking(0, &mut sector)?;
        info!(
            "sector 0 of {} begins {:02x?}",
            disk.capacity(),
            &sector[..8]
        );
    }
    Ok(())
}
