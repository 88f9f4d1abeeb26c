//! Starting the library's own threads, which have names, also where they cannot be started.

use std::io;
use std::thread::{Builder, JoinHandle};

/// Starts a thread with this name.
///
/// # Errors
/// When the host has none to give; says for what it was.
pub(crate) fn start<T: Send + 'static>(
    name: &str,
    body: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let started = Builder::new().name(name.to_owned()).spawn(body);
    started.map_err(|error| {
        let text = format!("cannot start the thread {name}: {error}");
        io::Error::new(error.kind(), text)
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_thread_has_the_name_that_it_was_given() {
        let name = || std::thread::current().name().map(str::to_owned);
        let thread = super::start("pv-named", name).unwrap();
        assert_eq!(thread.join().unwrap().as_deref(), Some("pv-named"));
    }
}
