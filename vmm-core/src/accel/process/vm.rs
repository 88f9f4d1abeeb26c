//! Making a sandboxed VM: gate, filter, set-up, supervisor.

use super::look::Look;
use super::placement::Placement;
use super::supervisor::{self, Start, Watch};
use super::vcpu::ProcessVcpu;
use super::wire::{self, MAX_MAPS, Map, Setup};
use super::{filter, futex, gate, handoff, page};
use crate::accel::{AccelError, AccelInput, AccelVm, Parts, Reporter, SandboxReport, Vcpu};
use crate::image::Access;
use crate::limits::{STUB_READY_TIMEOUT, VCPU_KICK_TIMEOUT};
use crate::memory::map::Source;
use crate::memory::{Backing, GuestMemory, Region};
use crate::vm::events::{EventTable, signal};
use pv_abi::layout::{
    GATE_BASE, GUEST_PHYS_END, VCPU_PAGES_BASE, VCPU_PAGES_LEN, VMM_BASE, vcpu_page,
};
use pv_abi::limits::MAX_POLL;
use pv_abi::vcpu::PollEntry;
use std::io;
use std::mem::offset_of;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Instant;

/// First address past user space on x86-64 with four-level paging.
const USER_END: u64 = 0x7fff_ffff_f000;
/// Stack for each vCPU's fault handler; the largest signal frame (AVX-512 state) fits.
const FAULT_STACK: u64 = 16 << 10;
/// Where those stacks lie: behind the vCPU pages, mapped only when they are used.
const FAULT_STACKS: u64 = VCPU_PAGES_BASE + VCPU_PAGES_LEN;

pub(super) struct ProcessVm {
    pidfd: Arc<OwnedFd>,
    watch: Arc<Watch>,
    memory: Arc<GuestMemory>,
    events: Arc<EventTable>,
    calls_base: i32,
    /// By vCPU: the events it waits for, by their place in the poll set.
    waiting: Mutex<Vec<Vec<Option<u32>>>>,
    layers: u32,
    supervisor: Option<JoinHandle<()>>,
}

/// Descriptors of the child, in order; a `None` leaves its number closed.
struct Descriptors {
    list: Vec<Option<RawFd>>,
    first_event: usize,
    kicks: usize,
    calls: usize,
    wakes: usize,
}

