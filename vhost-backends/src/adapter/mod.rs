//! Serves any `vhost_user_backend::VhostUserBackend` with this crate's session.
//!
//! In comes a backend written for the server loop of `vhost-user-backend`; out comes a
//! [`Device`]. The backend's view stays: vrings by thread as `queues_per_thread` says, never two
//! calls of `handle_event` at once for one of its threads, `update_memory` before the first event
//! on new memory, `stop_vring` before a queue's state is read.
//!
//! What changes is around it: real frontends are answered, connections come one after the other,
//! and an error of `handle_event` ends that queue with its error event and not a thread in
//! silence. The ring rules of [`crate::ring`] are *not* enforced: the backend walks its own rings.

mod queue;
#[cfg(test)]
mod tests;

use crate::limits::{MAX_CONFIG_LEN, MAX_QUEUES};
use crate::session::{ConfigRefused, Device, QueueSetup, QueueWorker};
use pv_abi::virtio::feature;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use vhost::vhost_user::VhostUserVirtioFeatures;
use vhost_user_backend::{VhostUserBackend, VringT};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

pub(crate) type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// A `VhostUserBackend` as a [`Device`].
pub struct Adapter<B: VhostUserBackend<Bitmap = ()>> {
    inner: Arc<Inner<B>>,
}

pub(crate) struct Inner<B: VhostUserBackend<Bitmap = ()>> {
    pub(crate) backend: B,
    memory: Memory,
    /// The memory that the backend knows.
    known: Mutex<Option<Arc<GuestMemoryMmap>>>,
    pub(crate) vrings: Vec<B::Vring>,
    pub(crate) threads: Vec<BackendThread<B::Vring>>,
}

/// What the backend takes for one of its threads.
pub(crate) struct BackendThread<V> {
    pub(crate) vrings: Vec<V>,
    /// Held during `handle_event`.
    pub(crate) turn: Mutex<()>,
}

impl<B: VhostUserBackend<Bitmap = ()>> std::fmt::Debug for Adapter<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Adapter").finish_non_exhaustive()
    }
}

impl<B> Adapter<B>
where
    B: VhostUserBackend<Bitmap = ()> + 'static,
    B::Vring: Clone + Send + Sync + 'static,
{
    /// A device that `backend` serves. Fails on more queues than [`MAX_QUEUES`], a queue size
    /// that is not a power of two, or a queue that belongs to none of the backend's threads.
    pub fn new(backend: B) -> io::Result<Adapter<B>> {
        let invalid = |what| io::Error::new(io::ErrorKind::InvalidInput, what);
        let count = backend.num_queues();
        if count == 0 || count > usize::from(MAX_QUEUES) {
            return Err(invalid("number of queues"));
        }
        let size = u16::try_from(backend.max_queue_size()).map_err(|_| invalid("queue size"))?;
        let memory = Memory::new(GuestMemoryMmap::new());
        let vrings = (0..count)
            .map(|_| B::Vring::new(memory.clone(), size).map_err(|_| invalid("queue size")))
            .collect::<io::Result<Vec<_>>>()?;
        let masks = backend.queues_per_thread();
        if (0..count).any(|q| !masks.iter().any(|mask| mask >> q & 1 == 1)) {
            return Err(invalid("a queue without a thread"));
        }
        let threads = masks
            .iter()
            .map(|mask| BackendThread {
                vrings: (vrings.iter().enumerate())
                    .filter(|(q, _)| mask >> q & 1 == 1)
                    .map(|(_, vring)| vring.clone())
                    .collect(),
                turn: Mutex::new(()),
            })
            .collect();
        Ok(Adapter {
            inner: Arc::new(Inner {
                backend,
                memory,
                known: Mutex::new(None),
                vrings,
                threads,
            }),
        })
    }

    /// The backend.
    pub fn backend(&self) -> &B {
        &self.inner.backend
    }
}

impl<B: VhostUserBackend<Bitmap = ()>> Inner<B> {
    /// Which of the backend's threads a queue belongs to, and its place there.
    pub(crate) fn place(&self, queue: u16) -> Option<(usize, u16)> {
        let masks = self.backend.queues_per_thread();
        let thread = masks.iter().position(|mask| mask >> queue & 1 == 1)?;
        let before = masks.get(thread)? & ((1u64 << queue) - 1);
        Some((thread, u16::try_from(before.count_ones()).ok()?))
    }

    /// Tells the backend about memory that it does not know yet. No queue runs on the old one:
    /// the session drains all before it exchanges memory.
    fn set_memory(&self, memory: &Arc<GuestMemoryMmap>) -> io::Result<()> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.as_ref().is_some_and(|k| Arc::ptr_eq(k, memory)) {
            return Ok(());
        }
        let lock = self.memory.lock().map_err(|_| io::Error::other("memory"))?;
        lock.replace(GuestMemoryMmap::clone(memory));
        self.backend.update_memory(self.memory.clone())?;
        *known = Some(Arc::clone(memory));
        Ok(())
    }
}

impl<B> Device for Adapter<B>
where
    B: VhostUserBackend<Bitmap = ()> + 'static,
    B::Vring: Clone + Send + Sync + 'static,
{
    fn queue_count(&self) -> u16 {
        // At most MAX_QUEUES.
        self.inner.vrings.len() as u16
    }

    fn features(&self) -> u64 {
        // The backend walks its own rings: no packed ones, and no dirty log.
        self.inner.backend.features()
            & !(feature::RING_PACKED
                | VhostUserVirtioFeatures::LOG_ALL.bits()
                | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits())
    }

    fn serves_through_ring(&self) -> bool {
        false
    }

    fn config(&self) -> Vec<u8> {
        self.inner.backend.get_config(0, MAX_CONFIG_LEN as u32)
    }

    fn read_config(&self, offset: u32, len: u32) -> Vec<u8> {
        self.inner.backend.get_config(offset, len)
    }

    fn write_config(&self, offset: u32, data: &[u8]) -> Result<(), ConfigRefused> {
        let written = self.inner.backend.set_config(offset, data);
        written.map_err(|_| ConfigRefused)
    }

    fn open_queue(&self, setup: QueueSetup) -> io::Result<Box<dyn QueueWorker>> {
        self.inner.set_memory(setup.ring.memory())?;
        self.inner.backend.acked_features(setup.features);
        self.inner
            .backend
            .set_event_idx(setup.features & feature::EVENT_IDX != 0);
        queue::spawn(Arc::clone(&self.inner), setup)
    }

    fn reset(&self) {
        self.inner.backend.reset_device();
    }
}
