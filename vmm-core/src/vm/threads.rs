//! The vCPU threads: the library's own, with the kick signal blocked from their first moment on.
//!
//! The first vCPU's thread starts while the VM is being built: it makes its vCPU while the building
//! thread loads the guest, and is there when the VM is run.

use super::shared::Shared;
use super::vcpu;
use crate::accel::{MakeVcpu, Vcpu};
use crate::own_thread;
use std::io;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use vmm_sys_util::signal::{block_signal, get_blocked_signals, unblock_signal};

/// Starts the first vCPU's thread; it makes its vCPU with what is sent, and waits to be started.
///
/// It ends at once if nothing is sent, or if what is sent makes none.
pub(super) fn start_first(shared: &Arc<Shared>) -> io::Result<Sender<MakeVcpu>> {
    let (sender, receiver) = channel::<MakeVcpu>();
    let _blocked = BlockedSignal::new(shared.kick_signal)?;
    let thread = spawn(shared, 0, move || receiver.recv().ok()?())?;
    threads(shared, |threads| threads.push(thread));
    Ok(sender)
}

/// Starts the threads of all other vCPUs.
///
/// # Errors
/// When one cannot be started; those that are missing count as done then.
pub(super) fn start_others(shared: &Arc<Shared>, vcpus: Vec<Box<dyn Vcpu>>) -> io::Result<()> {
    if vcpus.is_empty() {
        return Ok(());
    }
    let blocked = BlockedSignal::new(shared.kick_signal);
    let _blocked = blocked.inspect_err(|_| shared.no_threads_from(1))?;
    threads(shared, |threads| {
        for (index, vcpu) in (1u32..).zip(vcpus) {
            let thread = spawn(shared, index, || Some(vcpu));
            threads.push(thread.inspect_err(|_| shared.no_threads_from(index))?);
        }
        Ok(())
    })
}

/// Waits until all vCPU threads have ended; the VM must have.
pub(super) fn join(shared: &Shared) {
    for thread in threads(shared, std::mem::take) {
        let _ = thread.join();
    }
}

fn threads<T>(shared: &Shared, with: impl FnOnce(&mut Vec<JoinHandle<()>>) -> T) -> T {
    let threads = shared.threads.lock();
    with(&mut threads.unwrap_or_else(PoisonError::into_inner))
}

fn spawn(
    shared: &Arc<Shared>,
    index: u32,
    make: impl FnOnce() -> Option<Box<dyn Vcpu>> + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let own = Arc::clone(shared);
    own_thread::start(&format!("pv-vcpu{index}"), move || {
        let _vm = own.span.enter();
        vcpu::main(&own, index, make);
    })
}

/// Blocks a signal in this thread until dropped, unless it was blocked before.
struct BlockedSignal(Option<libc::c_int>);

impl BlockedSignal {
    fn new(signal: Option<libc::c_int>) -> io::Result<BlockedSignal> {
        let other = |e| io::Error::other(format!("block the kick signal: {e}"));
        let Some(signal) = signal else {
            return Ok(BlockedSignal(None));
        };
        if get_blocked_signals().map_err(other)?.contains(&signal) {
            return Ok(BlockedSignal(None));
        }
        block_signal(signal).map_err(other)?;
        Ok(BlockedSignal(Some(signal)))
    }
}

impl Drop for BlockedSignal {
    fn drop(&mut self) {
        if let Some(signal) = self.0
            && let Err(error) = unblock_signal(signal)
        {
            tracing::warn!(%error, "the kick signal stays blocked in the embedder's thread");
        }
    }
}
