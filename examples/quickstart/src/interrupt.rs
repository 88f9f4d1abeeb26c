//! Ctrl-C and its relatives: what was begun is put away before the program ends.
//!
//! A signal sets a flag, which everything that takes long asks for; the way out is that of an
//! error, so whatever is to be removed is. A second signal ends the program where it stands.

use signal_hook::consts::signal::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::{flag, low_level};
use std::fs;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

/// Signals that ask a program to end.
const SIGNALS: [i32; 3] = [SIGINT, SIGTERM, SIGHUP];

/// The signal that came, 0 before. Signals belong to the process, and so does this.
static CAUGHT: OnceLock<Arc<AtomicUsize>> = OnceLock::new();

/// The program was asked to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("interrupted")]
pub struct Interrupted;

/// Takes over the signals that ask a program to end, but for those that it was started to ignore.
///
/// For the program's `main` alone: a library leaves signals to the process that it is in.
///
/// # Errors
///
/// When the kernel refuses.
pub fn watch() -> io::Result<()> {
    let caught = CAUGHT.get_or_init(Arc::default);
    let again = Arc::new(AtomicBool::new(false));
    let ignored = ignored();
    for signal in SIGNALS {
        if ignored & 1 << (signal - 1) != 0 {
            continue;
        }
        // In this order: the first signal finds the flag unset, and sets it.
        flag::register_conditional_default(signal, again.clone())?;
        flag::register_usize(signal, caught.clone(), signal as usize)?;
        flag::register(signal, again.clone())?;
    }
    Ok(())
}

/// Signals that are ignored, one bit each; nohup and shells without job control ask for it.
fn ignored() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0)
}

/// The signal that came.
pub fn caught() -> Option<i32> {
    // Ordering: the number is all there is to see.
    let signal = CAUGHT.get()?.load(Ordering::Relaxed);
    i32::try_from(signal).ok().filter(|signal| *signal != 0)
}

/// Whether to go on.
///
/// # Errors
///
/// Once a signal has come.
pub fn check() -> Result<(), Interrupted> {
    caught().map_or(Ok(()), |_| Err(Interrupted))
}

/// Ends the program as this signal does when nobody takes it over: a shell then knows.
pub fn end_by(signal: i32) {
    let _ = low_level::emulate_default_handler(signal);
}
