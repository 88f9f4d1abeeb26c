//! `pv-blkd`: block devices for any VMM, behind sockets.

mod cli;
mod disk;
mod lock;

use super::{Denied, Fleet, Handed, Member, Sockets};
use crate::block::{BlockDevice, BlockOptions};
use crate::engine::{RawFile, Store};
use crate::limit::{self, Limits};
use crate::session::{ConnectionEvent, Device, SessionEnd};
use crate::stats::{DiskReport, json, prometheus};
use cli::{Cli, OneDisk};
use lock::ImageLock;
use pv_abi::virtio::block::feature;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

/// Runs `pv-blkd` with this command line, the program's name first. Takes the calling thread, the
/// process's panic hook, the signals that end it, and confines the process for good.
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
    raw: Option<Arc<RawFile>>,
    /// Held while the disk is served.
    locks: Mutex<Vec<ImageLock>>,
    /// What it is, for another process; or why none can serve it.
    identity: Result<String, &'static str>,
}

impl Served {
    /// The locks last as long as anything is in flight, also where this process is killed.
    fn hold_locks(&self) -> Result<(), String> {
        let Some(raw) = &self.raw else { return Ok(()) };
        let locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
        for lock in locks.iter() {
            let held = lock
                .hand_over()
                .map_err(|error| format!("{}: {error}", self.name))?;
            raw.hold(held);
        }
        Ok(())
    }

    /// What another process must have opened to serve this.
    fn describe(&self, identity: &str) -> String {
        let read_only = self.device.features() & feature::RO != 0;
        format!("{identity}, read-only {read_only}")
    }
}

/// All disks of a daemon.
struct Disks(Vec<Served>);

impl Disks {
    /// Opens the disks, each with its socket. The error is a sentence.
    fn open(disks: Vec<(String, OneDisk)>, sockets: &mut Sockets) -> Result<Disks, String> {
        sockets.name_devices(disks.iter().map(|(name, _)| name.clone()));
        let mut served = Vec::new();
        for (name, disk) in disks {
            let opened = (disk.source).open(&disk.how, disk.num_queues, sockets.taking_over())?;
            let device = device(&name, &disk, opened.store)?;
            sockets.open(disk.socket, &name)?;
            served.push(Served {
                name,
                device: Arc::new(device),
                raw: opened.raw,
                locks: Mutex::new(opened.locks),
                identity: opened.identity,
            });
        }
        if !sockets.taking_over() {
            served.iter().try_for_each(Served::hold_locks)?;
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
                let limits = limit::from_json::<Limits>(body)
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

    fn hand_over(&self, index: usize) -> Result<Handed, String> {
        let disk = self.0.get(index).ok_or("no such disk")?;
        let identity = match &disk.identity {
            Ok(identity) => disk.describe(identity),
            Err(reason) => return Err(format!("{}: {reason}", disk.name)),
        };
        let locks = disk.locks.lock().unwrap_or_else(PoisonError::into_inner);
        let fds: io::Result<Vec<_>> = locks.iter().map(ImageLock::hand_over).collect();
        let fds = fds.map_err(|error| format!("{}: {error}", disk.name))?;
        Ok(Handed { identity, fds })
    }

    fn take_over(&self, index: usize, handed: Handed) -> Result<(), String> {
        let disk = self.0.get(index).ok_or("no such disk")?;
        let in_sentence = |reason: &str| format!("{}: {reason}", disk.name);
        let identity = disk
            .identity
            .as_ref()
            .map_err(|reason| in_sentence(reason))?;
        if disk.describe(identity) != handed.identity {
            return Err(in_sentence("the running daemon serves something else"));
        }
        let held: Vec<File> = handed.fds.into_iter().map(File::from).collect();
        let mut locks = disk.locks.lock().unwrap_or_else(PoisonError::into_inner);
        for lock in locks.iter_mut() {
            lock.take_over(&held)
                .map_err(|reason| in_sentence(&reason))?;
        }
        drop(locks);
        disk.hold_locks()
    }

    fn over(&self) {
        for disk in &self.0 {
            let locks = disk.locks.lock().unwrap_or_else(PoisonError::into_inner);
            locks.iter().for_each(ImageLock::release);
        }
    }

    fn requests(&self) -> &'static str {
        "GET /metrics, GET /stats, PUT /disks/NAME/limits, PUT /disks/NAME/resize"
    }
}

fn device(name: &str, disk: &OneDisk, store: Arc<dyn Store>) -> Result<BlockDevice, String> {
    let limits = disk.limits()?;
    let mut block = BlockOptions::with_queues(disk.num_queues);
    if disk.id.is_some() {
        block.id.fill(0);
        for (to, from) in block.id.iter_mut().zip(name.bytes()) {
            *to = from;
        }
    }
    let device = BlockDevice::on(store, block);
    device.limiter().set(limits);
    Ok(device)
}
