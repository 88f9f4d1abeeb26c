//! A disk that grew while it is served (virtio 1.3 §5.2.3.1).
//!
//! The capacity only grows: requests that were checked against the old one stay good. It is there
//! before the driver hears of it, so that no request within what it was told is refused. A notice that
//! reached nobody is given again by the next look.

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
    /// Whether the frontend was told, of this or of what it has missed before; if not, why.
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
            Ok(()) if before == now => write!(f, "{now} sectors as before"),
            Ok(()) => write!(f, "{before} sectors became {now}; the frontend was told"),
            Err(reason) if before == now => {
                write!(
                    f,
                    "{now} sectors as before; the frontend was not told: {reason}"
                )
            }
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
    /// Looks at the store's size again. If it grew, the capacity does, and the frontend is told, as
    /// it is of a growth that it could not be told of before; which may take
    /// [`crate::limits::BACKEND_ACK_TIMEOUT_SECS`]. Not to be called from a thread that serves this
    /// device's session.
    pub fn resize(&self) -> Result<Resized, ResizeRefused> {
        let now = sectors(self.disk.store.geometry());
        // Ordering: Relaxed, as in `Disk::capacity`.
        let before = self.disk.capacity.fetch_max(now, Ordering::Relaxed);
        if now < before {
            return Err(ResizeRefused { now, told: before });
        }
        let link = self.frontend.lock().unwrap_or_else(PoisonError::into_inner);
        let link = link.as_ref().map(Arc::clone);
        // Ordering: Relaxed; looks that meet at most tell twice.
        let untold = self.untold.swap(false, Ordering::Relaxed);
        let told = match link {
            _ if now == before && !untold => Ok(()),
            Some(link) => link.config_changed(),
            None => Err(io::Error::other(
                "none is connected that takes such messages",
            )),
        };
        if told.is_err() {
            self.untold.store(true, Ordering::Relaxed);
        }
        Ok(Resized { before, now, told })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::BlockOptions;
    use crate::engine::{FileOptions, RawFile};
    use crate::session::{Device, FrontendLink};
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_notice_that_reached_nobody_is_given_again() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let store = RawFile::open(file.path(), FileOptions::default()).unwrap();
        let device = BlockDevice::new(store, BlockOptions::with_queues(1));
        assert!(device.resize().unwrap().told.is_ok(), "nothing to tell");
        file.as_file().set_len(2 << 20).unwrap();
        for before in [2048, 4096] {
            let Resized {
                before: b,
                now,
                told,
            } = device.resize().unwrap();
            assert_eq!((b, now), (before, 4096));
            assert!(told.is_err(), "there is nobody");
        }
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let link = FrontendLink::new(theirs.into(), false).unwrap();
        device.set_frontend(Some(Arc::new(link)));
        assert!(device.resize().unwrap().told.is_ok());
        (&ours).read_exact(&mut [0; 12]).unwrap();
        assert!(device.resize().unwrap().told.is_ok());
        assert!((&ours).read(&mut [0; 12]).is_err(), "told once");
        // One that has gone away hears nothing either.
        drop(ours);
        file.as_file().set_len(3 << 20).unwrap();
        assert!(device.resize().unwrap().told.is_err());
        assert!(device.resize().unwrap().told.is_err());
    }
}
