//! A spin lock, the one lock that a guest without a scheduler can have.
//!
//! A vCPU that waits for it burns its time slice, so holders do bounded work only and never idle.
#![allow(unsafe_code)]
// UNSAFETY: a lock gives out `&mut` to what it guards; the atomic flag is what makes that sound.

use core::cell::UnsafeCell;
use core::fmt;
use core::ops::{Deref, DerefMut};
use core::sync::atomic::{AtomicBool, Ordering};

/// A value behind a spin lock.
pub struct SpinLock<T: ?Sized> {
    locked: AtomicBool,
    value: UnsafeCell<T>,
}

// SAFETY: the lock hands the value to one thread at a time, which is all that `Send` asks for.
unsafe impl<T: ?Sized + Send> Send for SpinLock<T> {}
// SAFETY: as above; a shared lock never gives out two references at once.
unsafe impl<T: ?Sized + Send> Sync for SpinLock<T> {}

impl<T> SpinLock<T> {
    /// A lock around `value`.
    pub const fn new(value: T) -> Self {
        SpinLock {
            locked: AtomicBool::new(false),
            value: UnsafeCell::new(value),
        }
    }
}

impl<T> SpinLock<T> {
    /// The value, without the lock.
    pub fn into_inner(self) -> T {
        self.value.into_inner()
    }
}

impl<T: ?Sized> SpinLock<T> {
    /// The value, which nobody else can be at.
    pub fn get_mut(&mut self) -> &mut T {
        self.value.get_mut()
    }

    /// Waits for the lock. A holder that locks again waits for ever: a bug of the caller.
    pub fn lock(&self) -> SpinGuard<'_, T> {
        loop {
            if let Some(guard) = self.try_lock() {
                return guard;
            }
            // Ordering: Relaxed, a hint that avoids bouncing the line; `try_lock` synchronises.
            while self.locked.load(Ordering::Relaxed) {
                core::hint::spin_loop();
            }
        }
    }

    /// The lock if it is free now.
    pub fn try_lock(&self) -> Option<SpinGuard<'_, T>> {
        // Ordering: Acquire on success pairs with the Release in `drop`, so that everything the
        // last holder wrote is visible; failure publishes nothing.
        self.locked
            .compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed)
            .ok()
            .map(|_| SpinGuard { lock: self })
    }
}

impl<T: Default> Default for SpinLock<T> {
    fn default() -> Self {
        SpinLock::new(T::default())
    }
}

impl<T: ?Sized> fmt::Debug for SpinLock<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SpinLock").finish_non_exhaustive()
    }
}

/// The value of a [`SpinLock`] while it is held.
pub struct SpinGuard<'a, T: ?Sized> {
    lock: &'a SpinLock<T>,
}

impl<T: ?Sized> Deref for SpinGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: the guard exists only while `locked` is set by its creator.
        unsafe { &*self.lock.value.get() }
    }
}

impl<T: ?Sized> DerefMut for SpinGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as in `deref`, and `&mut self` makes this the guard's only borrow.
        unsafe { &mut *self.lock.value.get() }
    }
}

impl<T: ?Sized> Drop for SpinGuard<'_, T> {
    fn drop(&mut self) {
        // Ordering: Release publishes the holder's writes to the next `try_lock`.
        self.lock.locked.store(false, Ordering::Release);
    }
}

impl<T: ?Sized> fmt::Debug for SpinGuard<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SpinGuard").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::SpinLock;
    use std::vec::Vec;

    /// Two numbers that are equal whenever the lock is free, changed by threads that stop at odd
    /// moments. Not a loom model: a `const` lock cannot have loom's atomics, and there is one flag.
    #[test]
    fn holders_are_alone() {
        const THREADS: u64 = 4;
        const ROUNDS: u64 = 20_000;
        let lock = SpinLock::new((0u64, 0u64));
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..THREADS)
                .map(|thread| {
                    let lock = &lock;
                    scope.spawn(move || {
                        let mut random = thread + 1;
                        let mut tried = 0u64;
                        for _ in 0..ROUNDS {
                            random ^= random << 13;
                            random ^= random >> 7;
                            random ^= random << 17;
                            let guard = if random & 1 == 0 {
                                Some(lock.lock())
                            } else {
                                lock.try_lock()
                            };
                            let Some(mut both) = guard else { continue };
                            assert_eq!(both.0, both.1);
                            both.0 += 1;
                            if random & 0xf00 == 0 {
                                std::thread::yield_now();
                            }
                            both.1 += 1;
                            tried += 1;
                        }
                        tried
                    })
                })
                .collect();
            let taken: u64 = workers.into_iter().map(|w| w.join().unwrap()).sum();
            let both = lock.lock();
            assert!(taken >= THREADS * ROUNDS / 4, "{taken}");
            assert_eq!(*both, (taken, taken));
        });
    }
}
