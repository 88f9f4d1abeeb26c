//! The stub: what a sandboxed guest's process is before it is the guest.
//!
//! Executed from a memfd into a clean address space. It waits until the VMM watches it, confines
//! itself, maps guest memory at guest-physical addresses, closes what it no longer needs, starts
//! the vCPU threads, and ends in the gate's finish code, which unmaps the stub itself, installs the
//! system-call filter and parks. Freestanding: no allocator, no libc, no panics.
#![no_std]
#![no_main]
#![allow(clippy::missing_safety_doc)]
// Both sides compile the wire; each uses its part of it.
#![allow(dead_code)]

mod wire;

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicU32, Ordering};
use wire::*;

global_asm!(
    ".globl _start",
    "_start:",
    "mov rdi, rsp",
    "and rsp, -16",
    "call {main}",
    "ud2",
    main = sym stub_main,
);

// A thread starts here with RBX = its vCPU page, R12 = the gate's park code, R13 = the failure path.
global_asm!(
    ".globl pv_stub_thread",
    "pv_stub_thread:",
    "mov edi, 0x1001", // ARCH_SET_GS
    "mov rsi, rbx",
    "mov eax, 158",
    "syscall",
    "test eax, eax",
    "jnz 2f",
    "test r14, r14",
    "jz 3f",
    "mov rdi, r14", // stack_t for this thread
    "xor esi, esi",
    "mov eax, 131", // sigaltstack
    "syscall",
    "3:",
    "jmp r12",
    "2: mov edi, 125",
    "mov eax, 231",
    "syscall",
    "ud2",
);

mod nr {
    pub const MMAP: usize = 9;
    pub const RT_SIGACTION: usize = 13;
    pub const RT_SIGPROCMASK: usize = 14;
    pub const CAPSET: usize = 126;
    pub const SIGALTSTACK: usize = 131;
    pub const PRCTL: usize = 157;
    pub const ARCH_PRCTL: usize = 158;
    pub const SETRLIMIT: usize = 160;
    pub const FUTEX: usize = 202;
    pub const EXIT_GROUP: usize = 231;
    pub const UNSHARE: usize = 272;
    pub const CLOSE_RANGE: usize = 436;
    pub const LANDLOCK_CREATE_RULESET: usize = 444;
    pub const LANDLOCK_RESTRICT_SELF: usize = 446;
}

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

unsafe fn fail(setup: *mut Setup, step: u32, result: isize) -> ! {
    // SAFETY: `setup` is the shared mapping.
    unsafe {
        core::ptr::write_volatile(&raw mut (*setup).failed_step, step);
        core::ptr::write_volatile(&raw mut (*setup).failed_errno, -result as u32);
        syscall(nr::EXIT_GROUP, [EXIT_FAILED as usize, 0, 0, 0, 0, 0]);
        asm!("ud2", options(noreturn));
    }
}

