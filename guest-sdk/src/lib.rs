//! Drivers for Paravane guests, and a runtime for guests that have no kernel of their own.
#![no_std]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub use log;
pub use pv_abi as abi;

pub mod block;
pub mod clock;
pub mod console;
pub mod device;
#[cfg(test)]
mod fake;
#[cfg(feature = "flat")]
pub mod flat;
pub mod limits;
pub mod platform;
pub mod rng;
pub mod sync;
pub mod virtqueue;
