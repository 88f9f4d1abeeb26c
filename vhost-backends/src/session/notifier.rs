//! Signals to the frontend, on descriptors that are its own.
//!
//! Its eventfd and the one here are one: the frontend can fill the counter and make writes block
//! at any moment, and whoever blocks keeps a queue, or the whole session, from being stopped. So
//! nothing is written. The eventfd is registered with an io_uring of its own, and the kernel signals
//! it for a completion, which cannot wait.
#![allow(unsafe_code)]
// UNSAFETY: an entry of a submission queue, which is unsafe to push whatever it says.

use crate::readiness::{Interest, wait};
use io_uring::{IoUring, opcode};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// An eventfd of the frontend that may be exchanged, or absent, while a queue runs.
#[derive(Debug, Default)]
pub struct Notifier {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    file: Option<File>,
    way: Way,
}

/// How the descriptor is signalled.
#[derive(Default)]
enum Way {
    /// Not yet known.
    #[default]
    Unknown,
    /// With a completion of this ring, on which it is registered while there is one.
    Completion(Box<IoUring>),
    /// The host has no io_uring: by a write, if there is room at that moment.
    Write,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inner")
            .field("file", &self.file)
            .finish_non_exhaustive()
    }
}

impl Notifier {
    /// Signals, and never waits. A full eventfd is success: the peer has not even seen the last
    /// signal.
    pub fn signal(&self) {
        let mut guard = self.lock();
        let Inner { file, way } = &mut *guard;
        let Some(file) = file else { return };
        if let Way::Completion(ring) = way
            && complete(ring).is_ok()
        {
            return;
        }
        let room = wait([(file.as_fd(), Interest::Write)], Some(Duration::ZERO));
        if room.is_ok_and(|[ready]| ready) {
            // A peer whose descriptor cannot be written has itself to blame; there is no one to
            // tell.
            let _ = (&*file).write(&1u64.to_ne_bytes());
        }
    }

    /// Exchanges the descriptor; `None` takes it away. One that is no eventfd is an error, and
    /// then there is none.
    pub(crate) fn set(&self, fd: Option<OwnedFd>) -> io::Result<()> {
        let mut guard = self.lock();
        let Inner { file, way } = &mut *guard;
        if file.take().is_some()
            && let Way::Completion(ring) = way
        {
            ring.submitter().unregister_eventfd()?;
        }
        let Some(fd) = fd else { return Ok(()) };
        if let Way::Unknown = way {
            *way = match IoUring::new(1) {
                Ok(ring) => Way::Completion(Box::new(ring)),
                Err(_) => Way::Write,
            };
        }
        if let Way::Completion(ring) = way {
            ring.submitter().register_eventfd(fd.as_raw_fd())?;
        }
        *file = Some(File::from(fd));
        Ok(())
    }

    /// The descriptor once more, if there is one.
    pub(crate) fn duplicate(&self) -> Option<io::Result<OwnedFd>> {
        let guard = self.lock();
        let file = guard.file.as_ref()?;
        Some(file.try_clone().map(OwnedFd::from))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Completes nothing, at once.
fn complete(ring: &mut IoUring) -> io::Result<()> {
    let nothing = opcode::Nop::new().build();
    // SAFETY: the entry refers to no memory. One that is left from a submission that failed takes
    // the only place, and does as well.
    let _ = unsafe { ring.submission().push(&nothing) };
    ring.submit()?;
    ring.completion().for_each(drop);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::readiness::Event;
    use std::io::Read;
    use std::sync::{Arc, mpsc};

    fn event() -> File {
        File::from(Event::new().unwrap().duplicate().unwrap())
    }

    fn owned(event: &File) -> OwnedFd {
        event.try_clone().unwrap().into()
    }

    fn read(mut event: &File) -> io::Result<u64> {
        let mut count = [0; 8];
        event.read_exact(&mut count)?;
        Ok(u64::from_ne_bytes(count))
    }

    /// Signals in a thread; whether that ended in time.
    fn ends(notifier: &Arc<Notifier>) -> bool {
        let (done, ended) = mpsc::channel();
        let notifier = Arc::clone(notifier);
        std::thread::spawn(move || {
            notifier.signal();
            let _ = done.send(());
        });
        ended.recv_timeout(Duration::from_secs(5)).is_ok()
    }

    #[test]
    fn a_full_eventfd_that_came_to_block_holds_nobody_up() {
        let event = event();
        let notifier = Arc::new(Notifier::default());
        notifier.set(Some(owned(&event))).unwrap();
        notifier.signal();
        assert_eq!(read(&event).unwrap(), 1);
        // After it was given: full, and blocking for whoever shares it.
        (&event).write_all(&(u64::MAX - 1).to_ne_bytes()).unwrap();
        // SAFETY: F_SETFL takes no pointer.
        let set = unsafe { libc::fcntl(event.as_raw_fd(), libc::F_SETFL, 0) };
        assert_eq!(set, 0);
        assert!(ends(&notifier), "it waits for the peer");
        assert!(ends(&notifier));
        assert!(read(&event).unwrap() >= u64::MAX - 1);
        notifier.signal();
        assert_eq!(read(&event).unwrap(), 1, "the next signal arrives");
    }

    #[test]
    fn descriptors_are_exchanged_and_only_eventfds_taken() {
        let [first, second] = [event(), event()];
        let notifier = Notifier::default();
        notifier.signal();
        for round in 0..3 {
            for event in [&first, &second] {
                notifier.set(Some(owned(event))).unwrap();
                notifier.signal();
                assert_eq!(read(event).unwrap(), 1, "{round}");
            }
        }
        notifier.set(None).unwrap();
        notifier.signal();
        assert!(read(&second).is_err());
        let (_reader, writer) = std::io::pipe().unwrap();
        if IoUring::new(1).is_err() {
            println!("SKIPPED: without io_uring any descriptor is taken");
            return;
        }
        assert!(notifier.set(Some(writer.into())).is_err());
        notifier.signal();
    }
}
