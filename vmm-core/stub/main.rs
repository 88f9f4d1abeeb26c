//! The stub: what a sandboxed guest's process is before it is the guest.
//!
//! Executed from a memfd into a clean address space, with a socket and nothing else. It confines
//! itself, says so, and waits until it is watched and told what to become; spare ones do that for
//! long. Then it maps guest memory at guest-physical addresses, starts the vCPU threads, closes what
//! it no longer needs, and ends in the gate's finish code, which unmaps the stub itself, installs the
//! system-call filter and parks. Freestanding: no allocator, no libc, no panics.
#![no_std]
#![no_main]
#![allow(clippy::missing_safety_doc)]
// Both sides compile the wire; each uses its part of it.
#![allow(dead_code)]

mod wire;

use core::arch::{asm, global_asm};
use core::mem::MaybeUninit;
use core::sync::atomic::{AtomicU32, Ordering};
use wire::*;

global_asm!(
    ".globl _start",
    "_start:",
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
    pub const CLOSE: usize = 3;
    pub const MMAP: usize = 9;
    pub const MADVISE: usize = 28;
    pub const RT_SIGACTION: usize = 13;
    pub const RT_SIGPROCMASK: usize = 14;
    pub const SENDTO: usize = 44;
    pub const RECVMSG: usize = 47;
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

unsafe fn fail(step: u32, result: isize) -> ! {
    // SAFETY: ends the process, whether or not the VMM can be told why.
    unsafe {
        tell(FAILED, step | (-result as u32) << 16);
        exit()
    }
}

unsafe fn exit() -> ! {
    // SAFETY: ends the process.
    unsafe {
        syscall(nr::EXIT_GROUP, [EXIT_FAILED as usize, 0, 0, 0, 0, 0]);
        asm!("ud2", options(noreturn));
    }
}

unsafe fn tell(kind: u32, value: u32) {
    let head = Head { kind, value };
    // SAFETY: eight bytes that live here. Without a VMM there is nobody to hear it.
    unsafe {
        let flags = 0x4000; // MSG_NOSIGNAL
        syscall(nr::SENDTO, [SOCKET, &raw const head as usize, 8, flags, 0, 0]);
    }
}

unsafe extern "C" fn stub_main() -> ! {
    let mut setup = MaybeUninit::<Setup>::uninit();
    // SAFETY: the VMM left a socket, and says what to do on it; all calls below are made with memory
    // that it describes.
    unsafe {
        let none = 0u64;
        syscall(nr::RT_SIGPROCMASK, [2, &raw const none as usize, 0, 8, 0, 0]);
        tell(CONFINED, confine());
        let handlers = receive(setup.as_mut_ptr());
        let setup = setup.assume_init_ref();
        // The last map is the fault handlers' stacks, for guests that report their own faults.
        for i in 0..setup.map_count as usize - !handlers as usize {
            let map = *(&raw const setup.maps).cast::<Map>().add(i);
            // MAP_SHARED | MAP_FIXED_NOREPLACE
            let flags = 0x01 | 0x10_0000;
            let at = map.gpa as usize;
            let fd = FIRST_FD + map.fd as usize;
            let got = syscall(
                nr::MMAP,
                [at, map.len as usize, map.prot as usize, flags, fd, map.offset as usize],
            );
            if got != at as isize {
                fail(STEP_MAP, got);
            }
        }
        advise(setup);
        close_holes(setup);
        if handlers {
            install_handlers(setup);
        }
        start_threads(setup, handlers);
        let result = syscall(nr::ARCH_PRCTL, [0x1001, setup.vcpu_pages as usize, 0, 0, 0, 0]);
        if result != 0 {
            fail(STEP_GS_BASE, result);
        }
        // Nothing fails from here on but in ways that end the process.
        let first_event = FIRST_FD + setup.event_fds as usize;
        syscall(nr::CLOSE_RANGE, [0, first_event - 1, 0, 0, 0, 0]);
        // The others must have left this code before it is unmapped.
        for vcpu in 1..setup.vcpus as u64 {
            let address = setup.vcpu_pages + vcpu * 4096 + setup.ready_offset;
            let ready = AtomicU32::from_ptr(address as *mut u32);
            while ready.load(Ordering::Acquire) == 0 {
                syscall(nr::FUTEX, [address as usize, 0, 0, 0, 0, 0]);
            }
        }
        let start = setup.unmap_start;
        let len = setup.unmap_end - start;
        let (finish, filter) = (setup.finish, setup.filter);
        asm!("jmp {}", in(reg) finish, in("rdi") start, in("rsi") len, in("rdx") filter,
            options(noreturn));
    }
}

/// Waits for the supervisor's word, the set-up and its descriptors; whether to install handlers.
unsafe fn receive(setup: *mut Setup) -> bool {
    let mut handlers = None;
    let mut missing = None;
    let mut next = FIRST_FD;
    let mut head = Head { kind: 0, value: 0 };
    // A control message's header, and room for as many descriptors as one brings.
    let mut control = MaybeUninit::<[u64; 2 + FDS_AT_ONCE / 2]>::uninit();
    // SAFETY: all buffers live here or are the caller's, with their true lengths. The first message
    // with descriptors has the set-up, whose structure is plain integers.
    unsafe {
        while handlers.is_none() || missing.is_none_or(|fds| next < FIRST_FD + fds) {
            let parts = [
                &raw mut head as usize,
                size_of::<Head>(),
                setup as usize,
                size_of::<Setup>(),
            ];
            // struct msghdr: name, its length, parts, how many, control, its length, flags.
            let room = size_of_val(&control);
            let mut message =
                [0, 0, &raw const parts as usize, 2, control.as_mut_ptr() as usize, room, 0];
            let got = syscall(nr::RECVMSG, [SOCKET, &raw mut message as usize, 0, 0, 0, 0]);
            if got == -4 {
                continue; // EINTR
            }
            if got == 0 {
                exit(); // There is no VMM any more.
            }
            // MSG_CTRUNC | MSG_TRUNC
            if got < size_of::<Head>() as isize || message[6] & 0x28 != 0 {
                fail(STEP_SETUP, got.min(0));
            }
            if message[5] >= 20 {
                // Nothing else opens anything, so they have the lowest numbers, in their order.
                let length = (&raw const control).cast::<usize>().read();
                next += (length - 16) / 4;
            }
            match head.kind {
                WATCHED => handlers = Some(head.value != 0),
                SETUP => missing = Some(head.value as usize),
                _ => {}
            }
        }
    }
    handlers == Some(true)
}

/// What the VMM did to its own mappings of the same memory. A host that has no huge pages, or no
/// memory left to fill in ahead, is not an error: pages then come one by one.
unsafe fn advise(setup: &Setup) {
    // SAFETY: all of it is guest memory, which was just mapped; nothing changes its contents.
    unsafe {
        for [from, len] in setup.huge {
            if len != 0 {
                // MADV_HUGEPAGE
                syscall(nr::MADVISE, [from as usize, len as usize, 14, 0, 0, 0]);
            }
        }
        for map in setup.maps.iter().take(setup.map_count as usize) {
            if map.populate != 0 {
                // MADV_POPULATE_WRITE, MADV_POPULATE_READ
                let how = if map.prot & 2 != 0 { 23 } else { 22 };
                syscall(nr::MADVISE, [map.gpa as usize, map.len as usize, how, 0, 0, 0]);
            }
        }
    }
}

unsafe fn close_holes(setup: &Setup) {
    let first = FIRST_FD + setup.kicks as usize;
    for (word, bits) in setup.holes.iter().enumerate() {
        let mut left = *bits;
        while left != 0 {
            let fd = first + word * 64 + left.trailing_zeros() as usize;
            // SAFETY: closes what only filled a place.
            unsafe { syscall(nr::CLOSE, [fd, 0, 0, 0, 0, 0]) };
            left &= left - 1;
        }
    }
}

/// Layers that the filter does not need but that hold if it should not.
unsafe fn confine() -> u32 {
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
    }
    layers
}

