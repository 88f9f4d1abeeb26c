//! Making a sandboxed VM of a stub: gate, filter, set-up.

use super::spares::Spares;
use super::stub::{Stub, setup_bytes};
use super::vcpu::{ProcessVcpu, start_guest};
use super::waiting::Waiting;
use super::watch::Guest;
use super::wire::{self, MAX_MAPS, Map, Setup};
use super::{filter, gate, handoff, page};
use crate::accel::{
    AccelError, AccelInput, AccelVm, Parts, Reporter, SandboxReport, StartState, Vcpu,
};
use crate::image::Access;
use crate::limits::VCPU_KICK_TIMEOUT;
use crate::memory::map::Source;
use crate::memory::{GuestMemory, Region};
use crate::pidfd;
use crate::vm::events::{EventTable, signal};
use pv_abi::layout::{
    GATE_BASE, GUEST_PHYS_END, RAM_BASE, RAM_HIGH_BASE, VCPU_PAGES_BASE, VCPU_PAGES_LEN, VMM_BASE,
    vcpu_page,
};
use pv_abi::limits::{MAX_EVENTS, MAX_POLL};
use pv_abi::vcpu::PollEntry;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

const _: () = assert!(MAX_EVENTS as usize <= wire::HOLE_WORDS * 64);
/// First address past user space on x86-64 with four-level paging.
const USER_END: u64 = 0x7fff_ffff_f000;
/// Stack for each vCPU's fault handler; the largest signal frame (AVX-512 state) fits.
const FAULT_STACK: u64 = 16 << 10;
/// Where those stacks lie: behind the vCPU pages, mapped only when they are used.
const FAULT_STACKS: u64 = VCPU_PAGES_BASE + VCPU_PAGES_LEN;

pub(super) struct ProcessVm {
    pidfd: Arc<OwnedFd>,
    memory: Arc<GuestMemory>,
    events: Arc<EventTable>,
    calls_base: i32,
    /// By vCPU: the events it waits for, by their place in the poll set.
    waiting: Mutex<Vec<Vec<Option<u32>>>>,
    /// The first vCPU was let go without its thread.
    first_started: Arc<AtomicBool>,
    /// Dropped with the VM: that ends the process, and waits for it.
    stub: Stub,
}

/// Descriptors of the guest's process, in order.
struct Descriptors {
    list: Vec<RawFd>,
    /// The first that stays open; by event.
    kicks: usize,
    calls: usize,
    wakes: usize,
    /// Events without a doorbell.
    holes: [u64; wire::HOLE_WORDS],
}

/// Takes a spare stub, or starts one: the first thing, because it needs nothing of the VM.
///
/// Spare ones are traced where that works, so a VM that does not want that starts its own.
pub(crate) fn begin(spares: Option<&Spares>, self_report: bool) -> Result<Stub, AccelError> {
    let spare = spares.filter(|_| !self_report).and_then(Spares::take);
    spare.map_or_else(|| start(!self_report), Ok)
}

fn start(trace: bool) -> Result<Stub, AccelError> {
    Stub::start(trace, || ()).map_err(AccelError::host("the supervisor thread"))
}

