//! A future on one vCPU, and a waker that another one calls.

use crate::executor::block_on;
use core::task::{Poll, Waker};
use core::time::Duration;
use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use loom::sync::{Arc, Mutex, Notify};
use loom::thread;

/// What `block_on` asks of the real one.
pub(crate) trait Platform: Sync + 'static {
    fn vcpu_index(&self) -> u32;
    fn wake(&self, vcpu: u32);
    fn idle(&self, limit: Option<Duration>);
    fn take_events(&self, word: usize, mask: u64) -> u64;
    fn raise_events(&self, word: usize, mask: u64);
}

loom::thread_local! {
    static VCPU: core::cell::Cell<u32> = core::cell::Cell::new(0);
}

/// A first vCPU that sleeps, as long as it takes, until another rings: then its bit is pending, as
/// the gate does it. The limits of idles are left out, so that a wake that is lost is a deadlock.
struct Sleeper {
    doorbell: Notify,
    pending: AtomicU64,
}

impl Platform for Sleeper {
    fn vcpu_index(&self) -> u32 {
        VCPU.with(|vcpu| vcpu.get())
    }

    fn wake(&self, vcpu: u32) {
        assert_eq!(vcpu, 0);
        self.doorbell.notify();
    }

    fn idle(&self, _limit: Option<Duration>) {
        if self.pending.load(Ordering::Relaxed) == 0 {
            self.doorbell.wait();
            self.pending.fetch_or(1, Ordering::Relaxed);
        }
    }

    fn take_events(&self, word: usize, mask: u64) -> u64 {
        if word > 0 {
            return 0;
        }
        self.pending.fetch_and(!mask, Ordering::Relaxed) & mask
    }

    fn raise_events(&self, word: usize, mask: u64) {
        assert_eq!(word, 0);
        self.pending.fetch_or(mask, Ordering::Relaxed);
    }
}

#[test]
fn a_wake_is_not_lost() {
    crate::explore(|| {
        let sleeper: &'static Sleeper = Box::leak(Box::new(Sleeper {
            doorbell: Notify::new(),
            pending: AtomicU64::new(0),
        }));
        let shared = Arc::new((AtomicBool::new(false), Mutex::new(None::<Waker>)));
        let other = Arc::clone(&shared);
        let waker = thread::spawn(move || {
            VCPU.with(|vcpu| vcpu.set(1));
            other.0.store(true, Ordering::Relaxed);
            let waker = other.1.lock().unwrap().take();
            if let Some(waker) = waker {
                waker.wake();
            }
        });
        let mut polls = 0;
        block_on(
            sleeper,
            core::future::poll_fn(|context| {
                polls += 1;
                if polls == 1 {
                    // Its own vCPU needs no doorbell.
                    context.waker().wake_by_ref();
                    return Poll::Pending;
                }
                *shared.1.lock().unwrap() = Some(context.waker().clone());
                // Ordering: Relaxed, that the wake publishes it is what is to be shown.
                match shared.0.load(Ordering::Relaxed) {
                    true => Poll::Ready(()),
                    false => Poll::Pending,
                }
            }),
        );
        waker.join().unwrap();
    });
}
