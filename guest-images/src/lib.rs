//! The guests of this repository, built, checked and embedded.
//!
//! The build script builds every package of the workspace `guests/` with
//! [`guest-build`](../guest_build/index.html) and writes one constant for each: `FIRST_GUEST` for
//! the package `first-guest`, and `FIRST_GUEST_PATH` for the file. A new guest is a folder there, nothing here.
//!
//! ```
//! assert!(guest_images::FIRST_GUEST.starts_with(b"\x7fELF"));
//! assert!(std::fs::read(guest_images::FIRST_GUEST_PATH).unwrap() == guest_images::FIRST_GUEST);
//! ```
#![no_std]
#![forbid(unsafe_code)]

include!(concat!(env!("OUT_DIR"), "/images.rs"));
