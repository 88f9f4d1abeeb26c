//! A hypervisor library.
mod fault;
mod image;
pub mod limits;
mod memory;
