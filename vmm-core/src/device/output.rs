//! Console output on its way to the embedder's writer, on a thread of its own.
//!
//! The writer may block, for as long as it likes: what waits then is the guest's next output, because
//! one chain is with the writer at a time and completes when it is written. Nothing else waits: not
//! a reset, not the VM's other devices, and its end only for a moment.

use super::local::OnPanic;
use crate::limits::CONSOLE_DRAIN;
use crate::own_thread;
use crate::vm::events::signal;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Where console output goes.
pub(crate) type Output = Arc<Mutex<dyn Write + Send>>;

/// The writer's thread, once there is one; ended, or left to its writer, when dropped.
pub(crate) struct OutputThread {
    desk: Arc<Desk>,
    start: Option<Box<dyn FnOnce() -> io::Result<JoinHandle<()>> + Send>>,
    thread: Option<JoinHandle<()>>,
}

/// What lies between the device and the writer.
pub(crate) struct Desk {
    state: Mutex<State>,
    changed: Condvar,
    /// Signalled when the writer is done with something.
    written: EventFd,
}

#[derive(Default)]
struct State {
    /// Bytes for the writer, which has not taken them yet.
    waiting: Option<Vec<u8>>,
    writing: bool,
    over: bool,
}

impl OutputThread {
    /// A thread to be started when there is a guest that has something to say; `panicked` is called
    /// if the writer panics.
    pub(crate) fn new(
        output: Output,
        panicked: impl FnOnce() + Send + 'static,
        span: tracing::Span,
    ) -> io::Result<OutputThread> {
        let desk = Arc::new(Desk {
            state: Mutex::default(),
            changed: Condvar::new(),
            written: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        });
        let own = Arc::clone(&desk);
        let start = move || {
            let body = move || {
                let _vm = span.entered();
                let _guard = OnPanic(Some(panicked));
                own.write_all(&output);
            };
            own_thread::start("pv-console", body)
        };
        Ok(OutputThread {
            desk,
            start: Some(Box::new(start)),
            thread: None,
        })
    }

    /// The desk, with the thread behind it.
    pub(crate) fn desk(&mut self) -> io::Result<Arc<Desk>> {
        if let Some(start) = self.start.take() {
            self.thread = Some(start()?);
        }
        Ok(Arc::clone(&self.desk))
    }
}

impl Drop for OutputThread {
    fn drop(&mut self) {
        self.desk.lock().over = true;
        self.desk.changed.notify_all();
        let Some(thread) = self.thread.take() else {
            return;
        };
        if self.desk.wait_until_written() {
            let _ = thread.join();
        } else {
            tracing::warn!("a console writer blocks; its thread is left to it");
        }
    }
}

impl Desk {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives bytes to the writer. `false`: it is busy with others.
    pub(crate) fn give(&self, bytes: &mut Vec<u8>) -> bool {
        let mut state = self.lock();
        if state.waiting.is_some() || state.writing {
            return false;
        }
        state.waiting = Some(std::mem::take(bytes));
        self.changed.notify_all();
        true
    }

    /// Whether the writer is done with all that it was given.
    pub(crate) fn is_clear(&self) -> bool {
        let state = self.lock();
        state.waiting.is_none() && !state.writing
    }

    /// Readable when the writer is done with something.
    pub(crate) fn written(&self) -> &EventFd {
        &self.written
    }

    /// The thread: writes what comes until it is over.
    fn write_all(&self, output: &Output) {
        loop {
            let mut state = self.lock();
            let bytes = loop {
                if let Some(bytes) = state.waiting.take() {
                    state.writing = true;
                    break bytes;
                }
                if state.over {
                    return;
                }
                state = self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
            };
            drop(state);
            // Also when the writer panics.
            let _done = Done(self);
            let mut output = output.lock().unwrap_or_else(PoisonError::into_inner);
            // A writer that fails loses output; the guest is not to blame and goes on.
            if let Err(error) = output.write_all(&bytes).and_then(|()| output.flush()) {
                tracing::debug!(%error, "console output lost");
            }
        }
    }

    fn wait_until_written(&self) -> bool {
        let until = Instant::now() + CONSOLE_DRAIN;
        let mut state = self.lock();
        while state.waiting.is_some() || state.writing {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

struct Done<'a>(&'a Desk);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        // The state first: whoever was woken, and has taken the signal, finds it changed.
        self.0.lock().writing = false;
        self.0.changed.notify_all();
        let _ = signal(&self.0.written);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Duration;
    use tracing::Span;

    /// Writes nothing before it is told to, and says what it wrote.
    struct Held(mpsc::Receiver<()>, mpsc::Sender<Vec<u8>>);

    impl Write for Held {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.0.recv();
            let _ = self.1.send(bytes.to_vec());
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn one_thing_is_with_the_writer_at_a_time() {
        let ((go, held), (said, heard)) = (mpsc::channel(), mpsc::channel());
        let mut thread =
            OutputThread::new(Arc::new(Mutex::new(Held(held, said))), || (), Span::none()).unwrap();
        let desk = thread.desk().unwrap();
        assert!(desk.give(&mut b"first".to_vec()));
        let mut second = b"second".to_vec();
        assert!(!desk.give(&mut second) && !desk.is_clear());
        assert_eq!(second, b"second");
        go.send(()).unwrap();
        let patience = Duration::from_secs(20);
        assert_eq!(heard.recv_timeout(patience).unwrap(), b"first");
        // The signal comes after the state that it tells of, so it is what to wait for.
        let until = Instant::now() + patience;
        while let Err(error) = desk.written().read() {
            assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
            assert!(
                Instant::now() < until,
                "the writer is done and does not say so"
            );
            std::thread::yield_now();
        }
        assert!(desk.is_clear());
        assert!(desk.give(&mut second));
        go.send(()).unwrap();
        // What was given is written before the end.
        drop(thread);
        assert_eq!(heard.try_recv().unwrap(), b"second");
    }

    #[test]
    fn a_writer_that_blocks_is_left_and_one_that_panics_is_told_of() {
        let ((go, held), (said, _heard)) = (mpsc::channel(), mpsc::channel());
        let mut thread =
            OutputThread::new(Arc::new(Mutex::new(Held(held, said))), || (), Span::none()).unwrap();
        assert!(thread.desk().unwrap().give(&mut b"x".to_vec()));
        let started = Instant::now();
        drop(thread);
        assert!(started.elapsed() < CONSOLE_DRAIN + Duration::from_secs(20));
        drop(go);

        struct Panics;
        impl Write for Panics {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                std::panic::resume_unwind(Box::new("as the test wants"))
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let (told, panicked) = mpsc::channel();
        let tell = move || {
            let _ = told.send(());
        };
        let output = Arc::new(Mutex::new(Panics));
        let mut thread = OutputThread::new(output, tell, Span::none()).unwrap();
        assert!(thread.desk().unwrap().give(&mut b"x".to_vec()));
        panicked.recv_timeout(Duration::from_secs(20)).unwrap();
    }
}
