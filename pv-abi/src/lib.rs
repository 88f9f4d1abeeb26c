//! Every byte that a Paravane host and guest share.
//!
//! Both sides compile this crate: `vmm-core` on the host, `guest-sdk` in the guest. It holds types,
//! numbers and constants only; there is no behaviour here beyond small pure functions on them.
//! All types are `repr(C)` with explicit padding, implement the `zerocopy` traits, and have their
//! size, alignment and offsets asserted at compile time, so that a change of layout is a compile
//! error and not a silent break of the ABI.
//!
//! Integers are little-endian; ABI major 1 is defined for x86-64 only.
//!
//! | module | what it holds |
//! |---|---|
//! | [`layout`] | the guest-physical map |
//! | [`note`] | the ELF note in which a guest states what it needs |
//! | [`boot`] | the boot block: memory map, command line, features |
//! | [`gate`] | the slots of the executable gate |
//! | [`vcpu`] | the page that each vCPU owns: frames, events, poll set, scratch |
//! | [`call`] | call numbers and the call frame |
//! | [`status`] | the status codes that calls return |
//! | [`device`] | the device table and the queue set-up structures |
//! | [`clock`] | the clock page |
//! | [`virtio`] | the virtio structures that appear in rings |
//! | [`limits`] | every bound, with its reason |
#![no_std]
#![forbid(unsafe_code)]
// Both sides compile it: neither ends for what the other wrote.
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

pub mod boot;
pub mod call;
pub mod clock;
pub mod device;
pub mod gate;
pub mod layout;
pub mod limits;
pub mod note;
pub mod status;
pub mod vcpu;
pub mod virtio;

/// ABI major version: a different major is refused before the guest starts.
pub const ABI_MAJOR: u16 = 1;
/// ABI minor version: additions that an older guest does not notice.
pub const ABI_MINOR: u16 = 0;

/// Optional parts of the ABI, offered in the boot block and accepted by `NEGOTIATE`.
///
/// A feature is inert until the guest has accepted it.
pub mod feature {
    /// [`ClockPage`](crate::clock::ClockPage) is kept up to date.
    pub const CLOCK_PAGE: u64 = 1 << 0;
    /// [`MULTICALL`](crate::call::number::MULTICALL) is served.
    pub const MULTICALL: u64 = 1 << 1;
    /// Secondary vCPUs can be started.
    pub const SMP: u64 = 1 << 2;
    /// Calls in the embedder's number range are served.
    pub const EMBEDDER_CALLS: u64 = 1 << 3;
    /// Every feature that this version of the ABI defines.
    pub const ALL: u64 = CLOCK_PAGE | MULTICALL | SMP | EMBEDDER_CALLS;
}

/// The instruction-set baseline that a guest was compiled for.
///
/// The guest never asks the CPU; it is built for one of these and says which in its note.
pub mod baseline {
    /// x86-64-v2: SSE3, SSSE3, SSE4.1, SSE4.2, POPCNT, CMPXCHG16B.
    pub const X86_64_V2: u32 = 2;
}

/// Asserts size and alignment of a type and the offset of each of its fields, at compile time. A
/// field that is left out is an error.
macro_rules! assert_layout {
    ($ty:ident, size $size:expr, align $align:expr $(, $field:ident @ $off:expr)* $(,)?) => {
        const _: () = {
            assert!(core::mem::size_of::<$ty>() == $size, "size");
            assert!(core::mem::align_of::<$ty>() == $align, "alignment");
            $(assert!(core::mem::offset_of!($ty, $field) == $off, "offset");)*
            // Without `..`: the list is whole.
            let _ = |value: &$ty| {
                let $ty { $($field: _),* } = *value;
            };
        };
    };
}
pub(crate) use assert_layout;
