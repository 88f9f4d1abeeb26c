//! Gate bodies for process: position-independent code that the VMM copies into the gate region.
#![allow(unsafe_code)]
// UNSAFETY: the bodies are assembly, and the linker's symbols around them are read as bytes.

use super::{handoff, page};
use pv_abi::gate::{SLOT_COUNT, SLOT_SIZE, WAKE_DOORBELL};
use pv_abi::layout::{GATE_BASE, PAGE_SIZE};
use std::arch::global_asm;
use std::io;

// The assembly below counts on both.
const _: () = assert!(SLOT_SIZE == 64 && SLOT_COUNT == 16);

/// Where the gate's data lies, behind the bodies: one page has all that there is.
const DATA: u64 = GATE_BASE + 0xc00;
/// Where the filter program's header lies; the program follows it.
pub(super) const FILTER: u64 = GATE_BASE + 0xd00;

/// Offsets in the gate's data.
const KICK_BASE: u64 = DATA;
const KICK_COUNT: u64 = DATA + 4;
const WAKE_BASE: u64 = DATA + 8;
const WAKE_COUNT: u64 = DATA + 12;

/// What the gate's bodies need to know.
#[derive(Clone, Copy, Debug)]
pub(super) struct GateData {
    /// Descriptor of doorbell 0 in the guest's process.
    pub(super) kick_base: u32,
    pub(super) kick_count: u32,
    /// Descriptor of vCPU 0's wake eventfd.
    pub(super) wake_base: u32,
    pub(super) wake_count: u32,
}

impl GateData {
    fn bytes(self) -> Vec<u8> {
        [
            self.kick_base,
            self.kick_count,
            self.wake_base,
            self.wake_count,
        ]
        .iter()
        .flat_map(|v| v.to_le_bytes())
        .collect()
    }
}

