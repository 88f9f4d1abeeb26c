//! A guest web server over the files of its disk, reachable from the host without any privilege.
//!
//! ```text
//! curl ── 127.0.0.1:port ── forward ── stream socket ── pv-netd ── guest (smoltcp, HTTP) ── pv-blkd ── disk
//! ```
//!
//! | module | room |
//! |---|---|
//! | [`cli`] | the command line |
//! | [`app`] | the whole job |
//! | [`vm`] | the VM, its backends, and what the guest says |
//! | [`forward`] | TCP of the host to TCP of the guest, through the stream socket |
//! | [`fetch`] | fetching every file again and again, and comparing |
//! | [`pair`] | two guests on one switch, measuring TCP between them |
//! | [`limits`] | every bound, with its reason |
#![forbid(unsafe_code)]

pub mod app;
pub mod cli;
pub mod fetch;
pub mod forward;
pub mod limits;
pub mod pair;
pub mod vm;
