//! The floor on kvm: a VM made with nothing but the ioctls, and a guest of a few bytes.
//!
//! The same memory sizes and the same kind of start state as the library's: long mode, CPL 3, a TSS
//! whose bitmap opens the ports. Nothing is checked, counted or cleaned up but by closing it.
#![allow(unsafe_code)]
// UNSAFETY: guest memory is mapped by hand, which is what is to be measured.

use anyhow::{Context, Result, bail};
use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment, kvm_sregs, kvm_userspace_memory_region,
};
use kvm_ioctls::{IoEventAddress, Kvm, VcpuExit, VcpuFd, VmFd};
use pv_abi::layout::{GATE_BASE, MONITOR_BASE, PAGE_TABLES_BASE, RAM_BASE, VMM_BASE, VMM_LEN};
use vmm_sys_util::eventfd::EventFd;

/// Written for a call; leaves `KVM_RUN`.
const PORT_CALL: u16 = 0x500;
/// Answered by an ioeventfd.
const PORT_NOTIFY: u16 = 0x504;

/// The system handle and the CPUID table; opened once, as the library does.
pub(crate) struct System {
    kvm: Kvm,
    cpuid: CpuId,
}

impl System {
    pub(crate) fn open() -> Result<System> {
        let kvm = Kvm::new().context("/dev/kvm")?;
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .context("KVM_GET_SUPPORTED_CPUID")?;
        Ok(System { kvm, cpuid })
    }
}

/// Anonymous memory that is unmapped when dropped.
pub(crate) struct Mapping {
    at: *mut u8,
    len: usize,
}

// SAFETY: plain memory, whose only other user is the guest.
unsafe impl Send for Mapping {}

impl Mapping {
    fn new(len: u64) -> Result<Mapping> {
        let len = usize::try_from(len)?;
        // SAFETY: a fresh mapping.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error()).context("mmap");
        }
        let at = at.cast();
        Ok(Mapping { at, len })
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let offset = usize::try_from(offset)?;
        if offset
            .checked_add(bytes.len())
            .is_none_or(|end| end > self.len)
        {
            bail!("outside the mapping");
        }
        // SAFETY: inside the mapping, which nobody else uses before the guest runs.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.at.add(offset), bytes.len()) };
        Ok(())
    }

    /// Bytes of it that are resident, as the kernel counts them.
    pub(crate) fn resident(&self) -> u64 {
        let mut pages = vec![0u8; self.len.div_ceil(4096)];
        // SAFETY: one byte for each page of a mapping that lives.
        let r = unsafe { libc::mincore(self.at.cast(), self.len, pages.as_mut_ptr()) };
        if r != 0 {
            return 0;
        }
        pages.iter().filter(|page| **page & 1 != 0).count() as u64 * 4096
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: our own mapping; the VM that used it is closed before it.
        unsafe { libc::munmap(self.at.cast(), self.len) };
    }
}

/// A bare VM with one vCPU. Dropped in this order: the memory last.
pub(crate) struct RawVm {
    vcpu: VcpuFd,
    vm: VmFd,
    pub(crate) ram: Mapping,
    _control: Mapping,
}

/// What the few bytes of guest do.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Code {
    /// `out` to the call port, for ever.
    Calls,
    /// `out` to the ioeventfd's port as often as RCX says, then one call.
    Notify,
}

impl Code {
    const ALL: [Code; 2] = [Code::Calls, Code::Notify];

    fn bytes(self) -> &'static [u8] {
        match self {
            // mov eax, edi; mov edx, 0x500; 1: out dx, eax; jmp 1b
            Code::Calls => &[0x89, 0xf8, 0xba, 0x00, 0x05, 0, 0, 0xef, 0xeb, 0xfd],
            // mov eax, edi; mov edx, 0x504; 1: out dx, eax; dec rcx; jnz 1b;
            // mov edx, 0x500; 2: out dx, eax; jmp 2b
            Code::Notify => &[
                0x89, 0xf8, 0xba, 0x04, 0x05, 0, 0, 0xef, 0x48, 0xff, 0xc9, 0x75, 0xfa, 0xba, 0x00,
                0x05, 0, 0, 0xef, 0xeb, 0xfd,
            ],
        }
    }

    fn address(self) -> u64 {
        GATE_BASE + 256 * self as u64
    }
}