/// Makes it; `meanwhile` is done while the process starts, which needs nothing of this thread.
pub(crate) fn create(
    input: AccelInput,
    reporter: &Arc<dyn Reporter>,
    self_report: bool,
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
    let setup_len = wire::setup_len(vcpus) as u64;
    let setup_region =
        Region::new(setup_len, Backing::Memfd("pv-setup")).map_err(step("set-up memfd"))?;
    let mut maps = plan_maps(&map.mappings)?;
    let stacks = u64::from(vcpus) * FAULT_STACK;
    // The last map, which the stub leaves out when faults come through ptrace; whether they do is
    // known only once it has been tried.
    maps.push(Map {
        gpa: FAULT_STACKS,
        len: stacks,
        offset: FAULT_STACKS - VMM_BASE,
        fd: 1,
        prot: prot(Access::ReadWrite),
    });
    let descriptors = descriptors(&setup_region, &memory, &events)?;
    let base = super::spawn::base_for(&descriptors.list).map_err(step("the stub's memfd"))?;
    let at = |index: usize| {
        u32::try_from(index)
            .ok()
            .zip(u32::try_from(base).ok())
            .map(|(i, b)| i + b)
    };
    let number = |index| at(index).ok_or_else(|| AccelError::Sandbox("descriptor number".into()));
    let setup = Setup {
        go: 0,
        failed_step: 0,
        failed_errno: 0,
        layers: 0,
        vcpus,
        map_count: maps.len() as u32,
        event_fds: descriptors.first_event as u32,
        self_report: 0,
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
        maps: std::array::from_fn(|i| {
            maps.get(i).copied().unwrap_or(Map {
                gpa: 0,
                len: 0,
                offset: 0,
                fd: 0,
                prot: 0,
            })
        }),
    };
    write_setup(&setup_region, &setup).map_err(step("write the set-up"))?;

    let watch = Arc::new(Watch::new());
    // The stub goes on once it is watched and what it jumps into is written.
    let (go_region, go_watch) = (setup_region.clone(), Arc::clone(&watch));
    let left = AtomicU8::new(2);
    let go = Arc::new(move || {
        // Ordering: AcqRel, so that the last one publishes what both have done.
        if left.fetch_sub(1, Ordering::AcqRel) > 1 {
            return;
        }
        let offset = |field: usize| field as u64;
        if !go_watch.traced.load(Ordering::Acquire) {
            let _ = go_region.write(offset(offset_of!(Setup, self_report)), &1u32);
        }
        if let Ok(word) = go_region.word32(offset(offset_of!(Setup, go))) {
            word.store(1, Ordering::Release);
            futex::wake(word);
        }
    });
    let start = Start {
        descriptors: descriptors.list.clone(),
        base,
        go: Arc::clone(&go) as _,
        memory: Arc::clone(&memory),
        vcpus,
        trace: !self_report,
        reporter: Arc::downgrade(reporter),
    };
    let (sender, started) = mpsc::channel();
    let watched = Arc::clone(&watch);
    let supervisor = std::thread::Builder::new()
        .name("pv-supervisor".into())
        .spawn(move || {
            supervisor::run(start, &watched, |result| {
                let _ = sender.send(result);
            });
        })
        .map_err(step("the supervisor thread"))?;
    let mut write_all = || {
        write_gate(&memory, &descriptors, &number).map_err(step("write the gate"))?;
        for vcpu in 0..vcpus {
            let page = vcpu_page(vcpu) - VMM_BASE;
            let wake = number(descriptors.wakes + vcpu as usize)? as i32;
            init_page(&memory, page, wake).map_err(step("write a vCPU page"))?;
        }
        go();
        meanwhile().map_err(step("load the guest"))
    };
    let loaded = write_all();
    // Now that there is nothing left to do but to wait for the process.
    let prepared = loaded.and_then(|()| first().map_err(step("the first vCPU's thread")));
    let pidfd = started
        .recv()
        .unwrap_or_else(|_| Err(io::Error::other("the supervisor thread ended")))
        .map_err(step("start the sandboxed process"))?;
    let mut vm = ProcessVm {
        pidfd,
        watch,
        memory: Arc::clone(&memory),
        events,
        calls_base: number(descriptors.calls)? as i32,
        waiting: Mutex::new(vec![Vec::new(); vcpus as usize]),
        layers: 0,
        supervisor: Some(supervisor),
    };
    let first = match prepared {
        Ok(first) => first,
        Err(error) => {
            vm.watch.ending.store(true, Ordering::Release);
            return Err(error);
        }
    };
    let ready = memory
        .vmm
        .word32(vcpu_page(0) - VMM_BASE + page::READY as u64)
        .map_err(step("vCPU page"))?;
    if !supervisor::wait_ready(ready, &vm.watch.gone, STUB_READY_TIMEOUT) {
        // Dropping the VM ends the process; what it left in the set-up says why it failed.
        vm.watch.ending.store(true, Ordering::Release);
        return Err(AccelError::Sandbox(why_not_ready(&setup_region)));
    }
    vm.layers = setup_region
        .read(offset_of!(Setup, layers) as u64)
        .map_err(step("read the set-up"))?;
    let vcpu = |index| {
        Box::new(ProcessVcpu {
            index,
            memory: Arc::clone(&memory),
            gone: Arc::clone(&vm.watch.gone),
            owed: false,
            look: Look::default(),
            placement: Placement::default(),
        }) as Box<dyn Vcpu>
    };
    let boot = vcpu(0);
    // A thread that is gone says so by itself.
    let _ = first.send(Box::new(|| Some(boot)));
    let vcpus = (1..vcpus).map(vcpu).collect();
    Ok((Arc::new(vm), vcpus))
}

fn prot(access: Access) -> u32 {
    let prot = match access {
        Access::Read => libc::PROT_READ,
        Access::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
        Access::ReadExecute => libc::PROT_READ | libc::PROT_EXEC,
    };
    prot as u32
}

