//! The least that a process with guest memory can be: maps what the list on descriptor 3 says, at
//! the addresses that it says, and tells the parent by a futex. Then it waits for its end.
#![no_std]
#![no_main]

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicU32, Ordering};

include!("list.rs");

global_asm!(
    ".globl _start",
    "_start:",
    "and rsp, -16",
    "call {main}",
    "ud2",
    main = sym child_main,
);

unsafe fn syscall(number: usize, a: [usize; 6]) -> isize {
    let result: isize;
    // SAFETY: the caller's: each call's own contract. RCX and R11 are the kernel's.
    unsafe {
        asm!("syscall", inlateout("rax") number as isize => result, in("rdi") a[0], in("rsi") a[1],
            in("rdx") a[2], in("r10") a[3], in("r8") a[4], in("r9") a[5],
            lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    result
}

unsafe fn exit(code: usize) -> ! {
    // SAFETY: ends the process.
    unsafe {
        syscall(231, [code, 0, 0, 0, 0, 0]);
        asm!("ud2", options(noreturn));
    }
}

unsafe extern "C" fn child_main() -> ! {
    // SAFETY: the parent left a list on descriptor 3, and what it names on those after it.
    unsafe {
        // PR_SET_PDEATHSIG, SIGKILL: never left behind.
        syscall(157, [1, 9, 0, 0, 0, 0]);
        // mmap, PROT_READ | PROT_WRITE, MAP_SHARED
        let at = syscall(9, [0, 4096, 3, 1, LIST_FD, 0]);
        if at < 0 {
            exit(1);
        }
        let list = at as *const List;
        for i in 0..(*list).count as usize {
            let map = (&raw const (*list).maps).cast::<Map>().add(i).read();
            // MAP_SHARED | MAP_FIXED_NOREPLACE
            let args = [
                map.at as usize,
                map.len as usize,
                map.prot as usize,
                0x10_0001,
                map.fd as usize,
                map.offset as usize,
            ];
            if syscall(9, args) != map.at as isize {
                exit(2);
            }
        }
        let ready = &*(&raw const (*list).ready).cast::<AtomicU32>();
        ready.store(1, Ordering::Release);
        let word = ready as *const AtomicU32 as usize;
        syscall(202, [word, 1, 1, 0, 0, 0]);
        while ready.load(Ordering::Acquire) == 1 {
            syscall(202, [word, 0, 1, 0, 0, 0]);
        }
        exit(0)
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // SAFETY: ends the process; nothing in here panics, but the language wants a handler.
    unsafe { asm!("ud2", options(noreturn)) }
}

#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}
