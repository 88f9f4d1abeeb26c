//! The devices that a VM shall have, and the slots that they get.

use super::events::EventTable;
use super::stats::Counters;
use crate::device::{DeviceInfo, DeviceIo, Slot};
use crate::memory::GuestMemory;
use std::io;
use std::sync::Arc;

/// A device that the VM shall have.
pub(super) struct Wanted {
    pub(super) kind: u32,
    pub(super) name: String,
    pub(super) queues: u16,
    pub(super) queue_size: u16,
    /// Index among the devices with a vhost-user backend, which have arenas of their own.
    pub(super) remote: Option<usize>,
}

/// The device table's slots for these, in their order; `local`: arena 0 is the in-process devices'.
pub(super) fn slots(
    wants: &[Wanted],
    memory: &Arc<GuestMemory>,
    events: &Arc<EventTable>,
    counters: &Arc<Counters>,
    local: bool,
) -> io::Result<Vec<Arc<Slot>>> {
    let mut event_base = 0;
    let mut slots = Vec::new();
    for (index, want) in (0u32..).zip(wants) {
        // Arena 0 is the in-process devices', if there are any.
        let arena = want.remote.map_or(0, |r| r + usize::from(local));
        let found = memory.arenas.get(arena).cloned();
        let found = found.ok_or_else(|| io::Error::other("a device has no arena"))?;
        let info = DeviceInfo {
            index,
            kind: want.kind,
            name: want.name.clone(),
            arena: u32::try_from(arena).map_err(io::Error::other)?,
            event_base,
            queue_count: want.queues,
            max_queue_size: want.queue_size,
        };
        let io = DeviceIo {
            arena: found,
            events: Arc::clone(events),
            event_base,
        };
        event_base += u32::from(want.queues) + 1;
        let (memory, counters) = (Arc::clone(memory), Arc::clone(counters));
        slots.push(Arc::new(Slot::new(info, io, memory, counters)));
    }
    Ok(slots)
}
