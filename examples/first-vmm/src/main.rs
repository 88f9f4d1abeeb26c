//! A whole VMM: boots a guest, whose disk another process serves.
use std::{env, os::unix::process::CommandExt, process};
use vmm_core::{BlockConfig, Image, VmBuilder};

fn main() -> anyhow::Result<process::ExitCode> {
    // Started again under this name, the program is the disk's backend.
    if env::args_os().next().is_some_and(|name| name == "pv-blkd") {
        return Ok(vhost_backends::pv_blkd_main(env::args_os()));
    }
    let mut vm = VmBuilder::new(Image::from_bytes(guest_images::FIRST_GUEST)?)
        .accel(env::var("PV_ACCEL").as_deref().unwrap_or("auto").parse()?)
        .log(|level, line| println!("{level:?}: {}", line.escape_debug()));
    if let Some(disk) = env::args_os().nth(1) {
        vm = vm.block(BlockConfig::spawn(move || {
            let mut backend = process::Command::new("/proc/self/exe");
            backend.arg0("pv-blkd").arg("--blk-file").arg(&disk);
            backend
        }));
    }
    let exit = vm.build()?.run()?.wait();
    println!("the guest {exit}");
    Ok(process::ExitCode::from(u8::from(exit.code() != Some(0))))
}
