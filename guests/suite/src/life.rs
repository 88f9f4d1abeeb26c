//! A guest's life: start state, memory, idle, doorbells, vCPUs, panics, spinning.
#![allow(unsafe_code)]
// UNSAFETY: reads control registers of SSE and x87.

use crate::calls::gate;
use crate::{Case, Outcome, ensure, text};
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;
use guest_sdk::flat::{Boot, smp};
use guest_sdk::platform::Platform;
use pv_abi::boot::{MAGIC, memory_kind};
use pv_abi::call::number;
use pv_abi::gate::{NOTIFY, WAKE_DOORBELL};
use pv_abi::status::Status;

pub const CASES: &[Case] = &[
    ("life.boot_block", boot_block),
    ("life.start_state", start_state),
    ("life.exit_code", |_| {
        guest_sdk::flat::exit(guest_sdk::flat::ExitCode(42))
    }),
    ("life.panic", |_| panic!("as the case wants")),
    ("life.allocator", allocator),
    ("life.floating_point", floating_point),
    ("life.idle_times_out", idle_times_out),
    ("life.idle_short", idle_short),
    ("life.spin", |_| {
        loop {
            core::hint::spin_loop();
        }
    }),
    ("life.idle_forever", |boot| {
        loop {
            boot.platform().idle(None);
        }
    }),
    ("life.ticker", ticker),
    ("life.bad_doorbells", bad_doorbells),
    ("life.doorbell_storm", doorbell_storm),
    ("life.log_storm", log_storm),
    ("smp.start_all", smp_start_all),
    ("smp.wake", smp_wake),
    ("smp.bad_start", smp_bad_start),
    ("smp.exit_from_secondary", smp_exit),
];

fn boot_block(boot: &Boot) -> Outcome {
    let block = boot.block();
    ensure!(block.magic == MAGIC, "magic");
    ensure!(block.abi_major == pv_abi::ABI_MAJOR, "major");
    ensure!(block.size as usize == size_of_val(block), "size");
    ensure!(
        boot.argument("case") == Some("life.boot_block"),
        "command line {:?}",
        boot.cmdline()
    );
    let map = boot.memory_map();
    ensure!(
        map.windows(2).all(|w| w[0].gpa + w[0].len <= w[1].gpa),
        "regions overlap"
    );
    for kind in [
        memory_kind::IMAGE,
        memory_kind::STACK,
        memory_kind::USABLE,
        memory_kind::ARENA,
    ] {
        ensure!(
            map.iter().any(|r| r.kind == kind && r.len > 0),
            "no region of kind {kind}"
        );
    }
    let local = 0u8;
    let at = &raw const local as u64;
    let stack = map
        .iter()
        .find(|r| r.kind == memory_kind::STACK && r.owner == 0);
    ensure!(
        stack.is_some_and(|s| (s.gpa..s.gpa + s.len).contains(&at)),
        "stack at {at:#x}"
    );
    Ok(())
}

fn start_state(_boot: &Boot) -> Outcome {
    let (mut mxcsr, mut fcw, mut flags) = (0u32, 0u16, 0u64);
    // SAFETY: stores of control registers to locals.
    unsafe {
        core::arch::asm!("stmxcsr [{}]", in(reg) &raw mut mxcsr);
        core::arch::asm!("fnstcw [{}]", in(reg) &raw mut fcw);
        core::arch::asm!("pushfq", "pop {}", inout(reg) flags);
    }
    ensure!(mxcsr & 0xffc0 == 0x1f80, "MXCSR {mxcsr:#x}");
    ensure!(fcw == 0x37f, "x87 control word {fcw:#x}");
    ensure!(flags & 0x400 == 0, "DF is set");
    ensure!(flags & 0x3000 == 0, "IOPL is not 0");
    Ok(())
}

fn allocator(_boot: &Boot) -> Outcome {
    let mut kept: Vec<Vec<u8>> = Vec::new();
    for round in 0..200usize {
        kept.push(alloc::vec![round as u8; 1 + round * 97 % 40_000]);
        if round % 3 == 0 {
            kept.swap_remove(round / 3 % kept.len());
        }
    }
    for block in &kept {
        ensure!(
            block.iter().all(|b| b == &block[0]),
            "a block was overwritten"
        );
    }
    let big: Vec<u64> = (0..1 << 18).collect();
    ensure!(
        big.iter().sum::<u64>() == ((1 << 18) - 1) * (1 << 17),
        "sum"
    );
    Ok(())
}

fn floating_point(boot: &Boot) -> Outcome {
    let seed = boot.vcpu_count() as f64;
    let mut x = seed;
    for _ in 0..1000 {
        boot.platform().nop().map_err(text("nop"))?;
        x = x * 1.000_1 + 0.5;
    }
    let mut y = seed;
    for _ in 0..1000 {
        y = y * 1.000_1 + 0.5;
    }
    ensure!(
        x == y && x > 500.0,
        "{x} and {y}: a call changed a register"
    );
    Ok(())
}

fn idle_times_out(boot: &Boot) -> Outcome {
    let before = boot.platform().now_ns();
    let limit = Duration::from_millis(30);
    // Spurious returns are legal, so idle until the time is up.
    let mut turns = 0;
    while boot.platform().now_ns() - before < 30_000_000 {
        boot.platform().idle(Some(limit));
        turns += 1;
        ensure!(turns < 1000, "idle does not wait");
    }
    Ok(())
}

