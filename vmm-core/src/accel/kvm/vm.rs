//! Making a VM: memory slots, CPUID, sregs, doorbells.
#![allow(unsafe_code)]
// UNSAFETY: KVM_SET_USER_MEMORY_REGION hands host mappings to the kernel.

use super::idle::IdleSet;
use super::vcpu::KvmVcpu;
use super::{PORT_NOTIFY, System, errno, gate, monitor, paging};
use crate::accel::{AccelError, AccelInput, AccelVm, MakeVcpu, Parts, SandboxReport, Vcpu};
use crate::memory::{GuestMemory, Region};
use crate::vm::events::EventTable;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{IoEventAddress, VmFd};
use pv_abi::layout::{GATE_BASE, RAM_BASE, RAM_HIGH_BASE, VMM_BASE};
use std::collections::HashSet;
use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// Where Intel's real-mode helper pages go: in the MMIO hole, never mapped by the guest.
const TSS_PAGES: usize = 0xfffb_d000;

pub(super) struct KvmVm {
    fd: Arc<VmFd>,
    events: Arc<EventTable>,
    watched: Mutex<HashSet<u32>>,
    idle: Vec<Arc<IdleSet>>,
    host_tsc: bool,
    // Slots point into this memory, so it lives as long as the VM does.
    _memory: Arc<GuestMemory>,
}

pub(super) fn create(
    system: &'static System,
    input: AccelInput,
    meanwhile: &mut dyn FnMut() -> io::Result<()>,
) -> Result<Parts, AccelError> {
    let AccelInput {
        vcpus: count,
        memory,
        map,
        events,
        first,
    } = input;
    // Early: it starts while this one makes what it needs.
    let first = first().map_err(AccelError::host("the first vCPU's thread"))?;
    let fd = Arc::new(create_vm(system)?);
    if system.cpu_is_intel() {
        fd.set_tss_address(TSS_PAGES)
            .map_err(errno)
            .map_err(AccelError::host("KVM_SET_TSS_ADDR"))?;
    }
    let idle = (0..count)
        .map(|index| IdleSet::new(Arc::clone(&events), index).map(Arc::new))
        .collect::<io::Result<Vec<_>>>()
        .map_err(AccelError::host("epoll"))?;
    let slots = [(VMM_BASE, &memory.vmm), (RAM_BASE, &memory.ram_low)]
        .into_iter()
        .chain(memory.ram_high.as_ref().map(|r| (RAM_HIGH_BASE, r)))
        .chain(memory.arenas.iter().map(|a| (a.gpa, &*a.region)));
    for (slot, (gpa, region)) in (0u32..).zip(slots) {
        set_slot(&fd, slot, gpa, region).map_err(AccelError::host("KVM_SET_USER_MEMORY_REGION"))?;
    }
    // Not before: making a vCPU and setting slots wait for each other, far longer than either takes.
    let made = make_first(system, &first, &fd, &memory, idle.first());
    let write = |r: io::Result<()>| r.map_err(AccelError::host("write the monitor"));
    write(
        memory
            .vmm
            .write_bytes(GATE_BASE - VMM_BASE, &gate::bodies()),
    )?;
    write(monitor::build(&memory.vmm, count))?;
    let monitor_len = monitor::len(count);
    write(paging::build(
        &memory.vmm,
        &map,
        monitor_len,
        monitor::STUBS,
    ))?;
    meanwhile().map_err(AccelError::host("load the guest"))?;
    let mut vcpus: Vec<Box<dyn Vcpu>> = Vec::new();
    let mut host_tsc = true;
    for (index, set) in (0..).zip(&idle).skip(1) {
        let (memory, set) = (Arc::clone(&memory), Arc::clone(set));
        let vcpu = KvmVcpu::new(system, &fd, index, memory, set)?;
        host_tsc &= vcpu.shows_host_tsc();
        vcpus.push(Box::new(vcpu));
    }
    host_tsc &= made.recv().unwrap_or_else(|_| {
        let ended = io::Error::other("its thread ended");
        Err(AccelError::host("make the first vCPU")(ended))
    })?;
    let vm = KvmVm {
        fd,
        events,
        watched: Mutex::default(),
        idle,
        host_tsc,
        _memory: memory,
    };
    Ok((Arc::new(vm), vcpus))
}

