//! Calls: every number, with good and bad frames, addresses and lengths.
#![allow(unsafe_code)]
// UNSAFETY: builds malformed frames by hand and calls gate slots with arguments the SDK never uses.

use crate::{Case, Outcome, ensure, text};
use guest_sdk::flat::Boot;
use guest_sdk::platform::{CallError, Platform};
use pv_abi::call::{Frame, number};
use pv_abi::layout::{CONTROL_RO_BASE, GATE_BASE, MONITOR_BASE, RAM_BASE, vcpu_page};
use pv_abi::limits::{MAX_MULTICALL, SCRATCH_LEN};
use pv_abi::status::Status;

pub const CASES: &[Case] = &[
    ("call.nop", nop),
    ("call.unknown", unknown),
    ("call.bad_frame", bad_frame),
    ("call.unused_arguments", unused_arguments),
    ("call.negotiate_twice", negotiate_twice),
    ("call.log_limits", log_limits),
    ("call.clock", clock),
    ("call.multicall", multicall),
    ("call.multicall_bad", multicall_bad),
    ("call.embedder", embedder),
    ("call.embedder_later", embedder_later),
    ("call.embedder_refused", embedder_refused),
    ("call.embedder_dropped", embedder_dropped),
    ("call.embedder_bad_address", embedder_bad_address),
    ("call.frame_index", frame_index),
    ("call.second_frame", second_frame),
    ("call.checkpoint_refused", checkpoint_refused),
];

/// Addresses that no call may accept: outside everything, read-only, private, wrapping.
pub const BAD_ADDRESSES: [u64; 9] = [
    0,
    4096,
    MONITOR_BASE,
    GATE_BASE,
    CONTROL_RO_BASE,
    RAM_BASE,
    1 << 46,
    u64::MAX - 4095,
    u64::MAX,
];

fn refused(result: Result<u64, CallError>, status: Status, what: &str) -> Outcome {
    match result {
        Err(error) if error.status == status => Ok(()),
        other => Err(alloc::format!("{what}: expected {status:?}, got {other:?}")),
    }
}

fn nop(boot: &Boot) -> Outcome {
    for _ in 0..1000 {
        boot.platform().nop().map_err(text("nop"))?;
    }
    Ok(())
}

fn unknown(boot: &Boot) -> Outcome {
    let numbers = [
        6,
        7,
        0xff,
        0x103,
        0x1ff,
        0x200,
        0x301,
        0x7fff_ffff,
        0x8000_00ff,
        u32::MAX,
    ];
    for called in numbers {
        refused(
            boot.platform().call(called, [0; 6]),
            Status::UnknownCall,
            "unknown number",
        )?;
    }
    Ok(())
}

/// Puts a frame into the vCPU page as it is and calls the gate.
fn raw_call(index: u32, frame: Frame) -> Frame {
    let page = vcpu_page(guest_sdk::flat::vcpu_index());
    let at = page + 0x80 + u64::from(index & 1) * 128;
    let at = at as *mut Frame;
    // SAFETY: the frames of this vCPU's own page; no call is in progress. The slot is code.
    unsafe {
        at.write_volatile(frame);
        gate(pv_abi::gate::CALL, u64::from(index));
        at.read_volatile()
    }
}

/// Calls a gate slot with any argument.
///
/// # Safety
///
/// The slot returns, or the VM ends.
pub unsafe fn gate(slot: u64, argument: u64) -> u64 {
    let result;
    // SAFETY: the caller's.
    unsafe {
        core::arch::asm!("call {slot}", slot = in(reg) pv_abi::gate::slot(slot),
            inout("rdi") argument => _, out("rax") result, clobber_abi("sysv64"));
    }
    result
}