fn idle_short(boot: &Boot) -> Outcome {
    for ns in [0, 1, 999, 1_000, 50_000, 1_000_001] {
        boot.platform().idle(Some(Duration::from_nanos(ns)));
    }
    Ok(())
}

/// Tells the host again and again that it is well, until it is stopped.
fn ticker(boot: &Boot) -> Outcome {
    let canary: Vec<u64> = (0..4096).map(|i| i * 0x9e37_79b9_7f4a_7c15).collect();
    for round in 0u64.. {
        boot.platform()
            .call(number::EMBEDDER + 5, [round, 0, 0, 0, 0, 0])
            .map_err(text("tick"))?;
        let fine = canary
            .iter()
            .zip(0u64..)
            .all(|(c, i)| *c == i.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        ensure!(fine, "canary changed in round {round}");
        boot.platform().idle(Some(Duration::from_millis(2)));
    }
    Ok(())
}

fn bad_doorbells(boot: &Boot) -> Outcome {
    let bells = [
        200,
        255,
        256,
        0xfff,
        WAKE_DOORBELL + 64,
        0x7fff_ffff,
        0x8000_0000,
        u32::MAX,
    ];
    for bell in bells {
        boot.platform().notify(bell);
    }
    // SAFETY: the slot returns; only the low 32 bits of its argument count.
    unsafe { gate(NOTIFY, 0xffff_ffff_0000_00ff) };
    boot.platform().nop().map_err(text("nop"))?;
    Ok(())
}

fn doorbell_storm(boot: &Boot) -> Outcome {
    let table = boot.platform().device_table();
    let disk = table
        .find(pv_abi::device::kind::BLOCK, None)
        .ok_or("no disk")?;
    let mut queue = guest_sdk::block::open(boot.platform(), None).map_err(text("open"))?;
    let mut sector = [0; 512];
    for round in 0..20 {
        for _ in 0..1000 {
            boot.platform().notify(disk.queue_event(0));
        }
        queue
            .read_blocking(round, &mut sector)
            .map_err(text("read in the storm"))?;
    }
    Ok(())
}

fn log_storm(boot: &Boot) -> Outcome {
    for _ in 0..3000 {
        boot.platform()
            .call(number::LOG, [5, 16, 0, 0, 0, 0])
            .map_err(text("log"))?;
    }
    Ok(())
}

static STARTED: AtomicU64 = AtomicU64::new(0);
static WOKEN: AtomicU64 = AtomicU64::new(0);

fn wait_until(boot: &Boot, what: &str, done: impl Fn() -> bool) -> Outcome {
    let start = boot.platform().now_ns();
    while !done() {
        ensure!(
            boot.platform().now_ns() - start < 10_000_000_000,
            "{what}: not within 10 s"
        );
        boot.platform().idle(Some(Duration::from_millis(1)));
    }
    Ok(())
}

fn smp_start_all(boot: &Boot) -> Outcome {
    let count = boot.vcpu_count();
    ensure!(count >= 3, "{count} vCPUs");
    for index in 1..count {
        smp::start(
            index,
            |argument| {
                let right = guest_sdk::flat::vcpu_index() as usize == argument - 100;
                STARTED.fetch_or(u64::from(right) << (argument - 100), Ordering::Release);
            },
            100 + index as usize,
        )
        .map_err(text("start"))?;
    }
    let all = (1u64 << count) - 2;
    wait_until(boot, "all vCPUs", || STARTED.load(Ordering::Acquire) == all)
}

fn smp_wake(boot: &Boot) -> Outcome {
    smp::start(
        1,
        |_| {
            let platform = guest_sdk::flat::platform();
            STARTED.store(1, Ordering::Release);
            for _ in 0..20 {
                platform.idle(None);
                WOKEN.fetch_add(1, Ordering::AcqRel);
            }
        },
        0,
    )
    .map_err(text("start"))?;
    wait_until(boot, "start", || STARTED.load(Ordering::Acquire) == 1)?;
    wait_until(boot, "20 wake-ups", || {
        smp::wake(1);
        WOKEN.load(Ordering::Acquire) >= 20
    })
}

fn smp_bad_start(boot: &Boot) -> Outcome {
    let code = smp_bad_start as *const () as u64;
    let data = &raw const STARTED as u64;
    let start = |index, entry| {
        boot.platform()
            .call(number::VCPU_START, [index, entry, 0, 0, 0, 0])
    };
    let cases = [
        (0, code, Status::NotFound),
        (u64::from(boot.vcpu_count()), code, Status::NotFound),
        (u64::MAX, code, Status::NotFound),
        (1, data, Status::BadAddress),
        (1, 0, Status::BadAddress),
        (1, pv_abi::layout::GATE_BASE, Status::BadAddress),
        (1, pv_abi::layout::ARENA_BASE, Status::BadAddress),
        (1, u64::MAX, Status::BadAddress),
    ];
    for (index, entry, expected) in cases {
        let got = start(index, entry).map_err(|e| e.status);
        ensure!(got == Err(expected), "start({index}, {entry:#x}): {got:?}");
    }
    smp::start(1, |_| (), 0).map_err(text("good start"))?;
    let again = start(1, code).map_err(|e| e.status);
    ensure!(again == Err(Status::BadState), "twice: {again:?}");
    Ok(())
}

fn smp_exit(boot: &Boot) -> Outcome {
    smp::start(
        1,
        |_| guest_sdk::flat::exit(guest_sdk::flat::ExitCode(7)),
        0,
    )
    .map_err(text("start"))?;
    loop {
        boot.platform().idle(None);
    }
}