/// Makes it; `meanwhile` is done while the stub becomes a guest, which needs nothing of this thread.
///
/// A spare stub that fails before its guest ran is replaced by one that is started now.
pub(crate) fn create(
    input: AccelInput,
    reporter: &Arc<dyn Reporter>,
    stub: Stub,
    meanwhile: &mut dyn FnMut() -> io::Result<()>,
) -> Result<Parts, AccelError> {
    let step = AccelError::host;
    let AccelInput {
        vcpus,
        memory,
        map,
        events,
        first,
    } = input;
    let mut maps = plan_maps(&map.mappings, &memory)?;
    // The last map, which the stub leaves out when faults come through ptrace; whether they do is
    // known only once it has been tried.
    maps.push(Map {
        gpa: FAULT_STACKS,
        len: u64::from(vcpus) * FAULT_STACK,
        offset: FAULT_STACKS - VMM_BASE,
        fd: 0,
        populate: 0,
        prot: prot(Access::ReadWrite),
    });
    let descriptors = descriptors(&memory, &events)?;
    let setup = setup_bytes(&setup(vcpus, &maps, &memory, &descriptors));
    let hand_over = |stub: &Stub| -> io::Result<()> {
        for vcpu in 0..vcpus {
            let wake = i32::try_from(number(descriptors.wakes)? + vcpu);
            let page = vcpu_page(vcpu) - VMM_BASE;
            init_page(&memory, page, wake.map_err(io::Error::other)?)?;
        }
        let guest = Guest {
            memory: Arc::clone(&memory),
            vcpus,
            reporter: Arc::downgrade(reporter),
        };
        stub.hand_over(guest, &setup, &descriptors.list)
    };
    write_gate(&memory, &descriptors).map_err(step("write the gate"))?;
    let handed = hand_over(&stub);
    meanwhile().map_err(step("load the guest"))?;
    // Now that there is nothing left to do but to wait for the process.
    let first = first().map_err(step("the first vCPU's thread"))?;
    let ready = memory
        .vmm
        .word32(vcpu_page(0) - VMM_BASE + page::READY as u64)
        .map_err(step("vCPU page"))?;
    let arm = |mut stub: Stub, handed: io::Result<()>| -> Result<Stub, AccelError> {
        // What was not started says why, rather than what could not be sent to it.
        stub.watch
            .process()
            .map_err(step("start the sandboxed process"))?;
        let armed = handed
            .map_err(|error| format!("it does not take its set-up: {error}"))
            .and_then(|()| stub.arm(ready));
        armed.map_err(AccelError::Sandbox).map(|()| stub)
    };
    let spare = stub.is_spare();
    let stub = match arm(stub, handed) {
        // It is dead by now, and had no guest in it.
        Err(error) if spare => {
            let error: &dyn std::error::Error = &error;
            tracing::info!(
                error,
                "a spare process could not be used: another one is started"
            );
            let stub = start(true)?;
            let handed = hand_over(&stub);
            arm(stub, handed)?
        }
        other => other?,
    };
    let vm = ProcessVm {
        pidfd: stub.watch.process().map_err(step("the process"))?,
        memory: Arc::clone(&memory),
        events,
        calls_base: i32::try_from(number(descriptors.calls).map_err(step("a descriptor"))?)
            .map_err(io::Error::other)
            .map_err(step("a descriptor"))?,
        waiting: Mutex::new(vec![Vec::new(); vcpus as usize]),
        first_started: Arc::default(),
        stub,
    };
    let vcpu = |index| ProcessVcpu {
        index,
        memory: Arc::clone(&memory),
        gone: Arc::clone(&vm.stub.watch.gone),
        started: Arc::new(AtomicBool::new(false)),
        owed: false,
        waiting: Waiting::default(),
    };
    let boot = ProcessVcpu {
        started: Arc::clone(&vm.first_started),
        ..vcpu(0)
    };
    // A thread that is gone says so by itself.
    let _ = first.send(Box::new(|| {
        Waiting::begin();
        Some(Box::new(boot))
    }));
    let vcpus = (1..vcpus).map(|index| Box::new(vcpu(index)) as Box<dyn Vcpu>);
    let vcpus = vcpus.collect();
    Ok((Arc::new(vm), vcpus))
}

/// The number that a descriptor has in the guest's process, by its place in the list.
fn number(place: usize) -> io::Result<u32> {
    u32::try_from(wire::FIRST_FD + place).map_err(io::Error::other)
}

fn setup(vcpus: u32, maps: &[Map], memory: &GuestMemory, descriptors: &Descriptors) -> Setup {
    let none = Map {
        gpa: 0,
        len: 0,
        offset: 0,
        fd: 0,
        populate: 0,
        prot: 0,
    };
    // RAM is one piece of the guest's address space for each region, which mappings cut further.
    let huge = |region: Option<&Region>, base: u64| match region.and_then(Region::huge_range) {
        Some(range) => [base + range.start, range.end - range.start],
        None => [0; 2],
    };
    Setup {
        vcpus,
        map_count: maps.len() as u32,
        event_fds: descriptors.kicks as u32,
        kicks: descriptors.kicks as u32,
        vcpu_pages: VCPU_PAGES_BASE,
        park: gate::park(),
        finish: gate::finish(),
        filter: gate::FILTER,
        unmap_start: GUEST_PHYS_END,
        unmap_end: USER_END,
        ready_offset: page::READY as u64,
        fault_handler: gate::fault_handler(),
        fault_stacks: FAULT_STACKS,
        fault_stack_len: FAULT_STACK,
        huge: [
            huge(Some(&memory.ram_low), RAM_BASE),
            huge(memory.ram_high.as_ref(), RAM_HIGH_BASE),
        ],
        holes: descriptors.holes,
        maps: std::array::from_fn(|i| maps.get(i).copied().unwrap_or(none)),
    }
}

fn prot(access: Access) -> u32 {
    let prot = match access {
        Access::Read => libc::PROT_READ,
        Access::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
        Access::ReadExecute => libc::PROT_READ | libc::PROT_EXEC,
    };
    prot as u32
}

