//! Running a future where there is nothing but `idle`.

use super::{Platform, Waiter};
use crate::limits::LOSS_POLL;
use alloc::sync::Arc;
use alloc::task::Wake;
use core::future::Future;
use core::pin::pin;
#[cfg(not(loom))]
use core::sync::atomic::{AtomicBool, Ordering};
use core::task::{Context, Poll, Waker};
#[cfg(loom)]
use loom::sync::atomic::{AtomicBool, Ordering};

/// Runs a future on this vCPU, and idles whenever it has nothing to do.
///
/// Every event of this vCPU makes the future look again, so drivers need no interrupt glue: the
/// futures of this crate look at their rings each time they are polled. A waker that is called on
/// another vCPU wakes this one. The idle is never longer than
/// [`LOSS_POLL`](crate::limits::LOSS_POLL), so that a future whose device was lost notices it on
/// whichever vCPU it runs. When it returns, every event that came meanwhile is pending again, for
/// whoever waits for it.
pub fn block_on<P: Platform, F: Future>(platform: &'static P, future: F) -> F::Output {
    let mut future = pin!(future);
    let signal = Arc::new(Signal {
        platform,
        woken: AtomicBool::new(false),
        vcpu: platform.vcpu_index(),
    });
    let waker = Waker::from(Arc::clone(&signal));
    let mut context = Context::from_waker(&waker);
    // Nobody can know which of the events are the future's own: all of them are given back.
    let mut waiter = Waiter::new(platform, &[]);
    loop {
        waiter.clear();
        // Ordering: Acquire pairs with the Release in `wake_by_ref`.
        signal.woken.swap(false, Ordering::Acquire);
        if let Poll::Ready(output) = future.as_mut().poll(&mut context) {
            return output;
        }
        // Ordering: Acquire, as above. A wake after this look rings the doorbell, which ends the idle.
        if !signal.woken.load(Ordering::Acquire) {
            waiter.idle(Some(LOSS_POLL));
        }
    }
}

struct Signal<P: Platform> {
    platform: &'static P,
    woken: AtomicBool,
    vcpu: u32,
}

impl<P: Platform> Wake for Signal<P> {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        // Ordering: Release publishes what the waker's caller did before.
        self.woken.store(true, Ordering::Release);
        if self.platform.vcpu_index() != self.vcpu {
            self.platform.wake(self.vcpu);
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::block_on;
    use crate::fake::Fake;
    use crate::platform::Platform;
    use core::task::Poll;

    #[test]
    fn running_a_future_keeps_the_events_of_others() {
        let fake = Fake::new(1, 1, 1, true);
        fake.raise_events(0, 1 << 9);
        let mut polls = 0;
        let output = block_on(
            fake,
            core::future::poll_fn(|context| {
                polls += 1;
                if polls == 1 {
                    fake.raise_events(1, 1 << 5);
                    context.waker().wake_by_ref();
                    return Poll::Pending;
                }
                Poll::Ready(polls)
            }),
        );
        assert_eq!(output, 2);
        assert!(fake.take_event(9), "pending before");
        assert!(fake.take_event(64 + 5), "came while it ran");
    }
}