/// The kernel's start stack: argc, argv[0], argv[1], ...; argv[1] is the first descriptor.
unsafe extern "C" fn stub_main(stack: *const usize) -> ! {
    // SAFETY: the VMM passes two arguments and a set-up memfd at the descriptor they name; all
    // calls below are made with memory that it describes.
    unsafe {
        let mut text = *stack.add(2) as *const u8;
        let mut base = 0usize;
        while *text != 0 {
            base = base * 10 + (*text - b'0') as usize;
            text = text.add(1);
        }
        // The first descriptor is the set-up memfd; its head says how large the rest is.
        let head = map_setup(base, core::mem::size_of::<Setup>());
        let setup = map_setup(base, setup_len((*head).vcpus)) as *mut Setup;

        let go = AtomicU32::from_ptr(&raw mut (*setup).go);
        while go.load(Ordering::Acquire) == 0 {
            let address = &raw mut (*setup).go as usize;
            syscall(nr::FUTEX, [address, 0, 0, 0, 0, 0]);
        }
        let none = 0u64;
        syscall(nr::RT_SIGPROCMASK, [2, &raw const none as usize, 0, 8, 0, 0]);
        confine(setup);
        // The last map is the fault handlers' stacks, for guests that report their own faults.
        let handlers = (*setup).self_report != 0;
        for i in 0..(*setup).map_count as usize - !handlers as usize {
            let map = *(&raw const (*setup).maps).cast::<Map>().add(i);
            // MAP_SHARED | MAP_FIXED_NOREPLACE
            let flags = 0x01 | 0x10_0000;
            let at = map.gpa as usize;
            let fd = base + map.fd as usize;
            let got = syscall(
                nr::MMAP,
                [at, map.len as usize, map.prot as usize, flags, fd, map.offset as usize],
            );
            if got != at as isize {
                fail(setup, STEP_MAP, got);
            }
        }
        let first_event = base + (*setup).event_fds as usize;
        syscall(nr::CLOSE_RANGE, [0, first_event - 1, 0, 0, 0, 0]);
        if handlers {
            install_handlers(setup);
        }
        start_threads(setup);
        let result = syscall(nr::ARCH_PRCTL, [0x1001, (*setup).vcpu_pages as usize, 0, 0, 0, 0]);
        if result != 0 {
            fail(setup, STEP_GS_BASE, result);
        }
        // The others must have left this code before it is unmapped.
        for vcpu in 1..(*setup).vcpus as u64 {
            let address = (*setup).vcpu_pages + vcpu * 4096 + (*setup).ready_offset;
            let ready = AtomicU32::from_ptr(address as *mut u32);
            while ready.load(Ordering::Acquire) == 0 {
                syscall(nr::FUTEX, [address as usize, 0, 0, 0, 0, 0]);
            }
        }
        let start = (*setup).unmap_start;
        let len = (*setup).unmap_end - start;
        let (finish, filter) = ((*setup).finish, (*setup).filter);
        asm!("jmp {}", in(reg) finish, in("rdi") start, in("rsi") len, in("rdx") filter,
            options(noreturn));
    }
}

unsafe fn map_setup(fd: usize, len: usize) -> *mut Setup {
    // SAFETY: a fresh mapping.
    let at = unsafe { syscall(nr::MMAP, [0, len, 3, 1, fd, 0]) };
    if at < 0 {
        // SAFETY: ends the process.
        unsafe {
            syscall(nr::EXIT_GROUP, [EXIT_FAILED as usize, 0, 0, 0, 0, 0]);
            asm!("ud2", options(noreturn));
        }
    }
    at as *mut Setup
}

/// Layers that the filter does not need but that hold if it should not.
unsafe fn confine(setup: *mut Setup) {
    let mut layers = 0;
    // SAFETY: all structures live on this stack; the calls change this process only.
    unsafe {
        // PR_SET_NAME: the name that the process had as an argument is about to be unmapped.
        syscall(nr::PRCTL, [15, c"pv-guest".as_ptr() as usize, 0, 0, 0, 0]);
        let no_core = [0u64; 2];
        syscall(nr::SETRLIMIT, [4, &raw const no_core as usize, 0, 0, 0, 0]);
        if syscall(nr::PRCTL, [38, 1, 0, 0, 0, 0]) == 0 {
            layers |= LAYER_NO_NEW_PRIVS;
        }
        let (user, rest) = (0x1000_0000, 0x0800_0000 | 0x0400_0000 | 0x0200_0000);
        if syscall(nr::UNSHARE, [user | rest, 0, 0, 0, 0, 0]) == 0 {
            layers |= LAYER_USER_NS | LAYER_OTHER_NS;
        } else if syscall(nr::UNSHARE, [rest, 0, 0, 0, 0, 0]) == 0 {
            layers |= LAYER_OTHER_NS;
        }
        // struct landlock_ruleset_attr: every file, network and scope right of the newest ABI that
        // the kernel knows, and no rule that grants one.
        let abi = syscall(nr::LANDLOCK_CREATE_RULESET, [0, 0, 1, 0, 0, 0]);
        if abi > 0 {
            let files: u64 = match abi {
                1 => 0x1fff,
                2 => 0x3fff,
                3 | 4 => 0x7fff,
                _ => 0xffff,
            };
            let attr = [files, if abi >= 4 { 3 } else { 0 }, if abi >= 6 { 3 } else { 0 }];
            let size = if abi >= 6 { 24 } else if abi >= 4 { 16 } else { 8 };
            let ruleset =
                syscall(nr::LANDLOCK_CREATE_RULESET, [&raw const attr as usize, size, 0, 0, 0, 0]);
            if ruleset >= 0
                && syscall(nr::LANDLOCK_RESTRICT_SELF, [ruleset as usize, 0, 0, 0, 0, 0]) == 0
            {
                layers |= LAYER_LANDLOCK;
            }
            if ruleset >= 0 {
                syscall(nr::CLOSE_RANGE, [ruleset as usize, ruleset as usize, 0, 0, 0, 0]);
            }
        }
        let header = [0x2008_0522u32, 0];
        let caps = [0u32; 6];
        let args = [&raw const header as usize, &raw const caps as usize, 0, 0, 0, 0];
        if syscall(nr::CAPSET, args) == 0 {
            layers |= LAYER_NO_CAPS;
        }
        core::ptr::write_volatile(&raw mut (*setup).layers, layers);
    }
}

