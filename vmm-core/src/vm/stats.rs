//! Counters: exact, cheap, and readable while the VM runs.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A counter that many threads add to and nobody orders anything by.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, n: u64) {
        // Ordering: a statistic; nothing is published through it.
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Live counters of one VM.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) exits_call: Counter,
    pub(crate) exits_idle: Counter,
    pub(crate) exits_doorbell: Counter,
    pub(crate) exits_fault: Counter,
    pub(crate) exits_interrupted: Counter,
    pub(crate) exits_other: Counter,
    pub(crate) bad_doorbells: Counter,
    pub(crate) refused_calls: Counter,
    pub(crate) log_dropped: Counter,
    pub(crate) config_events: Counter,
    pub(crate) backend_losses: Counter,
    pub(crate) backend_reconnects: Counter,
    /// By call number; the map only ever holds numbers that exist.
    pub(crate) calls: BTreeMap<u32, Counter>,
}

/// Exits to the VMM's user space, by kind.
///
/// On kvm these are returns of `KVM_RUN`; on process they are hand-offs, and `notify` and `idle`
/// are direct system calls of the guest's process that are not exits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ExitCounts {
    /// The `call` slot.
    pub call: u64,
    /// The `idle` slot.
    pub idle: u64,
    /// Doorbells that no ioeventfd answered.
    pub doorbell: u64,
    /// CPU faults, and violations that the accel saw.
    pub fault: u64,
    /// Kicks by the VMM itself: pause, stop.
    pub interrupted: u64,
    /// Everything else, the `exit` slot included.
    pub other: u64,
}

impl ExitCounts {
    /// All exits.
    pub fn total(&self) -> u64 {
        self.call + self.idle + self.doorbell + self.fault + self.interrupted + self.other
    }
}

/// What a VM has done so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Exits to the VMM's user space.
    pub exits: ExitCounts,
    /// Calls by number, those that were never made left out.
    pub calls: BTreeMap<u32, u64>,
    /// Calls answered with a status other than `Ok`.
    pub refused_calls: u64,
    /// Times that the guest used the `notify` slot, as the gate counted them in the guest's pages.
    pub kicks: u64,
    /// Times that the guest used the `idle` slot, as the gate counted them in the guest's pages.
    pub idles: u64,
    /// Events of queues and configurations that `idle` found, as counted in the guest's pages.
    ///
    /// One that came while the guest was busy, and that it did not idle for, is not among them; several
    /// of a queue that came together are one.
    pub events: u64,
    /// Doorbells that do not exist.
    pub bad_doorbells: u64,
    /// Log lines that were dropped because the guest was too talkative.
    pub log_dropped: u64,
    /// Configuration events sent to the guest.
    pub config_events: u64,
    /// Backends that went away.
    pub backend_losses: u64,
    /// Backends that came back.
    pub backend_reconnects: u64,
    /// From the start of `build` to the guest's `NEGOTIATE`, its first call; `None` before it.
    pub negotiated_after: Option<Duration>,
}

impl Counters {
    pub(crate) fn new(numbers: impl IntoIterator<Item = u32>) -> Counters {
        let calls = numbers
            .into_iter()
            .map(|n| (n, Counter::default()))
            .collect();
        Counters {
            calls,
            ..Default::default()
        }
    }

    pub(crate) fn snapshot(&self) -> Stats {
        let calls = self
            .calls
            .iter()
            .map(|(n, c)| (*n, c.get()))
            .filter(|(_, c)| *c > 0);
        Stats {
            exits: ExitCounts {
                call: self.exits_call.get(),
                idle: self.exits_idle.get(),
                doorbell: self.exits_doorbell.get(),
                fault: self.exits_fault.get(),
                interrupted: self.exits_interrupted.get(),
                other: self.exits_other.get(),
            },
            calls: calls.collect(),
            refused_calls: self.refused_calls.get(),
            kicks: 0,
            idles: 0,
            events: 0,
            bad_doorbells: self.bad_doorbells.get(),
            log_dropped: self.log_dropped.get(),
            config_events: self.config_events.get(),
            backend_losses: self.backend_losses.get(),
            backend_reconnects: self.backend_reconnects.get(),
            negotiated_after: None,
        }
    }
}