fn bad_frame(_boot: &Boot) -> Outcome {
    for flags in [1, 0x8000_0000, u32::MAX] {
        let done = raw_call(
            0,
            Frame {
                flags,
                ..Default::default()
            },
        );
        ensure!(
            done.status == Status::BadFrame.code(),
            "flags {flags:#x}: {}",
            done.status
        );
    }
    let done = raw_call(
        0,
        Frame {
            reserved: 1,
            ..Default::default()
        },
    );
    ensure!(
        done.status == Status::BadFrame.code(),
        "reserved: {}",
        done.status
    );
    let done = raw_call(
        0,
        Frame {
            padding: [u64::MAX; 7],
            ..Default::default()
        },
    );
    ensure!(
        done.status == 0,
        "padding is not looked at: {}",
        done.status
    );
    Ok(())
}

fn unused_arguments(boot: &Boot) -> Outcome {
    let calls = [
        (number::NOP, 0),
        (number::CLOCK, 0),
        (number::DEVICE_RESET, 1),
        (number::VCPU_START, 3),
        (number::DEVICE_ACTIVATE, 3),
        (number::DEVICE_CONFIG_WRITE, 4),
        (number::LOG, 2),
        (number::PANIC, 1),
    ];
    for (called, used) in calls {
        for extra in used..6 {
            let mut args = [0; 6];
            args[extra] = 1;
            refused(
                boot.platform().call(called, args),
                Status::BadArgument,
                "unused argument",
            )?;
        }
    }
    Ok(())
}

fn negotiate_twice(boot: &Boot) -> Outcome {
    let abi = u64::from(pv_abi::ABI_MAJOR) << 16;
    let again = |features, abi| {
        boot.platform()
            .call(number::NEGOTIATE, [features, abi, 0, 0, 0, 0])
    };
    refused(again(0, abi), Status::BadState, "again")?;
    refused(again(1 << 63, abi), Status::NotSupported, "unknown feature")?;
    refused(
        again(0, abi + (1 << 16)),
        Status::BadArgument,
        "wrong major",
    )
}

fn log_limits(boot: &Boot) -> Outcome {
    let log = |level, len| boot.platform().call(number::LOG, [level, len, 0, 0, 0, 0]);
    log(5, SCRATCH_LEN as u64).map_err(text("a full scratch area"))?;
    log(5, 0).map_err(text("an empty line"))?;
    for level in [0, 6, u64::MAX] {
        refused(log(level, 1), Status::BadArgument, "level")?;
    }
    for len in [SCRATCH_LEN as u64 + 1, 1 << 32, u64::MAX] {
        refused(log(5, len), Status::BadLength, "length")?;
        let panic = boot.platform().call(number::PANIC, [len, 0, 0, 0, 0, 0]);
        refused(panic, Status::BadLength, "panic length")?;
    }
    Ok(())
}

fn clock(boot: &Boot) -> Outcome {
    let call = || {
        boot.platform()
            .call(number::CLOCK, [0; 6])
            .map_err(text("clock"))
    };
    let (first, page) = (call()?, boot.platform().now_ns());
    ensure!(
        page.abs_diff(first) < 2_000_000_000,
        "page {page}, call {first}"
    );
    let mut last = 0;
    for _ in 0..10_000 {
        let now = boot.platform().now_ns();
        ensure!(now >= last, "time went back from {last} to {now}");
        last = now;
    }
    ensure!(call()? > first, "the clock stands");
    Ok(())
}

fn multicall(boot: &Boot) -> Outcome {
    let arena = boot.platform().arena(0).ok_or("no arena")?;
    let mut array = arena
        .alloc_aligned(128 * MAX_MULTICALL as usize, 128)
        .map_err(text("alloc"))?;
    for i in 0..MAX_MULTICALL as usize {
        let called = if i % 2 == 0 {
            number::NOP
        } else {
            number::CLOCK
        };
        array.write(i * 128, &called.to_le_bytes());
        array.write(i * 128 + 56, &u32::MAX.to_le_bytes());
    }
    // One that is refused, and one that may not be nested.
    array.write(10 * 128, &0x7777u32.to_le_bytes());
    array.write(11 * 128, &number::MULTICALL.to_le_bytes());
    let args = [array.gpa(), MAX_MULTICALL, 0, 0, 0, 0];
    let done = boot
        .platform()
        .call(number::MULTICALL, args)
        .map_err(text("multicall"))?;
    ensure!(done == MAX_MULTICALL, "{done} frames");
    for i in 0..MAX_MULTICALL as usize {
        let mut status = [0; 4];
        array.read(i * 128 + 56, &mut status);
        let expected = match i {
            10 => Status::UnknownCall,
            11 => Status::BadState,
            _ => Status::Ok,
        };
        ensure!(
            u32::from_le_bytes(status) == expected.code(),
            "frame {i}: {status:?}"
        );
    }
    Ok(())
}

