//! A deadline on a conversation with a backend.
//!
//! The vhost-user frontend reads until an answer is complete, however long that takes, so a socket
//! time-out does not end it. What does is shutting the socket down, from another thread.

use crate::own_thread;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::Duration;

/// Ends the conversation on a socket unless it is dropped in time.
pub(super) struct Deadline {
    over: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    passed: Arc<AtomicBool>,
}

impl Deadline {
    /// From now on; conversations are rare (bring-up, reset), so a thread for each costs nothing.
    pub(super) fn start(stream: &UnixStream, limit: Duration) -> io::Result<Deadline> {
        let (sender, dropped) = mpsc::channel();
        let stream = stream.try_clone()?;
        let span = tracing::Span::current();
        let passed = Arc::new(AtomicBool::new(false));
        let noted = Arc::clone(&passed);
        let thread = own_thread::start("pv-deadline", move || {
            let _of_caller = span.entered();
            if let Err(RecvTimeoutError::Timeout) = dropped.recv_timeout(limit) {
                // Ordering: Release, before the end that it explains.
                noted.store(true, Ordering::Release);
                tracing::debug!(?limit, "a backend did not answer in time");
                let _ = stream.shutdown(Shutdown::Both);
            }
        })?;
        Ok(Deadline {
            over: Some(sender),
            thread: Some(thread),
            passed,
        })
    }

    /// Whether it is what has ended the conversation.
    pub(super) fn has_passed(&self) -> bool {
        self.passed.load(Ordering::Acquire)
    }
}

impl Drop for Deadline {
    /// Nothing of it is left: the thread ends as soon as it hears.
    fn drop(&mut self) {
        self.over = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn silence_ends_and_an_answer_in_time_goes_on() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        drop(Deadline::start(&ours, Duration::from_millis(20)).unwrap());
        std::thread::sleep(Duration::from_millis(60));
        io::Write::write_all(&mut &theirs, b"x").unwrap();
        assert_eq!(ours.read(&mut [0]).unwrap(), 1);
        let deadline = Deadline::start(&ours, Duration::from_millis(20)).unwrap();
        assert_eq!(ours.read(&mut [0]).unwrap(), 0);
        assert!(deadline.has_passed());
    }
}
