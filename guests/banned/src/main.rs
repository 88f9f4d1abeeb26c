//! A guest that the build must refuse: it asks the CPU what it can do.
//!
//! It stands on its own feet, without guest-sdk, to show what the smallest image consists of.
#![no_std]
#![no_main]
// UNSAFETY: symbols with fixed names, the entry point and the note, and the instruction itself.
#![allow(unsafe_code)]

use pv_abi::note::NoteRecord;

// SAFETY: the section holds such records and nothing else; the name is nobody else's.
#[unsafe(link_section = ".note.paravane")]
#[used]
static NOTE: NoteRecord = NoteRecord::new(0, 0);

/// Where the host starts the guest.
// SAFETY: the only `_start` in the image.
#[unsafe(no_mangle)]
pub extern "C" fn _start() -> ! {
    let leaf = sniff_the_cpu();
    loop {
        core::hint::black_box(leaf);
    }
}

/// Contains the instruction that the build refuses.
#[inline(never)]
fn sniff_the_cpu() -> u32 {
    let leaf: u32;
    // SAFETY: CPUID changes these four registers and nothing else; RBX is put back.
    unsafe {
        core::arch::asm!(
            "mov {save:r}, rbx", "cpuid", "mov rbx, {save:r}",
            save = out(reg) _, inout("eax") 0 => leaf, out("ecx") _, out("edx") _,
        );
    }
    leaf
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {
        core::hint::spin_loop();
    }
}