fn plan_maps(
    mappings: &[crate::memory::map::Mapping],
    memory: &GuestMemory,
) -> Result<Vec<Map>, AccelError> {
    if mappings.len() >= MAX_MAPS {
        return Err(AccelError::Sandbox(format!(
            "{} mappings are too many",
            mappings.len()
        )));
    }
    let map = |m: &crate::memory::map::Mapping| Map {
        gpa: m.gpa,
        len: m.len,
        offset: m.offset,
        // In the order in which `descriptors` lists them.
        fd: match m.source {
            Source::Vmm => 0,
            Source::RamLow => 1,
            Source::RamHigh => 2,
            Source::Arena(index) => 3 + index as u16,
        },
        populate: match m.source {
            Source::RamLow | Source::RamHigh => u16::from(memory.ram_low.is_prefaulted()),
            Source::Vmm | Source::Arena(_) => 0,
        },
        prot: prot(m.access),
    };
    Ok(mappings.iter().map(map).collect())
}

fn descriptors(memory: &GuestMemory, events: &EventTable) -> Result<Descriptors, AccelError> {
    let missing = || AccelError::Sandbox("guest memory without a file".into());
    let file = |region: &Region| region.file().map(AsRawFd::as_raw_fd).ok_or_else(missing);
    let ram = file(&memory.ram_low)?;
    let high = memory.ram_high.as_ref().map_or(Ok(ram), file)?;
    let mut list = vec![file(&memory.vmm)?, ram, high];
    for arena in &memory.arenas {
        list.push(file(&arena.region)?);
    }
    let kicks = list.len();
    let mut holes = [0u64; wire::HOLE_WORDS];
    for (event, call) in events.calls() {
        let kick = events.kick(event);
        if kick.is_none()
            && let Some(word) = holes.get_mut(event as usize / 64)
        {
            *word |= 1 << (event % 64);
        }
        list.push(kick.unwrap_or(call).as_raw_fd());
    }
    let calls = list.len();
    list.extend(events.calls().map(|(_, e)| e.as_raw_fd()));
    let wakes = list.len();
    list.extend(events.wakes().map(|(_, e)| e.as_raw_fd()));
    Ok(Descriptors {
        list,
        kicks,
        calls,
        wakes,
        holes,
    })
}

fn write_gate(memory: &GuestMemory, descriptors: &Descriptors) -> io::Result<()> {
    let count = |from: usize, to: usize| u32::try_from(to - from).map_err(io::Error::other);
    let end = descriptors.list.len();
    let data = gate::GateData {
        kick_base: number(descriptors.kicks)?,
        kick_count: count(descriptors.kicks, descriptors.calls)?,
        wake_base: number(descriptors.wakes)?,
        wake_count: count(descriptors.wakes, end)?,
    };
    let program = filter::program(number(descriptors.kicks)?..number(end)?);
    let image = filter::image(&program, gate::FILTER)?;
    let page = gate::page(data, &image)?;
    memory.vmm.write_bytes(GATE_BASE - VMM_BASE, &page)
}

/// Page contents that the stub needs before the builder writes the rest.
fn init_page(memory: &GuestMemory, page: u64, wake: i32) -> io::Result<()> {
    let vmm = &memory.vmm;
    vmm.write(page, &(page + VMM_BASE))?;
    vmm.write(page + page::HANDOFF as u64, &handoff::PARKED)?;
    // A stub that failed before may have left something.
    vmm.write(page + page::READY as u64, &0u32)?;
    let entry = PollEntry {
        fd: wake,
        events: libc::POLLIN,
        revents: 0,
    };
    vmm.write(page + page::POLL as u64, &entry)?;
    vmm.write(page + page::POLL_EVENT as u64, &u16::MAX)?;
    vmm.write(page + page::POLL_COUNT as u64, &1u32)
}

impl ProcessVm {
    /// Writes one entry of a vCPU's poll set; `None` empties it, which `ppoll` passes over.
    fn write_poll_entry(&self, vcpu: u32, slot: usize, event: Option<u32>) -> io::Result<()> {
        let page = vcpu_page(vcpu) - VMM_BASE;
        let vmm = &self.memory.vmm;
        // Entry 0 is the vCPU's wake eventfd.
        let slot = u64::try_from(slot + 1).map_err(io::Error::other)?;
        let (fd, number) = match event {
            Some(event) => {
                let fd = self.calls_base + i32::try_from(event).map_err(io::Error::other)?;
                (fd, u16::try_from(event).map_err(io::Error::other)?)
            }
            None => (-1, u16::MAX),
        };
        vmm.write(page + page::POLL_EVENT as u64 + slot * 2, &number)?;
        let entry = PollEntry {
            fd,
            events: libc::POLLIN,
            revents: 0,
        };
        vmm.write(page + page::POLL as u64 + slot * 8, &entry)
    }
}

