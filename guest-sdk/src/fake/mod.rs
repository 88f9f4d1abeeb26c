//! A platform in plain memory, with a device behind it, for this crate's tests.
//!
//! Everything is deterministic: the host's side runs inside `idle`, and an idle without a limit that
//! nothing would ever end is a panic, which is how a lost wakeup shows.
#![allow(unsafe_code)]
// UNSAFETY: implements the unsafe trait over leaked memory, and plays the host that writes it.

mod host;
mod net;

pub(crate) use host::{Host, ModelQueue};
pub(crate) use net::Delivery;

use crate::platform::{Arena, CallError, DeviceTable, Platform};
use core::cell::Cell;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use core::time::Duration;
use pv_abi::device::DeviceEntry;
use pv_abi::limits::SCRATCH_LEN;
use pv_abi::vcpu::EVENT_WORDS;
use std::boxed::Box;
use std::sync::{Mutex, MutexGuard};
use std::vec::Vec;

/// Where the arena is, as the device knows it; not where it is in this process.
pub(crate) const ARENA_GPA: u64 = pv_abi::layout::ARENA_BASE;
const ARENA_LEN: usize = 4 << 20;

std::thread_local! {
    static VCPU: Cell<u32> = const { Cell::new(0) };
}

/// Makes this thread a vCPU.
pub(crate) fn enter_vcpu(index: u32) {
    VCPU.set(index);
}

struct Vcpu {
    pending: [AtomicU64; EVENT_WORDS],
    scratch: Mutex<Box<[u8; SCRATCH_LEN]>>,
}

pub(crate) struct Fake {
    vcpus: Vec<Vcpu>,
    table: NonNull<DeviceEntry>,
    memory: NonNull<u8>,
    arena: &'static Arena,
    host: Mutex<Host>,
    now: AtomicU64,
    pub(crate) kicks: AtomicU64,
    pub(crate) idles: AtomicU64,
    /// Nanoseconds that an idle takes, however soon it ends.
    pub(crate) trip_ns: AtomicU64,
    /// Whether a wait that nothing ends is an error here; not when threads are involved.
    pub(crate) strict: bool,
    /// Keeps calls waiting, as a host does whose backend does not answer; and whether one waits.
    pub(crate) hold_calls: AtomicBool,
    pub(crate) call_held: AtomicBool,
}

// SAFETY: table and memory are leaked and accessed with volatile and atomic operations only.
unsafe impl Send for Fake {}
// SAFETY: as above; the rest is behind locks and atomics.
unsafe impl Sync for Fake {}

impl Fake {
    /// A platform with `vcpus` vCPUs and one block device of `sectors`, with `queues` queues.
    pub(crate) fn new(vcpus: u32, sectors: u64, queues: u16, strict: bool) -> &'static Fake {
        let table = Box::leak(Box::new([Host::empty_entry()]));
        let layout = std::alloc::Layout::from_size_align(ARENA_LEN, 4096).expect("a layout");
        // SAFETY: the layout is not empty.
        let memory = unsafe { std::alloc::alloc_zeroed(layout) };
        let memory = NonNull::new(memory).expect("memory");
        // SAFETY: leaked, used by nobody else.
        let arena = unsafe { Arena::new(0, ARENA_GPA, memory, ARENA_LEN as u64) };
        let table = NonNull::from(table).cast();
        let fake = Fake {
            vcpus: (0..vcpus)
                .map(|_| Vcpu {
                    pending: [const { AtomicU64::new(0) }; EVENT_WORDS],
                    scratch: Mutex::new(Box::new([0; SCRATCH_LEN])),
                })
                .collect(),
            table,
            memory,
            arena: Box::leak(Box::new(arena)),
            host: Mutex::new(Host::new(table, memory, ARENA_LEN, sectors, queues)),
            now: AtomicU64::new(0),
            kicks: AtomicU64::new(0),
            idles: AtomicU64::new(0),
            trip_ns: AtomicU64::new(0),
            strict,
            hold_calls: AtomicBool::new(false),
            call_held: AtomicBool::new(false),
        };
        Box::leak(Box::new(fake))
    }

    pub(crate) fn host(&self) -> MutexGuard<'_, Host> {
        self.host.lock().expect("no test panicked with it")
    }

    pub(crate) fn free_bytes(&self) -> u64 {
        self.arena.free_bytes()
    }

    pub(crate) fn the_arena(&self) -> &'static Arena {
        self.arena
    }

    /// A device over some ring in the arena, for tests of the queue alone.
    pub(crate) fn model_queue(&self, addresses: (u64, u64, u64), size: u16) -> ModelQueue {
        ModelQueue::new(self.memory, ARENA_LEN, addresses, size)
    }

    /// Lets the host's side do what there is to do, and makes its events pending.
    pub(crate) fn run_host(&self) {
        let events = self.host().run();
        for (vcpu, event) in events {
            let word = &self.vcpus[vcpu as usize].pending[event as usize / 64];
            // Ordering: Release, as a host.
            word.fetch_or(1 << (event % 64), Ordering::Release);
        }
    }

    fn vcpu(&self) -> &Vcpu {
        &self.vcpus[VCPU.get() as usize]
    }

    fn anything_pending(&self) -> bool {
        self.vcpu()
            .pending
            .iter()
            .any(|word| word.load(Ordering::Acquire) != 0)
    }
}

