//! What a case has beside it: another VM, which must not notice, or a file system that fills up.
#![allow(unsafe_code)]
// UNSAFETY: mounting and unmounting have no wrapper.

use anyhow::{bail, ensure};
use paravane_tests::{patience, suite_vm};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use vmm_core::{Accel, ExitReason, FaultClass, VmHandle};

/// A small file system to be filled.
pub(crate) struct Tmpfs(pub(crate) PathBuf);

impl Tmpfs {
    pub(crate) fn mount(folder: &Path) -> std::io::Result<Tmpfs> {
        let at = folder.join("small");
        std::fs::create_dir(&at)?;
        let target = std::ffi::CString::new(at.as_os_str().as_encoded_bytes())?;
        let (kind, options) = (c"tmpfs".as_ptr(), c"size=6m".as_ptr());
        // SAFETY: four valid strings.
        let r = unsafe { libc::mount(kind, target.as_ptr(), kind, 0, options.cast()) };
        if r == 0 {
            Ok(Tmpfs(at))
        } else {
            Err(std::io::Error::last_os_error())
        }
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        if let Ok(target) = std::ffi::CString::new(self.0.as_os_str().as_encoded_bytes()) {
            // SAFETY: a valid string.
            unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
        }
    }
}

/// Another VM of this process, which goes on with its own business.
pub(crate) struct Neighbour {
    vm: VmHandle,
    ticks: Arc<AtomicU64>,
    accel: Accel,
}

impl Neighbour {
    pub(crate) fn start(accel: Accel) -> anyhow::Result<Neighbour> {
        let ticks: Arc<AtomicU64> = Arc::default();
        let counted = Arc::clone(&ticks);
        let vm = suite_vm("life.ticker", accel)?
            .call(5, move |call| {
                counted.fetch_add(1, Ordering::Relaxed);
                call.finish(Ok(0));
            })
            .build()?
            .run()?;
        Ok(Neighbour { vm, ticks, accel })
    }

    pub(crate) fn finish(self) -> anyhow::Result<()> {
        let before = self.ticks.load(Ordering::Relaxed);
        std::thread::sleep(patience(1) / 4);
        let after = self.ticks.load(Ordering::Relaxed);
        if let Some(reason) = self.vm.exit() {
            let ended = format!("the neighbour on {} has ended: {reason}", self.accel);
            if self.accel == Accel::Kvm && emulated() && shut_down(&reason) {
                println!("NOT REPEATED: {ended}: the emulated CPU shut down");
                return Ok(());
            }
            bail!(ended);
        }
        ensure!(
            after > before,
            "the neighbour on {} stands still",
            self.accel
        );
        self.vm.stop();
        println!(
            "the neighbour on {} ticked {after} times and noticed nothing",
            self.accel
        );
        Ok(())
    }
}

/// Whether the machine is emulated: who runs the tests there gives them more time.
pub(crate) fn emulated() -> bool {
    patience(1) > Duration::from_secs(1)
}

/// Whether the CPU shut down: a triple fault.
pub(crate) fn shut_down(reason: &ExitReason) -> bool {
    reason.fault_class() == Some(FaultClass::Shutdown)
}
