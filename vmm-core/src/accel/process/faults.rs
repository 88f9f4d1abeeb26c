//! Signals become typed faults, with the classes that kvm has.

use crate::fault::{FaultClass, GuestFault, Registers, Violation, classify};
use crate::memory::GuestMemory;

/// What is known about a signal.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Signal {
    pub(super) number: i32,
    pub(super) code: i32,
    pub(super) address: u64,
    pub(super) syscall: i32,
    pub(super) registers: Registers,
    /// The x86 error code, where the kernel tells.
    pub(super) error: u64,
}

const SI_KERNEL: i32 = 0x80;
const SEGV_MAPERR: i32 = 1;
const SEGV_ACCERR: i32 = 2;
const BUS_ADRALN: i32 = 1;
const FPE_INTDIV: i32 = 1;
const FPE_INTOVF: i32 = 2;
const SYS_SECCOMP: i32 = 1;

/// The fault or violation that this signal stands for.
pub(super) fn blame(
    vcpu: u32,
    signal: &Signal,
    memory: &GuestMemory,
    self_reported: bool,
) -> Result<Box<GuestFault>, Violation> {
    let code = code_at(memory, signal.registers.rip);
    let page = matches!(signal.code, SEGV_MAPERR | SEGV_ACCERR);
    let (vector, class) = match signal.number {
        libc::SIGSYS if signal.code == SYS_SECCOMP => {
            let number = u32::try_from(signal.syscall).unwrap_or(u32::MAX);
            return Err(Violation::SystemCall { number });
        }
        libc::SIGFPE if matches!(signal.code, FPE_INTDIV | FPE_INTOVF) => (0, None),
        libc::SIGFPE => (19, None),
        libc::SIGILL => (6, None),
        // INT3 is SI_KERNEL; single steps and ICEBP have codes of their own.
        libc::SIGTRAP if signal.code == SI_KERNEL => (3, None),
        libc::SIGTRAP => (1, None),
        libc::SIGSEGV if page => (14, None),
        libc::SIGSEGV => (13, None),
        libc::SIGBUS if signal.code == BUS_ADRALN => (17, None),
        libc::SIGBUS if signal.code == SI_KERNEL => (12, None),
        libc::SIGBUS => (18, Some(FaultClass::Memory)),
        _ => (255, Some(FaultClass::Other)),
    };
    let class = class.unwrap_or_else(|| classify(vector, &code));
    let with_address = matches!(class, FaultClass::Page | FaultClass::Memory);
    Ok(Box::new(GuestFault {
        vcpu,
        class,
        vector,
        error: signal.error,
        rip: signal.registers.rip,
        address: with_address.then_some(signal.address),
        registers: signal.registers,
        self_reported,
    }))
}

fn code_at(memory: &GuestMemory, rip: u64) -> Vec<u8> {
    let byte = |at| {
        let mut byte = [0];
        let (ram, offset) = memory.private(at, 1)?;
        ram.read_bytes(offset, &mut byte).ok()?;
        Some(byte)
    };
    (0..15)
        .map_while(|i| byte(rip.checked_add(i)?))
        .flatten()
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn class(number: i32, code: i32) -> Result<FaultClass, Violation> {
        let memory = GuestMemory::plain(4 << 20, &[]);
        let signal = Signal {
            number,
            code,
            syscall: 59,
            ..Default::default()
        };
        blame(0, &signal, &memory, false).map(|f| f.class)
    }

    #[test]
    fn signals_have_classes() {
        assert_eq!(class(libc::SIGFPE, FPE_INTDIV), Ok(FaultClass::Divide));
        assert_eq!(class(libc::SIGFPE, 7), Ok(FaultClass::FloatingPoint));
        assert_eq!(class(libc::SIGILL, 2), Ok(FaultClass::InvalidOpcode));
        assert_eq!(class(libc::SIGTRAP, SI_KERNEL), Ok(FaultClass::Breakpoint));
        assert_eq!(class(libc::SIGTRAP, 2), Ok(FaultClass::Debug));
        assert_eq!(class(libc::SIGSEGV, SEGV_MAPERR), Ok(FaultClass::Page));
        assert_eq!(class(libc::SIGSEGV, SI_KERNEL), Ok(FaultClass::Protection));
        assert_eq!(class(libc::SIGBUS, BUS_ADRALN), Ok(FaultClass::Alignment));
        assert_eq!(class(libc::SIGBUS, SI_KERNEL), Ok(FaultClass::Protection));
        assert_eq!(class(libc::SIGBUS, 2), Ok(FaultClass::Memory));
        assert_eq!(
            class(libc::SIGSYS, 1),
            Err(Violation::SystemCall { number: 59 })
        );
    }
}
