//! The benchmarks' guest: does what the host asks for, counts it, and times it by the TSC.
#![no_std]
#![no_main]

extern crate alloc;

// Both sides compile it; each uses its part.
#[allow(dead_code)]
mod protocol;
mod reads;

use core::time::Duration;
use guest_sdk::abi::call::number::EMBEDDER;
use guest_sdk::flat::{Boot, Flat};
use guest_sdk::platform::{CallError, Platform};
use guest_sdk::{block, rng::Rng};
use protocol::{Command, NEXT, Outcome, Work};

guest_sdk::entry!(main);

/// Why the guest gives up.
#[derive(Debug)]
#[allow(dead_code, reason = "the runtime prints the Debug form")]
enum Failure {
    Call(CallError),
    Open(guest_sdk::device::OpenError),
    Disk(block::Error),
    Command(u64),
    NoDevice,
}

fn main(boot: &Boot) -> Result<(), Failure> {
    let platform = boot.platform();
    let mut outcome = Outcome::default();
    // Opened at the first use: a guest that only boots or sleeps has no devices.
    let mut rng: Option<Rng<Flat>> = None;
    let mut reader: Option<reads::Reader> = None;
    loop {
        let word = platform
            .call(EMBEDDER + NEXT, outcome.to_args())
            .map_err(Failure::Call)?;
        let command = Command::decode(word).ok_or(Failure::Command(word))?;
        outcome = match command.work {
            Work::Calls => timed(command.count, || platform.nop().map(drop))?,
            Work::Notify => {
                if rng.is_none() {
                    rng = Some(Rng::open(platform, None).map_err(Failure::Open)?);
                }
                let doorbell = rng.as_ref().ok_or(Failure::NoDevice)?.event();
                timed(command.count, || {
                    platform.notify(doorbell);
                    Ok(())
                })?
            }
            Work::Idle => timed(command.count, || {
                platform.idle(Some(Duration::ZERO));
                Ok(())
            })?,
            Work::Read => {
                if reader.is_none() {
                    reader = Some(reads::Reader::open(platform)?);
                }
                let reader = reader.as_mut().ok_or(Failure::NoDevice)?;
                reader.run(platform, &command).map_err(Failure::Disk)?
            }
            Work::Sleep => loop {
                platform.idle(None);
            },
        };
    }
}

/// Does a piece of work so many times.
fn timed(count: u32, work: impl Fn() -> Result<(), CallError>) -> Result<Outcome, Failure> {
    let start = ticks();
    for _ in 0..count {
        work().map_err(Failure::Call)?;
    }
    Ok(Outcome {
        ticks: ticks() - start,
        done: count.into(),
        wrong: 0,
    })
}

/// The time-stamp counter.
#[allow(unsafe_code)]
// UNSAFETY: an intrinsic.
pub(crate) fn ticks() -> u64 {
    // SAFETY: RDTSC has no precondition; the flat profile leaves it to the guest.
    unsafe { core::arch::x86_64::_rdtsc() }
}
