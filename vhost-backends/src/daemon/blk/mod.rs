//! `pv-blkd`: block devices for any VMM, behind sockets.

mod cli;
mod disk;
mod lock;

use super::{Denied, Fleet, Member, Sockets};
use crate::block::{BlockDevice, BlockOptions};
use crate::limit::Limits;
use crate::session::{ConnectionEvent, SessionEnd};
use crate::stats::{DiskReport, json, prometheus};
use cli::{Cli, OneDisk};
use lock::ImageLock;
use std::ffi::OsString;
use std::process::ExitCode;
use std::sync::Arc;

/// Runs `pv-blkd` with this command line, the program's name first. Takes the calling thread, the
/// process's panic hook, SIGTERM and SIGINT, and confines the process for good.
///
/// A program that embeds this calls it as early as possible, while it has one thread.
pub fn pv_blkd_main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli: Cli = match super::parse(args) {
        Ok(cli) => cli,
        Err(code) => return code,
    };
    let capabilities =
        serde_json::json!({ "type": "block", "features": ["read-only", "blk-file"] });
    super::start("pv-blkd", &cli.operation, &capabilities, || {
        let disks = cli.disks()?;
        super::serve(&cli.operation, |sockets| Disks::open(disks, sockets))
    })
}

/// A disk that is served.
struct Served {
    name: String,
    device: Arc<BlockDevice>,
    /// Held while the disk is served.
    _locks: Vec<ImageLock>,
}

/// All disks of a daemon.
struct Disks(Vec<Served>);

impl Disks {
    /// Opens the disks, each with its socket. The error is a sentence.
    fn open(disks: Vec<(String, OneDisk)>, sockets: &mut Sockets) -> Result<Disks, String> {
        let mut served = Vec::new();
        for (name, disk) in disks {
            let (device, locks) = open_disk(&name, &disk)?;
            sockets.open(disk.socket, &name)?;
            served.push(Served {
                name,
                device: Arc::new(device),
                _locks: locks,
            });
        }
        Ok(Disks(served))
    }

    fn reports(&self) -> Vec<DiskReport> {
        let report = |disk: &Served| {
            let stats = disk.device.stats();
            DiskReport {
                disk: disk.name.clone(),
                limits: disk.device.limiter().get(),
                refused: stats.refused,
                retired_rings: stats.retired,
                calls: stats.calls,
                wakes: stats.wakes,
                snapshot: disk.device.measurements().snapshot(),
            }
        };
        self.0.iter().map(report).collect()
    }
}

impl Fleet for Disks {
    const DEVICES: &'static str = "disks";

    fn members(&self) -> Vec<Member> {
        let member = |disk: &Served| {
            let device = Arc::clone(&disk.device);
            Member {
                name: disk.name.clone(),
                device: device.clone(),
                watch: Arc::new(move |event| match event {
                    ConnectionEvent::Connected => device.measurements().connected(),
                    ConnectionEvent::Ended(end) => {
                        let broken = end == SessionEnd::Broken;
                        device.measurements().disconnected(broken);
                    }
                }),
            }
        };
        self.0.iter().map(member).collect()
    }

    fn prometheus(&self) -> String {
        prometheus(&self.reports())
    }

    fn json(&self) -> String {
        json(&self.reports())
    }

    fn put(&self, name: &str, what: &str, body: &str) -> Result<String, Denied> {
        let disk = self.0.iter().find(|disk| disk.name == name);
        let disk = disk.ok_or(Denied::NotFound("no disk has this name"))?;
        match what {
            "limits" => {
                let limits = serde_json::from_str::<Limits>(body)
                    .map_err(|error| error.to_string())
                    .and_then(|limits| limits.check().map_err(|error| error.to_string()))
                    .map_err(Denied::Bad)?;
                disk.device.limiter().set(limits);
                tracing::info!(disk = name, ?limits, "limits changed");
                Ok("done".into())
            }
            "resize" => {
                let resized = disk
                    .device
                    .resize()
                    .map_err(|e| Denied::Refused(e.to_string()))?;
                Ok(resized.to_string())
            }
            _ => Err(Denied::NotFound(self.requests())),
        }
    }

    fn requests(&self) -> &'static str {
        "GET /metrics, GET /stats, PUT /disks/NAME/limits, PUT /disks/NAME/resize"
    }
}

fn open_disk(name: &str, disk: &OneDisk) -> Result<(BlockDevice, Vec<ImageLock>), String> {
    let limits = disk.limits()?;
    let (store, locks) = disk.source.open(&disk.how, disk.num_queues)?;
    let mut block = BlockOptions::with_queues(disk.num_queues);
    if disk.id.is_some() {
        block.id.fill(0);
        for (to, from) in block.id.iter_mut().zip(name.bytes()) {
            *to = from;
        }
    }
    let device = BlockDevice::on(store, block);
    device.limiter().set(limits);
    Ok((device, locks))
}
