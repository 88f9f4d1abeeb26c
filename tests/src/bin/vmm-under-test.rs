//! A VMM in a process of its own, which somebody else ends.
//!
//! Usage: `vmm-under-test ACCEL [IMAGE [SPARES]]`. With an image its guest has a backend and ticks; without,
//! it is idle. A line on standard output says when it does: `ticking`, `running`. So many spare processes
//! wait for other guests.

use paravane_tests::{disk, suite_vm};
use std::io::Write;
use std::sync::atomic::{AtomicU32, Ordering};

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let Some(accel) = args.next() else {
        anyhow::bail!("usage: vmm-under-test ACCEL [IMAGE [SPARES]]");
    };
    let accel = accel.parse()?;
    let Some(image) = args.next() else {
        let vm = suite_vm("life.idle_forever", accel)?.build()?.run()?;
        say("running");
        vm.wait();
        return Ok(());
    };
    let spares = match args.next() {
        Some(count) => Some(vmm_core::Spares::new(count.parse()?)?),
        None => None,
    };
    let ticks = AtomicU32::new(0);
    let mut vm = suite_vm("life.ticker", accel)?;
    if let Some(spares) = &spares {
        vm = vm.spares(spares);
    }
    let vm = vm
        .block(disk(image.as_ref(), &[]))
        .call(5, move |call| {
            if ticks.fetch_add(1, Ordering::Relaxed) == 3 {
                say("ticking");
            }
            call.finish(Ok(0));
        })
        .build()?
        .run()?;
    vm.wait();
    Ok(())
}

/// Somebody waits for this line.
fn say(line: &str) {
    let mut out = std::io::stdout();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}