/// Without ptrace: faults arrive in the gate's handler, on a stack of their own.
unsafe fn install_handlers(setup: *mut Setup) {
    // SAFETY: the handler is in the gate, which is mapped; it never returns, so the restorer that
    // the ABI wants is never used.
    unsafe {
        // struct kernel_sigaction: handler, flags (SIGINFO | ONSTACK | RESTORER), restorer, mask.
        let action = [(*setup).fault_handler, 0x4 | 0x0800_0000 | 0x0400_0000, (*setup).park, !0];
        // ILL, TRAP, BUS, FPE, SEGV, SYS
        for signal in [4, 5, 7, 8, 11, 31] {
            let args = [signal, &raw const action as usize, 0, 8, 0, 0];
            let result = syscall(nr::RT_SIGACTION, args);
            if result != 0 {
                fail(setup, STEP_SIGNALS, result);
            }
        }
        let own = [(*setup).fault_stacks, 0, (*setup).fault_stack_len];
        let result = syscall(nr::SIGALTSTACK, [&raw const own as usize, 0, 0, 0, 0, 0]);
        if result != 0 {
            fail(setup, STEP_SIGNALS, result);
        }
    }
}

unsafe fn start_threads(setup: *mut Setup) {
    // SAFETY: every thread gets a stack of its own behind the set-up structure, and uses no more
    // of it than its stack_t.
    unsafe {
        let vcpus = (*setup).vcpus as usize;
        let stacks = setup as usize + setup_len(0);
        for vcpu in 1..vcpus {
            let top = stacks + (vcpu + 1) * THREAD_STACK;
            let page = (*setup).vcpu_pages as usize + vcpu * 4096;
            let mut altstack = 0usize;
            if (*setup).self_report != 0 {
                altstack = top - 64;
                let len = (*setup).fault_stack_len;
                let slot = altstack as *mut u64;
                slot.write((*setup).fault_stacks + vcpu as u64 * len);
                slot.add(1).write(0);
                slot.add(2).write(len);
            }
            // CLONE_VM | FS | FILES | SIGHAND | THREAD | SYSVSEM
            let flags = 0x100usize | 0x200 | 0x400 | 0x800 | 0x1_0000 | 0x4_0000;
            let result: isize;
            asm!(
                "push rbx",
                "mov rbx, {page}",
                "mov eax, 56",
                "xor edx, edx",
                "xor r10d, r10d",
                "xor r8d, r8d",
                "syscall",
                "test rax, rax",
                "jz pv_stub_thread",
                "pop rbx",
                page = in(reg) page,
                in("rdi") flags,
                in("rsi") top - 128,
                in("r12") (*setup).park,
                in("r14") altstack,
                lateout("rax") result,
                out("rdx") _, out("r10") _, out("r8") _, lateout("rcx") _, lateout("r11") _,
            );
            if result < 0 {
                fail(setup, STEP_CLONE, result);
            }
        }
    }
}

// The compiler may call these for copies of structures.
global_asm!(
    ".globl memcpy",
    "memcpy:",
    "mov rax, rdi",
    "mov rcx, rdx",
    "rep movsb",
    "ret",
    ".globl memset",
    "memset:",
    "mov r8, rdi",
    "mov eax, esi",
    "mov rcx, rdx",
    "rep stosb",
    "mov rax, r8",
    "ret",
);

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // SAFETY: ends the process; nothing in here panics, but the language wants a handler.
    unsafe { asm!("ud2", options(noreturn)) }
}

#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}
