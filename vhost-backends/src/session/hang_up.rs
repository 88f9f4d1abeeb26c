//! The end of a connection from inside: a queue that cannot go on takes its session with it, so that
//! the frontend sees a backend that is lost, and not a queue that says nothing for ever.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Ends a session's connection. One of a default does nothing.
#[derive(Clone, Debug, Default)]
pub struct HangUp(Option<Arc<Line>>);

#[derive(Debug)]
struct Line {
    stream: Arc<UnixStream>,
    cut: AtomicBool,
}

impl HangUp {
    pub(super) fn of(stream: Arc<UnixStream>) -> HangUp {
        let cut = AtomicBool::new(false);
        HangUp(Some(Arc::new(Line { stream, cut })))
    }

    /// Ends the connection: its session drains what it can and is over.
    pub fn now(&self) {
        if let Some(line) = &self.0 {
            // Ordering: Release, so that who finds the connection at its end finds this.
            line.cut.store(true, Ordering::Release);
            // A peer that is gone already is as well.
            let _ = line.stream.shutdown(Shutdown::Both);
        }
    }

    /// Whether it was ended from inside.
    pub(super) fn was_used(&self) -> bool {
        // Ordering: Acquire, as in `now`.
        (self.0.as_ref()).is_some_and(|line| line.cut.load(Ordering::Acquire))
    }

    /// Runs a queue; a panic of it ends the connection, and goes on.
    pub(crate) fn guard<T>(&self, run: impl FnOnce() -> T) -> T {
        // What the panic left behind is not looked at: the session is over.
        match catch_unwind(AssertUnwindSafe(run)) {
            Ok(done) => done,
            Err(panic) => {
                self.now();
                resume_unwind(panic);
            }
        }
    }
}
