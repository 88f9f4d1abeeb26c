//! The program `pv-netd`: where its ports' frames go, and how it is run.

mod operations;
mod ports;
#[path = "../support"]
mod support {
    pub(crate) mod net;
    pub(crate) mod process;
    pub(crate) mod raw;
}

use std::path::Path;
use support::net::{MRG, NetFront, VERSION_1};
use support::process::connect;
use support::raw::Client;

const PLAIN: [u8; 12] = [0; 12];

fn front(socket: &Path) -> NetFront {
    let client = Client::over(connect(socket));
    NetFront::on(client, VERSION_1 | MRG, 2)
}

fn frame(to: u8, from: u8, len: usize) -> Vec<u8> {
    let mut bytes = vec![
        0x52, 0x54, 0, 0, 0, to, 0x52, 0x54, 0, 0, 0, from, 0x88, 0xb5,
    ];
    bytes.extend((bytes.len()..len).map(|i| i as u8));
    bytes
}

fn port(socket: &Path, index: u8, more: &str) -> [String; 2] {
    let socket = socket.display();
    let keys = format!("socket={socket},mac=52:54:00:00:00:{index:02x},{more}");
    ["--port".into(), keys]
}
