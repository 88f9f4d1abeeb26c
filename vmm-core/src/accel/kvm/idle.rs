//! Waiting on behalf of an idle vCPU: one epoll over its call eventfds and its wake eventfd.
#![allow(unsafe_code)]
// UNSAFETY: epoll_pwait2, for its nanosecond time limit, has no wrapper.

use crate::memory::GuestMemory;
use crate::vm::events::EventTable;
use pv_abi::gate::IDLE_FOREVER;
use pv_abi::layout::{VMM_BASE, vcpu_page};
use pv_abi::limits::MAX_POLL;
use pv_abi::vcpu::{EVENT_WORDS, VcpuPage};
use std::collections::BTreeSet;
use std::io;
use std::mem::offset_of;
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// Marks the wake eventfd among the epoll's data.
const WAKE: u64 = u64::MAX;
/// Events taken from the kernel at once.
const BATCH: usize = 16;

/// The events of one vCPU.
pub(super) struct IdleSet {
    epoll: Epoll,
    events: Arc<EventTable>,
    vcpu: u32,
    /// Events that are waited for; as many as the process accel could hold, so that a guest meets
    /// the same limit everywhere.
    waiting: Mutex<BTreeSet<u32>>,
}

impl IdleSet {
    pub(super) fn new(events: Arc<EventTable>, vcpu: u32) -> io::Result<IdleSet> {
        let epoll = Epoll::new()?;
        if let Some(wake) = events.wake(vcpu) {
            let event = EpollEvent::new(EventSet::IN, WAKE);
            epoll.ctl(ControlOperation::Add, wake.as_raw_fd(), event)?;
        }
        Ok(IdleSet {
            epoll,
            events,
            vcpu,
            waiting: Mutex::default(),
        })
    }

    /// Waits for this event from now on, or no longer.
    ///
    /// Edge-triggered, and never read: whoever signals it has the same open file, and could make a
    /// read of it block.
    pub(super) fn set(&self, event: u32, on: bool) -> io::Result<()> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.contains(&event) == on {
            return Ok(());
        }
        if on && waiting.len() + 1 >= MAX_POLL {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let Some(call) = self.events.call(event) else {
            return Ok(());
        };
        let entry = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, u64::from(event));
        let operation = if on {
            ControlOperation::Add
        } else {
            ControlOperation::Delete
        };
        self.epoll.ctl(operation, call.as_raw_fd(), entry)?;
        if on {
            waiting.insert(event);
        } else {
            waiting.remove(&event);
        }
        Ok(())
    }

    /// Carries out one `idle` call: waits, and sets the pending bits of what fired.
    pub(super) fn wait(&self, memory: &GuestMemory) -> io::Result<()> {
        let page = vcpu_page(self.vcpu) - VMM_BASE;
        let pending = page + offset_of!(VcpuPage, pending) as u64;
        let mut limit_ns = memory
            .vmm
            .word64(page + offset_of!(VcpuPage, idle_ns) as u64)?
            .load(Ordering::Relaxed);
        for word in 0..EVENT_WORDS as u64 {
            // Ordering: Acquire pairs with the Release of whoever set the bit.
            if memory
                .vmm
                .word64(pending + word * 8)?
                .load(Ordering::Acquire)
                != 0
            {
                limit_ns = 0;
            }
        }
        let mut ready = [EpollEvent::default(); BATCH];
        let count = self.wait_ns(limit_ns, &mut ready)?;
        for entry in ready.iter().take(count) {
            if entry.data() == WAKE {
                // Only this process has it. WouldBlock: a spurious return is legal.
                let _ = self.events.wake(self.vcpu).map(|e| e.read());
                continue;
            }
            let Ok(event) = u32::try_from(entry.data()) else {
                continue;
            };
            let word = memory.vmm.word64(pending + u64::from(event / 64) * 8)?;
            // Ordering: Release, so that who takes the bit sees what the event announced.
            word.fetch_or(1 << (event % 64), Ordering::Release);
            // Ordering: a statistic. The host's to count, as it is the host that waits.
            let events = page + offset_of!(VcpuPage, events) as u64;
            memory.vmm.word64(events)?.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    fn wait_ns(&self, limit_ns: u64, ready: &mut [EpollEvent; BATCH]) -> io::Result<usize> {
        let limit = libc::timespec {
            tv_sec: i64::try_from(limit_ns / 1_000_000_000).unwrap_or(i64::MAX),
            tv_nsec: i64::try_from(limit_ns % 1_000_000_000).unwrap_or(0),
        };
        let limit: *const libc::timespec = if limit_ns == IDLE_FOREVER {
            std::ptr::null()
        } else {
            &raw const limit
        };
        // SAFETY: `ready` holds BATCH entries of the kernel's layout (EpollEvent is transparent
        // over epoll_event); the time limit, if any, lives until the call returns.
        let count = unsafe {
            libc::syscall(
                libc::SYS_epoll_pwait2,
                self.epoll.as_raw_fd(),
                ready.as_mut_ptr(),
                BATCH,
                limit,
                std::ptr::null::<libc::sigset_t>(),
                0,
            )
        };
        match usize::try_from(count) {
            Ok(count) => Ok(count),
            Err(_) => match io::Error::last_os_error() {
                e if e.kind() == io::ErrorKind::Interrupted => Ok(0),
                e => Err(e),
            },
        }
    }
}