impl RawVm {
    /// Opens, maps, sets: everything up to the first `KVM_RUN`.
    pub(crate) fn new(system: &System, memory: u64) -> Result<RawVm> {
        let control = Mapping::new(VMM_LEN)?;
        let ram = Mapping::new(memory)?;
        let vm = system.kvm.create_vm().context("KVM_CREATE_VM")?;
        for (slot, gpa, mapping) in [(0, VMM_BASE, &control), (1, RAM_BASE, &ram)] {
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: gpa,
                memory_size: mapping.len as u64,
                userspace_addr: mapping.at as u64,
            };
            // SAFETY: the mapping outlives the VM: the fields are dropped in order.
            unsafe { vm.set_user_memory_region(region) }.context("memory slot")?;
        }
        for code in Code::ALL {
            control.write(code.address() - VMM_BASE, code.bytes())?;
        }
        control.write(TSS - VMM_BASE, &tss())?;
        for (offset, entries) in page_tables() {
            for (slot, entry) in entries {
                let at = PAGE_TABLES_BASE - VMM_BASE + offset + slot * 8;
                control.write(at, &entry.to_le_bytes())?;
            }
        }
        let vcpu = vm.create_vcpu(0).context("KVM_CREATE_VCPU")?;
        vcpu.set_cpuid2(&system.cpuid).context("KVM_SET_CPUID2")?;
        let host = vcpu.get_sregs().context("KVM_GET_SREGS")?;
        vcpu.set_sregs(&sregs(host)).context("KVM_SET_SREGS")?;
        let mut raw = RawVm {
            vcpu,
            vm,
            ram,
            _control: control,
        };
        raw.enter(Code::Calls, 0, 0)?;
        Ok(raw)
    }

    /// Puts the vCPU at the start of this code.
    pub(crate) fn enter(&mut self, code: Code, count: u64, value: u32) -> Result<()> {
        let regs = kvm_regs {
            rip: code.address(),
            rcx: count,
            rdi: value.into(),
            rflags: 2,
            ..Default::default()
        };
        self.vcpu.set_regs(&regs).context("KVM_SET_REGS")
    }

    /// Runs to the next call.
    pub(crate) fn run(&mut self) -> Result<()> {
        match self.vcpu.run().context("KVM_RUN")? {
            VcpuExit::IoOut(PORT_CALL, _) => Ok(()),
            other => bail!("unexpected exit {other:?}"),
        }
    }

    /// Lets this eventfd answer doorbell `value`.
    pub(crate) fn doorbell(&self, event: &EventFd, value: u32) -> Result<()> {
        let address = IoEventAddress::Pio(u64::from(PORT_NOTIFY));
        self.vm
            .register_ioevent(event, &address, value)
            .context("KVM_IOEVENTFD")
    }
}

/// Where the TSS lies.
const TSS: u64 = MONITOR_BASE + 0x4000;
/// Bytes of a 64-bit TSS without its bitmap.
const TSS_SIZE: usize = 104;
/// Bytes of bitmap, the one of ones at its end included.
const BITMAP_LEN: usize = 0x510 / 8 + 1;

fn tss() -> Vec<u8> {
    let mut tss = vec![0u8; TSS_SIZE + BITMAP_LEN];
    let at = (TSS_SIZE as u16).to_le_bytes();
    for (byte, port) in tss.iter_mut().skip(TSS_SIZE).zip((0..).step_by(8)) {
        *byte = if (0x500..0x510).contains(&port) {
            0
        } else {
            0xff
        };
    }
    for (byte, value) in tss.iter_mut().skip(102).zip(at) {
        *byte = value;
    }
    tss
}

/// Page tables of the same depth as the library's: 4 KiB pages for the TSS (CPL 0) and the code
/// (CPL 3), a large one for the RAM.
fn page_tables() -> [(u64, Vec<(u64, u64)>); 5] {
    const TABLE: u64 = 0x27; // present, writable, user, accessed
    const SYSTEM: u64 = 0x63; // present, writable, accessed, dirty
    const CODE: u64 = 0x65; // present, user, accessed, dirty
    const LARGE: u64 = 0xe7; // present, writable, user, accessed, dirty, large
    let table = |index: u64| (PAGE_TABLES_BASE + index * 0x1000) | TABLE;
    let page = |gpa: u64, flags| (gpa >> 12 & 511, gpa | flags);
    [
        (0, vec![(0, table(1))]),
        (0x1000, vec![(0, table(2))]),
        (
            0x2000,
            vec![
                (MONITOR_BASE >> 21, table(3)),
                (GATE_BASE >> 21, table(4)),
                (RAM_BASE >> 21, RAM_BASE | LARGE),
            ],
        ),
        (0x3000, vec![page(MONITOR_BASE, SYSTEM), page(TSS, SYSTEM)]),
        (0x4000, vec![page(GATE_BASE, CODE)]),
    ]
}

fn sregs(host: kvm_sregs) -> kvm_sregs {
    let code = kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: 0x33,
        type_: 0xb,
        present: 1,
        dpl: 3,
        db: 0,
        s: 1,
        l: 1,
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    };
    let data = kvm_segment {
        selector: 0x2b,
        type_: 3,
        db: 1,
        l: 0,
        ..code
    };
    let mut sregs = host;
    sregs.cs = code;
    for segment in [
        &mut sregs.ss,
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
    ] {
        *segment = data;
    }
    sregs.tr = kvm_segment {
        base: TSS,
        limit: (TSS_SIZE + BITMAP_LEN) as u32 - 1,
        selector: 0x40,
        dpl: 0,
        s: 0,
        l: 0,
        g: 0,
        ..code
    };
    sregs.ldt = kvm_segment {
        unusable: 1,
        type_: 2,
        ..Default::default()
    };
    sregs.gdt.base = MONITOR_BASE;
    sregs.gdt.limit = 0x4f;
    sregs.idt.base = MONITOR_BASE;
    sregs.idt.limit = 0x1ff;
    sregs.cr0 = 1 | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 16 | 1 << 18 | 1 << 31;
    sregs.cr3 = PAGE_TABLES_BASE;
    sregs.cr4 = 1 << 5 | 1 << 9 | 1 << 10 | 1 << 16;
    sregs.efer = 1 << 8 | 1 << 10 | 1 << 11;
    sregs
}
