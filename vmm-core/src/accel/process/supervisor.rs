//! The thread that starts a sandboxed guest, watches it, and blames it.
//!
//! It traces the guest's threads (seized, killed with the tracer), so that a fault's registers come
//! from the kernel and cannot be forged. Where ptrace is forbidden it only waits, and faults are
//! reported by the guest's own process. It waits with `__WNOTHREAD`, so it sees no child but its own.
//! The embedder's other threads could see this one, though: an embedder must not wait for *any*
//! child (`waitpid(-1)`) without that flag, because it would take the guest's stops away.
#![allow(unsafe_code)]
// UNSAFETY: ptrace and waitpid.

use super::faults::{Signal, blame};
use super::stub::message;
use super::watch::Watch;
use super::{spawn, wire};
use crate::fault::{Registers, Violation};
use crate::pidfd::signal;
use pv_abi::layout::vcpu_page;
use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;

/// Runs in the supervisor thread, from the process's first moment to its last.
pub(super) fn run(socket: OwnedFd, tell: Arc<UnixDatagram>, trace: bool, watch: &Watch) {
    let _over = Over(watch);
    let child = spawn::start(&socket);
    // The process has its own: who talks to a dead one shall notice.
    drop(socket);
    let child = match child {
        Ok(child) => child,
        Err(error) => return watch.not_started(error),
    };
    let pidfd = Arc::new(child.pidfd);
    let mut tracer = Tracer {
        pid: child.pid,
        pidfd: Arc::clone(&pidfd),
        threads: HashMap::new(),
        traced: false,
        sent: false,
    };
    if trace {
        match tracer.seize() {
            Ok(()) => tracer.traced = true,
            Err(error) => tracing::info!(%error, "ptrace is not to be had: faults self-reported"),
        }
    }
    // A process that is gone already is noticed below.
    let _ = tell.send(&message(wire::WATCHED, u32::from(!tracer.traced)));
    drop(tell);
    watch.started(pidfd, tracer.traced);
    let end = tracer.watch(watch);
    watch.end(end);
}

/// Says that there is no process where this thread ends without having said anything.
struct Over<'a>(&'a Watch);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0
            .not_started(io::Error::other("the supervisor thread ended"));
    }
}

struct Tracer {
    pid: libc::pid_t,
    pidfd: Arc<OwnedFd>,
    /// Threads, and whether each is in a group stop.
    threads: HashMap<libc::pid_t, bool>,
    traced: bool,
    /// Somebody has sent it a signal that faults have, and it gets that.
    sent: bool,
}

