//! Building a VM: everything is checked, made and connected before anything runs.

use super::built::{EndUnlessRun, Vm};
use super::calls::{Call, Registry, RegistryError};
use super::clock::{self, Clock};
use super::contents::{load, write_boot_block, write_vcpu_page};
use super::dispatch::CORE_NUMBERS;
use super::events::EventTable;
use super::shared::{LogSink, Shared, SharedParts, new_span};
use super::stats::Counters;
use super::threads;
use super::wanted::{Wanted, slots};
use super::{LogLevel, VmEvent};
use crate::accel::process::{self, Spares};
use crate::accel::{Accel, AccelError, AccelInput, HostFeature, Reporter, host};
use crate::device::block::BlockConfig;
use crate::device::console::{Console, Input};
use crate::device::local::{LocalEndpoint, LocalThread};
use crate::device::net::NetConfig;
use crate::device::output::{Output, OutputThread};
use crate::device::rng::Rng;
use crate::device::vhost_user::link::{EventSink, Reports};
use crate::device::vhost_user::{Link, Remote};
use crate::device::{Backend, Offer, console, rng};
use crate::image::Image;
use crate::limits::{CLOCK_UPDATE, HOST_ARENA, HOST_QUEUE_SIZE, MAX_MEMORY, MIN_ARENA, MIN_MEMORY};
use crate::memory::map::AddressMap;
use crate::memory::{GuestMemory, MemoryKind, MemoryPlan, room_left};
use pv_abi::device::kind;
use pv_abi::layout::ARENA_STRIDE;
use pv_abi::limits::{
    MAX_ARENAS, MAX_CMDLINE, MAX_DEVICES, MAX_EVENTS, MAX_QUEUE_SIZE, MAX_QUEUES, MAX_VCPUS,
};
use std::io::{self, Write};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Why a VM could not be built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// A setting outside its range.
    #[error("{what} is {value}; it must be {range}")]
    OutOfRange {
        /// The setting.
        what: &'static str,
        /// What was asked for.
        value: u64,
        /// What would be accepted.
        range: String,
    },
    /// The image and the stacks do not fit.
    #[error("{0}")]
    MemoryTooSmall(String),
    /// All of the memory is to be present at once, and the host has less left, swap included.
    #[error(
        "{needed} bytes of memory are to be prefaulted, and the host, or this program's cgroup, has {left} \
         left; give the guest less, or do not prefault"
    )]
    NoRoom {
        /// Bytes of private RAM.
        needed: u64,
        /// Bytes that are left.
        left: u64,
    },
    /// The image needs features that this configuration does not offer.
    #[error("the guest needs features {missing:#x}, which this VM does not offer")]
    Features {
        /// The bits that are missing.
        missing: u64,
    },
    /// More queues in all than there are events.
    #[error("the devices need {needed} events, and a VM has {MAX_EVENTS}; use fewer queues")]
    TooManyQueues {
        /// How many.
        needed: u32,
    },
    /// A call handler that cannot be registered.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The accel cannot be used.
    #[error(transparent)]
    Accel(#[from] AccelError),
    /// A backend could not be started or reached.
    #[error("the backend of device {name:?} could not be started or reached")]
    Backend {
        /// The device.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// A host call failed.
    #[error("cannot make the VM")]
    Host(#[from] io::Error),
}

/// Collects what a VM shall be; [`VmBuilder::build`] makes it.
pub struct VmBuilder {
    image: Image,
    accel: Option<Accel>,
    vcpus: u32,
    memory: u64,
    memory_kind: MemoryKind,
    huge_pages: bool,
    prefault: bool,
    cmdline: String,
    console: Option<Output>,
    rng: bool,
    remotes: Vec<Remote>,
    registry: Registry,
    registry_error: Option<RegistryError>,
    log: Option<LogSink>,
    events: Option<EventSink>,
    boot_deadline: Option<Duration>,
    self_reported_faults: bool,
    spares: Option<Spares>,
}

impl std::fmt::Debug for VmBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VmBuilder")
            .field("accel", &self.accel)
            .field("vcpus", &self.vcpus)
            .field("memory", &self.memory)
            .field("remotes", &self.remotes)
            .finish_non_exhaustive()
    }
}