// Registers: system calls clobber RAX, RCX and R11 only, and the bodies use nothing but the other
// caller-saved ones, so the SysV clobber rules hold. No body uses the stack: it is the guest's.
global_asm!(
    ".pushsection .text.pv_gate,\"ax\",@progbits",
    ".p2align 6",
    ".globl pv_gate_start",
    "pv_gate_start:",
    "jmp 10f", // call
    ".p2align 6",
    "jmp 20f", // notify
    ".p2align 6",
    "jmp 30f", // idle
    ".p2align 6",
    "mov eax, {exit}", // exit
    "jmp 40f",
    ".p2align 6",
    "or rax, -1", // checkpoint
    "ret",
    ".rept 11",
    ".p2align 6",
    "ud2",
    ".endr",
    ".p2align 6",

    // call(edi = frame)
    "10:",
    "mov eax, {call}",
    // Hand-off: EAX = kind, EDI = argument; returns when the VMM has set another state.
    "40:",
    "mov gs:[{arg}], edi",
    "mov r9d, eax",
    // The kernel's own way to say where a thread runs: the limit of a segment (see getcpu in the
    // vDSO). Never faults; where there is no such segment, the hint is no CPU at all.
    "mov ecx, 0x7b",
    "lsl ecx, ecx",
    "mov gs:[{cpu}], ecx",
    "mov gs:[{handoff}], eax",
    "mov rdi, gs:[0]",
    "add rdi, {handoff}",
    "mov esi, 1", // FUTEX_WAKE
    "mov edx, 1",
    "mov eax, 202",
    "syscall",
    "41:",
    "mov eax, gs:[{handoff}]",
    "cmp eax, r9d",
    "jne 42f",
    "mov rdi, gs:[0]",
    "add rdi, {handoff}",
    "xor esi, esi", // FUTEX_WAIT
    "mov edx, r9d",
    "xor r10d, r10d",
    "mov eax, 202",
    "syscall",
    "jmp 41b",
    "42:",
    "ret",

    // notify(edi = doorbell)
    "20:",
    "inc qword ptr gs:[{kicks}]",
    "mov r8d, edi",
    "cmp edi, {wake_doorbell}",
    "jae 21f",
    "cmp edi, [{kick_count}]",
    "jae 23f",
    "add edi, [{kick_base}]",
    "jmp 22f",
    "21:",
    "sub edi, {wake_doorbell}",
    "cmp edi, [{wake_count}]",
    "jae 23f",
    "add edi, [{wake_base}]",
    "22:",
    "lea rsi, [rip + 29f]",
    "mov edx, 8",
    "mov eax, 1", // write
    "syscall",
    "cmp rax, -9", // EBADF: an event without a doorbell
    "je 23f",
    "ret",
    "23:",
    "mov edi, r8d",
    "mov eax, {doorbell}",
    "jmp 40b",
    ".p2align 3",
    "29: .quad 1",

    // idle(rdi = nanoseconds)
    "30:",
    "mov gs:[{idle_ns}], rdi",
    "inc qword ptr gs:[{idles}]",
    "mov rax, gs:[{pending}]",
    "or rax, gs:[{pending} + 8]",
    "or rax, gs:[{pending} + 16]",
    "or rax, gs:[{pending} + 24]",
    "jz 31f",
    "xor edi, edi", // an event is pending already: collect, do not wait
    "31:",
    "xor edx, edx",
    "cmp rdi, -1",
    "je 32f",
    "mov rax, rdi",
    "mov ecx, 1000000000",
    "div rcx",
    "mov gs:[{timespec}], rax",
    "mov gs:[{timespec} + 8], rdx",
    "mov rdx, gs:[0]",
    "add rdx, {timespec}",
    "32:",
    "mov rdi, gs:[0]",
    "add rdi, {poll}",
    "mov esi, gs:[{poll_count}]",
    "xor r10d, r10d",
    "mov r8d, 8",
    "mov eax, 271", // ppoll
    "syscall",
    "test rax, rax",
    "jle 35f",
    "xor r9d, r9d",
    "33:",
    "cmp r9d, gs:[{poll_count}]",
    "jae 35f",
    "mov r8, gs:[0]",
    "cmp word ptr [r8 + r9*8 + {poll} + 6], 0",
    "je 34f",
    // Once: the VMM may empty the entry while its old descriptor is being waited for.
    "mov edi, [r8 + r9*8 + {poll}]",
    "test edi, edi",
    "js 34f",
    "lea rsi, [r8 + {read_buffer}]",
    "mov edx, 8",
    "xor eax, eax", // read: drain before the bit is set
    "syscall",
    "movzx eax, word ptr [r8 + r9*2 + {poll_event}]",
    "cmp eax, 256",
    "jae 34f",
    "lock bts qword ptr [r8 + {pending}], rax",
    "inc qword ptr [r8 + {events}]",
    "34:",
    "inc r9d",
    "jmp 33b",
    "35:",
    "ret",

    // A thread that waits to be started.
    ".globl pv_gate_park",
    "pv_gate_park:",
    "mov dword ptr gs:[{ready}], 1",
    "mov rdi, gs:[0]",
    "add rdi, {ready}",
    "mov esi, 1",
    "mov edx, 0x7fffffff",
    "mov eax, 202",
    "syscall",
    "51:",
    "mov eax, gs:[{handoff}]",
    "cmp eax, {parked}",
    "jne 52f",
    "mov rdi, gs:[0]",
    "add rdi, {handoff}",
    "xor esi, esi",
    "mov edx, {parked}",
    "xor r10d, r10d",
    "mov eax, 202",
    "syscall",
    "jmp 51b",
    "52:",
    "mov rsp, gs:[{start_rsp}]",
    "mov rdi, gs:[{start_rdi}]",
    "mov rsi, gs:[{start_rsi}]",
    "xor eax, eax",
    "xor ebx, ebx",
    "xor ecx, ecx",
    "xor edx, edx",
    "xor ebp, ebp",
    "xor r8d, r8d",
    "xor r9d, r9d",
    "xor r10d, r10d",
    "xor r11d, r11d",
    "xor r12d, r12d",
    "xor r13d, r13d",
    "xor r14d, r14d",
    "xor r15d, r15d",
    "cld",
    "jmp qword ptr gs:[{start_rip}]",

    // The stub's last step: RDI, RSI = what to unmap, RDX = filter program. Uses no stack: there is
    // none any more.
    ".globl pv_gate_finish",
    "pv_gate_finish:",
    "mov r15, rdx",
    "mov eax, 11", // munmap
    "syscall",
    "test rax, rax",
    "jnz 60f",
    "mov edi, 1", // SECCOMP_SET_MODE_FILTER
    "mov esi, 1", // SECCOMP_FILTER_FLAG_TSYNC
    "mov rdx, r15",
    "mov eax, 317",
    "syscall",
    "test rax, rax",
    "jz pv_gate_park",
    "60:",
    "mov edi, 124",
    "mov eax, 231", // exit_group
    "syscall",
    "ud2",

    // A signal handler without ptrace: RSI = siginfo, RDX = ucontext. Saves what it knows in the
    // vCPU page and waits for its end.
    ".globl pv_gate_fault",
    "pv_gate_fault:",
    "mov r8, gs:[0]",
    "add r8, {report}",
    "mov eax, [rsi]", // si_signo
    "mov [r8], rax",
    "movsxd rax, dword ptr [rsi + 8]", // si_code
    "mov [r8 + 8], rax",
    "mov rax, [rsi + 16]", // si_addr, or si_call_addr
    "mov [r8 + 16], rax",
    "mov eax, [rsi + 24]", // si_syscall
    "mov [r8 + 24], rax",
    "lea rsi, [rdx + 40]", // uc_mcontext: 19 registers from r8 to err, trapno
    "lea rdi, [r8 + 32]",
    "mov ecx, 21",
    "rep movsq",
    "mov eax, {fault}",
    "xor edi, edi",
    "jmp 40b",
    ".globl pv_gate_end",
    "pv_gate_end:",
    ".popsection",
    call = const handoff::CALL,
    exit = const handoff::EXIT,
    parked = const handoff::PARKED,
    fault = const handoff::FAULT,
    doorbell = const handoff::DOORBELL,
    handoff = const page::HANDOFF,
    arg = const page::ARG,
    ready = const page::READY,
    start_rip = const page::START_RIP,
    start_rsp = const page::START_RSP,
    start_rdi = const page::START_RDI,
    start_rsi = const page::START_RSI,
    cpu = const page::CPU,
    timespec = const page::TIMESPEC,
    read_buffer = const page::READ_BUFFER,
    kicks = const page::KICKS,
    idles = const page::IDLES,
    idle_ns = const page::IDLE_NS,
    pending = const page::PENDING,
    events = const page::EVENTS,
    poll = const page::POLL,
    poll_count = const page::POLL_COUNT,
    poll_event = const page::POLL_EVENT,
    report = const page::REPORT,
    wake_doorbell = const WAKE_DOORBELL,
    kick_base = const KICK_BASE,
    kick_count = const KICK_COUNT,
    wake_base = const WAKE_BASE,
    wake_count = const WAKE_COUNT,
);

