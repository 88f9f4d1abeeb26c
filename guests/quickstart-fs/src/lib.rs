//! What the quickstart does with a disk: mount it, hash every file, write a manifest.
//!
//! `no_std`, and without a word about hypervisors: in comes a [`Disk`](disk::Disk), out go a
//! [`Summary`](walk::Summary) and a changed disk. The guest runs it on its block driver; the host
//! runs the same code on a file, in tests and for packing.
//!
//! | module | room |
//! |---|---|
//! | [`disk`] | the disk as it is needed here: reads in flight, writes, flush |
//! | [`cache`] | chunks of the disk in memory, with read-ahead |
//! | [`walk`] | the FAT volume: every file is hashed, then the manifest is written |
//! | [`files`] | the same volume, for reading files by their paths |
//! | [`manifest`] | the manifest's form, and the guest's report to the host |
//! | [`count`] | numbers of things, as they are said |
//! | [`limits`] | every bound, with its reason |
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod cache;
pub mod count;
pub mod disk;
pub mod files;
pub mod limits;
pub mod manifest;
pub mod walk;
