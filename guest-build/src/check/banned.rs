//! Which instructions a guest may not contain, one decoded instruction at a time.
//!
//! The baseline is a list of what is allowed, not of what is known to be bad: an extension that
//! this list does not name is refused, so a new one is refused on the day LLVM learns it.

use iced_x86::{CpuidFeature, EncodingKind, Instruction, Mnemonic, OpKind, Register};
use std::fmt;

/// Why an instruction is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Ban {
    /// Faults at CPL 3, port I/O included: the gate is the only way out.
    Privileged,
    /// `INT n`, `INTO`, `INT1`: ends differently from host to host.
    SoftwareInterrupt,
    /// `SYSCALL`, `SYSENTER` and their returns: would reach the host kernel in a process.
    SystemCall,
    /// `VMCALL`, `VMMCALL`, `VMFUNC` and the enclave calls.
    HypervisorCall,
    /// `CPUID`, `XGETBV`: show the host's values on some hosts; the boot block has the guest's.
    AsksTheCpu,
    /// `RDPMC`: counters that the host did not offer.
    PerformanceCounter,
    /// `WRGSBASE`, `SWAPGS`: GS base is the host's.
    GsBase,
    /// Loads a segment register, or transfers control to another segment.
    Segment,
    /// `SGDT`, `SIDT`, `SLDT`, `STR`, `SMSW`, `LAR`, `LSL`, `VERR`, `VERW`: show the monitor's
    /// tables, or the host's.
    SystemTable,
    /// Not part of x86-64-v2, AVX among others.
    BeyondBaseline,
    /// Not an instruction.
    NotCode,
}

impl fmt::Display for Ban {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Ban::Privileged => "privileged",
            Ban::SoftwareInterrupt => "software interrupt",
            Ban::SystemCall => "system call",
            Ban::HypervisorCall => "hypervisor call",
            Ban::AsksTheCpu => "asks the CPU instead of the boot block",
            Ban::PerformanceCounter => "performance counter",
            Ban::GsBase => "changes GS base, which is the host's",
            Ban::Segment => "changes a segment",
            Ban::SystemTable => "reads a system table",
            Ban::BeyondBaseline => "beyond the x86-64-v2 baseline",
            Ban::NotCode => "not an instruction",
        })
    }
}

/// Why a guest may not contain `instruction`; `None` when it may.
pub fn classify(instruction: &Instruction) -> Option<Ban> {
    use Mnemonic as M;
    if instruction.is_invalid() {
        return Some(Ban::NotCode);
    }
    // By name first, so that the reason given is the most telling one.
    match instruction.mnemonic() {
        M::Int | M::Into | M::Int1 => return Some(Ban::SoftwareInterrupt),
        M::Syscall | M::Sysenter | M::Sysret | M::Sysretq | M::Sysexit | M::Sysexitq => {
            return Some(Ban::SystemCall);
        }
        M::Vmcall
        | M::Vmmcall
        | M::Vmgexit
        | M::Vmfunc
        | M::Tdcall
        | M::Seamcall
        | M::Enclu
        | M::Enclv
        | M::Encls => return Some(Ban::HypervisorCall),
        M::Cpuid | M::Xgetbv => return Some(Ban::AsksTheCpu),
        M::Rdpmc => return Some(Ban::PerformanceCounter),
        M::Wrgsbase | M::Swapgs => return Some(Ban::GsBase),
        M::Sgdt | M::Sidt | M::Sldt | M::Str | M::Smsw | M::Lar | M::Lsl | M::Verr | M::Verw => {
            return Some(Ban::SystemTable);
        }
        // Shares its CPUID bit with PREFETCH, and is no hint: #UD on every Intel CPU.
        M::Femms => return Some(Ban::BeyondBaseline),
        M::Iret | M::Iretd | M::Iretq | M::Retf | M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss => {
            return Some(Ban::Segment);
        }
        // LLVM writes `rep bsf` for count-trailing-zeros: it decodes as TZCNT and is right as
        // either, because LLVM handles the zero that they disagree on.
        M::Tzcnt if instruction.encoding() == EncodingKind::Legacy => return None,
        _ => {}
    }
    if instruction.is_privileged() || is_port_io(instruction.mnemonic()) {
        return Some(Ban::Privileged);
    }
    if is_far(instruction) || loads_segment(instruction) {
        return Some(Ban::Segment);
    }
    if instruction.encoding() != EncodingKind::Legacy
        || !instruction.cpuid_features().iter().all(in_baseline)
    {
        return Some(Ban::BeyondBaseline);
    }
    None
}

fn is_port_io(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::In | M::Out | M::Insb | M::Insw | M::Insd | M::Outsb | M::Outsw | M::Outsd
    )
}

fn is_far(instruction: &Instruction) -> bool {
    instruction.is_jmp_far()
        || instruction.is_jmp_far_indirect()
        || instruction.is_call_far()
        || instruction.is_call_far_indirect()
}

fn loads_segment(instruction: &Instruction) -> bool {
    let to_segment = instruction.op_count() > 0
        && instruction.op0_kind() == OpKind::Register
        && matches!(
            instruction.op0_register(),
            Register::ES | Register::CS | Register::SS | Register::DS | Register::FS | Register::GS
        );
    to_segment && matches!(instruction.mnemonic(), Mnemonic::Mov | Mnemonic::Pop)
}

/// What x86-64-v2 has, with the few things that every CPU of that level has although the level
/// does not name them.
fn in_baseline(feature: &CpuidFeature) -> bool {
    use CpuidFeature as F;
    matches!(
        feature,
        F::INTEL8086
            | F::INTEL8086_ONLY
            | F::INTEL186
            | F::INTEL286
            | F::INTEL386
            | F::INTEL486
            | F::X64
            | F::CMOV
            | F::CX8
            | F::CMPXCHG16B
            | F::FPU
            | F::FPU287
            | F::FPU387
            | F::FXSR
            | F::MMX
            | F::SSE
            | F::SSE2
            | F::SSE3
            | F::SSSE3
            | F::SSE4_1
            | F::SSE4_2
            | F::POPCNT
            | F::MULTIBYTENOP
            | F::PAUSE
            | F::CLFSH
            // ENDBR64 is a no-op where it means nothing.
            | F::CET_IBT
            // Hint no-ops on every 64-bit CPU.
            | F::PREFETCHW
            | F::D3NOW
            // The clock page is read with these; the host leaves CR4.TSD clear.
            | F::TSC
            | F::RDTSCP
            // FS base is the guest's, and the host sets CR4.FSGSBASE; WRGSBASE is refused above.
            | F::FSGSBASE
    )
}