fn plan_maps(mappings: &[crate::memory::map::Mapping]) -> Result<Vec<Map>, AccelError> {
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
        // In the order in which `descriptors` lists them; 0 is the set-up.
        fd: match m.source {
            Source::Vmm => 1,
            Source::RamLow => 2,
            Source::RamHigh => 3,
            Source::Arena(index) => 4 + index as u32,
        },
        prot: prot(m.access),
    };
    Ok(mappings.iter().map(map).collect())
}

fn descriptors(
    setup: &Region,
    memory: &GuestMemory,
    events: &EventTable,
) -> Result<Descriptors, AccelError> {
    let file = |region: &Region| region.file().map(AsRawFd::as_raw_fd);
    let mut list = vec![file(setup), file(&memory.vmm), file(&memory.ram_low)];
    list.push(memory.ram_high.as_ref().and_then(file));
    list.extend(memory.arenas.iter().map(|a| file(&a.region)));
    let first_event = list.len();
    let mut kicks: Vec<Option<RawFd>> = events.calls().map(|_| None).collect();
    for (doorbell, kick) in events.kicks() {
        if let Some(slot) = kicks.get_mut(doorbell as usize) {
            *slot = Some(kick.as_raw_fd());
        }
    }
    let calls = first_event + kicks.len();
    list.extend(kicks);
    list.extend(events.calls().map(|(_, e)| Some(e.as_raw_fd())));
    let wakes = list.len();
    list.extend(events.wakes().map(|(_, e)| Some(e.as_raw_fd())));
    Ok(Descriptors {
        list,
        first_event,
        kicks: first_event,
        calls,
        wakes,
    })
}

fn write_gate(
    memory: &GuestMemory,
    descriptors: &Descriptors,
    number: &dyn Fn(usize) -> Result<u32, AccelError>,
) -> io::Result<()> {
    let number = |index| number(index).map_err(io::Error::other);
    let count = |from: usize, to: usize| u32::try_from(to - from).unwrap_or(0);
    let end = descriptors.list.len();
    let data = gate::GateData {
        kick_base: number(descriptors.kicks)?,
        kick_count: count(descriptors.kicks, descriptors.calls),
        wake_base: number(descriptors.wakes)?,
        wake_count: count(descriptors.wakes, end),
    };
    let program = filter::program(number(descriptors.first_event)?..number(end)?)?;
    let image = filter::image(&program, gate::FILTER)?;
    if image.len() as u64 > gate::FILTER_LEN {
        return Err(io::Error::other("the filter does not fit"));
    }
    memory
        .vmm
        .write_bytes(GATE_BASE - VMM_BASE, gate::bodies())?;
    memory
        .vmm
        .write_bytes(gate::DATA - VMM_BASE, &data.bytes())?;
    memory.vmm.write_bytes(gate::FILTER - VMM_BASE, &image)
}

/// Page contents that the stub needs before the builder writes the rest.
fn init_page(memory: &GuestMemory, page: u64, wake: i32) -> io::Result<()> {
    let vmm = &memory.vmm;
    vmm.write(page, &(page + VMM_BASE))?;
    vmm.write(page + page::HANDOFF as u64, &handoff::PARKED)?;
    let entry = PollEntry {
        fd: wake,
        events: libc::POLLIN,
        revents: 0,
    };
    vmm.write(page + page::POLL as u64, &entry)?;
    vmm.write(page + page::POLL_EVENT as u64, &u16::MAX)?;
    vmm.write(page + page::POLL_COUNT as u64, &1u32)
}

