//! The eventfds of one VM: doorbells, queue events, configuration events, vCPU wake-ups.
//!
//! All are made when the VM is built, because a sandboxed guest cannot be given descriptors later.
//! All are non-blocking; `EAGAIN` on a write means that the event is pending already, so it is
//! success.

use pv_abi::gate::WAKE_DOORBELL;
use std::io;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// The eventfds of one VM.
#[derive(Debug)]
pub(crate) struct EventTable {
    /// By doorbell; `None` where the event has no doorbell (configuration events).
    kicks: Vec<Option<EventFd>>,
    /// By event.
    calls: Vec<EventFd>,
    /// By vCPU.
    wakes: Vec<EventFd>,
}

fn eventfd() -> io::Result<EventFd> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
}

/// Signals an eventfd; a full one is signalled already.
pub(crate) fn signal(event: &EventFd) -> io::Result<()> {
    match event.write(1) {
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(()),
        other => other,
    }
}

impl EventTable {
    /// Events for devices with these queue counts, in order, and for so many vCPUs.
    pub(crate) fn new(queue_counts: &[u16], vcpus: u32) -> io::Result<EventTable> {
        let mut kicks = Vec::new();
        let mut calls = Vec::new();
        for queues in queue_counts {
            for _ in 0..*queues {
                kicks.push(Some(eventfd()?));
                calls.push(eventfd()?);
            }
            kicks.push(None);
            calls.push(eventfd()?);
        }
        let wakes = (0..vcpus).map(|_| eventfd()).collect::<io::Result<_>>()?;
        Ok(EventTable {
            kicks,
            calls,
            wakes,
        })
    }

    /// The eventfd behind a doorbell, if there is one.
    pub(crate) fn doorbell(&self, doorbell: u32) -> Option<&EventFd> {
        match doorbell.checked_sub(WAKE_DOORBELL) {
            Some(vcpu) => self.wake(vcpu),
            None => self.kicks.get(usize::try_from(doorbell).ok()?)?.as_ref(),
        }
    }

    /// The eventfd that the guest rings for this event; `None` where it has no doorbell.
    pub(crate) fn kick(&self, event: u32) -> Option<&EventFd> {
        self.kicks.get(usize::try_from(event).ok()?)?.as_ref()
    }

    /// The eventfd that says this event happened.
    pub(crate) fn call(&self, event: u32) -> Option<&EventFd> {
        self.calls.get(usize::try_from(event).ok()?)
    }

    /// The eventfd that makes a vCPU's `idle` return.
    pub(crate) fn wake(&self, vcpu: u32) -> Option<&EventFd> {
        self.wakes.get(usize::try_from(vcpu).ok()?)
    }

    /// (event, eventfd) of every event.
    pub(crate) fn calls(&self) -> impl Iterator<Item = (u32, &EventFd)> {
        (0u32..).zip(&self.calls)
    }

    /// (vCPU, eventfd) of every vCPU.
    pub(crate) fn wakes(&self) -> impl Iterator<Item = (u32, &EventFd)> {
        (0u32..).zip(&self.wakes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doorbells_follow_the_device_table() {
        let events = EventTable::new(&[2, 1], 2).unwrap();
        let there: Vec<bool> = (0..6).map(|d| events.doorbell(d).is_some()).collect();
        assert_eq!(there, [true, true, false, true, false, false]);
        assert_eq!(events.calls().count(), 5);
        assert!(events.doorbell(WAKE_DOORBELL + 1).is_some());
        assert!(events.doorbell(WAKE_DOORBELL + 2).is_none());
        assert!(events.doorbell(u32::MAX).is_none());
    }

    #[test]
    fn a_full_eventfd_is_success() {
        let events = EventTable::new(&[1], 1).unwrap();
        let event = events.call(0).unwrap();
        event.write(u64::MAX - 1).unwrap();
        signal(event).unwrap();
    }
}
