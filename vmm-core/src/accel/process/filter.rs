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
//! Anything else raises SIGSYS, which ends the guest with a typed reason. The program is written by
//! hand: the kernel tries it with every number there is when it is installed, so a call that is not
//! on the list takes few steps here.

use pv_abi::limits::MAX_POLL;
use std::io;
use std::ops::Range;

/// One instruction, as `struct sock_filter` has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Instruction {
    code: u16,
    yes: u8,
    no: u8,
    k: u32,
}

// BPF_LD | BPF_W | BPF_ABS; BPF_JMP | BPF_JEQ, BPF_JGT, BPF_JGE, each | BPF_K; BPF_RET | BPF_K.
const LOAD: u16 = 0x20;
const EQUAL: u16 = 0x15;
const ABOVE: u16 = 0x25;
const AT_LEAST: u16 = 0x35;
const RETURN: u16 = 0x06;
/// `AUDIT_ARCH_X86_64`.
const X86_64: u32 = 0xc000_003e;
/// In `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
/// Halves of the first three arguments.
const FIRST_LOW: u32 = 16;
const SECOND_LOW: u32 = 24;
const SECOND_HIGH: u32 = 28;
const THIRD_LOW: u32 = 32;
const THIRD_HIGH: u32 = 36;

const READ: u32 = libc::SYS_read as u32;
const WRITE: u32 = libc::SYS_write as u32;
const FUTEX: u32 = libc::SYS_futex as u32;
const RESTART: u32 = libc::SYS_restart_syscall as u32;
const PPOLL: u32 = libc::SYS_ppoll as u32;
// What the order of the tests below counts on.
const _: () = assert!(READ == 0 && WRITE == 1 && WRITE < FUTEX && FUTEX < RESTART);
const _: () = assert!(RESTART < PPOLL);

const ALLOW: usize = 23;
const TRAP: usize = 24;
const KILL: usize = 25;

/// The filter program for a guest whose eventfds are these descriptors.
pub(super) fn program(events: Range<u32>) -> Vec<Instruction> {
    // Operation, operand, and the next place if it holds and if it does not.
    let listing: [(u16, u32, usize, usize); KILL + 1] = [
        (LOAD, ARCHITECTURE, 1, 1),
        (EQUAL, X86_64, 2, KILL),
        (LOAD, NUMBER, 3, 3),
        (ABOVE, PPOLL, TRAP, 4),
        (AT_LEAST, RESTART, 17, 5),
        (ABOVE, WRITE, 13, 6),
        // 6: read and write
        (LOAD, FIRST_LOW, 7, 7),
        (AT_LEAST, events.start, 8, TRAP),
        (AT_LEAST, events.end, TRAP, 9),
        (LOAD, THIRD_LOW, 10, 10),
        (EQUAL, 8, 11, TRAP),
        (LOAD, THIRD_HIGH, 12, 12),
        (EQUAL, 0, ALLOW, TRAP),
        // 13: between write and restart_syscall
        (EQUAL, FUTEX, 14, TRAP),
        (LOAD, SECOND_LOW, 15, 15),
        (EQUAL, libc::FUTEX_WAIT as u32, ALLOW, 16),
        (EQUAL, libc::FUTEX_WAKE as u32, ALLOW, TRAP),
        // 17: from restart_syscall to ppoll
        (EQUAL, RESTART, ALLOW, 18),
        (EQUAL, PPOLL, 19, TRAP),
        (LOAD, SECOND_LOW, 20, 20),
        (ABOVE, MAX_POLL as u32, TRAP, 21),
        (LOAD, SECOND_HIGH, 22, 22),
        (EQUAL, 0, ALLOW, TRAP),
        (RETURN, libc::SECCOMP_RET_ALLOW, 24, 24),
        (RETURN, libc::SECCOMP_RET_TRAP, 25, 25),
        (RETURN, libc::SECCOMP_RET_KILL_PROCESS, 26, 26),
    ];
    // The kernel counts from the next instruction on, and forwards only.
    let relative = |at: usize, to: usize| u8::try_from(to - at - 1).unwrap_or(u8::MAX);
    let lines = listing.iter().enumerate();
    lines
        .map(|(at, (code, k, yes, no))| Instruction {
            code: *code,
            yes: relative(at, *yes),
            no: relative(at, *no),
            k: *k,
        })
        .collect()
}

