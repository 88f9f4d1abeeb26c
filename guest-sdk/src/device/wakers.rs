//! Futures that wait for a device, on executors that do not look again by themselves.

use crate::sync::SpinLock;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::task::Waker;

/// The wakers of the futures that wait for one device; a handle that is cheap to clone.
///
/// A future of a driver looks at its ring whenever it is polled, and asks for an event before it says
/// that it is pending. An executor that polls again at every event of the vCPU, as
/// [`block_on`](crate::platform::block_on) does, needs nothing else. Any other one calls
/// [`wake`](Self::wake) when one of the device's events is pending; and now and then, at least every
/// [`LOSS_POLL`](crate::limits::LOSS_POLL), or a device that is lost may go unnoticed.
#[derive(Clone, Default)]
pub struct Wakers {
    list: Arc<SpinLock<Vec<Waker>>>,
}

impl Wakers {
    /// Wakes every future that waits for the device, to look again.
    pub fn wake(&self) {
        let list = core::mem::take(&mut *self.list.lock());
        // Outside the lock: a waker may poll right away.
        list.into_iter().for_each(Waker::wake);
    }

    /// Keeps a waker until something happens; one for each task.
    pub(crate) fn register(&self, waker: &Waker) {
        let mut list = self.list.lock();
        if !list.iter().any(|other| other.will_wake(waker)) {
            list.push(waker.clone());
        }
    }
}

impl core::fmt::Debug for Wakers {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Wakers").finish_non_exhaustive()
    }
}
