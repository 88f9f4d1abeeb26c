//! One vCPU: `KVM_RUN` and what comes out of it.
#![allow(unsafe_code)]
// UNSAFETY: KVM_SET_SIGNAL_MASK has no wrapper; the device attribute carries a user address.

use super::idle::IdleSet;
use super::monitor::trap_frame;
use super::sregs::{SYSCALL_SENTINEL, flat_sregs};
use super::{PORT_CALL, PORT_EXIT, PORT_FAULT, PORT_IDLE, PORT_NOTIFY, System, errno};
use crate::accel::{AccelError, StartState, Vcpu, VcpuExit};
use crate::fault::{FaultClass, GuestFault, Registers, Violation, classify};
use crate::memory::GuestMemory;
use kvm_bindings::{Msrs, kvm_device_attr, kvm_fpu, kvm_msr_entry, kvm_regs};
use kvm_ioctls::{VcpuFd, VmFd};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

const MSR_LSTAR: u32 = 0xc000_0082;
const KVM_VCPU_TSC_CTRL: u32 = 0;
const KVM_VCPU_TSC_OFFSET: u64 = 0;
const KVM_SET_DEVICE_ATTR: libc::c_ulong = 0x4018_aee1;
const KVM_SET_SIGNAL_MASK: libc::c_ulong = 0x4004_ae8b;

/// The real-time signal that takes a vCPU thread out of the guest.
///
/// Blocked in the library's threads and admitted only inside `KVM_RUN`, so it needs no handler and
/// none is installed.
pub(crate) fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN() + 7
}

pub(super) struct KvmVcpu {
    fd: VcpuFd,
    index: u32,
    memory: Arc<GuestMemory>,
    idle: Arc<IdleSet>,
    host_tsc: bool,
}

impl KvmVcpu {
    /// Whether this vCPU's TSC is the host's.
    pub(super) fn shows_host_tsc(&self) -> bool {
        self.host_tsc
    }

    pub(super) fn new(
        system: &System,
        vm: &VmFd,
        index: u32,
        memory: Arc<GuestMemory>,
        idle: Arc<IdleSet>,
    ) -> Result<KvmVcpu, AccelError> {
        let fd = vm
            .create_vcpu(u64::from(index))
            .map_err(errno)
            .map_err(AccelError::host("KVM_CREATE_VCPU"))?;
        // CPUID first: it decides which CR4 bits KVM lets through.
        fd.set_cpuid2(&system.cpuid)
            .map_err(errno)
            .map_err(AccelError::host("KVM_SET_CPUID2"))?;
        let step = AccelError::host("KVM_GET_SREGS");
        let host = fd.get_sregs().map_err(errno).map_err(step)?;
        let step = AccelError::host("KVM_SET_SREGS");
        fd.set_sregs(&flat_sregs(host, index, system.cpu_is_amd()))
            .map_err(errno)
            .map_err(step)?;
        let step = AccelError::host("KVM_SET_FPU");
        let fpu = kvm_fpu {
            fcw: 0x37f,
            mxcsr: 0x1f80,
            ..Default::default()
        };
        fd.set_fpu(&fpu).map_err(errno).map_err(step)?;
        let mut vcpu = KvmVcpu {
            fd,
            index,
            memory,
            idle,
            host_tsc: false,
        };
        vcpu.set_sentinel()
            .map_err(AccelError::host("KVM_SET_MSRS"))?;
        vcpu.host_tsc = vcpu.clear_tsc_offset();
        vcpu.admit_kick()
            .map_err(AccelError::host("KVM_SET_SIGNAL_MASK"))?;
        Ok(vcpu)
    }

    fn set_sentinel(&self) -> io::Result<()> {
        let entry = kvm_msr_entry {
            index: MSR_LSTAR,
            data: SYSCALL_SENTINEL,
            ..Default::default()
        };
        let msrs = Msrs::from_entries(&[entry]).map_err(|e| io::Error::other(format!("{e:?}")))?;
        self.fd.set_msrs(&msrs).map_err(errno)?;
        Ok(())
    }

    /// Makes the guest's TSC the host's; `false` where the host cannot. KVM's default is a TSC that
    /// begins with the VM.
    fn clear_tsc_offset(&self) -> bool {
        let offset = 0u64;
        let attribute = kvm_device_attr {
            group: KVM_VCPU_TSC_CTRL,
            attr: KVM_VCPU_TSC_OFFSET,
            addr: &raw const offset as u64,
            flags: 0,
        };
        // SAFETY: the ioctl reads the attribute, and eight bytes at the address in it.
        let r = unsafe {
            libc::ioctl(
                self.fd.as_raw_fd(),
                KVM_SET_DEVICE_ATTR,
                &raw const attribute,
            )
        };
        if r < 0 {
            let error = io::Error::last_os_error();
            tracing::debug!(%error, "the TSC offset cannot be set");
        }
        r >= 0
    }

