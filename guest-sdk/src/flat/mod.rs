//! The flat profile: one address space, no privilege, everything through the gate.
//!
//! In comes control at `_start` (written by [`entry!`](crate::entry)); out go calls of gate slots. A
//! guest program enables the crate feature `runtime`, which adds what a freestanding program lacks:
//! panic handler, allocator and C memory functions.
//!
//! | file | what |
//! |---|---|
//! | `entry` | the `entry!` macro and the way from `_start` to `main` |
//! | `boot` | [`Boot`]: the boot block for people |
//! | `gate` | the only place that calls gate slots and knows the vCPU page |
//! | `platform` | [`Flat`]: `Platform` over the gate |
//! | `smp` | starting and waking other vCPUs |
//! | `executor` | [`block_on`]: runs one future, idles in between |
//! | `logging` | the sink of the `log` crate |
//! | `heap`, `memory`, `panic` | feature `runtime`: allocator, C memory functions, panic handler |

mod boot;
pub mod entry;
mod executor;
mod gate;
#[cfg(feature = "runtime")]
mod heap;
mod logging;
#[cfg(feature = "runtime")]
mod memory;
#[cfg(feature = "runtime")]
mod panic;
mod platform;
pub mod smp;

pub use boot::Boot;
pub use entry::{ExitCode, Termination};
pub use executor::block_on;
pub use gate::{exit, vcpu_index};
pub use platform::{Flat, platform};