fn write_setup(region: &Region, setup: &Setup) -> io::Result<()> {
    // Field by field: the structure is plain integers, but it is not a zerocopy type, because the
    // stub compiles it without dependencies.
    let words = [
        u64::from(setup.go) | u64::from(setup.failed_step) << 32,
        u64::from(setup.failed_errno) | u64::from(setup.layers) << 32,
        u64::from(setup.vcpus) | u64::from(setup.map_count) << 32,
        u64::from(setup.event_fds) | u64::from(setup.self_report) << 32,
        setup.vcpu_pages,
        setup.park,
        setup.finish,
        setup.filter,
        setup.unmap_start,
        setup.unmap_end,
        setup.ready_offset,
        setup.fault_handler,
        setup.fault_stacks,
        setup.fault_stack_len,
    ];
    let maps = setup.maps.iter().flat_map(|m| {
        [
            m.gpa,
            m.len,
            m.offset,
            u64::from(m.fd) | u64::from(m.prot) << 32,
        ]
    });
    let bytes: Vec<u8> = words
        .into_iter()
        .chain(maps)
        .flat_map(u64::to_le_bytes)
        .collect();
    debug_assert_eq!(bytes.len(), size_of::<Setup>());
    region.write_bytes(0, &bytes)
}

fn why_not_ready(setup: &Region) -> String {
    let read = |field: usize| setup.read::<u32>(field as u64).unwrap_or(0);
    let errno = i32::try_from(read(offset_of!(Setup, failed_errno))).unwrap_or(0);
    let step = match read(offset_of!(Setup, failed_step)) {
        wire::STEP_MAP => "map guest memory",
        wire::STEP_CLONE => "start the vCPU threads",
        wire::STEP_GS_BASE => "set GS base",
        wire::STEP_SIGNALS => "install the fault handlers",
        _ => {
            return "it ended before it was ready; does this host allow seccomp filters (the \
                    system call seccomp with SECCOMP_FILTER_FLAG_TSYNC)?"
                .into();
        }
    };
    format!(
        "it could not {step}: {}",
        io::Error::from_raw_os_error(errno)
    )
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
    fn watch_doorbell(&self, _doorbell: u32) -> io::Result<()> {
        Ok(())
    }

    fn wait_for(&self, vcpu: u32, event: u32, on: bool) -> io::Result<()> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let index = usize::try_from(vcpu).map_err(io::Error::other)?;
        let Some(slots) = waiting.get_mut(index) else {
            return Ok(());
        };
        // An entry never moves: the gate may be half-way through the set.
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
        if self.watch.want_stop(true) {
            match supervisor::signal(&self.pidfd, libc::SIGSTOP) {
                Err(e) if e.raw_os_error() == Some(libc::ESRCH) => return Ok(true),
                other => other?,
            }
        }
        if self.watch.wait_stopped(VCPU_KICK_TIMEOUT) {
            Ok(true)
        } else {
            let kind = io::ErrorKind::TimedOut;
            Err(io::Error::new(kind, "the guest's threads did not stop"))
        }
    }

    fn thaw(&self) -> io::Result<()> {
        if !self.watch.want_stop(false) {
            return Ok(());
        }
        match supervisor::signal(&self.pidfd, libc::SIGCONT) {
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            other => other,
        }
    }

    fn wait_dead(&self, deadline: Option<Instant>) -> bool {
        self.watch.wait_dead(deadline)
    }

    fn kill(&self) {
        self.watch.ending.store(true, Ordering::Release);
        let _ = supervisor::signal(&self.pidfd, libc::SIGKILL);
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
            if self.layers & bit != 0 {
                layers.push(name.to_owned());
            } else {
                missing.push(format!("{name}: refused by this host"));
            }
        }
        if self.watch.traced.load(Ordering::Acquire) {
            layers.push("ptrace: faults as the kernel saw them, killed with the VMM".to_owned());
        } else {
            missing.push("ptrace: not used, so faults are self-reported".to_owned());
        }
        SandboxReport {
            layers,
            missing,
            claim: "isolation of a seccomp-confined process; the host kernel's page-fault, futex, \
                    poll and eventfd code is exposed, and CPU side channels; weaker than hardware \
                    KVM",
        }
    }
}

impl Drop for ProcessVm {
    fn drop(&mut self) {
        self.kill();
        // The supervisor itself may hold the last reference, for the moment of a report.
        if let Some(supervisor) = self.supervisor.take()
            && supervisor.thread().id() != std::thread::current().id()
        {
            let _ = supervisor.join();
        }
    }
}
