//! Calls to the driver, put together as it asks for (virtio 1.3 §5.1.6.5: notification coalescing).
//!
//! In come finished buffers, and whether the driver wants to be called for them; out goes one call
//! for so many packets or so much time. A thread that is started with the first such wish makes
//! those whose time is over. As long as nobody asks, a queue looks at one number, and calls.

use super::limits::MAX_COALESCE_MICROS;
use crate::session::Notifier;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// What a driver wants of one queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Wish {
    /// Packets for one call; zero is any number.
    pub(super) packets: u32,
    /// Microseconds that a call may wait; zero is none.
    pub(super) micros: u32,
}

impl Wish {
    /// As in a command; a longer time than any is the longest.
    pub(super) fn parse(bytes: &[u8]) -> Option<Wish> {
        let [a, b, c, d, e, f, g, h] = <[u8; 8]>::try_from(bytes).ok()?;
        Some(Wish {
            packets: u32::from_le_bytes([a, b, c, d]),
            micros: u32::from_le_bytes([e, f, g, h]).min(MAX_COALESCE_MICROS),
        })
    }

    pub(super) fn to_bytes(self) -> [u8; 8] {
        let (packets, micros) = (self.packets.to_le_bytes(), self.micros.to_le_bytes());
        let mut bytes = [0; 8];
        for (to, from) in bytes.iter_mut().zip(packets.into_iter().chain(micros)) {
            *to = from;
        }
        bytes
    }

    /// Every call at once.
    fn is_none(self) -> bool {
        self.micros == 0 || self.packets == 1
    }

    fn pack(self) -> u64 {
        u64::from(self.packets) << 32 | u64::from(self.micros)
    }

    fn unpack(word: u64) -> Wish {
        Wish {
            // Both halves fit.
            packets: (word >> 32) as u32,
            micros: word as u32,
        }
    }
}

/// The calls of a device's queues.
#[derive(Debug)]
pub(super) struct Coalescing {
    wishes: Box<[AtomicU64]>,
    calls: Arc<Calls>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug, Default)]
struct Calls {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// One for each queue at most.
    held: Vec<Held>,
    over: bool,
}

#[derive(Debug)]
struct Held {
    queue: u16,
    call: Arc<Notifier>,
    due: Instant,
    /// Packets until it is made whatever the time.
    left: u64,
}

impl Coalescing {
    /// For so many queues, none of which has its calls put together.
    pub(super) fn new(queues: u16) -> Coalescing {
        Coalescing {
            wishes: (0..queues).map(|_| AtomicU64::default()).collect(),
            calls: Arc::default(),
            thread: Mutex::default(),
        }
    }

    /// What is in force for a queue. `None`: there is no such queue.
    pub(super) fn wish(&self, queue: u16) -> Option<Wish> {
        // Ordering: Relaxed, it stands for itself; a call may be made by the old or the new one.
        let word = self.wishes.get(usize::from(queue))?.load(Ordering::Relaxed);
        Some(Wish::unpack(word))
    }

    /// Sets it. `None`: there is no such queue, or no thread for it.
    pub(super) fn set(&self, queue: u16, wish: Wish) -> Option<()> {
        let place = self.wishes.get(usize::from(queue))?;
        if !wish.is_none() {
            self.start().ok()?;
        }
        // Ordering: Relaxed, as in `wish`.
        place.store(wish.pack(), Ordering::Relaxed);
        // What was held by the old one is not held longer than that.
        self.release(queue);
        Some(())
    }

    /// So many packets of a queue are done; `wanted`: the driver is to be called. Whether that
    /// makes a call, now or later.
    pub(super) fn done(
        &self,
        queue: u16,
        packets: usize,
        wanted: bool,
        call: &Arc<Notifier>,
    ) -> bool {
        let wish = self.wish(queue).unwrap_or_default();
        if wish.is_none() {
            if wanted {
                call.signal();
            }
            return wanted;
        }
        self.hold(queue, packets as u64, wanted, call, wish)
    }

    fn hold(
        &self,
        queue: u16,
        packets: u64,
        wanted: bool,
        call: &Arc<Notifier>,
        wish: Wish,
    ) -> bool {
        let mut state = self.calls.lock();
        if let Some(at) = state.held.iter().position(|held| held.queue == queue) {
            let over = state.held.get_mut(at).is_some_and(|held| {
                held.left = held.left.saturating_sub(packets);
                held.left == 0
            });
            if over {
                let held = state.held.swap_remove(at);
                drop(state);
                held.call.signal();
            }
            return false;
        }
        if !wanted {
            return false;
        }
        let most = match wish.packets {
            0 => u64::MAX,
            packets => packets.into(),
        };
        let left = most.saturating_sub(packets);
        if left == 0 {
            drop(state);
            call.signal();
            return true;
        }
        state.held.push(Held {
            queue,
            call: Arc::clone(call),
            due: Instant::now() + Duration::from_micros(wish.micros.into()),
            left,
        });
        drop(state);
        self.calls.changed.notify_one();
        true
    }

    /// Makes a queue's call, if one is held.
    pub(super) fn release(&self, queue: u16) {
        let mut state = self.calls.lock();
        if let Some(at) = state.held.iter().position(|held| held.queue == queue) {
            let held = state.held.swap_remove(at);
            drop(state);
            held.call.signal();
        }
    }

