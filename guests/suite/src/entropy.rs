//! The entropy device's queue, by hand: moved between vCPUs, and for exact counts.

use crate::devices::{RawSetup, reset};
use crate::{Case, Outcome, ensure, text, thin};
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use core::time::Duration;
use guest_sdk::flat::{Boot, smp};
use guest_sdk::platform::{DmaBuf, Platform};
use pv_abi::call::number;
use pv_abi::device::kind;
use pv_abi::virtio::desc_flag::WRITE;

pub const CASES: &[Case] = &[("smp.queue_moves", queue_moves), ("life.counted", counted)];

/// Entries of the ring, and bytes of its one buffer.
const SIZE: u16 = 8;
const LEN: u32 = 16;
/// How often the queue moves, or for how long where each time takes long; on emulated machines (`thin`)
/// less often by so much.
const MOVES: u32 = 20_000;
const LIMIT_NS: u64 = 10_000_000_000;

static WAITS: AtomicU64 = AtomicU64::new(0);
static OVER: AtomicBool = AtomicBool::new(false);

/// A ring with one buffer, which is made available again and again.
struct RawEntropy {
    device: u64,
    /// Event and doorbell of the queue.
    event: u32,
    setup: RawSetup,
    ring: DmaBuf,
    _data: DmaBuf,
}

impl RawEntropy {
    fn new(boot: &Boot) -> Result<RawEntropy, alloc::string::String> {
        let table = boot.platform().device_table();
        let info = table.find(kind::RNG, None).ok_or("no entropy device")?;
        let arena = boot.platform().arena(info.arena).ok_or("no arena")?;
        let mut ring = arena.alloc_aligned(4096, 4096).map_err(text("ring"))?;
        let data = arena.alloc(LEN as usize).map_err(text("buffer"))?;
        ring.write(0, &data.gpa().to_le_bytes());
        ring.write(8, &LEN.to_le_bytes());
        ring.write(12, &WRITE.to_le_bytes());
        Ok(RawEntropy {
            device: info.index.into(),
            event: info.queue_event(0),
            setup: RawSetup::at(ring.gpa(), SIZE),
            ring,
            _data: data,
        })
    }

    /// So many chains have been made available.
    fn publish(&mut self, index: u16) {
        let at = (self.setup.avail - self.ring.gpa()) as usize + 2;
        core::sync::atomic::fence(Ordering::SeqCst);
        self.ring.write(at, &index.to_le_bytes());
        core::sync::atomic::fence(Ordering::SeqCst);
    }

    /// As if nothing had been completed.
    fn forget(&mut self) {
        let at = self.used();
        self.ring.write(at, &0u16.to_le_bytes());
    }

    fn used(&self) -> usize {
        (self.setup.used - self.ring.gpa()) as usize + 2
    }

    fn completed(&self) -> u16 {
        let mut index = [0; 2];
        self.ring.read(self.used(), &mut index);
        u16::from_le_bytes(index)
    }
}

/// vCPU 1 idles all the time. The queue is its own in every other activation, and comes to vCPU 0 in
/// those between, with an event on its way each time.
fn queue_moves(boot: &Boot) -> Outcome {
    let platform = boot.platform();
    let mut raw = RawEntropy::new(boot)?;
    smp::start(1, |_| wait_all_the_time(), 0).map_err(text("start"))?;
    let start = platform.now_ns();
    for round in 0..MOVES / thin(boot) {
        raw.publish(1);
        raw.forget();
        raw.setup.vcpu = (round + 1) % 2;
        raw.setup.config_vcpu = raw.setup.vcpu;
        let active = raw.setup.activate(boot, raw.device);
        ensure!(active.is_ok(), "activation {round}: {active:?}");
        let since = platform.now_ns();
        while raw.completed() != 1 {
            ensure!(
                platform.now_ns() - since < LIMIT_NS,
                "round {round}: nothing came"
            );
            platform.idle(Some(Duration::ZERO));
        }
        let stopped = reset(boot, raw.device);
        ensure!(stopped.is_ok(), "reset {round}: {stopped:?}");
        if platform.now_ns() - start > LIMIT_NS {
            break;
        }
    }
    OVER.store(true, Ordering::Release);
    smp::wake(1);
    ensure!(WAITS.load(Ordering::Relaxed) > 0, "vCPU 1 never waited");
    Ok(())
}

fn wait_all_the_time() {
    let platform = guest_sdk::flat::platform();
    while !OVER.load(Ordering::Acquire) {
        platform.idle(Some(Duration::from_millis(50)));
        for word in 0..pv_abi::vcpu::EVENT_WORDS {
            platform.take_events(word, u64::MAX);
        }
        WAITS.fetch_add(1, Ordering::Relaxed);
    }
}

/// Does everything a known number of times, and tells the host of what it counted itself.
fn counted(boot: &Boot) -> Outcome {
    let platform = boot.platform();
    for _ in 0..17 {
        platform.nop().map_err(text("nop"))?;
    }
    for round in 0..5 {
        let asked = platform.call(number::CLOCK, [0; 6]);
        asked.map_err(text("clock"))?;
        let sum = platform.call(number::EMBEDDER, [round, 0, 0, 0, 0, 0]);
        ensure!(sum.is_ok_and(|sum| sum == round), "round {round}");
        let unknown = platform.call(0x7777, [0; 6]);
        ensure!(unknown.is_err(), "a call that does not exist");
    }
    for _ in 0..3 {
        platform.notify(200);
    }
    let mut raw = RawEntropy::new(boot)?;
    let active = raw.setup.activate(boot, raw.device);
    ensure!(active.is_ok(), "activation: {active:?}");
    let (mut idles, rounds) = (0, 40);
    let (word, bit) = (raw.event as usize / 64, 1 << (raw.event % 64));
    for round in 1..=rounds {
        raw.publish(round);
        platform.notify(raw.event);
        while platform.take_events(word, bit) == 0 {
            // Spurious returns are legal.
            platform.idle(None);
            idles += 1;
        }
        ensure!(raw.completed() == round, "event {round} without its chain");
    }
    let told = platform.call(number::EMBEDDER + 20, [idles, rounds.into(), 0, 0, 0, 0]);
    told.map_err(text("tell")).map(|_| ())
}
