//! Saying on the network where the guest is: by the guest, and by the device in its place
//! (virtio 1.3 §5.1.6.5.4).
//!
//! In come wishes, of an operator or of a frontend that has moved its guest, and the driver's word that
//! it is done. Out go the bit `ANNOUNCE` of the configuration, which is there from the one to the other,
//! and word to frontends that keep a copy of it.

use super::Link;
use crate::session::quota::PEER_LINES;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Whether the guest is to announce itself.
#[derive(Debug, Default)]
pub(super) struct Announcement {
    wanted: AtomicBool,
    /// The driver has a queue to say on that it is done.
    able: AtomicBool,
    notices: Mutex<Notices>,
}

/// What a frontend is to be told by a thread of its own: there is one at most.
#[derive(Debug, Default)]
struct Notices {
    due: bool,
    running: bool,
}

// Ordering: Relaxed for all of these, as for all of the link: each stands for itself.
impl Announcement {
    /// What the configuration shows.
    pub(super) fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::Relaxed)
    }

    /// The guest is to announce itself.
    pub(super) fn want(&self) {
        self.wanted.store(true, Ordering::Relaxed);
    }

    /// Whether there is a driver that can, from now on.
    pub(super) fn set_able(&self, able: bool) {
        self.able.store(able, Ordering::Relaxed);
    }

    fn notices(&self) -> MutexGuard<'_, Notices> {
        self.notices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there is something to tell; the thread that asks ends if not.
    fn take_notice(&self) -> bool {
        let mut notices = self.notices();
        let due = std::mem::take(&mut notices.due);
        notices.running = due;
        due
    }
}

impl Link {
    /// The frontend has moved its guest: a driver that can is asked to announce itself.
    pub(super) fn moved(self: &Arc<Self>) {
        if self.announcement.able.load(Ordering::Relaxed)
            && !self.announcement.wanted.swap(true, Ordering::Relaxed)
        {
            self.tell_later();
        }
    }

    /// The driver has announced itself, and is not asked to any more.
    pub(super) fn announced(self: &Arc<Self>) {
        if self.announcement.wanted.swap(false, Ordering::Relaxed) {
            self.tell_later();
        }
    }

    /// Tells the frontend that the configuration is another, for those who cannot wait for it: it may
    /// be waiting for them.
    fn tell_later(self: &Arc<Self>) {
        {
            let mut notices = self.announcement.notices();
            notices.due = true;
            if std::mem::replace(&mut notices.running, true) {
                return;
            }
        }
        let link = Arc::clone(self);
        let tell = move || {
            while link.announcement.take_notice() {
                if let Err(error) = link.tell() {
                    tracing::debug!(%error, "the frontend was not told of an announcement");
                }
            }
        };
        let thread = std::thread::Builder::new().name("net-notice".into());
        if let Err(error) = thread.spawn(tell) {
            self.announcement.notices().running = false;
            if PEER_LINES.may_say() {
                tracing::warn!(%error, "the frontend is not told of an announcement");
            }
        }
    }
}
