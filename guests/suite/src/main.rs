//! The guest of the test suite: the command line names a case, which is carried out and ends the VM
//! with code 0, or with what it provokes.
#![no_std]
#![no_main]

extern crate alloc;

mod blocks;
mod calls;
mod cards;
mod devices;
mod entropy;
mod faults;
mod life;
mod memory;
mod net;
mod net_raw;
mod net_stack;
mod rings;
mod soak;

use alloc::format;
use alloc::string::String;
use guest_sdk::flat::Boot;

guest_sdk::entry!(main);

/// What a case returns: nothing, or what was wrong.
type Outcome = Result<(), String>;

/// A case: its stable id, and what it does.
type Case = (&'static str, fn(&Boot) -> Outcome);

/// By how much loops are to be shorter, on emulated machines: 1 anywhere else.
fn thin(boot: &Boot) -> u32 {
    let thin = boot.argument("thin").and_then(|n| n.parse().ok());
    thin.unwrap_or(1).max(1)
}

/// Fails a case with a message unless the condition holds.
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $($message:tt)+) => {
        if !$condition {
            return Err(alloc::format!($($message)+));
        }
    };
}

fn main(boot: &Boot) -> Outcome {
    let wanted = boot.argument("case").unwrap_or("");
    let all = [
        calls::CASES,
        life::CASES,
        memory::CASES,
        entropy::CASES,
        faults::CASES,
        devices::CASES,
        blocks::CASES,
        rings::CASES,
        soak::CASES,
        net::CASES,
        net_raw::CASES,
        net_stack::CASES,
    ];
    let found = all.into_iter().flatten().find(|(name, _)| *name == wanted);
    let (_, case) = found.ok_or_else(|| format!("there is no case {wanted:?}"))?;
    case(boot)
}

/// Turns any error into a case's message.
fn text<E: core::fmt::Debug>(what: &'static str) -> impl FnOnce(E) -> String {
    move |error| format!("{what}: {error:?}")
}
