//! Where an engine without io_uring sleeps.

use super::{Wake, WakeSources};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

const KICK: u64 = 0;
const STOP: u64 = 1;
const OTHER: u64 = 2;

/// One epoll on the kick, the stop event and what the engine adds.
#[derive(Debug)]
pub(super) struct Sleeper {
    epoll: Epoll,
    looks: u32,
    /// The stop event was seen, which stays set.
    stop: bool,
}

/// Looks for the stop event between two that cost a system call.
const LOOKS: u32 = 64;

impl Sleeper {
    pub(super) fn new(wake: WakeSources<'_>) -> io::Result<Sleeper> {
        let epoll = Epoll::new()?;
        // Edge-triggered, so that the kick need not be drained: a read could block on a peer.
        let kick = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, KICK);
        epoll.ctl(ControlOperation::Add, wake.kick.as_raw_fd(), kick)?;
        // Told once, and remembered: it stays set, and a drain that waits after it must sleep.
        let stop = EpollEvent::new(EventSet::IN | EventSet::ONE_SHOT, STOP);
        epoll.ctl(ControlOperation::Add, wake.stop.as_raw_fd(), stop)?;
        Ok(Sleeper {
            epoll,
            looks: 0,
            stop: false,
        })
    }

    /// Also wakes for this descriptor.
    pub(super) fn watch(&self, fd: BorrowedFd<'_>, events: EventSet) -> io::Result<()> {
        let event = EpollEvent::new(events, OTHER);
        self.epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), event)
    }

    /// Changes what it wakes for on a watched descriptor.
    pub(super) fn change(&self, fd: BorrowedFd<'_>, events: EventSet) -> io::Result<()> {
        let event = EpollEvent::new(events, OTHER);
        self.epoll
            .ctl(ControlOperation::Modify, fd.as_raw_fd(), event)
    }

    /// No longer wakes for this descriptor.
    pub(super) fn forget(&self, fd: BorrowedFd<'_>) {
        // One that is not watched is as good.
        let _ = self.epoll.ctl(
            ControlOperation::Delete,
            fd.as_raw_fd(),
            EpollEvent::default(),
        );
    }

    /// Looks, without waiting.
    pub(super) fn look(&mut self) -> io::Result<Wake> {
        self.wait(0)
    }

    /// Looks once in a while: for engines that look so often that it would be most of their cost.
    pub(super) fn glance(&mut self) -> io::Result<Wake> {
        self.looks = (self.looks + 1) % LOOKS;
        if self.looks == 0 {
            self.look()
        } else {
            Ok(Wake { stop: self.stop })
        }
    }

    /// Waits until something happens.
    pub(super) fn sleep(&mut self) -> io::Result<Wake> {
        self.wait(-1)
    }

    /// Waits until something happens or the time is over.
    pub(super) fn sleep_for(&mut self, time: std::time::Duration) -> io::Result<Wake> {
        // Rounded up, so that a wait does not end before its time.
        let ms = time.as_nanos().div_ceil(1_000_000);
        self.wait(i32::try_from(ms).unwrap_or(i32::MAX))
    }

    fn wait(&mut self, timeout_ms: i32) -> io::Result<Wake> {
        let mut events = [EpollEvent::default(); 4];
        let count = match self.epoll.wait(timeout_ms, &mut events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            result => result?,
        };
        self.stop |= events.iter().take(count).any(|e| e.data() == STOP);
        Ok(Wake { stop: self.stop })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::readiness::Event;
    use std::os::fd::AsFd;
    use std::time::{Duration, Instant};

    #[test]
    fn a_stop_is_told_and_then_slept_through() {
        let (kick, stop) = (Event::new().unwrap(), Event::new().unwrap());
        let mut sleeper = Sleeper::new(WakeSources {
            kick: kick.as_fd(),
            stop: stop.as_fd(),
        })
        .unwrap();
        assert!(!sleeper.look().unwrap().stop);
        stop.set();
        assert!(sleeper.sleep().unwrap().stop);
        let time = Duration::from_millis(50);
        let start = Instant::now();
        assert!(sleeper.sleep_for(time).unwrap().stop, "remembered");
        assert!(start.elapsed() >= time, "a drain would spin");
    }
}
