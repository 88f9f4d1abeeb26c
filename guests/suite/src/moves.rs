//! A queue that goes from one vCPU to another while the other waits for it.

use crate::devices::{RawSetup, reset};
use crate::{Case, Outcome, ensure, text};
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use core::time::Duration;
use guest_sdk::flat::{Boot, smp};
use guest_sdk::platform::Platform;
use pv_abi::device::kind;
use pv_abi::virtio::desc_flag::WRITE;

pub const CASES: &[Case] = &[("smp.queue_moves", queue_moves)];

/// Entries of the ring, and bytes of its one buffer.
const SIZE: u16 = 8;
const LEN: u32 = 16;
/// How often the queue moves, or for how long where each time takes long.
const MOVES: u32 = 20_000;
const LIMIT_NS: u64 = 10_000_000_000;

static WAITS: AtomicU64 = AtomicU64::new(0);
static OVER: AtomicBool = AtomicBool::new(false);

/// vCPU 1 idles all the time. The entropy device's queue is its own in every other activation, and
/// comes to vCPU 0 in those between, with an event on its way each time.
fn queue_moves(boot: &Boot) -> Outcome {
    let platform = boot.platform();
    let table = platform.device_table();
    let info = table.find(kind::RNG, None).ok_or("no entropy device")?;
    let device = u64::from(info.index);
    let arena = platform.arena(info.arena).ok_or("no arena")?;
    let mut ring = arena.alloc_aligned(4096, 4096).map_err(text("ring"))?;
    let data = arena.alloc(LEN as usize).map_err(text("buffer"))?;
    let mut setup = RawSetup::at(ring.gpa(), SIZE);
    let (avail, used) = (setup.avail - ring.gpa(), setup.used - ring.gpa());
    let (avail, used) = (avail as usize, used as usize);
    ring.write(0, &data.gpa().to_le_bytes());
    ring.write(8, &LEN.to_le_bytes());
    ring.write(12, &WRITE.to_le_bytes());
    smp::start(1, |_| wait_all_the_time(), 0).map_err(text("start"))?;
    let start = platform.now_ns();
    for round in 0..MOVES {
        ring.write(avail + 2, &1u16.to_le_bytes());
        ring.write(used + 2, &0u16.to_le_bytes());
        setup.vcpu = (round + 1) % 2;
        setup.config_vcpu = setup.vcpu;
        let active = setup.activate(boot, device);
        ensure!(active.is_ok(), "activation {round}: {active:?}");
        let since = platform.now_ns();
        let mut done = [0; 2];
        while u16::from_le_bytes(done) != 1 {
            ensure!(platform.now_ns() - since < LIMIT_NS, "round {round}: nothing came");
            platform.idle(Some(Duration::ZERO));
            ring.read(used + 2, &mut done);
        }
        let stopped = reset(boot, device);
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