impl VmBuilder {
    /// A VM for this image: one vCPU, 64 MiB, no devices, [`Accel::auto`].
    pub fn new(image: Image) -> VmBuilder {
        VmBuilder {
            image,
            accel: None,
            vcpus: 1,
            memory: 64 << 20,
            memory_kind: MemoryKind::default(),
            huge_pages: true,
            prefault: false,
            cmdline: String::new(),
            console: None,
            rng: false,
            remotes: Vec::new(),
            registry: Registry::default(),
            registry_error: None,
            log: None,
            events: None,
            boot_deadline: None,
            self_reported_faults: false,
            spares: None,
        }
    }

    /// The accel to run on.
    pub fn accel(mut self, accel: Accel) -> VmBuilder {
        self.accel = Some(accel);
        self
    }

    /// vCPUs, 1 to 64. The guest starts all but the first.
    pub fn vcpus(mut self, vcpus: u32) -> VmBuilder {
        self.vcpus = vcpus;
        self
    }

    /// Private RAM in bytes, 4 MiB or more, rounded up to 2 MiB.
    pub fn memory(mut self, bytes: u64) -> VmBuilder {
        self.memory = bytes;
        self
    }

    /// Where private RAM comes from.
    pub fn memory_kind(mut self, kind: MemoryKind) -> VmBuilder {
        self.memory_kind = kind;
        self
    }

    /// Whether huge pages are asked for; they are unless this says `false`.
    pub fn huge_pages(mut self, ask: bool) -> VmBuilder {
        self.huge_pages = ask;
        self
    }

    /// Whether all of private RAM is made present while building.
    ///
    /// More than the host has left, as it says at that moment, is refused ([`BuildError::NoRoom`]): the
    /// kernel would rather end this program.
    pub fn prefault(mut self, prefault: bool) -> VmBuilder {
        self.prefault = prefault;
        self
    }

    /// The guest's command line, at most 2 KiB.
    pub fn cmdline(mut self, cmdline: impl Into<String>) -> VmBuilder {
        self.cmdline = cmdline.into();
        self
    }

    /// A console device; its output goes to this writer.
    ///
    /// The writer runs on a thread of its own and may block: the guest's next output waits then, and
    /// nothing else does. A chain is complete once it is written. A VM that ends waits half a second
    /// for a writer that blocks, and then leaves the thread to it.
    pub fn console(mut self, output: impl Write + Send + 'static) -> VmBuilder {
        self.console = Some(Arc::new(Mutex::new(output)));
        self
    }

    /// A console device; its output goes to this callback, as it comes.
    pub fn console_callback(self, output: impl FnMut(&[u8]) + Send + 'static) -> VmBuilder {
        self.console(Callback(output))
    }

    /// An entropy device.
    pub fn rng(mut self) -> VmBuilder {
        self.rng = true;
        self
    }

    /// A block device. May be given more than once; the guest sees them, and network cards, in this
    /// order.
    pub fn block(mut self, config: BlockConfig) -> VmBuilder {
        self.remotes.push(config.any());
        self
    }

    /// A network card. May be given more than once; the guest sees them, and block devices, in this
    /// order.
    pub fn net(mut self, config: NetConfig) -> VmBuilder {
        self.remotes.push(config.any());
        self
    }

    /// A handler for a call of the embedder's own, 0 to 255.
    ///
    /// The handler runs on the vCPU's thread and may answer later ([`Call::finish`]).
    pub fn call(mut self, index: u32, handler: impl Fn(Call) + Send + Sync + 'static) -> VmBuilder {
        if let Err(error) = self.registry.add(index, Arc::new(handler)) {
            self.registry_error.get_or_insert(error);
        }
        self
    }

    /// Where the guest's log lines go; without it they become `tracing` events.
    ///
    /// The sink gets them as the guest sent them, 2 KiB at most, with what is not UTF-8 replaced: line
    /// breaks and control sequences are still in there. The events have them escaped.
    pub fn log(mut self, sink: impl Fn(LogLevel, &str) + Send + Sync + 'static) -> VmBuilder {
        self.log = Some(Box::new(sink));
        self
    }

    /// Hears of backends that are lost and come back. Called on a library thread; do not block.
    pub fn on_event(mut self, sink: impl Fn(VmEvent) + Send + Sync + 'static) -> VmBuilder {
        self.events = Some(Arc::new(sink));
        self
    }

    /// Ends the VM if the guest has not negotiated within this time of its start.
    pub fn boot_deadline(mut self, deadline: Duration) -> VmBuilder {
        self.boot_deadline = Some(deadline);
        self
    }

