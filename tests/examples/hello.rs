//! scratch
use vmm_core::*;
fn main() -> anyhow::Result<()> {
    let accel: Accel = std::env::args().nth(1).unwrap_or("kvm".into()).parse()?;
    let img = std::env::args().nth(2);
    let mut b = VmBuilder::new(Image::from_bytes(guest_images::HELLO)?).accel(accel).log(|l, t| println!("{l:?}: {t}"));
    if let Some(img) = img {
        b = b.block(BlockConfig::spawn(move || { let mut c = std::process::Command::new("target/debug/pv-blkd"); c.args(["--blk-file", &img]); c }));
    }
    let t = std::time::Instant::now();
    let vm = b.build()?;
    println!("built {:?}", t.elapsed());
    let h = vm.run()?;
    println!("{:?} {:?}", h.wait_timeout(std::time::Duration::from_secs(5)), t.elapsed());
    println!("{:#?}", h.stats());
    Ok(())
}