fn multicall_bad(boot: &Boot) -> Outcome {
    let call = |gpa, n| {
        boot.platform()
            .call(number::MULTICALL, [gpa, n, 0, 0, 0, 0])
    };
    let arena = boot.platform().arena(0).ok_or("no arena")?;
    for count in [0, MAX_MULTICALL + 1, 1 << 40, u64::MAX] {
        refused(call(arena.gpa(), count), Status::Limit, "count")?;
    }
    for address in BAD_ADDRESSES {
        refused(call(address, 1), Status::BadAddress, "address")?;
    }
    refused(
        call(arena.gpa() + arena.len() - 128, 2),
        Status::BadAddress,
        "runs past the arena",
    )?;
    refused(call(arena.gpa() + 8, 1), Status::BadAddress, "misaligned")
}

fn embedder_call(boot: &Boot, index: u32, args: [u64; 6]) -> Result<u64, CallError> {
    boot.platform().call(number::EMBEDDER + index, args)
}

fn embedder(boot: &Boot) -> Outcome {
    let sum = embedder_call(boot, 0, [1, 2, 3, 4, 5, 6]).map_err(text("sum"))?;
    ensure!(sum == 21, "{sum}");
    let arena = boot.platform().arena(0).ok_or("no arena")?;
    let mut buf = arena.alloc(64).map_err(text("alloc"))?;
    buf.write(0, b"abcdefgh");
    embedder_call(boot, 1, [buf.gpa(), 8, 0, 0, 0, 0]).map_err(text("reverse"))?;
    let mut out = [0; 8];
    buf.read(0, &mut out);
    ensure!(&out == b"hgfedcba", "{out:?}");
    Ok(())
}

fn embedder_later(boot: &Boot) -> Outcome {
    let value = embedder_call(boot, 2, [7, 0, 0, 0, 0, 0]).map_err(text("later"))?;
    ensure!(value == 14, "{value}");
    Ok(())
}

fn embedder_refused(boot: &Boot) -> Outcome {
    match embedder_call(boot, 3, [99, 0, 0, 0, 0, 0]) {
        Err(e) if e.status == Status::Refused && e.value == 99 => Ok(()),
        other => Err(alloc::format!("{other:?}")),
    }
}

fn embedder_dropped(boot: &Boot) -> Outcome {
    refused(embedder_call(boot, 4, [0; 6]), Status::HostError, "dropped")
}

fn embedder_bad_address(boot: &Boot) -> Outcome {
    for address in BAD_ADDRESSES {
        let result = embedder_call(boot, 1, [address, 8, 0, 0, 0, 0]);
        refused(result, Status::BadAddress, "address")?;
    }
    Ok(())
}

fn frame_index(_boot: &Boot) -> Outcome {
    // SAFETY: the VM ends.
    unsafe { gate(pv_abi::gate::CALL, 7) };
    Err("a frame that does not exist was served".into())
}

fn second_frame(_boot: &Boot) -> Outcome {
    let done = raw_call(
        1,
        Frame {
            status: u32::MAX,
            ..Default::default()
        },
    );
    ensure!(done.status == 0, "frame 1: {}", done.status);
    Ok(())
}

fn checkpoint_refused(_boot: &Boot) -> Outcome {
    // SAFETY: the slot returns.
    let result = unsafe { gate(pv_abi::gate::CHECKPOINT, 0) };
    ensure!(
        result == pv_abi::gate::CHECKPOINT_UNSUPPORTED,
        "{result:#x}"
    );
    Ok(())
}
