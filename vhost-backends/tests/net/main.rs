//! The network device from a raw frontend, split and packed: what it carries, and what it refuses.

mod control;
mod frames;
mod session;
mod stream;
#[path = "../support"]
mod support {
    pub(crate) mod net;
    pub(crate) mod raw;
}
mod switch;

use std::sync::Arc;
use support::net::{EVENT_IDX, VERSION_1};
use support::raw::PACKED;
use vhost_backends::net::port::Port;
use vhost_backends::net::{Mac, NetDevice, NetOptions};

const MAC: Mac = Mac([0x52, 0x54, 0, 0, 0, 1]);
const PLAIN: [u8; 12] = [0; 12];
const BASE: u64 = VERSION_1 | EVENT_IDX;
const FORMATS: [u64; 2] = [0, PACKED];

fn device(port: impl Port + 'static) -> Arc<NetDevice> {
    Arc::new(NetDevice::new(Arc::new(port), NetOptions::with_mac(MAC)))
}

/// An Ethernet frame of so many bytes.
fn frame(to: Mac, from: Mac, len: usize) -> Vec<u8> {
    let mut bytes = [to.0, from.0].concat();
    bytes.extend([0x88, 0xb5]);
    bytes.extend((bytes.len()..len).map(|i| (i * 7 + len) as u8));
    bytes.truncate(len);
    bytes
}

/// Flags, kind, header length, segment size, where the checksum starts and goes.
fn header(flags: u8, kind: u8, size: u16, start: u16, offset: u16) -> [u8; 12] {
    let mut bytes = [flags, kind, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    bytes[2..4].copy_from_slice(&54u16.to_le_bytes());
    bytes[4..6].copy_from_slice(&size.to_le_bytes());
    bytes[6..8].copy_from_slice(&start.to_le_bytes());
    bytes[8..10].copy_from_slice(&offset.to_le_bytes());
    bytes
}

/// A large TCP or UDP frame on IPv4 of so many bytes of payload, and its header.
fn large(to: Mac, udp: bool, payload: usize, size: u16) -> ([u8; 12], Vec<u8>) {
    let transport: usize = if udp { 8 } else { 20 };
    let mut bytes = [to.0, mac(1).0].concat();
    bytes.extend([0x08, 0, 0x45, 0]);
    bytes.extend(((20 + transport + payload) as u16).to_be_bytes());
    let protocol = if udp { 17 } else { 6 };
    bytes.extend([0, 1, 0, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    let mut head = vec![0; transport];
    if !udp {
        head[12] = 0x50;
    }
    bytes.extend(head);
    bytes.resize(bytes.len() + payload, 7);
    let kind = if udp { 5 } else { 1 };
    (header(1, kind, size, 34, if udp { 6 } else { 16 }), bytes)
}

fn mac(index: u8) -> Mac {
    Mac([0x52, 0x54, 0, 0, 0, index])
}
