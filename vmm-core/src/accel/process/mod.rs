//! The process accel: a guest in a confined Linux process, for hosts without `/dev/kvm`.
//!
//! A supervisor thread ([`supervisor`]) starts a tiny freestanding stub from a memfd ([`spawn`]; its
//! source is `stub/`), into an address space that has nothing of the embedder's in it. The stub
//! confines itself and waits to be told what to become ([`stub`]), perhaps for long ([`spares`]).
//! Then it maps guest memory at guest-physical addresses, starts all vCPU threads, unmaps
//! itself, and installs the system-call filter ([`filter`]). What is left is the guest, and gate
//! bodies ([`gate`]) that make four kinds of system calls: `write` to a doorbell's eventfd, `ppoll`
//! and `read` on this guest's own eventfds, and `futex` for the hand-off to the VMM ([`vcpu`]).
//!
//! The claim: *isolation of a seccomp-confined process; the host kernel's page-fault, futex, poll
//! and eventfd code is exposed, and CPU side channels; weaker than hardware KVM.*

mod faults;
mod filter;
mod futex;
mod gate;
mod spares;
mod spawn;
mod stub;
mod supervisor;
mod vcpu;
mod vm;
mod waiting;
mod watch;
#[path = "../../../stub/wire.rs"]
#[allow(dead_code, unreachable_pub, missing_docs, clippy::manual_div_ceil)]
mod wire;

pub use spares::{SpareCounts, Spares};
pub(super) use spawn::prepare as executable;
pub(crate) use vm::{begin, create};

use pv_abi::vcpu::VcpuPage;
use std::mem::offset_of;

/// States of a vCPU page's `handoff` word.
mod handoff {
    /// The guest runs.
    pub(super) const RUN: u32 = 0;
    /// It made a call; `handoff_arg` is the frame.
    pub(super) const CALL: u32 = 1;
    /// It exits; `handoff_arg` is the code.
    pub(super) const EXIT: u32 = 2;
    /// The vCPU waits to be started.
    pub(super) const PARKED: u32 = 3;
    /// The fault handler has saved a report (self-reported faults only).
    pub(super) const FAULT: u32 = 4;
    /// It rang a doorbell that does not exist; `handoff_arg` is its number.
    pub(super) const DOORBELL: u32 = 5;
}

/// Offsets in a vCPU page that gate bodies and the VMM share.
mod page {
    use super::*;
    const PRIVATE: usize = offset_of!(VcpuPage, gate_private);
    pub(super) const HANDOFF: usize = offset_of!(VcpuPage, handoff);
    pub(super) const ARG: usize = offset_of!(VcpuPage, handoff_arg);
    /// Set once the vCPU is parked for the first time.
    pub(super) const READY: usize = PRIVATE;
    pub(super) const START_RIP: usize = PRIVATE + 8;
    pub(super) const START_RSP: usize = PRIVATE + 16;
    pub(super) const START_RDI: usize = PRIVATE + 24;
    pub(super) const START_RSI: usize = PRIVATE + 32;
    pub(super) const TIMESPEC: usize = PRIVATE + 40;
    pub(super) const READ_BUFFER: usize = PRIVATE + 56;
    /// On which CPU the guest was when it handed over: what the kernel tells user space, a hint.
    pub(super) const CPU: usize = PRIVATE + 64;
    pub(super) const KICKS: usize = offset_of!(VcpuPage, kicks);
    pub(super) const IDLES: usize = offset_of!(VcpuPage, idles);
    pub(super) const IDLE_NS: usize = offset_of!(VcpuPage, idle_ns);
    pub(super) const PENDING: usize = offset_of!(VcpuPage, pending);
    pub(super) const EVENTS: usize = offset_of!(VcpuPage, events);
    pub(super) const POLL: usize = offset_of!(VcpuPage, poll);
    pub(super) const POLL_COUNT: usize = offset_of!(VcpuPage, poll_count);
    pub(super) const POLL_EVENT: usize = offset_of!(VcpuPage, poll_event);
    /// Where the fault handler saves its report.
    pub(super) const REPORT: usize = offset_of!(VcpuPage, save_area);
}
