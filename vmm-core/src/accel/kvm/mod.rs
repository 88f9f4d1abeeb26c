//! The kvm accel: hardware or pagetable-based KVM behind `/dev/kvm`.
//!
//! No irqchip; the guest runs at CPL 3 on page tables that the VMM built ([`paging`]), over a
//! monitor page that turns exceptions into exits ([`monitor`]). Gate bodies are single `OUT`
//! instructions to ports that the TSS bitmap opens ([`gate`]). RIP and RFLAGS read back after an
//! I/O exit differ between hosts and are never used to go on.

mod gate;
mod idle;
mod monitor;
mod paging;
pub(crate) mod sregs;
mod vcpu;
mod vm;

pub(crate) use vcpu::kick_signal;

use super::{AccelError, AccelInput, Parts};
use kvm_bindings::{CpuId, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm};
use std::io;
use std::sync::OnceLock;

/// First of the ports that the guest may write; four bytes each.
pub(crate) const PORT_CALL: u16 = 0x500;
pub(crate) const PORT_NOTIFY: u16 = 0x504;
pub(crate) const PORT_IDLE: u16 = 0x508;
pub(crate) const PORT_EXIT: u16 = 0x50c;
/// Written by the monitor's exception stubs, at CPL 0; not open to the guest.
pub(crate) const PORT_FAULT: u16 = 0x510;

/// The system handle and the CPUID table, opened once per process.
struct System {
    kvm: Kvm,
    cpuid: CpuId,
}

impl System {
    /// Whether the CPU's twelve letters are one of these, by their first four (CPUID 0, EBX).
    fn vendor_is(&self, starts: &[&[u8; 4]]) -> bool {
        let leaf = self.cpuid.as_slice().iter().find(|e| e.function == 0);
        leaf.is_some_and(|l| starts.iter().any(|s| l.ebx == u32::from_le_bytes(**s)))
    }

    fn cpu_is_intel(&self) -> bool {
        self.vendor_is(&[b"Genu"])
    }

    /// AMD, or Hygon, whose CPUs are of AMD's line.
    fn cpu_is_amd(&self) -> bool {
        self.vendor_is(&[b"Auth", b"Hygo"])
    }
}

fn system() -> Result<&'static System, AccelError> {
    static SYSTEM: OnceLock<System> = OnceLock::new();
    if let Some(system) = SYSTEM.get() {
        return Ok(system);
    }
    let kvm = Kvm::new().map_err(|e| AccelError::NoKvm { source: errno(e) })?;
    if u32::try_from(kvm.get_api_version()) != Ok(KVM_API_VERSION) {
        let what = "version 12 of its interface";
        return Err(AccelError::KvmLacks { what });
    }
    for (cap, what) in [
        (Cap::UserMemory, "user memory regions"),
        (Cap::Ioeventfd, "ioeventfd"),
    ] {
        if !kvm.check_extension(cap) {
            return Err(AccelError::KvmLacks { what });
        }
    }
    let cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(errno)
        .map_err(AccelError::host("KVM_GET_SUPPORTED_CPUID"))?;
    Ok(SYSTEM.get_or_init(|| System { kvm, cpuid }))
}

pub(super) fn check() -> Result<(), AccelError> {
    system().map(|_| ())
}

pub(super) fn max_vcpus() -> Result<u32, AccelError> {
    Ok(u32::try_from(system()?.kvm.get_max_vcpus()).unwrap_or(u32::MAX))
}

/// Makes it; `meanwhile` is done while the first vCPU's thread makes that vCPU.
pub(crate) fn create(
    input: AccelInput,
    meanwhile: &mut dyn FnMut() -> io::Result<()>,
) -> Result<Parts, AccelError> {
    vm::create(system()?, input, meanwhile)
}

fn errno(error: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}