    /// Lets the kick signal interrupt `KVM_RUN`, and only that.
    fn admit_kick(&self) -> io::Result<()> {
        #[repr(C)]
        struct SignalMask {
            len: u32,
            set: [u8; 8],
        }
        let blocked = !(1u64 << (kick_signal() - 1));
        let mask = SignalMask {
            len: 8,
            set: blocked.to_le_bytes(),
        };
        // SAFETY: the ioctl reads `len` and eight bytes from a structure that lives here.
        let r = unsafe { libc::ioctl(self.fd.as_raw_fd(), KVM_SET_SIGNAL_MASK, &raw const mask) };
        if r == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    fn registers(&self) -> io::Result<Registers> {
        let r = self.fd.get_regs().map_err(errno)?;
        Ok(Registers {
            rax: r.rax,
            rbx: r.rbx,
            rcx: r.rcx,
            rdx: r.rdx,
            rsi: r.rsi,
            rdi: r.rdi,
            rbp: r.rbp,
            rsp: r.rsp,
            r8: r.r8,
            r9: r.r9,
            r10: r.r10,
            r11: r.r11,
            r12: r.r12,
            r13: r.r13,
            r14: r.r14,
            r15: r.r15,
            rip: r.rip,
            rflags: r.rflags,
        })
    }

    /// Reads the frame that an exception stub left.
    fn fault(&self) -> io::Result<VcpuExit> {
        let mut registers = self.registers()?;
        let Some(frame) = trap_frame(&self.memory.vmm, self.index, registers.rsp)? else {
            return Ok(VcpuExit::Violation(Violation::BadPort { port: PORT_FAULT }));
        };
        registers.rax = frame.rax;
        registers.rdx = frame.rdx;
        registers.rip = frame.rip;
        registers.rflags = frame.rflags;
        registers.rsp = frame.rsp;
        let vector = u8::try_from(frame.vector).unwrap_or(u8::MAX);
        let cr2 = self.fd.get_sregs().map_err(errno)?.cr2;
        let syscall = vector == 14 && frame.rip == SYSCALL_SENTINEL;
        // The error code names an IDT gate, and no external event: an `INT n` whose gate is not the
        // guest's. Where KVM had to inject it anew on a CPU without NRIPS, RIP is already past it.
        let int_n = vector == 13 && frame.error & 0b11 == 0b10;
        let class = if syscall || int_n {
            FaultClass::Forbidden
        } else {
            classify(vector, &self.code_at(frame.rip))
        };
        Ok(VcpuExit::Fault(Box::new(GuestFault {
            vcpu: self.index,
            class,
            vector,
            error: frame.error,
            rip: frame.rip,
            address: (vector == 14).then_some(cr2),
            registers,
            self_reported: false,
        })))
    }

    /// Up to 15 bytes of private RAM at an address; what cannot be read is left out.
    fn code_at(&self, rip: u64) -> Vec<u8> {
        let mut code = Vec::new();
        for at in (0..15).map_while(|i| rip.checked_add(i)) {
            let mut byte = [0];
            match self.memory.private(at, 1) {
                Some((ram, offset)) if ram.read_bytes(offset, &mut byte).is_ok() => {
                    code.extend_from_slice(&byte);
                }
                _ => break,
            }
        }
        code
    }

    /// The CPU, or KVM's emulator, gave up.
    fn gave_up(&self, class: FaultClass) -> io::Result<VcpuExit> {
        let registers = self.registers()?;
        Ok(VcpuExit::Fault(Box::new(GuestFault {
            vcpu: self.index,
            class,
            vector: 8,
            error: 0,
            rip: registers.rip,
            address: None,
            registers,
            self_reported: false,
        })))
    }
}

/// Takes the pending kick signals off this thread; they are blocked, so nothing else does.
fn drain_kicks() {
    let now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the set is made before it is read, and both live here. The loop ends: real-time
    // signals queue, and each turn takes one.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, kick_signal());
        while libc::sigtimedwait(&raw const set, std::ptr::null_mut(), &raw const now) > 0 {}
    }
}

impl Vcpu for KvmVcpu {
    fn start(&mut self, state: &StartState) -> io::Result<()> {
        let regs = kvm_regs {
            rip: state.rip,
            rsp: state.rsp,
            rdi: state.rdi,
            rsi: state.rsi,
            rflags: 2,
            ..Default::default()
        };
        self.fd.set_regs(&regs).map_err(errno)
    }

    fn run(&mut self) -> io::Result<VcpuExit> {
        use kvm_ioctls::VcpuExit as Exit;
        let exit = match self.fd.run() {
            Ok(exit) => exit,
            Err(e) if e.errno() == libc::EINTR || e.errno() == libc::EAGAIN => {
                drain_kicks();
                return Ok(VcpuExit::Interrupted);
            }
            // The host lost the memory behind a page that the guest touched.
            Err(e) if e.errno() == libc::EFAULT || e.errno() == libc::EHWPOISON => {
                return self.gave_up(FaultClass::Memory);
            }
            Err(e) => return Err(errno(e)),
        };
        Ok(match exit {
            Exit::IoOut(port, data) => match (port, <[u8; 4]>::try_from(data)) {
                (PORT_CALL, Ok(value)) => VcpuExit::Call(u32::from_le_bytes(value)),
                (PORT_NOTIFY, Ok(value)) => VcpuExit::Doorbell(u32::from_le_bytes(value)),
                (PORT_IDLE, Ok(_)) => {
                    self.idle.wait(&self.memory)?;
                    VcpuExit::Idle
                }
                (PORT_EXIT, Ok(value)) => VcpuExit::Exit(u32::from_le_bytes(value)),
                (PORT_FAULT, _) => return self.fault(),
                _ => VcpuExit::Violation(Violation::BadPort { port }),
            },
            Exit::IoIn(port, _) => VcpuExit::Violation(Violation::BadPort { port }),
            Exit::MmioRead(gpa, _) | Exit::MmioWrite(gpa, _) => {
                VcpuExit::Violation(Violation::BadPhysicalAddress { gpa })
            }
            Exit::Intr => VcpuExit::Interrupted,
            Exit::Shutdown => return self.gave_up(FaultClass::Shutdown),
            Exit::InternalError | Exit::FailEntry(..) | Exit::Hlt => {
                return self.gave_up(FaultClass::Other);
            }
            other => return Err(io::Error::other(format!("unexpected KVM exit {other:?}"))),
        })
    }
}