impl AccelVm for ProcessVm {
    fn start_first(&self, state: &StartState) -> io::Result<()> {
        self.first_started.store(true, Ordering::Release);
        start_guest(&self.memory, 0, state)
    }

    fn watch_doorbell(&self, _doorbell: u32) -> io::Result<()> {
        Ok(())
    }

    fn wait_for(&self, vcpu: u32, event: u32, on: bool) -> io::Result<()> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let index = usize::try_from(vcpu).map_err(io::Error::other)?;
        let Some(slots) = waiting.get_mut(index) else {
            return Ok(());
        };
        // An entry never moves, as the gate may be half-way through the set; and one that is emptied
        // may still fire, as `ppoll` waits with a copy: the gate passes over it.
        let found = slots.iter().position(|slot| *slot == Some(event));
        let slot = match (found, on) {
            (Some(_), true) | (None, false) => return Ok(()),
            (Some(slot), false) => slot,
            (None, true) => match slots.iter().position(Option::is_none) {
                Some(slot) => slot,
                None if slots.len() + 1 < MAX_POLL => {
                    slots.push(None);
                    slots.len() - 1
                }
                None => return Err(io::ErrorKind::StorageFull.into()),
            },
        };
        if let Some(entry) = slots.get_mut(slot) {
            *entry = on.then_some(event);
        }
        self.write_poll_entry(vcpu, slot, on.then_some(event))?;
        let count = u32::try_from(slots.len() + 1).map_err(io::Error::other)?;
        let at = vcpu_page(vcpu) - VMM_BASE + page::POLL_COUNT as u64;
        // Ordering: Release, entries before their count.
        self.memory.vmm.word32(at)?.store(count, Ordering::Release);
        // An idle vCPU waits with the old set until it is woken.
        self.events.wake(vcpu).map_or(Ok(()), signal)
    }

    fn freeze(&self) -> io::Result<bool> {
        if self.stub.watch.want_stop(true) {
            match pidfd::signal(&self.pidfd, libc::SIGSTOP) {
                Err(e) if e.raw_os_error() == Some(libc::ESRCH) => return Ok(true),
                other => other?,
            }
        }
        if self.stub.watch.wait_stopped(VCPU_KICK_TIMEOUT) {
            Ok(true)
        } else {
            let kind = io::ErrorKind::TimedOut;
            Err(io::Error::new(kind, "the guest's threads did not stop"))
        }
    }

    fn thaw(&self) -> io::Result<()> {
        if !self.stub.watch.want_stop(false) {
            return Ok(());
        }
        match pidfd::signal(&self.pidfd, libc::SIGCONT) {
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            other => other,
        }
    }

    fn wait_dead(&self, deadline: Option<Instant>) -> bool {
        self.stub.watch.wait_dead(deadline)
    }

    fn kill(&self) {
        self.stub.watch.ending.store(true, Ordering::Release);
        let _ = pidfd::signal(&self.pidfd, libc::SIGKILL);
    }

    fn shows_host_tsc(&self) -> bool {
        true
    }

    fn sandbox_report(&self) -> SandboxReport {
        let mut layers = vec![
            "an address space of its own that holds guest memory and the gate only".to_owned(),
            "seccomp: read and write on its own eventfds, ppoll, futex wait and wake, \
             restart_syscall"
                .to_owned(),
            "no descriptors but its own eventfds; no core dumps".to_owned(),
        ];
        let mut missing = vec![
            "network, mount and PID namespaces: not used, as no system call that reaches them is \
             allowed"
                .to_owned(),
        ];
        let known = [
            (wire::LAYER_NO_NEW_PRIVS, "no_new_privs"),
            (wire::LAYER_NO_CAPS, "no capabilities"),
            (wire::LAYER_USER_NS, "a user namespace of its own"),
            (
                wire::LAYER_OTHER_NS,
                "IPC, UTS and cgroup namespaces of its own",
            ),
            (
                wire::LAYER_LANDLOCK,
                "Landlock: no file, no TCP port, no scope outside itself",
            ),
        ];
        for (bit, name) in known {
            if self.stub.layers() & bit != 0 {
                layers.push(name.to_owned());
            } else {
                missing.push(format!("{name}: refused by this host"));
            }
        }
        if self.stub.watch.traced.load(Ordering::Acquire) {
            layers.push("ptrace: faults as the kernel saw them, killed with the VMM".to_owned());
        } else {
            missing.push("ptrace: not used, so faults are self-reported".to_owned());
        }
        SandboxReport {
            layers,
            missing,
            spare: self.stub.is_spare(),
            claim: "isolation of a seccomp-confined process; the host kernel's page-fault, futex, \
                    poll and eventfd code is exposed, and CPU side channels; weaker than hardware \
                    KVM",
        }
    }
}
