//! A backend on a thread of this process, at the other end of a socket pair.

use super::Serve;
use super::spawn::ended;
use crate::limits::{BACKEND_DEATH, HUNG_UP_END};
use crate::own_thread;
use std::any::Any;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

/// A thread that serves one connection; hung up on and waited for when dropped.
pub(super) struct BackendThread {
    thread: Option<JoinHandle<io::Result<()>>>,
    /// Its end of the socket.
    stream: Arc<UnixStream>,
}

/// Hangs up when the backend is done, in whatever way, and whatever it has kept of the socket.
struct HangUp(Arc<UnixStream>);

impl Drop for HangUp {
    fn drop(&mut self) {
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

impl BackendThread {
    /// Starts the thread, and gives the frontend's end of its socket.
    pub(super) fn start(serve: &Arc<Serve>) -> io::Result<(BackendThread, UnixStream)> {
        let (ours, theirs) = UnixStream::pair()?;
        let stream = Arc::new(theirs.try_clone()?);
        let (guard, serve) = (HangUp(Arc::clone(&stream)), Arc::clone(serve));
        let span = tracing::Span::current();
        let thread = own_thread::start("pv-in-process", move || {
            let _of_caller = span.entered();
            let _guard = guard;
            serve(theirs)
        })?;
        let backend = BackendThread {
            thread: Some(thread),
            stream,
        };
        Ok((backend, ours))
    }

    /// Hangs up and waits a while; how it ended, or `None` if it has not yet.
    pub(super) fn end(&mut self) -> Option<String> {
        self.end_within(BACKEND_DEATH)
    }

    /// The same where nothing has been shared with it yet: it is not waited for later either, and goes
    /// on by itself if it has not ended.
    pub(super) fn leave(&mut self) -> Option<String> {
        let how = self.end_within(HUNG_UP_END);
        if self.thread.take().is_some() {
            tracing::warn!("a backend of this process goes on without its connection");
        }
        how
    }

    fn end_within(&mut self, limit: Duration) -> Option<String> {
        let _ = self.stream.shutdown(Shutdown::Both);
        let thread = self.thread.as_ref()?;
        ended(limit, || thread.is_finished().then_some(()))?;
        Some(match self.thread.take()?.join() {
            Ok(Ok(())) => "it ended".into(),
            Ok(Err(error)) => error.to_string(),
            Err(panic) => format!("it panicked: {}", message(&*panic)),
        })
    }
}

fn message(panic: &(dyn Any + Send)) -> &str {
    let literal = panic.downcast_ref::<&str>().copied();
    let formatted = || panic.downcast_ref::<String>().map(String::as_str);
    literal.or_else(formatted).unwrap_or("without a message")
}

impl Drop for BackendThread {
    fn drop(&mut self) {
        if self.thread.is_some() && self.end().is_none() {
            // It cannot be killed; what it has is its own mapping of the arena and its disk.
            tracing::error!("a backend of this process does not end, and is left behind");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn started(
        serve: impl Fn(UnixStream) -> io::Result<()> + Send + Sync + 'static,
    ) -> (BackendThread, UnixStream) {
        let serve: Arc<Serve> = Arc::new(serve);
        BackendThread::start(&serve).unwrap()
    }

    #[test]
    fn every_end_of_a_backend_hangs_up_and_has_a_reason() {
        let (mut thread, mut ours) = started(|mut stream| {
            let _ = stream.read(&mut [0]);
            Ok(())
        });
        assert_eq!(thread.end().as_deref(), Some("it ended"));
        assert_eq!(ours.read(&mut [0]).unwrap(), 0);
        let (mut thread, mut ours) = started(|_| Err(io::Error::other("no disk")));
        assert_eq!(ours.read(&mut [0]).unwrap(), 0);
        assert_eq!(thread.end().as_deref(), Some("no disk"));
        let (mut thread, mut ours) = started(|_| panic!("a bug"));
        assert_eq!(ours.read(&mut [0]).unwrap(), 0);
        assert_eq!(thread.end().as_deref(), Some("it panicked: a bug"));
    }

    #[test]
    fn one_that_does_not_return_is_left_to_itself() {
        let (release, held) = std::sync::mpsc::channel::<()>();
        let held = std::sync::Mutex::new(held);
        let (mut thread, mut ours) = started(move |_| {
            let _ = held.lock().unwrap().recv();
            Ok(())
        });
        assert_eq!(thread.leave(), None);
        assert_eq!(ours.read(&mut [0]).unwrap(), 0);
        // Nothing is waited for any more.
        drop(thread);
        drop(release);
    }

    #[test]
    fn a_socket_that_is_kept_is_hung_up_all_the_same() {
        let kept = Arc::new(std::sync::Mutex::new(None));
        let keep = Arc::clone(&kept);
        let (_thread, mut ours) = started(move |stream| {
            *keep.lock().unwrap() = Some(stream);
            Ok(())
        });
        assert_eq!(ours.read(&mut [0]).unwrap(), 0);
        assert!(kept.lock().unwrap().is_some());
    }
}
