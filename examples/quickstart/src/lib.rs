//! The quickstart: a folder becomes a disk, a guest hashes it, the host checks the result.
//!
//! | module | room |
//! |---|---|
//! | [`cli`] | the command line |
//! | [`accel`] | what is to run the guest: by the command line, or by `PV_ACCEL` |
//! | [`app`] | the whole job, from the command line to the report |
//! | [`scan`] | what there is to pack, and what cannot be packed |
//! | [`place`] | where the image lies: under a name when it is whole, or without one |
//! | [`image`] | the image file: partition table, FAT volume, the file as a disk |
//! | [`pack`] | from the plan to the image, hashing on the way |
//! | [`run`] | the VM, its disk's backend, and what the guest says |
//! | [`verify`] | the image after the guest |
//! | [`report`] | the table at the end |
//! | [`interrupt`] | Ctrl-C: what was begun is put away |
//! | [`limits`] | every bound, with its reason |
#![forbid(unsafe_code)]

pub mod accel;
pub mod app;
pub mod cli;
pub mod image;
pub mod interrupt;
pub mod limits;
pub mod pack;
pub mod place;
pub mod report;
pub mod run;
pub mod scan;
pub mod verify;
