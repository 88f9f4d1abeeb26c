//! Running a future where there is nothing but `idle`.

use super::platform::platform;
use crate::limits::LOSS_POLL;
use crate::platform::Platform;
use alloc::sync::Arc;
use alloc::task::Wake;
use core::future::Future;
use core::pin::pin;
use core::sync::atomic::{AtomicBool, Ordering};
use core::task::{Context, Poll, Waker};
use pv_abi::vcpu::EVENT_WORDS;

/// Runs a future on this vCPU, and idles whenever it has nothing to do.
///
/// Every event of this vCPU makes the future look again, so drivers need no interrupt glue: the
/// futures of this crate look at their rings each time they are polled. A waker that is called on
/// another vCPU wakes this one. The idle is never longer than
/// [`LOSS_POLL`](crate::limits::LOSS_POLL), so that a future whose device was lost notices it on
/// whichever vCPU it runs.
pub fn block_on<F: Future>(future: F) -> F::Output {
    let platform = platform();
    let mut future = pin!(future);
    let signal = Arc::new(Signal {
        woken: AtomicBool::new(false),
        vcpu: platform.vcpu_index(),
    });
    let waker = Waker::from(Arc::clone(&signal));
    let mut context = Context::from_waker(&waker);
    loop {
        for word in 0..EVENT_WORDS {
            platform.take_events(word, u64::MAX);
        }
        // Ordering: Acquire pairs with the Release in `wake_by_ref`.
        signal.woken.swap(false, Ordering::Acquire);
        if let Poll::Ready(output) = future.as_mut().poll(&mut context) {
            return output;
        }
        // Ordering: Acquire, as above. A wake after this look rings the doorbell, which ends the idle.
        if !signal.woken.load(Ordering::Acquire) {
            platform.idle(Some(LOSS_POLL));
        }
    }
}

struct Signal {
    woken: AtomicBool,
    vcpu: u32,
}

impl Wake for Signal {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        // Ordering: Release publishes what the waker's caller did before.
        self.woken.store(true, Ordering::Release);
        if platform().vcpu_index() != self.vcpu {
            platform().wake(self.vcpu);
        }
    }
}