    /// Process accel: take faults from the guest's own process even where ptrace works.
    ///
    /// Such reports are marked [`self_reported`](crate::GuestFault::self_reported). This is also
    /// what happens where the host forbids ptrace.
    pub fn self_reported_faults(mut self) -> VmBuilder {
        self.self_reported_faults = true;
        self
    }

    /// Process accel: takes a process that waits instead of starting one, where there is one.
    ///
    /// A VM with [`VmBuilder::self_reported_faults`] starts its own.
    pub fn spares(mut self, spares: &Spares) -> VmBuilder {
        self.spares = Some(spares.clone());
        self
    }

    fn check(&mut self) -> Result<(), BuildError> {
        let range = |what, value: u64, low: u64, high: u64| {
            if (low..=high).contains(&value) {
                Ok(())
            } else {
                Err(BuildError::OutOfRange {
                    what,
                    value,
                    range: format!("{low} to {high}"),
                })
            }
        };
        range(
            "the number of vCPUs",
            self.vcpus.into(),
            1,
            MAX_VCPUS.into(),
        )?;
        range("the memory in bytes", self.memory, MIN_MEMORY, MAX_MEMORY)?;
        self.memory = self
            .memory
            .next_multiple_of(pv_abi::layout::LARGE_PAGE_SIZE);
        range(
            "the length of the command line",
            self.cmdline.len() as u64,
            0,
            MAX_CMDLINE as u64,
        )?;
        let devices =
            self.remotes.len() + usize::from(self.rng) + usize::from(self.console.is_some());
        range(
            "the number of devices",
            devices as u64,
            0,
            MAX_DEVICES.into(),
        )?;
        range(
            "the number of arenas",
            self.remotes.len() as u64 + 1,
            0,
            MAX_ARENAS.into(),
        )?;
        for remote in &mut self.remotes {
            if let Err((what, value, low, high)) = remote.model.check() {
                range(what, value, low, high)?;
            }
            range(
                "the number of queues",
                remote.model.queues().into(),
                1,
                MAX_QUEUES.into(),
            )?;
            range(
                "the queue size",
                remote.queue_size.into(),
                2,
                MAX_QUEUE_SIZE.into(),
            )?;
            if !remote.queue_size.is_power_of_two() {
                return Err(BuildError::OutOfRange {
                    what: "the queue size",
                    value: remote.queue_size.into(),
                    range: "a power of two".into(),
                });
            }
            range("the arena in bytes", remote.arena, 1, ARENA_STRIDE)?;
            remote.arena = remote.arena.max(MIN_ARENA).next_multiple_of(MIN_ARENA);
            range(
                "the length of a device's name",
                remote.name.len() as u64,
                0,
                32,
            )?;
        }
        self.registry_error.take().map_or(Ok(()), |e| Err(e.into()))
    }

