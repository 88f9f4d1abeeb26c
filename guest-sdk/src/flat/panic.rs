//! The panic handler: the message to the host, then the end of the VM.
#![allow(unsafe_code)]
// UNSAFETY: defines the unwinder's symbols, which the precompiled `alloc` and `core` refer to.

use super::entry::ExitCode;
use super::gate;
use super::logging::Line;
use core::fmt::Write;
use core::panic::PanicInfo;
use core::sync::atomic::{AtomicBool, Ordering};
use pv_abi::call::number;

static PANICKED: AtomicBool = AtomicBool::new(false);

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    // Ordering: Relaxed, only whether somebody was here before; a panic while formatting a panic, or
    // on two vCPUs at once, ends the VM without a second message.
    if !PANICKED.swap(true, Ordering::Relaxed) {
        let mut line = Line::new();
        // A message that is too long is cut.
        let _cut = write!(line, "{info}").is_err();
        let bytes = line.as_bytes();
        if gate::fill_scratch(bytes).is_some() {
            gate::call(number::PANIC, [bytes.len() as u64, 0, 0, 0, 0, 0]);
        }
    }
    gate::exit(ExitCode::PANIC)
}

/// Never called, since guests are built with `panic = "abort"`, but referred to.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

/// As above: the landing pads of precompiled code end in it, and nothing ever enters one.
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    gate::exit(ExitCode::PANIC)
}
