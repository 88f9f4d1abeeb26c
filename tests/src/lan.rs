//! A switch with three cards on it, in this process or behind a `pv-netd`.

use crate::{Backend, CARD_MAC, pv_blkd, wait_until};
use anyhow::Context;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use vhost_backends::net::port::Switch;
use vhost_backends::net::{Drop as Dropped, Mac, NetDevice, NetOptions};
use vhost_backends::session;
use vmm_core::NetConfig;

/// The cards' names in the guest, each with the last byte of its address.
const CARDS: [(&str, u8); 3] = [("net", 1), ("left", 0x11), ("right", 0x12)];

/// A switch with the cards "net", "left" and "right". It ends with this value.
#[derive(Debug)]
pub enum Lan {
    /// Devices of this process.
    Devices(Vec<Arc<NetDevice>>),
    /// A daemon, and the folder of its sockets.
    Daemon(Child, PathBuf),
}

impl Lan {
    /// Starts it; its sockets, if it has any, are in `folder`.
    ///
    /// # Errors
    /// When the daemon cannot be started.
    ///
    /// # Panics
    /// When the daemon makes no sockets.
    pub fn start(backend: Backend, folder: &Path) -> anyhow::Result<Lan> {
        if backend == Backend::InProcess {
            let switch = Arc::new(Switch::default());
            let device = |(_, last): (&str, u8)| {
                let port = switch.port().context("the switch has a port")?;
                let options = NetOptions::with_mac(Mac(address(last)));
                Ok(Arc::new(NetDevice::new(Arc::new(port), options)))
            };
            let devices = CARDS.into_iter().map(device);
            return Ok(Lan::Devices(devices.collect::<anyhow::Result<_>>()?));
        }
        let mut command = Command::new(pv_blkd()?);
        command.arg0("pv-netd").stdin(Stdio::null());
        for (name, last) in CARDS {
            let socket = folder.join(name);
            let mac = Mac(address(last));
            let port = format!("id={name},socket={},switch=lan,mac={mac}", socket.display());
            command.args(["--port", &port]);
        }
        command.arg("--stats-socket").arg(folder.join("stats"));
        let lan = Lan::Daemon(command.spawn()?, folder.into());
        wait_until("pv-netd makes its sockets", || {
            let names = CARDS.iter().map(|(name, _)| *name).chain(["stats"]);
            names.into_iter().all(|name| folder.join(name).exists())
        });
        Ok(lan)
    }

    /// The cards, to be built into one VM.
    pub fn cards(&self) -> Vec<NetConfig> {
        let card = |(index, (name, last)): (usize, (&str, u8))| {
            let config = match self {
                Lan::Devices(devices) => {
                    let device = devices.get(index).map(Arc::clone);
                    NetConfig::in_process(move |stream| match &device {
                        Some(device) => session::serve(&**device, stream),
                        None => Ok(()),
                    })
                }
                Lan::Daemon(_, folder) => NetConfig::socket(folder.join(name)),
            };
            config.name(name).mac(address(last))
        };
        CARDS.into_iter().enumerate().map(card).collect()
    }

    /// Frames of the card "net" that were dropped because it floods the others.
    ///
    /// # Errors
    /// When the daemon does not say.
    pub fn flood_drops(&self) -> anyhow::Result<u64> {
        match self {
            Lan::Devices(devices) => {
                let device = devices.first().context("there are devices")?;
                Ok(device.stats().snapshot().dropped(Dropped::Flood))
            }
            Lan::Daemon(_, folder) => {
                let mut stream = UnixStream::connect(folder.join("stats"))?;
                stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n")?;
                let mut said = String::new();
                stream.read_to_string(&mut said)?;
                let count = said.lines().find_map(|line| {
                    line.strip_prefix("pv_net_drops_total{port=\"net\",reason=\"flood\"} ")
                });
                Ok(count.context("pv-netd counts the flood")?.parse()?)
            }
        }
    }
}

impl Drop for Lan {
    fn drop(&mut self) {
        if let Lan::Daemon(child, _) = self {
            // It may be gone already.
            let _gone = child.kill().is_err();
            let _reaped = child.wait().is_err();
        }
    }
}

fn address(last: u8) -> [u8; 6] {
    let [a, b, c, d, e, _] = CARD_MAC;
    [a, b, c, d, e, last]
}