unsafe extern "C" {
    static pv_gate_start: u8;
    static pv_gate_park: u8;
    static pv_gate_finish: u8;
    static pv_gate_fault: u8;
    static pv_gate_end: u8;
}

/// The gate's page: bodies, data, and the filter's image.
///
/// # Errors
/// When the filter does not fit.
pub(super) fn page(data: GateData, filter: &[u8]) -> io::Result<Vec<u8>> {
    let mut page = Vec::with_capacity(PAGE_SIZE as usize);
    for (at, part) in [
        (GATE_BASE, bodies()),
        (DATA, &data.bytes()),
        (FILTER, filter),
    ] {
        let at = usize::try_from(at - GATE_BASE).map_err(io::Error::other)?;
        if page.len() > at {
            return Err(io::Error::other("the gate does not fit its page"));
        }
        page.resize(at, 0);
        page.extend_from_slice(part);
    }
    if page.len() as u64 > PAGE_SIZE {
        return Err(io::Error::other("the filter does not fit"));
    }
    Ok(page)
}

/// The bytes of the gate region's code.
fn bodies() -> &'static [u8] {
    let (start, end) = (&raw const pv_gate_start, &raw const pv_gate_end);
    // SAFETY: the two symbols enclose one section of this library's text.
    unsafe { std::slice::from_raw_parts(start, end.offset_from_unsigned(start)) }
}

fn copied(symbol: *const u8) -> u64 {
    GATE_BASE + (symbol as u64 - &raw const pv_gate_start as u64)
}

/// Guest address of the park code.
pub(super) fn park() -> u64 {
    copied(&raw const pv_gate_park)
}

/// Guest address of the finish code.
pub(super) fn finish() -> u64 {
    copied(&raw const pv_gate_finish)
}

/// Guest address of the fault handler.
pub(super) fn fault_handler() -> u64 {
    copied(&raw const pv_gate_fault)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_and_filters_fit_their_page() {
        let data = GateData {
            kick_base: 1,
            kick_count: 2,
            wake_base: 3,
            wake_count: 4,
        };
        let most = (GATE_BASE + PAGE_SIZE - FILTER) as usize;
        assert!(page(data, &vec![0; most]).is_ok());
        assert!(page(data, &vec![0; most + 1]).is_err());
        let bodies = bodies();
        assert!(bodies.len() as u64 >= SLOT_SIZE * SLOT_COUNT);
        assert!(GATE_BASE + bodies.len() as u64 <= DATA);
        // jmp rel8 or rel32, mov eax, or rax, ud2: every slot begins with one of these.
        for slot in bodies.chunks(SLOT_SIZE as usize).take(SLOT_COUNT as usize) {
            assert!(
                matches!(slot[0], 0xe9 | 0xeb | 0xb8 | 0x48 | 0x0f),
                "{:#x}",
                slot[0]
            );
        }
    }
}
