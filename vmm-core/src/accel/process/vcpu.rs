//! One vCPU of a sandboxed guest: the VMM's half of the hand-off.
//!
//! The guest can write every word of its page at any time. So nothing is believed: the word is read
//! once and matched, the argument is checked by whoever uses it, and the only thing that ends a
//! wait for good is `gone`, which the guest cannot reach.

use super::faults::{Signal, blame};
use super::waiting::Waiting;
use super::{futex, handoff, page};
use crate::accel::{StartState, Vcpu, VcpuExit};
use crate::fault::{Registers, Violation};
use crate::memory::GuestMemory;
use pv_abi::layout::{VMM_BASE, vcpu_page};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

pub(super) struct ProcessVcpu {
    pub(super) index: u32,
    pub(super) memory: Arc<GuestMemory>,
    /// The process is dead.
    pub(super) gone: Arc<AtomicBool>,
    /// A hand-off waits for its answer.
    pub(super) owed: bool,
    pub(super) waiting: Waiting,
    /// It runs already.
    pub(super) started: Arc<AtomicBool>,
}

/// Lets a parked vCPU begin with these registers.
pub(super) fn start_guest(memory: &GuestMemory, vcpu: u32, state: &StartState) -> io::Result<()> {
    let at = |field: usize| vcpu_page(vcpu) - VMM_BASE + field as u64;
    let vmm = &memory.vmm;
    vmm.write(at(page::START_RIP), &state.rip)?;
    vmm.write(at(page::START_RSP), &state.rsp)?;
    vmm.write(at(page::START_RDI), &state.rdi)?;
    vmm.write(at(page::START_RSI), &state.rsi)?;
    release(vmm.word32(at(page::HANDOFF))?);
    Ok(())
}

fn release(word: &AtomicU32) {
    // Ordering: Release, so that the guest sees the answer when it sees the word.
    word.store(handoff::RUN, Ordering::Release);
    futex::wake(word);
}

impl ProcessVcpu {
    fn at(&self, field: usize) -> u64 {
        vcpu_page(self.index) - VMM_BASE + field as u64
    }

    fn release(&self) -> io::Result<()> {
        release(self.memory.vmm.word32(self.at(page::HANDOFF))?);
        Ok(())
    }

    /// A report that the guest's own fault handler left; the guest could have made it up.
    fn self_report(&self) -> io::Result<VcpuExit> {
        let [number, code, address, syscall]: [u64; 4] =
            self.memory.vmm.read(self.at(page::REPORT))?;
        // struct sigcontext: r8 to r15, rdi, rsi, rbp, rbx, rdx, rax, rcx, rsp, rip, eflags,
        // segments, err, trapno.
        let regs: [u64; 21] = self.memory.vmm.read(self.at(page::REPORT) + 32)?;
        let [
            r8,
            r9,
            r10,
            r11,
            r12,
            r13,
            r14,
            r15,
            rdi,
            rsi,
            rbp,
            rbx,
            rdx,
            rax,
            rcx,
            rsp,
            rip,
            rflags,
            _,
            error,
            _,
        ] = regs;
        let low = |v: u64| v as u32 as i32;
        let registers = Registers {
            rax,
            rbx,
            rcx,
            rdx,
            rsi,
            rdi,
            rbp,
            rsp,
            r8,
            r9,
            r10,
            r11,
            r12,
            r13,
            r14,
            r15,
            rip,
            rflags,
        };
        let signal = Signal {
            number: low(number),
            code: low(code),
            address,
            syscall: low(syscall),
            registers,
            error,
        };
        Ok(match blame(self.index, &signal, &self.memory, true) {
            Ok(fault) => VcpuExit::Fault(fault),
            Err(violation) => VcpuExit::Violation(violation),
        })
    }
}

impl Vcpu for ProcessVcpu {
    fn start(&mut self, state: &StartState) -> io::Result<()> {
        if self.started.load(Ordering::Acquire) {
            return Ok(());
        }
        Waiting::begin();
        start_guest(&self.memory, self.index, state)
    }

    fn run(&mut self) -> io::Result<VcpuExit> {
        if std::mem::take(&mut self.owed) {
            self.release()?;
        }
        let word = self.memory.vmm.word32(self.at(page::HANDOFF))?;
        loop {
            // Ordering: Acquire pairs with the guest's store: its frame is visible.
            let state = word.load(Ordering::Acquire);
            if self.gone.load(Ordering::Acquire) {
                return Ok(VcpuExit::Gone);
            }
            let argument = || {
                let arg = self.memory.vmm.word32(self.at(page::ARG));
                arg.map(|arg| arg.load(Ordering::Relaxed))
            };
            let exit = match state {
                handoff::CALL => {
                    let frame = argument()?;
                    let hint = self.memory.vmm.word32(self.at(page::CPU))?;
                    let hint = hint.load(Ordering::Relaxed);
                    self.waiting.called(hint);
                    VcpuExit::Call(frame)
                }
                handoff::DOORBELL => VcpuExit::Doorbell(argument()?),
                handoff::EXIT => VcpuExit::Exit(argument()?),
                handoff::FAULT => self.self_report()?,
                handoff::RUN | handoff::PARKED => {
                    if !self.waiting.changes(word, state) {
                        futex::wait(word, state, None);
                    }
                    continue;
                }
                word => VcpuExit::Violation(Violation::BadHandOff { word }),
            };
            self.owed = true;
            return Ok(exit);
        }
    }
}
