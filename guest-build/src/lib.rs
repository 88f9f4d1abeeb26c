//! Builds guests with the stock toolchain and refuses what a guest may not contain.
//!
//! A guest is an ordinary `no_std`, `no_main` program for `x86_64-unknown-linux-gnu`; what makes it
//! a guest is how it is linked. In goes a guest workspace, out comes one ELF per package that has
//! passed [`check()`]:
//!
//! | module | room |
//! |---|---|
//! | `workspace` | which packages there are and what their manifests say about them |
//! | `cargo` | the nested `cargo build`: flags, environment, target directory |
//! | [`mod@check`] | the checks on the finished ELF: segments, note, instructions |
//! | `error` | every refusal, as a type and a sentence |
//!
//! From a build script:
//!
//! ```no_run
//! # fn main() -> Result<(), guest_build::BuildError> {
//! let elf = guest_build::GuestBuild::new("../guests").package("first-guest").build()?;
//! elf.emit_rerun_if_changed();
//! std::fs::write("first-guest.elf", &elf.bytes).unwrap();
//! # Ok(())
//! # }
//! ```
//!
//! By hand: `guest-build check first-guest.elf`.
#![forbid(unsafe_code)]

mod cargo;
pub mod check;
mod error;
mod workspace;

pub use cargo::{GuestBuild, GuestElf, LINK_SCRIPT};
pub use check::{CheckOptions, CheckReport, check};
pub use error::{BuildError, CheckError, Finding};
pub use workspace::{GuestPackage, GuestWorkspace};
