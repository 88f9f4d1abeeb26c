//! In which process something was made: what the embedder forks has a copy, and no part in it.
//!
//! The copy's descriptors are the same, so ending it would end what the other process has; its threads
//! do not exist, so waiting for them would last for ever; and guest memory is not mapped there.

use std::io;

/// The process that made something.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Owner(u32);

impl Owner {
    /// The calling one.
    pub(crate) fn here() -> Owner {
        Owner(std::process::id())
    }

    /// Whether this is still that process; a system call, so not for what happens often.
    pub(crate) fn is_here(self) -> bool {
        self.0 == std::process::id()
    }

    /// Why nothing can be done in another process.
    pub(crate) fn elsewhere(self) -> io::Error {
        let text = format!(
            "it belongs to process {}, which this one was forked from",
            self.0
        );
        io::Error::new(io::ErrorKind::Unsupported, text)
    }
}
