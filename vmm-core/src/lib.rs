//! A hypervisor library: build a VM, give it memory, devices and backends, run it.
//!
//! ```no_run
//! use vmm_core::{Accel, BlockConfig, Image, VmBuilder};
//! use std::process::Command;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let vm = VmBuilder::new(Image::open("guest.elf")?)
//!     .accel(Accel::auto())
//!     .memory(64 << 20)
//!     .console(std::io::stdout())
//!     .block(BlockConfig::spawn(|| {
//!         let mut command = Command::new("pv-blkd");
//!         command.args(["--blk-file", "disk.img"]);
//!         command
//!     }))
//!     .build()?;
//! let exit = vm.run()?.wait();
//! println!("the guest {exit}");
//! # Ok(())
//! # }
//! ```
//!
//! The library never prints, never exits, and installs no signal handler. It starts threads of its
//! own (one per vCPU, the first of them in `build`; one per backend; one for in-process devices; one for [`Spares`] and one for each of them), and
//! on kvm it sends its vCPU threads the real-time signal `SIGRTMIN + 7`, blocked in those threads and
//! admitted only inside `KVM_RUN`. On process, and for spawned backends, it has child processes: an
//! embedder that waits for *any* child (`waitpid(-1)`) must do so with `__WNOTHREAD`, or it takes their
//! ends away from the library. A `VmHandle` is not dropped or waited for inside a callback of its own
//! VM, nor paused in a call handler, which would wait for itself until it times out. A [`Call`] that is
//! kept keeps all memory of its VM, the VM itself being gone or not.
//!
//! What an embedder forks has copies of its VMs that are of no use there: dropping or stopping one does
//! nothing, in neither process, and everything else gives an error or says as much (`Vm`, `VmHandle`,
//! `Spares`). A [`Call`] is not to be used there at all, as guest memory is not mapped.
//!
//! | room | what happens there |
//! |---|---|
//! | `image` | an ELF file becomes checked segments and a note |
//! | `memory` | private RAM, arenas, and the one list of what the guest sees where |
//! | `accel` | the list becomes a KVM guest or a confined process |
//! | `device` | the device table, in-process devices, the vhost-user frontend |
//! | `vm` | building, running, calls, statistics |
//! | `fault` | why a guest ended and who is to blame |

// Somebody else's process is what this runs in.
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

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!("vmm-core runs on Linux on x86-64");

mod accel;
mod device;
mod fault;
mod image;
pub mod limits;
mod memory;
mod own_thread;
mod owner;
mod pidfd;
mod vm;

pub use accel::process::{SpareCounts, Spares};
pub use accel::{Accel, AccelError, HostFeature, SandboxReport};
pub use device::block::BlockConfig;
pub use device::net::NetConfig;
pub use device::vhost_user::DeviceConfig;
pub use fault::{
    ExitReason, Fault, FaultClass, GuestFault, PeerLost, Policy, Registers, Violation,
};
pub use image::{Access, Image, ImageError, Segment};
pub use memory::{HugePages, MemoryKind, MemoryReport};
pub use pv_abi;
pub use vm::{
    BuildError, Call, ExitCounts, LogLevel, Refusal, RegistryError, Stats, Vm, VmBuilder, VmError,
    VmEvent, VmHandle,
};
