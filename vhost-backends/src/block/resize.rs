//! A disk that grew while it is served (virtio 1.3 §5.2.3.1).
//!
//! The capacity only grows: requests that were checked against the old one stay good. It is there
//! before the driver hears of it, so that no request within what it was told is refused.

use super::{BlockDevice, sectors};
use std::fmt;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

/// How a look at the disk's size ended.
#[derive(Debug)]
pub struct Resized {
    /// Sectors before.
    pub before: u64,
    /// Sectors now.
    pub now: u64,
    /// Whether the frontend was told, and if it was not, why.
    pub told: Result<(), io::Error>,
}

/// The disk is smaller than it was: the driver may use what is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the disk has {now} sectors and the guest was told {told}; a disk is not made smaller while it \
     is served, and what is missing are I/O errors"
)]
pub struct ResizeRefused {
    /// Sectors that it has.
    pub now: u64,
    /// Sectors that the driver knows of.
    pub told: u64,
}

impl fmt::Display for Resized {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Resized { before, now, told } = self;
        match told {
            _ if before == now => write!(f, "{now} sectors as before"),
            Ok(()) => write!(f, "{before} sectors became {now}; the frontend was told"),
            Err(reason) => {
                write!(
                    f,
                    "{before} sectors became {now}; the frontend was not told: {reason}"
                )
            }
        }
    }
}

impl BlockDevice {
    /// Looks at the store's size again. If it grew, the capacity does, and the frontend is told,
    /// which may take [`crate::limits::BACKEND_ACK_TIMEOUT_SECS`]. Not to be called from a thread
    /// that serves this device's session.
    pub fn resize(&self) -> Result<Resized, ResizeRefused> {
        let now = sectors(self.disk.store.geometry());
        // Ordering: Relaxed, as in `Disk::capacity`.
        let before = self.disk.capacity.fetch_max(now, Ordering::Relaxed);
        if now < before {
            return Err(ResizeRefused { now, told: before });
        }
        let link = self.frontend.lock().unwrap_or_else(PoisonError::into_inner);
        let link = link.as_ref().map(Arc::clone);
        let told = match link {
            _ if now == before => Ok(()),
            Some(link) => link.config_changed(),
            None => Err(io::Error::other(
                "none is connected that takes such messages",
            )),
        };
        Ok(Resized { before, now, told })
    }
}
