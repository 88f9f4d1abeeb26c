//! Every CPU exception that a flat guest can raise, and every instruction that it may not execute.
//!
//! Functions that hold banned instructions begin with `hostile_`, which is what the build's check
//! is told to let pass.
#![allow(unsafe_code)]
// UNSAFETY: everything here is done to see what becomes of it.

use crate::{Case, Outcome};
use core::arch::{asm, global_asm};
use guest_sdk::flat::Boot;
use pv_abi::layout::{
    ARENA_BASE, BOOT_BLOCK_BASE, CLOCK_PAGE_BASE, DEVICE_TABLE_BASE, GATE_BASE, MONITOR_BASE,
    PAGE_TABLES_BASE, vcpu_page,
};

pub const CASES: &[Case] = &[
    ("fault.divide", |_| run(divide)),
    ("fault.divide_overflow", |_| run(divide_overflow)),
    ("fault.debug", |_| run(debug)),
    ("fault.icebp", |_| run(hostile_icebp)),
    ("fault.breakpoint", |_| run(breakpoint)),
    ("fault.invalid_opcode", |_| run(invalid_opcode)),
    ("fault.null", |_| read(0)),
    ("fault.unmapped", |_| read(0x30_0000_0000)),
    ("fault.past_the_image", |boot| {
        read(boot.memory_map()[0].gpa - 4096)
    }),
    ("fault.kernel_half", |_| read(0xffff_8000_0000_0000)),
    ("fault.monitor", |_| read(MONITOR_BASE)),
    ("fault.page_tables", |_| read(PAGE_TABLES_BASE)),
    ("fault.write_gate", |_| write(GATE_BASE)),
    ("fault.write_boot_block", |_| write(BOOT_BLOCK_BASE)),
    ("fault.write_device_table", |_| write(DEVICE_TABLE_BASE)),
    ("fault.write_clock", |_| write(CLOCK_PAGE_BASE)),
    ("fault.write_text", |_| write(run as *const () as u64)),
    ("fault.write_rodata", |_| write(CASES.as_ptr() as u64)),
    ("fault.jump_data", |_| jump(&raw const DATA as u64)),
    ("fault.jump_stack", jump_stack),
    ("fault.jump_arena", |_| jump(ARENA_BASE)),
    ("fault.jump_control", |_| jump(vcpu_page(0))),
    ("fault.jump_null", |_| jump(0)),
    ("fault.stack_overflow", |_| stack_overflow()),
    ("fault.stack_overflow_secondary", stack_overflow_secondary),
    ("fault.non_canonical", |_| read(0x8000_0000_0000_0000)),
    ("fault.non_canonical_jump", |_| jump(0x8000_0000_0000_0000)),
    ("fault.alignment", |_| run(alignment)),
    ("fault.aligned_sse", |_| run(aligned_sse)),
    ("fault.x87", |_| run(x87)),
    ("fault.sse", |_| run(sse)),
    ("fault.empty_slot", |_| run(empty_slot)),
    ("fault.bad_segment", |_| run(hostile_bad_segment)),
    ("fault.stack_segment", |_| run(stack_segment)),
    ("fault.gs_base", |_| run(hostile_gs_base)),
    ("banned.hlt", |_| run(hostile_hlt)),
    ("banned.cli", |_| run(hostile_cli)),
    ("banned.sti", |_| run(hostile_sti)),
    ("banned.in", |_| run(hostile_in)),
    ("banned.out", |_| run(hostile_out)),
    ("banned.gate_port_byte", |_| run(hostile_gate_port_byte)),
    ("banned.gate_port_in", |_| run(hostile_gate_port_in)),
    ("banned.fault_port", |_| run(hostile_fault_port)),
    ("banned.int80", |_| run(hostile_int80)),
    ("banned.int_2", |_| run(hostile_int_2)),
    ("banned.syscall", |_| run(hostile_syscall)),
    ("banned.rdmsr", |_| run(hostile_rdmsr)),
    ("banned.mov_cr3", |_| run(hostile_mov_cr3)),
    ("banned.lgdt", |_| run(hostile_lgdt)),
    ("banned.invlpg", |_| run(hostile_invlpg)),
    ("banned.iopl", |_| run(hostile_iopl)),
    ("banned.vmcall", |_| call_out(hostile_vmcall)),
    ("banned.vmmcall", |_| call_out(hostile_vmmcall)),
    ("banned.iretq", |_| run(hostile_iretq)),
    ("banned.far_call", |_| run(hostile_far_call)),
    ("banned.swapgs", |_| run(hostile_swapgs)),
    ("banned.rdpmc", |_| run(hostile_rdpmc)),
    ("banned.sysenter", |_| run(hostile_sysenter)),
];

static DATA: u64 = 0xc3;

fn run(provoke: unsafe extern "C" fn()) -> Outcome {
    // SAFETY: ends the VM, or returns and fails the case.
    unsafe { provoke() };
    Err("nothing happened".into())
}

/// A hypervisor may answer a call from CPL 3, with no more than an error in RAX.
fn call_out(provoke: unsafe extern "C" fn()) -> Outcome {
    // SAFETY: ends the VM, or does nothing.
    unsafe { provoke() };
    Ok(())
}