// SAFETY: table and arena are leaked and belong to this platform alone.
unsafe impl Platform for Fake {
    fn vcpu_index(&self) -> u32 {
        VCPU.get()
    }

    fn vcpu_count(&self) -> u32 {
        self.vcpus.len() as u32
    }

    fn call(&self, number: u32, args: [u64; 6]) -> Result<u64, CallError> {
        while self.hold_calls.load(Ordering::Acquire) {
            self.call_held.store(true, Ordering::Release);
            std::thread::yield_now();
        }
        let scratch = self.vcpu().scratch.lock().expect("no panic");
        let status = self.host().call(number, args, &scratch[..]);
        status.map_err(|status| CallError { status, value: 0 })
    }

    fn fill_scratch(&self, data: &[u8]) -> Option<u64> {
        let mut scratch = self.vcpu().scratch.lock().expect("no panic");
        scratch.get_mut(..data.len())?.copy_from_slice(data);
        Some(host::SCRATCH_ADDRESS)
    }

    fn notify(&self, _doorbell: u32) {
        self.kicks.fetch_add(1, Ordering::Relaxed);
        self.host().kicked = true;
    }

    fn idle(&self, limit: Option<Duration>) {
        self.idles.fetch_add(1, Ordering::Relaxed);
        let trip = self.trip_ns.load(Ordering::Relaxed);
        self.now.fetch_add(trip, Ordering::Relaxed);
        if self.anything_pending() {
            return;
        }
        self.run_host();
        if self.anything_pending() {
            return;
        }
        match limit {
            Some(limit) => {
                let ns = limit.as_nanos() as u64;
                self.now.fetch_add(ns, Ordering::Relaxed);
                std::thread::yield_now();
            }
            None if self.strict => panic!("nothing will ever end this idle: a lost wakeup"),
            None => std::thread::yield_now(),
        }
    }

    fn take_events(&self, word: usize, mask: u64) -> u64 {
        let Some(word) = self.vcpu().pending.get(word) else {
            return 0;
        };
        word.fetch_and(!mask, Ordering::AcqRel) & mask
    }

    fn raise_events(&self, word: usize, mask: u64) {
        if let Some(word) = self.vcpu().pending.get(word) {
            word.fetch_or(mask, Ordering::Release);
        }
    }

    fn device_table(&self) -> DeviceTable {
        // SAFETY: leaked, one entry.
        unsafe { DeviceTable::new(self.table, 1) }
    }

    fn arena(&self, index: u32) -> Option<&'static Arena> {
        (index == 0).then_some(self.arena)
    }

    fn now_ns(&self) -> u64 {
        self.now.load(Ordering::Relaxed)
    }
}