    /// Makes the VM: memory, image, devices, backends, accel, and the first vCPU's thread, which
    /// inherits the affinity and the priority of the calling one.
    ///
    /// # Errors
    /// [`BuildError`]; nothing is left behind then.
    pub fn build(mut self) -> Result<Vm, BuildError> {
        let began = Instant::now();
        let span = new_span();
        let _vm = span.clone().entered();
        let _span = tracing::debug_span!("build").entered();
        clock::prepare();
        self.check()?;
        let accel = self.accel.unwrap_or_else(Accel::auto);
        accel.check()?;
        let (vcpus, room) = (self.vcpus, accel.max_vcpus()?);
        if vcpus > room {
            return Err(BuildError::OutOfRange {
                what: "the number of vCPUs",
                value: vcpus.into(),
                range: format!("1 to {room}, as this host's KVM has room for no more"),
            });
        }
        if self.prefault {
            host::require(HostFeature::PopulateWrite, accel)?;
            fits(self.memory, room_left())?;
        }
        let features = self.features();
        let missing = self.image.note().needed_features & !features;
        if missing != 0 {
            return Err(BuildError::Features { missing });
        }
        let wants = self.wanted_devices();
        let needed: u32 = wants.iter().map(|w| u32::from(w.queues) + 1).sum();
        if needed > MAX_EVENTS {
            return Err(BuildError::TooManyQueues { needed });
        }
        // What takes longest comes first: a process starts beside all that follows.
        let on_process = accel == Accel::Process;
        let begin = || process::begin(self.spares.as_ref(), self.self_reported_faults);
        let stub = on_process.then(begin).transpose()?;
        let in_process = wants.iter().any(|w| w.remote.is_none());
        let arenas: Vec<u64> = in_process
            .then_some(HOST_ARENA)
            .into_iter()
            .chain(self.remotes.iter().map(|r| r.arena))
            .collect();
        let map = AddressMap::new(&self.image, self.vcpus, self.memory, &arenas)
            .map_err(|e| BuildError::MemoryTooSmall(e.to_string()))?;
        let plan = MemoryPlan {
            private: self.memory,
            shared_private: on_process || self.memory_kind == MemoryKind::Forkable,
            shared_vmm: on_process,
            huge_pages: self.huge_pages,
            prefault: self.prefault,
            huge_from: map.heap,
        };
        let memory = Arc::new(GuestMemory::new(&plan, &arenas)?);
        let map = Arc::new(map);
        let queue_counts: Vec<u16> = wants.iter().map(|w| w.queues).collect();
        let events = Arc::new(EventTable::new(&queue_counts, self.vcpus)?);
        let numbers = CORE_NUMBERS.into_iter().chain(self.registry.numbers());
        let counters = Arc::new(Counters::new(numbers));
        let devices = slots(&wants, &memory, &events, &counters, in_process)?;
        let shared = Arc::new(Shared::new(SharedParts {
            memory: Arc::clone(&memory),
            map: Arc::clone(&map),
            events: Arc::clone(&events),
            devices: devices.clone(),
            registry: std::mem::take(&mut self.registry),
            counters,
            clock: Clock::new(),
            log: self.log.take().unwrap_or_else(|| Box::new(log_to_tracing)),
            vcpus: self.vcpus,
            kick_signal: accel.kick_signal(),
            began,
            exited: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            span,
        }));
        let (guard, own) = (EndUnlessRun(Some(Arc::clone(&shared))), Arc::clone(&shared));
        let start_first = Box::new(move || threads::start_first(&own));
        let input = AccelInput {
            first: start_first,
            vcpus: self.vcpus,
            memory: Arc::clone(&memory),
            map: Arc::clone(&map),
            events,
        };
        let mut local = None;
        let mut prepare = || {
            load(&self.image, &memory)?;
            let counts = (self.vcpus, devices.len());
            write_boot_block(&memory, &map, accel, counts, features, &self.cmdline)?;
            for vcpu in 0..self.vcpus {
                write_vcpu_page(&memory, vcpu, self.vcpus)?;
            }
            shared.clock.publish(&memory, true)?;
            let (clock, span) = (clock_updates(&shared), shared.span.clone());
            local = Some(LocalThread::new(clock, ends_vm(&shared), span)?);
            Ok(())
        };
        let (accel_vm, vcpus) = match stub {
            None => crate::accel::kvm::create(input, &mut prepare)?,
            Some(stub) => {
                let reporter: Arc<dyn Reporter> = Arc::clone(&shared) as _;
                process::create(input, &reporter, stub, &mut prepare)?
            }
        };
        if !accel_vm.shows_host_tsc() {
            shared.clock.distrust_tsc();
            shared.clock.publish(&memory, true)?;
        }
        let _ = shared.accel.set(accel_vm);
        let prepared = local.ok_or_else(|| io::Error::other("the guest was not loaded"));
        let (mut local, starter) = prepared?;
        let late = if in_process {
            local.start(starter)?;
            None
        } else {
            Some(starter)
        };
        let (entry, boot_deadline) = (self.image.entry(), self.boot_deadline);
        let connected = self.connect(&wants, &shared, &local.endpoint())?;
        for slot in &devices {
            slot.publish_initial()?;
        }
        let (links, input) = connected;
        Ok(Vm {
            guard,
            shared,
            vcpus,
            links,
            local,
            late,
            input,
            accel,
            entry,
            boot_deadline,
        })
    }

    fn features(&self) -> u64 {
        pv_abi::feature::ALL
    }

    fn wanted_devices(&self) -> Vec<Wanted> {
        let remote = |(index, config): (usize, &Remote)| Wanted {
            kind: config.model.kind(),
            name: config.name.clone(),
            queues: config.model.queues(),
            queue_size: config.queue_size,
            remote: Some(index),
        };
        let local = |kind, name: &str, queues| Wanted {
            kind,
            name: name.into(),
            queues,
            queue_size: HOST_QUEUE_SIZE,
            remote: None,
        };
        let mut wants: Vec<Wanted> = self.remotes.iter().enumerate().map(remote).collect();
        if self.console.is_some() {
            wants.push(local(kind::CONSOLE, "console", console::QUEUES));
        }
        if self.rng {
            wants.push(local(kind::RNG, "rng", rng::QUEUES));
        }
        wants
    }

