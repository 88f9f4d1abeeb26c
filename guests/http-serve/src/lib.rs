//! What the web guest says to its clients: bytes of a connection in, bytes of it out.
//!
//! `no_std`, and without a word about networks: in come requests as they arrive, out go responses as
//! far as there is room. The guest runs it on TCP sockets; the host's tests run it on vectors.
//!
//! | module | room |
//! |---|---|
//! | [`connection`] | one connection: its input, its response, and what comes next |
//! | [`request`] | the head of a request, parsed or refused |
//! | [`site`] | the files, small ones in memory, and the list of them |
//! | [`calls`] | what guest and host say to each other |
//! | [`limits`] | every bound, with its reason |
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod calls;
pub mod connection;
pub mod limits;
pub mod request;
pub mod site;
