//! The device table and the queue set-up structures.
//!
//! | state | means | leaves by |
//! |---|---|---|
//! | absent | no backend behind it now | the backend appears: negotiated |
//! | negotiated | offered features and configuration are valid | `DEVICE_ACTIVATE`: active |
//! | active | its queues are served | `DEVICE_RESET`: negotiated or absent; loss: needs-reset |
//! | needs-reset | its queues are dead | `DEVICE_RESET`: negotiated or absent |
//!
//! Every change of state that the guest did not ask for sets the configuration event; `generation`
//! goes up each time queues die or come alive.

use crate::assert_layout;
use crate::limits::{MAX_CONFIG, MAX_DEVICES, MAX_QUEUES, SCRATCH_LEN};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Device kinds: the virtio device IDs (virtio 1.3 §5).
pub mod kind {
    /// Network card.
    pub const NET: u32 = 1;
    /// Block device.
    pub const BLOCK: u32 = 2;
    /// Console.
    pub const CONSOLE: u32 = 3;
    /// Entropy source.
    pub const RNG: u32 = 4;
}

/// The state of a device, as the device table shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum DeviceState {
    /// No backend behind it now.
    Absent = 0,
    /// Offered features and configuration are valid; it may be activated.
    Negotiated = 1,
    /// Its queues are served.
    Active = 2,
    /// Its queues are dead until a reset.
    NeedsReset = 3,
}

impl DeviceState {
    /// The state with this number.
    pub const fn from_code(code: u32) -> Option<DeviceState> {
        match code {
            0 => Some(DeviceState::Absent),
            1 => Some(DeviceState::Negotiated),
            2 => Some(DeviceState::Active),
            3 => Some(DeviceState::NeedsReset),
            _ => None,
        }
    }

    /// The number in the device table.
    pub const fn code(self) -> u32 {
        self as u32
    }
}

/// One entry of the device table. Read-only for the guest.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(64))]
pub struct DeviceEntry {
    /// [`kind`].
    pub kind: u32,
    /// [`DeviceState`].
    pub state: u32,
    /// Goes up each time queues die or come alive.
    pub generation: u32,
    /// Event and doorbell of queue 0; queue `q` has `event_base + q`, and the configuration event
    /// is `event_base + queue_count`.
    pub event_base: u32,
    /// Queues that the device has.
    pub queue_count: u16,
    /// Most entries that each queue may have.
    pub max_queue_size: u16,
    /// Index of the arena in which this device's rings and buffers lie.
    pub arena: u32,
    /// Virtio feature bits offered.
    pub features: u64,
    /// First byte of the arena.
    pub arena_gpa: u64,
    /// Bytes in the arena.
    pub arena_len: u64,
    /// Seqlock over `config`: odd while the host writes.
    pub config_seq: u32,
    /// Bytes of `config` in use.
    pub config_len: u32,
    /// The embedder's name for the device, UTF-8, padded with zeroes.
    pub name: [u8; 32],
    /// Zero.
    pub reserved: [u8; 32],
    /// Configuration space, as virtio lays it out for this kind.
    pub config: [u8; MAX_CONFIG],
    /// Zero.
    pub padding: [u8; 136],
}
assert_layout!(DeviceEntry, size 512, align 64, kind @ 0, state @ 4, generation @ 8,
    event_base @ 12, queue_count @ 16, max_queue_size @ 18, arena @ 20, features @ 24,
    arena_gpa @ 32, arena_len @ 40, config_seq @ 48, config_len @ 52, name @ 56,
    reserved @ 88, config @ 120, padding @ 376);

const _: () = assert!(
    crate::layout::DEVICE_TABLE_BASE + MAX_DEVICES as u64 * size_of::<DeviceEntry>() as u64
        <= crate::layout::CLOCK_PAGE_BASE
);

/// Head of the structure that `DEVICE_ACTIVATE` reads; `queue_count` × [`QueueSetup`] follow it.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DeviceSetup {
    /// Accepted virtio features: a subset of those offered.
    pub features: u64,
    /// Queues that follow: 1 to the device's `queue_count`.
    pub queue_count: u32,
    /// The vCPU that gets the configuration event.
    pub config_vcpu: u32,
}
assert_layout!(DeviceSetup, size 16, align 8, features @ 0, queue_count @ 8, config_vcpu @ 12);

/// One split virtqueue (virtio 1.3 §2.7). All three parts lie in the device's arena.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct QueueSetup {
    /// Address of the descriptor table, a multiple of 16.
    pub desc: u64,
    /// Address of the available ring, a multiple of 2.
    pub avail: u64,
    /// Address of the used ring, a multiple of 4.
    pub used: u64,
    /// Entries: a power of two, 2 to the device's `max_queue_size`.
    pub size: u16,
    /// Zero.
    pub flags: u16,
    /// The vCPU that waits for this queue.
    pub vcpu: u32,
}
assert_layout!(QueueSetup, size 32, align 8, desc @ 0, avail @ 8, used @ 16, size @ 24,
    flags @ 26, vcpu @ 28);

const _: () = assert!(
    size_of::<DeviceSetup>() + MAX_QUEUES as usize * size_of::<QueueSetup>() <= SCRATCH_LEN
);