    /// As at first: what is held is made.
    pub(super) fn reset(&self) {
        for queue in 0.. {
            if self.set(queue, Wish::default()).is_none() {
                break;
            }
        }
    }

    fn start(&self) -> io::Result<()> {
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if thread.is_none() {
            let calls = Arc::clone(&self.calls);
            let builder = std::thread::Builder::new().name("net-calls".into());
            *thread = Some(builder.spawn(move || calls.make())?);
        }
        Ok(())
    }
}

impl Drop for Coalescing {
    fn drop(&mut self) {
        self.calls.lock().over = true;
        self.calls.changed.notify_one();
        let thread = self.thread.get_mut();
        if let Some(thread) = thread.unwrap_or_else(PoisonError::into_inner).take() {
            // It does not panic.
            let _ = thread.join();
        }
    }
}

impl Calls {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes each call when its time is over.
    fn make(&self) {
        let mut state = self.lock();
        while !state.over {
            let now = Instant::now();
            let mut at = 0;
            while let Some(held) = state.held.get(at) {
                if held.due <= now {
                    // A write to an eventfd that does not wait.
                    state.held.swap_remove(at).call.signal();
                } else {
                    at += 1;
                }
            }
            let next = state.held.iter().map(|held| held.due).min();
            state = match next {
                Some(due) => {
                    let left = due.saturating_duration_since(now);
                    let waited = self.changed.wait_timeout(state, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                None => (self.changed.wait(state)).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::readiness::Event;
    use std::fs::File;
    use std::io::Read;

    /// Where the calls arrive.
    struct Called(File);

    impl Called {
        /// Calls since the last look.
        fn count(&self) -> u64 {
            let mut count = [0; 8];
            match (&self.0).read_exact(&mut count) {
                Ok(()) => u64::from_ne_bytes(count),
                Err(_) => 0,
            }
        }
    }

    fn call() -> (Called, Arc<Notifier>) {
        let event = File::from(Event::new().unwrap().duplicate().unwrap());
        let notifier = Arc::new(Notifier::default());
        notifier
            .set(Some(event.try_clone().unwrap().into()))
            .unwrap();
        (Called(event), notifier)
    }

    const HOUR: u32 = 3_600_000_000;

    fn wish(packets: u32, micros: u32) -> Wish {
        Wish { packets, micros }
    }

    #[test]
    fn nothing_is_held_unless_asked_for() {
        let calls = Coalescing::new(3);
        let (event, notifier) = call();
        for wish in [wish(0, 0), wish(1, HOUR), wish(100, 0)] {
            calls.set(0, wish).unwrap();
            assert!(calls.done(0, 1, true, &notifier));
            assert_eq!(event.count(), 1);
            assert!(!calls.done(0, 1, false, &notifier));
            assert_eq!(event.count(), 0);
        }
        assert!(calls.set(3, wish(0, 0)).is_none());
        assert_eq!(calls.wish(3), None);
    }

    #[test]
    fn so_many_packets_make_one_call() {
        let calls = Coalescing::new(3);
        calls.set(1, wish(10, HOUR)).unwrap();
        assert_eq!(calls.wish(1), Some(wish(10, HOUR)));
        let (event, notifier) = call();
        for _ in 0..3 {
            // Counted from when the driver wants to know.
            assert!(!calls.done(1, 50, false, &notifier));
            assert!(calls.done(1, 4, true, &notifier));
            assert!(!calls.done(1, 5, true, &notifier));
            assert_eq!(event.count(), 0);
            assert!(!calls.done(1, 1, false, &notifier));
            assert_eq!(event.count(), 1);
        }
        assert!(calls.done(1, 10, true, &notifier));
        assert_eq!(event.count(), 1);
        // Other queues are not concerned.
        let (other, others) = call();
        assert!(calls.done(2, 1, true, &others));
        assert_eq!(other.count(), 1);
    }

    #[test]
    fn a_call_waits_so_long_and_no_queue_ends_with_one_held() {
        let calls = Coalescing::new(2);
        let (event, notifier) = call();
        let come = || {
            let deadline = Instant::now() + Duration::from_secs(20);
            while event.count() == 0 {
                assert!(Instant::now() < deadline, "the call was not made");
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        for packets in [0, 100] {
            calls.set(0, wish(packets, 1000)).unwrap();
            calls.done(0, 1, true, &notifier);
            come();
        }
        calls.set(0, wish(0, HOUR)).unwrap();
        calls.done(0, 1 << 40, true, &notifier);
        assert_eq!(event.count(), 0);
        calls.release(0);
        assert_eq!(event.count(), 1);
        calls.done(0, 1, true, &notifier);
        calls.reset();
        assert_eq!(event.count(), 1);
        assert_eq!(calls.wish(0), Some(Wish::default()));
    }

    #[test]
    fn a_wish_has_a_bound() {
        let asked = wish(7, u32::MAX).to_bytes();
        let heard = Wish::parse(&asked).unwrap();
        assert_eq!(heard, wish(7, MAX_COALESCE_MICROS));
        assert_eq!(Wish::unpack(heard.pack()), heard);
        assert_eq!(Wish::parse(&asked[1..]), None);
    }
}