/// The program as the kernel reads it: `struct sock_fprog` for this address, then the program.
pub(super) fn image(program: &[Instruction], at: u64) -> io::Result<Vec<u8>> {
    let len = u16::try_from(program.len()).map_err(io::Error::other)?;
    let mut bytes = u64::from(len).to_le_bytes().to_vec();
    bytes.extend_from_slice(&(at + 16).to_le_bytes());
    for instruction in program {
        bytes.extend_from_slice(&instruction.code.to_le_bytes());
        bytes.extend_from_slice(&[instruction.yes, instruction.no]);
        bytes.extend_from_slice(&instruction.k.to_le_bytes());
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the program as the kernel does; the action, and how many steps that took.
    fn run(program: &[Instruction], data: &[u32; 16]) -> (u32, usize) {
        let (mut at, mut accumulator) = (0, 0);
        for steps in 1.. {
            let instruction = program[at];
            let k = instruction.k;
            let holds = match instruction.code {
                RETURN => return (k, steps),
                LOAD => {
                    accumulator = data[k as usize / 4];
                    false
                }
                EQUAL => accumulator == k,
                ABOVE => accumulator > k,
                AT_LEAST => accumulator >= k,
                code => panic!("{code:#x}"),
            };
            at += 1 + usize::from(if holds {
                instruction.yes
            } else {
                instruction.no
            });
        }
        unreachable!()
    }

    fn data(number: u32, architecture: u32, arguments: [u64; 3]) -> [u32; 16] {
        let mut data = [0; 16];
        (data[0], data[1]) = (number, architecture);
        for (place, argument) in arguments.into_iter().enumerate() {
            data[4 + 2 * place] = argument as u32;
            data[5 + 2 * place] = (argument >> 32) as u32;
        }
        data
    }

    /// The list at the top of this file, in words.
    fn allowed(number: u32, [first, second, third]: [u64; 3]) -> bool {
        match i64::from(number) {
            libc::SYS_read | libc::SYS_write => (100..700).contains(&(first as u32)) && third == 8,
            libc::SYS_ppoll => second <= MAX_POLL as u64,
            libc::SYS_futex => {
                [libc::FUTEX_WAIT, libc::FUTEX_WAKE].contains(&(second as u32).cast_signed())
            }
            libc::SYS_restart_syscall => true,
            _ => false,
        }
    }

    #[test]
    fn what_is_on_the_list_and_nothing_else() {
        let program = program(100..700);
        let poll = MAX_POLL as u64;
        let edges = [
            0,
            1,
            2,
            7,
            8,
            9,
            99,
            100,
            699,
            700,
            poll,
            poll + 1,
            128,
            129,
            1 << 32,
            (1 << 32) + 8,
            (1 << 32) + poll,
            u64::MAX,
        ];
        // x32's numbers too.
        let numbers = (0..1024).chain([1 << 30, (1 << 30) + 1, u32::MAX]);
        for number in numbers {
            for first in edges {
                for second in edges {
                    for third in edges {
                        let arguments = [first, second, third];
                        let expected = if allowed(number, arguments) {
                            libc::SECCOMP_RET_ALLOW
                        } else {
                            libc::SECCOMP_RET_TRAP
                        };
                        let (action, _) = run(&program, &data(number, X86_64, arguments));
                        assert_eq!(action, expected, "{number} {arguments:?}");
                        // What is not on the list says so at once, whatever its arguments.
                        if !matches!(number, READ | WRITE | FUTEX | PPOLL) {
                            break;
                        }
                    }
                }
            }
        }
        let other = data(READ, 0x4000_0003, [100, 0, 8]);
        assert_eq!(run(&program, &other).0, libc::SECCOMP_RET_KILL_PROCESS);
    }

    #[test]
    fn the_program_is_short_for_what_it_refuses() {
        let program = program(100..700);
        for number in (2..1024).filter(|n| ![FUTEX, RESTART, PPOLL].contains(n)) {
            let (action, steps) = run(&program, &data(number, X86_64, [0; 3]));
            assert_eq!(action, libc::SECCOMP_RET_TRAP);
            assert!(steps <= 8, "{number}: {steps}");
        }
    }
}
