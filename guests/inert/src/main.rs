//! A guest that is well-formed and then does nothing for ever: no call, no negotiation, no idle.
#![no_std]
#![no_main]
#![allow(unsafe_code)]
// UNSAFETY: a program without a runtime: an exported entry point and its note.

use pv_abi::note::NoteRecord;

#[unsafe(link_section = ".note.paravane")]
#[used]
static NOTE: NoteRecord = NoteRecord::new(0, 0);

/// Spins.
#[unsafe(no_mangle)]
extern "C" fn _start() -> ! {
    loop {
        core::hint::spin_loop();
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {
        core::hint::spin_loop();
    }
}
