//! A whole guest: says hello, and reads its disk if it has one.
#![no_std]
#![no_main]

use guest_sdk::{block, flat::Boot, log::info};

guest_sdk::entry!(main);

fn main(boot: &Boot) -> Result<(), block::Error> {
    info!("hello from a guest on {}", boot.accel());
    if let Ok(mut disk) = block::open(boot.platform(), None) {
        let (mut sector, sectors) = ([0; 512], disk.capacity());
        disk.read_blocking(0, &mut sector)?;
        info!("{sectors} sectors, the first begins {:02x?}", &sector[..8]);
    }
    Ok(())
}
