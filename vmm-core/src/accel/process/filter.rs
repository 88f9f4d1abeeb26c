//! The system-call filter of a sandboxed guest: the whole list.
//!
//! | call | only |
//! |---|---|
//! | `read` | 8 bytes from this guest's own eventfds |
//! | `write` | 8 bytes to this guest's own eventfds |
//! | `ppoll` | up to 65 descriptors; none but its own eventfds are open |
//! | `futex` | `FUTEX_WAIT` and `FUTEX_WAKE` |
//! | `restart_syscall` | a wait that a stop interrupted |
//!
//! Anything else raises SIGSYS, which ends the guest with a typed reason.

use pv_abi::limits::MAX_POLL;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use std::io;
use std::ops::Range;

/// The filter program for a guest whose eventfds are these descriptors.
pub(super) fn program(events: Range<u32>) -> io::Result<BpfProgram> {
    let dword = SeccompCmpArgLen::Dword;
    let is = |arg, op, value| SeccompCondition::new(arg, dword.clone(), op, value);
    let wide = |arg, op, value| SeccompCondition::new(arg, SeccompCmpArgLen::Qword, op, value);
    let build = || -> Result<BpfProgram, seccompiler::BackendError> {
        let event_io = || {
            SeccompRule::new(vec![
                is(0, SeccompCmpOp::Ge, events.start.into())?,
                is(0, SeccompCmpOp::Lt, events.end.into())?,
                wide(2, SeccompCmpOp::Eq, 8)?,
            ])
        };
        let futex = |operation: libc::c_int| {
            let operation = u64::try_from(operation).unwrap_or(u64::MAX);
            SeccompRule::new(vec![is(1, SeccompCmpOp::Eq, operation)?])
        };
        let poll = SeccompRule::new(vec![wide(1, SeccompCmpOp::Le, MAX_POLL as u64)?])?;
        let rules = [
            (libc::SYS_read, vec![event_io()?]),
            (libc::SYS_write, vec![event_io()?]),
            (libc::SYS_ppoll, vec![poll]),
            (
                libc::SYS_futex,
                vec![futex(libc::FUTEX_WAIT)?, futex(libc::FUTEX_WAKE)?],
            ),
            (libc::SYS_restart_syscall, vec![]),
        ];
        SeccompFilter::new(
            rules.into_iter().collect(),
            SeccompAction::Trap,
            SeccompAction::Allow,
            TargetArch::x86_64,
        )?
        .try_into()
    };
    build().map_err(io::Error::other)
}

/// The program as the kernel reads it: `struct sock_fprog` for this address, then the program.
pub(super) fn image(program: &BpfProgram, at: u64) -> io::Result<Vec<u8>> {
    let len = u16::try_from(program.len()).map_err(io::Error::other)?;
    let mut bytes = u64::from(len).to_le_bytes().to_vec();
    bytes.extend_from_slice(&(at + 16).to_le_bytes());
    for instruction in program {
        bytes.extend_from_slice(&instruction.code.to_le_bytes());
        bytes.extend_from_slice(&[instruction.jt, instruction.jf]);
        bytes.extend_from_slice(&instruction.k.to_le_bytes());
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_fits_its_place() {
        let program = program(100..700).unwrap();
        let image = image(&program, super::super::gate::FILTER).unwrap();
        assert!(image.len() as u64 <= super::super::gate::FILTER_LEN);
        assert!(program.len() < 100, "{} instructions", program.len());
    }
}
