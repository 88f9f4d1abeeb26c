//! Drivers for Paravane guests, and a runtime for guests that have no kernel of their own.
//!
//! A guest with a kernel implements [`platform::Platform`] and takes the drivers. A guest without one
//! enables the feature `runtime`, says [`entry!`], and has the flat profile's platform:
//!
//! ```no_run,standalone_crate
//! use guest_sdk::{block, flat::Boot, log};
//!
//! guest_sdk::entry!(start);
//!
//! fn start(boot: &Boot) -> Result<(), Box<dyn core::error::Error>> {
//!     let mut disk = block::open(boot.platform(), None)?;
//!     let mut sector = [0; 512];
//!     disk.read_blocking(0, &mut sector)?;
//!     log::info!("{} sectors, the first begins {:02x?}", disk.capacity(), &sector[..8]);
//!     sector[0] ^= 1;
//!     disk.write_blocking(0, &sector)?;
//!     Ok(disk.flush()?)
//! }
//! ```
//!
//! # The life of a request, on the guest's side
//!
//! 1. [`BlockQueue::submit`](block::BlockQueue::submit) checks the request, takes it with its buffer
//!    ([`DmaBuf`](platform::DmaBuf), a piece of the device's arena) and a head buffer for header and
//!    status, and hands all of it to the queue's channel.
//! 2. The channel (`device::Channel`) holds the request until it is completed, through however many
//!    backends that takes, and writes header and status byte into the arena.
//! 3. [`DriverQueue::add`](virtqueue::DriverQueue::add) takes descriptors from a free list in private
//!    memory, writes the chain, and puts the request into its books under the chain's head.
//! 4. [`publish`](virtqueue::DriverQueue::publish), once for everything that was added: one store of
//!    the index, a full fence, one look at what the device asked for, and at most one
//!    [`notify`](platform::Platform::notify). The doorbell goes to the backend, past the VMM.
//! 5. [`wait_for`](block::BlockQueue::wait_for) looks at the used ring; finding nothing it arms the
//!    queue for as many completions as it needs, looks again, and goes
//!    [`idle`](platform::Platform::idle). The backend's signal sets the queue's event bit and ends
//!    the idle.
//! 6. [`pop`](virtqueue::DriverQueue::pop) checks the device's index, head and length against the
//!    books, and takes the request out of them.
//! 7. The status byte becomes a result, the head buffer goes back to its queue, and the
//!    [`Completion`](block::Completion) returns token, result and buffer. They are the caller's again.
//!
//! If the backend dies anywhere between 4 and 6, the request is still in the books: [`device`] tells
//! how it gets to the next one.
//!
//! Each driver has three forms: calls that wait, calls that only look, and futures. The futures belong
//! to no executor: [`device::Wakers`] and [`AsyncBlock`](block::AsyncBlock) say what one owes them.
//!
//! | module | what |
//! |---|---|
//! | [`platform`] | what drivers stand on: calls, events, device table, arenas |
//! | [`flat`] | that platform for the flat profile, and the runtime of freestanding guests |
//! | [`virtqueue`] | the driver half of a split ring |
//! | [`device`] | bring-up, loss and return, for all drivers |
//! | [`block`], [`net`], [`console`], [`rng`], [`clock`] | the drivers |
//! | [`limits`] | every bound, with its reason |
#![no_std]
// What a device or a host says ends no guest.
#![cfg_attr(
    not(test),
    deny(
        clippy::print_stdout,
        clippy::print_stderr,
        clippy::exit,
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic
    )
)]

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
pub mod net;
pub mod platform;
pub mod rng;
pub mod sync;
pub mod virtqueue;
