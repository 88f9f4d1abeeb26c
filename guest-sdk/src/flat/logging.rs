//! The sink of the `log` crate: one `LOG` call per line.

use super::boot::Boot;
use super::platform::platform;
use crate::platform::Platform;
use core::fmt::{self, Write};
use log::{Level, LevelFilter, Log, Metadata, Record};
use pv_abi::call::number;
use pv_abi::limits::SCRATCH_LEN;

/// Bytes in a log line or a panic message; longer ones are cut.
///
/// The line is put together on the stack, so this is kept well below a page.
const LINE: usize = if SCRATCH_LEN < 1024 {
    SCRATCH_LEN
} else {
    1024
};

struct Sink;

static SINK: Sink = Sink;

/// Installs the sink. The command line's `log=off|error|warn|info|debug|trace` sets the level.
pub(super) fn start(boot: &Boot) {
    let level = boot
        .argument("log")
        .and_then(|level| level.parse().ok())
        .unwrap_or(LevelFilter::Info);
    // The guest program may not install a sink of its own before `main`, so this cannot fail.
    let _installed = log::set_logger(&SINK).is_ok();
    log::set_max_level(level);
}

impl Log for Sink {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let level = match record.level() {
            Level::Error => 1,
            Level::Warn => 2,
            Level::Info => 3,
            Level::Debug => 4,
            Level::Trace => 5,
        };
        let mut line = Line::new();
        // A line that is too long is cut; `write!` then reports an error that says no more.
        let _cut = write!(line, "{}", record.args()).is_err();
        let bytes = line.as_bytes();
        if !bytes.is_empty() && platform().fill_scratch(bytes).is_some() {
            // A host that does not take log lines is no reason to fail.
            let _refused = platform().call(number::LOG, [level, bytes.len() as u64, 0, 0, 0, 0]);
        }
    }

    fn flush(&self) {}
}

/// Text of a bounded length, cut at a character boundary.
pub(super) struct Line {
    bytes: [u8; LINE],
    len: usize,
}

impl Line {
    pub(super) fn new() -> Self {
        Line {
            bytes: [0; LINE],
            len: 0,
        }
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = LINE - self.len;
        let most = room.min(text.len());
        let take = (0..=most)
            .rev()
            .find(|&end| text.is_char_boundary(end))
            .unwrap_or(0);
        self.bytes[self.len..self.len + take].copy_from_slice(&text.as_bytes()[..take]);
        self.len += take;
        if take == text.len() {
            Ok(())
        } else {
            Err(fmt::Error)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::String;

    #[test]
    fn lines_are_cut_between_characters() {
        let mut line = Line::new();
        let text: String = core::iter::repeat_n('ä', LINE).collect();
        assert!(write!(line, "x{text}").is_err());
        assert_eq!(line.as_bytes().len(), LINE - 1);
        assert!(core::str::from_utf8(line.as_bytes()).is_ok());
    }
}
