//! A VMM to be killed: runs a guest that ticks, with a backend, and says so on standard output.
//!
//! Usage: `vmm-under-test ACCEL IMAGE`.

use paravane_tests::{disk, suite_vm};
use std::io::Write;
use std::sync::atomic::{AtomicU32, Ordering};

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let (Some(accel), Some(image)) = (args.next(), args.next()) else {
        anyhow::bail!("usage: vmm-under-test ACCEL IMAGE");
    };
    let ticks = AtomicU32::new(0);
    let vm = suite_vm("life.ticker", accel.parse()?)?
        .block(disk(image.as_ref(), &[]))
        .call(5, move |call| {
            if ticks.fetch_add(1, Ordering::Relaxed) == 3 {
                // The test waits for this line.
                let mut out = std::io::stdout();
                let _ = writeln!(out, "ticking").and_then(|()| out.flush());
            }
            call.finish(Ok(0));
        })
        .build()?
        .run()?;
    vm.wait();
    Ok(())
}