    #[allow(clippy::type_complexity)]
    fn connect(
        self,
        wants: &[Wanted],
        shared: &Arc<Shared>,
        endpoint: &LocalEndpoint,
    ) -> Result<(Vec<Link>, Option<Arc<Input>>), BuildError> {
        let mut links = Vec::new();
        let mut input = None;
        let sink: EventSink = self.events.unwrap_or_else(|| Arc::new(|_| ()));
        let mut remotes = self.remotes.into_iter();
        for (want, slot) in wants.iter().zip(&shared.devices) {
            if want.remote.is_some() {
                let Some(config) = remotes.next() else {
                    continue;
                };
                let reports = Reports {
                    counters: Arc::clone(&shared.counters),
                    events: Arc::clone(&sink),
                    panicked: Box::new(ends_vm(shared)),
                    span: shared.span.clone(),
                };
                let link = Link::start(config, Arc::clone(slot), reports);
                links.push(link.map_err(|source| BuildError::Backend {
                    name: want.name.clone(),
                    source,
                })?);
                continue;
            }
            let (backend, offer): (Box<dyn Backend>, Offer) = match (want.kind, &self.console) {
                (kind::CONSOLE, Some(output)) => {
                    let bytes = Arc::new(Input::new()?);
                    input = Some(Arc::clone(&bytes));
                    let (output, span) = (Arc::clone(output), shared.span.clone());
                    let output = OutputThread::new(output, ends_vm(shared), span)?;
                    let console = Console::new(endpoint.clone(), output, bytes);
                    (Box::new(console), console::offer())
                }
                _ => (Box::new(Rng::new(endpoint.clone())), rng::offer()),
            };
            slot.backend_ready(backend, offer)?;
        }
        Ok((links, input))
    }
}

/// Whether so much memory can be made present; what nobody knows is tried.
fn fits(needed: u64, left: Option<u64>) -> Result<(), BuildError> {
    match left {
        Some(left) if left < needed => Err(BuildError::NoRoom { needed, left }),
        _ => Ok(()),
    }
}

fn clock_updates(shared: &Arc<Shared>) -> (Duration, Box<dyn FnMut() + Send>) {
    let shared = Arc::downgrade(shared);
    let update = move || {
        if let Some(shared) = shared.upgrade()
            && let Err(error) = shared.clock.update(&shared.memory)
        {
            tracing::warn!(%error, "the clock page cannot be updated");
        }
    };
    (CLOCK_UPDATE, Box::new(update))
}

/// Ends the VM when the embedder's own code panics on a library thread.
fn ends_vm(shared: &Arc<Shared>) -> impl FnOnce() + Send + 'static {
    let shared = Arc::downgrade(shared);
    move || {
        if let Some(shared) = shared.upgrade() {
            shared.host_error(io::Error::other("a callback of the embedder's panicked"));
        }
    }
}

fn log_to_tracing(level: LogLevel, text: &str) {
    // A guest forges no line, and reaches no terminal.
    let text = text.escape_debug();
    match level {
        LogLevel::Error => tracing::error!(target: "guest", "{text}"),
        LogLevel::Warn => tracing::warn!(target: "guest", "{text}"),
        LogLevel::Info => tracing::info!(target: "guest", "{text}"),
        LogLevel::Debug => tracing::debug!(target: "guest", "{text}"),
        LogLevel::Trace => tracing::trace!(target: "guest", "{text}"),
    }
}

/// A callback as a writer.
struct Callback<F>(F);

impl<F: FnMut(&[u8])> Write for Callback<F> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        (self.0)(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_than_is_left_is_not_prefaulted() {
        assert!(fits(50, Some(50)).is_ok() && fits(50, None).is_ok());
        let error = fits(50 << 30, Some(23 << 30)).unwrap_err();
        assert!(matches!(error, BuildError::NoRoom { .. }));
        let text = error.to_string();
        assert!(
            text.contains("53687091200") && text.contains("24696061952"),
            "{text}"
        );
    }
}
