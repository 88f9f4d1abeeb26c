//! Reading the device table, which the host may be writing.
#![allow(unsafe_code)]
// UNSAFETY: the table is memory that the host writes while we read; raw volatile access only.

use core::ptr::NonNull;
use core::sync::atomic::{Ordering, fence};
use pv_abi::device::{DeviceEntry, DeviceState};
use pv_abi::limits::{MAX_CONFIG, MAX_DEVICES};

/// Looks at a configuration that the host keeps changing before taking it as it is.
///
/// The host writes for well under a microsecond at a time; only one that is stuck gets us here.
const CONFIG_RETRIES: usize = 10_000;

/// The device table: a pointer and a count, cheap to copy.
#[derive(Clone, Copy, Debug)]
pub struct DeviceTable {
    base: NonNull<DeviceEntry>,
    count: u32,
}

// SAFETY: the pointer is only ever read through, with volatile accesses, and its target lives as
// long as the program (duty of `new`).
unsafe impl Send for DeviceTable {}
// SAFETY: as above.
unsafe impl Sync for DeviceTable {}

/// What the device table says about one device, at one moment.
#[derive(Clone, Copy, Debug)]
pub struct DeviceInfo {
    /// Its index in the table.
    pub index: u32,
    /// Its virtio device ID: [`pv_abi::device::kind`].
    pub kind: u32,
    /// Event and doorbell of queue 0.
    pub event_base: u32,
    /// Queues that it has.
    pub queue_count: u16,
    /// Most entries that each queue may have.
    pub max_queue_size: u16,
    /// The arena for its rings and buffers.
    pub arena: u32,
    /// Virtio feature bits offered.
    pub features: u64,
    name: [u8; 32],
}

impl DeviceInfo {
    /// The embedder's name for the device; empty if it is not UTF-8.
    pub fn name(&self) -> &str {
        let len = self.name.iter().position(|&b| b == 0).unwrap_or(32);
        core::str::from_utf8(&self.name[..len]).unwrap_or("")
    }

    /// The event that says that the device's state or configuration changed.
    pub fn config_event(&self) -> u32 {
        self.event_base.wrapping_add(u32::from(self.queue_count))
    }

    /// Event and doorbell of a queue.
    pub fn queue_event(&self, queue: u16) -> u32 {
        self.event_base.wrapping_add(u32::from(queue))
    }
}

/// Reads one field of an entry, without ever making a reference to it.
macro_rules! field {
    ($entry:expr, $field:ident) => {{
        let entry: *const DeviceEntry = $entry;
        // SAFETY: the entry is in bounds of the table, which is readable for ever (`new`); the field
        // is aligned by the type's layout and volatile, because the host may write it.
        unsafe { core::ptr::read_volatile(&raw const (*entry).$field) }
    }};
}

impl DeviceTable {
    /// A table of `count` entries at `base`; at most [`MAX_DEVICES`] are used.
    ///
    /// # Safety
    ///
    /// `base` points at that many entries, readable as long as the program runs.
    pub unsafe fn new(base: NonNull<DeviceEntry>, count: u32) -> Self {
        DeviceTable {
            base,
            count: count.min(MAX_DEVICES),
        }
    }

    /// Entries in use.
    pub fn len(&self) -> u32 {
        self.count
    }

    /// Whether there is no device.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The first device of this kind whose name is `name`; any name if `None`.
    pub fn find(&self, kind: u32, name: Option<&str>) -> Option<DeviceInfo> {
        (0..self.count)
            .filter_map(|index| self.info(index))
            .find(|info| info.kind == kind && name.is_none_or(|name| info.name() == name))
    }

    /// The devices.
    pub fn iter(&self) -> impl Iterator<Item = DeviceInfo> + use<> {
        let table = *self;
        (0..table.count).filter_map(move |index| table.info(index))
    }

    /// What the table says about a device now.
    pub fn info(&self, index: u32) -> Option<DeviceInfo> {
        let entry = self.entry(index)?;
        Some(DeviceInfo {
            index,
            kind: field!(entry, kind),
            event_base: field!(entry, event_base),
            queue_count: field!(entry, queue_count),
            max_queue_size: field!(entry, max_queue_size),
            arena: field!(entry, arena),
            features: field!(entry, features),
            name: field!(entry, name),
        })
    }

    /// State and generation of a device; `None` if there is none or its state is no known number.
    ///
    /// Two plain loads from a page that stays in the cache: cheap enough for every poll.
    pub fn state(&self, index: u32) -> Option<(DeviceState, u32)> {
        let entry = self.entry(index)?;
        let state = DeviceState::from_code(field!(entry, state))?;
        let generation = field!(entry, generation);
        // Ordering: Acquire pairs with the host's release of the state, so that what it wrote before
        // (features, configuration) is seen by the reads that come after this.
        fence(Ordering::Acquire);
        Some((state, generation))
    }

    /// The configuration's sequence number: it moves whenever the host writes the configuration.
    pub fn config_seq(&self, index: u32) -> Option<u32> {
        Some(field!(self.entry(index)?, config_seq))
    }

    /// A consistent copy of the configuration space, its bytes in use, and its sequence number.
    pub fn config(&self, index: u32) -> Option<([u8; MAX_CONFIG], usize, u32)> {
        let entry = self.entry(index)?;
        let mut tries = 0;
        loop {
            let before = field!(entry, config_seq);
            // Ordering: Acquire keeps the reads of the data after the read of the sequence number.
            fence(Ordering::Acquire);
            let config: [u8; MAX_CONFIG] = field!(entry, config);
            let len = field!(entry, config_len) as usize;
            // Ordering: Acquire keeps the reads of the data before the second read of the number.
            fence(Ordering::Acquire);
            let after = field!(entry, config_seq);
            tries += 1;
            if (before & 1 == 0 && before == after) || tries == CONFIG_RETRIES {
                return Some((config, len.min(MAX_CONFIG), after));
            }
            core::hint::spin_loop();
        }
    }

    fn entry(&self, index: u32) -> Option<*const DeviceEntry> {
        if index >= self.count {
            return None;
        }
        // SAFETY: `index` is in bounds of the table (`new`).
        Some(unsafe { self.base.as_ptr().add(index as usize) })
    }
}