fn read(address: u64) -> Outcome {
    // SAFETY: ends the VM, or returns and fails the case.
    let value = unsafe { (address as *const u64).read_volatile() };
    Err(alloc::format!("{address:#x} reads {value:#x}"))
}

fn write(address: u64) -> Outcome {
    // SAFETY: ends the VM, or returns and fails the case.
    unsafe { (address as *mut u64).write_volatile(0x90) };
    Err(alloc::format!("{address:#x} was written"))
}

fn jump(address: u64) -> Outcome {
    // SAFETY: ends the VM, or returns and fails the case.
    unsafe { asm!("call {}", in(reg) address, clobber_abi("sysv64")) };
    Err(alloc::format!("{address:#x} was executed"))
}

fn jump_stack(_boot: &Boot) -> Outcome {
    let code = [0xc3u8; 16];
    jump(code.as_ptr() as u64)
}

fn stack_overflow() -> Outcome {
    #[allow(unconditional_recursion)]
    #[inline(never)]
    fn deeper(depth: u64) -> u64 {
        let room = core::hint::black_box([depth; 64]);
        deeper(depth + 1) + room[(depth % 64) as usize]
    }
    Err(alloc::format!("{}", deeper(0)))
}

fn stack_overflow_secondary(boot: &Boot) -> Outcome {
    use guest_sdk::platform::Platform;
    guest_sdk::flat::smp::start(1, |_| drop(stack_overflow()), 0).map_err(crate::text("start"))?;
    loop {
        boot.platform().idle(None);
    }
}

macro_rules! provoke {
    ($($name:ident: $($line:literal),+;)+) => {
        unsafe extern "C" {
            $(fn $name();)+
        }
        global_asm!($(
            concat!(".globl ", stringify!($name)),
            concat!(".type ", stringify!($name), ",@function"),
            concat!(stringify!($name), ":"),
            $($line,)+
            "ret",
            concat!(".size ", stringify!($name), ", . - ", stringify!($name)),
        )+);
    };
}

provoke! {
    divide: "xor ecx, ecx", "mov eax, 1", "xor edx, edx", "div ecx";
    divide_overflow: "mov ecx, 1", "mov edx, 5", "xor eax, eax", "div ecx";
    debug: "pushfq", "or qword ptr [rsp], 0x100", "popfq", "nop", "nop";
    hostile_icebp: ".byte 0xf1";
    breakpoint: "int3";
    invalid_opcode: "ud2";
    alignment: "pushfq", "or qword ptr [rsp], 0x40000", "popfq", "mov rax, [rsp - 15]";
    aligned_sse: "movaps xmm0, [rsp + 1]";
    x87: "sub rsp, 8", "mov word ptr [rsp], 0x37b", "fldcw [rsp]", "fld1", "fldz", "fdivp", "fwait", "add rsp, 8";
    sse: "sub rsp, 8", "mov dword ptr [rsp], 0x1d80", "ldmxcsr [rsp]", "xorps xmm0, xmm0", "mov eax, 1", "cvtsi2ss xmm1, eax", "divss xmm1, xmm0", "add rsp, 8";
    empty_slot: "mov eax, 0x800000 + 15*64", "call rax";
    hostile_bad_segment: "mov eax, 0x08", "mov ds, eax";
    hostile_hlt: "hlt";
    hostile_cli: "cli";
    hostile_sti: "sti";
    hostile_in: "mov edx, 0x60", "in al, dx";
    hostile_out: "mov edx, 0x80", "out dx, al";
    hostile_gate_port_byte: "mov edx, 0x500", "out dx, al";
    hostile_gate_port_in: "mov edx, 0x500", "in eax, dx";
    hostile_fault_port: "mov edx, 0x510", "out dx, al";
    hostile_int80: "mov eax, 1", "int 0x80";
    hostile_int_2: "int 2";
    hostile_syscall: "mov eax, 59", "xor edi, edi", "xor esi, esi", "xor edx, edx", "syscall";
    hostile_rdmsr: "mov ecx, 0x1b", "rdmsr";
    hostile_mov_cr3: "mov rax, cr3";
    hostile_lgdt: "lgdt [rsp]";
    hostile_invlpg: "invlpg [rsp]";
    stack_segment: "mov rax, 1", "shl rax, 63", "mov rsp, rax", "push rax";
    hostile_gs_base: "mov rax, 0x3000000000", "wrgsbase rax", "mov eax, 0x800000 + 64", "xor edi, edi", "call rax";
    hostile_vmcall: "mov eax, 1", "vmcall";
    hostile_vmmcall: "mov eax, 1", "vmmcall";
    hostile_iretq: "mov rax, rsp", "push 0x18", "push rax", "pushfq", "push 0x10", "lea rax, [rip + 2f]", "push rax", "iretq", "2:";
    hostile_far_call: "sub rsp, 8", "mov dword ptr [rsp], 0", "mov dword ptr [rsp + 4], 0x10", ".byte 0xff, 0x1c, 0x24", "add rsp, 8";
    hostile_swapgs: "swapgs";
    hostile_rdpmc: "xor ecx, ecx", "rdpmc";
    hostile_sysenter: "mov rbp, rsp", "mov eax, 20", "sysenter";
    hostile_iopl: "pushfq", "or qword ptr [rsp], 0x3000", "popfq", "cli";
}