impl Tracer {
    fn seize(&mut self) -> io::Result<()> {
        let options = libc::PTRACE_O_EXITKILL | libc::PTRACE_O_TRACECLONE;
        self.threads.insert(self.pid, false);
        // SAFETY: seizing our own child; the fourth argument is a bit mask.
        let r = unsafe { libc::ptrace(libc::PTRACE_SEIZE, self.pid, 0, options) };
        if r == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// Waits until the process has ended; says how.
    fn watch(&mut self, watch: &Watch) -> Violation {
        loop {
            let mut status = 0;
            let mut flags = libc::__WALL | libc::__WNOTHREAD | libc::WUNTRACED;
            if !self.traced {
                // A tracer is told by a stop of its own.
                flags |= libc::WCONTINUED;
            }
            // SAFETY: waits for children and tracees of this thread only.
            let tid = unsafe { libc::waitpid(-1, &raw mut status, flags) };
            if tid < 0 {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Violation::ProcessEnded {
                    how: format!("waitpid: {error}"),
                };
            }
            if libc::WIFEXITED(status) || libc::WIFSIGNALED(status) {
                self.threads.remove(&tid);
                if tid == self.pid {
                    return how_ended(status, self.sent);
                }
                self.note_stops(watch);
            } else if libc::WIFSTOPPED(status) {
                if self.traced {
                    self.stopped(tid, status, watch);
                } else if watch.armed().is_some() {
                    watch.note_stopped(true);
                } else {
                    self.end();
                }
            } else if libc::WIFCONTINUED(status) {
                watch.note_stopped(false);
            }
        }
    }

    fn stopped(&mut self, tid: libc::pid_t, status: libc::c_int, watch: &Watch) {
        let signal = libc::WSTOPSIG(status);
        let event = status >> 16;
        self.threads.entry(tid).or_insert(false);
        if event == libc::PTRACE_EVENT_STOP
            && matches!(
                signal,
                libc::SIGSTOP | libc::SIGTSTP | libc::SIGTTIN | libc::SIGTTOU
            )
        {
            if watch.armed().is_none() {
                // Nobody of ours wants it to stop before there is a guest in it.
                return self.end();
            }
            self.threads.insert(tid, true);
            self.request(libc::PTRACE_LISTEN, tid, 0);
            self.note_stops(watch);
            return;
        }
        self.threads.insert(tid, false);
        self.note_stops(watch);
        if event != 0 {
            self.request(libc::PTRACE_CONT, tid, 0);
            return;
        }
        let fatal = [
            libc::SIGSEGV,
            libc::SIGBUS,
            libc::SIGILL,
            libc::SIGFPE,
            libc::SIGTRAP,
            libc::SIGSYS,
        ];
        if !fatal.contains(&signal) {
            self.request(libc::PTRACE_CONT, tid, signal);
            return;
        }
        match self.describe(tid) {
            // Sent by somebody, not raised by an instruction.
            Some(found) if found.code <= 0 => {
                self.sent = true;
                self.request(libc::PTRACE_CONT, tid, signal);
            }
            found => {
                if let Some(guest) = watch.armed() {
                    let signal = found.unwrap_or(Signal {
                        number: signal,
                        ..Default::default()
                    });
                    let vcpu = self.vcpu_of(tid, guest.vcpus);
                    match blame(vcpu, &signal, &guest.memory, false) {
                        Ok(fault) => guest.tell(|reporter| reporter.fault(fault)),
                        Err(violation) => guest.tell(|reporter| reporter.violation(violation)),
                    }
                }
                self.end();
            }
        }
    }

    /// Kills the process; by its pidfd, because its number may be somebody else's by now.
    fn end(&self) {
        // One that is dead already is no news; and a subscriber, which may panic, is kept from the thread
        // that everybody else waits for.
        let _ = signal(&self.pidfd, libc::SIGKILL);
    }

    /// Says whether all threads are in a stop, for who waits for that.
    fn note_stops(&self, watch: &Watch) {
        watch.note_stopped(self.threads.values().all(|stopped| *stopped));
    }

    fn request(&self, request: libc::c_uint, tid: libc::pid_t, data: libc::c_int) {
        // SAFETY: on a stopped tracee. It may be dying, in which case there is nothing to do.
        unsafe { libc::ptrace(request, tid, 0, libc::c_long::from(data)) };
    }

    /// Signal and registers of a stopped thread, as the kernel has them.
    fn describe(&self, tid: libc::pid_t) -> Option<Signal> {
        // SAFETY: both structures are written by the kernel before they are read.
        unsafe {
            let mut info: libc::siginfo_t = std::mem::zeroed();
            let mut regs: libc::user_regs_struct = std::mem::zeroed();
            if libc::ptrace(libc::PTRACE_GETSIGINFO, tid, 0, &raw mut info) != 0
                || libc::ptrace(libc::PTRACE_GETREGS, tid, 0, &raw mut regs) != 0
            {
                return None;
            }
            // siginfo: si_addr (or si_call_addr) at 16, si_syscall at 24.
            let bytes = (&raw const info).cast::<u8>();
            Some(Signal {
                number: info.si_signo,
                code: info.si_code,
                address: bytes.add(16).cast::<u64>().read_unaligned(),
                syscall: bytes.add(24).cast::<i32>().read_unaligned(),
                registers: Registers {
                    rax: regs.rax,
                    rbx: regs.rbx,
                    rcx: regs.rcx,
                    rdx: regs.rdx,
                    rsi: regs.rsi,
                    rdi: regs.rdi,
                    rbp: regs.rbp,
                    rsp: regs.rsp,
                    r8: regs.r8,
                    r9: regs.r9,
                    r10: regs.r10,
                    r11: regs.r11,
                    r12: regs.r12,
                    r13: regs.r13,
                    r14: regs.r14,
                    r15: regs.r15,
                    rip: regs.rip,
                    rflags: regs.eflags,
                },
                error: 0,
            })
        }
    }

    /// The vCPU that a thread is: its GS base is that vCPU's page unless the guest changed it.
    fn vcpu_of(&self, tid: libc::pid_t, vcpus: u32) -> u32 {
        // SAFETY: written by the kernel before it is read.
        let gs = unsafe {
            let mut regs: libc::user_regs_struct = std::mem::zeroed();
            if libc::ptrace(libc::PTRACE_GETREGS, tid, 0, &raw mut regs) != 0 {
                return 0;
            }
            regs.gs_base
        };
        (0..vcpus).find(|vcpu| vcpu_page(*vcpu) == gs).unwrap_or(0)
    }
}

/// `sent`: somebody has sent it a signal that faults have.
fn how_ended(status: libc::c_int, sent: bool) -> Violation {
    if libc::WIFEXITED(status) {
        let how = format!("exit code {}", libc::WEXITSTATUS(status));
        return Violation::ProcessEnded { how };
    }
    match libc::WTERMSIG(status) {
        // The filter kills at once what comes through another architecture's entry (`INT 0x80`).
        libc::SIGSYS if !sent => Violation::SystemCall { number: u32::MAX },
        signal => Violation::ProcessEnded {
            how: format!("signal {signal}"),
        },
    }
}