/// Without ptrace: faults arrive in the gate's handler, on a stack of their own.
unsafe fn install_handlers(setup: &Setup) {
    // SAFETY: the handler is in the gate, which is mapped; it never returns, so the restorer that
    // the ABI wants is never used.
    unsafe {
        // struct kernel_sigaction: handler, flags (SIGINFO | ONSTACK | RESTORER), restorer, mask.
        let action = [setup.fault_handler, 0x4 | 0x0800_0000 | 0x0400_0000, setup.park, !0];
        // ILL, TRAP, BUS, FPE, SEGV, SYS
        for signal in [4, 5, 7, 8, 11, 31] {
            let args = [signal, &raw const action as usize, 0, 8, 0, 0];
            let result = syscall(nr::RT_SIGACTION, args);
            if result != 0 {
                fail(STEP_SIGNALS, result);
            }
        }
        let own = [setup.fault_stacks, 0, setup.fault_stack_len];
        let result = syscall(nr::SIGALTSTACK, [&raw const own as usize, 0, 0, 0, 0, 0]);
        if result != 0 {
            fail(STEP_SIGNALS, result);
        }
    }
}

unsafe fn start_threads(setup: &Setup, handlers: bool) {
    // SAFETY: every thread gets a stack of its own, which goes with the rest of the stub, and uses no
    // more of it than its stack_t.
    unsafe {
        let vcpus = setup.vcpus as usize;
        if vcpus == 1 {
            return;
        }
        // MAP_PRIVATE | MAP_ANONYMOUS
        let stacks = syscall(nr::MMAP, [0, vcpus * THREAD_STACK, 3, 0x22, usize::MAX, 0]);
        if stacks < 0 {
            fail(STEP_CLONE, stacks);
        }
        for vcpu in 1..vcpus {
            let top = stacks as usize + (vcpu + 1) * THREAD_STACK;
            let page = setup.vcpu_pages as usize + vcpu * 4096;
            let mut altstack = 0usize;
            if handlers {
                altstack = top - 64;
                let len = setup.fault_stack_len;
                let slot = altstack as *mut u64;
                slot.write(setup.fault_stacks + vcpu as u64 * len);
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
                in("r12") setup.park,
                in("r14") altstack,
                lateout("rax") result,
                out("rdx") _, out("r10") _, out("r8") _, lateout("rcx") _, lateout("r11") _,
            );
            if result < 0 {
                fail(STEP_CLONE, result);
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