/// Lets the first vCPU's thread make its vCPU; what is received says how that
/// went, and whether the vCPU's TSC is the host's.
///
/// A vCPU costs about as much as all the rest of a VM, and is best made where it will run.
fn make_first(
    system: &'static System,
    first: &Sender<MakeVcpu>,
    fd: &Arc<VmFd>,
    memory: &Arc<GuestMemory>,
    idle: Option<&Arc<IdleSet>>,
) -> Receiver<Result<bool, AccelError>> {
    let (sender, made) = channel();
    let (fd, memory, set) = (Arc::clone(fd), Arc::clone(memory), idle.cloned());
    let make = move || {
        let vcpu = KvmVcpu::new(system, &fd, 0, memory, set?);
        // Before anybody hears of it, so that who drops the VM drops the last of it.
        drop(fd);
        let (vcpu, made) = match vcpu {
            Ok(vcpu) => {
                let made = Ok(vcpu.shows_host_tsc());
                (Some(Box::new(vcpu) as Box<dyn Vcpu>), made)
            }
            Err(error) => (None, Err(error)),
        };
        let _ = sender.send(made);
        vcpu
    };
    // A thread that is gone cannot be told, and does not answer either.
    let _ = first.send(Box::new(make));
    made
}

/// `KVM_CREATE_VM` is interrupted by signals that have nothing to do with it.
fn create_vm(system: &System) -> Result<VmFd, AccelError> {
    loop {
        match system.kvm.create_vm() {
            Err(e) if e.errno() == libc::EINTR => continue,
            other => {
                return other
                    .map_err(errno)
                    .map_err(AccelError::host("KVM_CREATE_VM"));
            }
        }
    }
}

fn set_slot(fd: &VmFd, slot: u32, gpa: u64, region: &Region) -> io::Result<()> {
    let slot = kvm_userspace_memory_region {
        slot,
        flags: 0,
        guest_phys_addr: gpa,
        memory_size: region.len(),
        userspace_addr: region.host_address(),
    };
    // SAFETY: the mapping covers `memory_size` bytes and outlives the VM: the VM holds the memory.
    unsafe { fd.set_user_memory_region(slot) }.map_err(errno)
}

impl AccelVm for KvmVm {
    fn watch_doorbell(&self, doorbell: u32) -> io::Result<()> {
        let mut watched = self.watched.lock().unwrap_or_else(PoisonError::into_inner);
        if watched.contains(&doorbell) {
            return Ok(());
        }
        let Some(event) = self.events.doorbell(doorbell) else {
            return Ok(());
        };
        let address = IoEventAddress::Pio(u64::from(PORT_NOTIFY));
        self.fd
            .register_ioevent(event, &address, doorbell)
            .map_err(errno)?;
        watched.insert(doorbell);
        Ok(())
    }

    fn wait_for(&self, vcpu: u32, event: u32, on: bool) -> io::Result<()> {
        let set = usize::try_from(vcpu).ok().and_then(|i| self.idle.get(i));
        set.map_or(Ok(()), |set| set.set(event, on))
    }

    fn freeze(&self) -> io::Result<bool> {
        Ok(false)
    }

    fn thaw(&self) -> io::Result<()> {
        Ok(())
    }

    fn kill(&self) {}

    fn wait_dead(&self, _deadline: Option<Instant>) -> bool {
        true
    }

    fn shows_host_tsc(&self) -> bool {
        self.host_tsc
    }

    fn sandbox_report(&self) -> SandboxReport {
        SandboxReport {
            layers: vec!["kvm: guest at CPL 3 on its own page tables, no irqchip".into()],
            spare: false,
            missing: Vec::new(),
            claim: "isolation of a KVM guest; on a pagetable-based KVM, the host kernel's shadow \
                    paging and instruction emulation are exposed",
        }
    }
}
