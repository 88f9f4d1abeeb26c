//! One disk whose daemon changes: each takes over from the one before.
#![allow(dead_code)]

use super::Disk;
use super::process::{Daemon, blkd};
use std::path::PathBuf;
use std::process::Command;

const MIB: u64 = 1 << 20;

/// A disk, and where its daemons are found.
pub(crate) struct Site {
    pub(crate) disk: Disk,
    pub(crate) stats: PathBuf,
    pub(crate) control: PathBuf,
}

impl Site {
    pub(crate) fn new() -> Site {
        let disk = Disk::new(16 * MIB);
        let (stats, control) = (disk.dir.path().join("stats"), disk.dir.path().join("ctl"));
        Site {
            disk,
            stats,
            control,
        }
    }

    pub(crate) fn command(&self, more: &[&str]) -> Command {
        let mut command = blkd();
        command.arg("--stats-socket").arg(&self.stats);
        command.arg("--control-socket").arg(&self.control);
        command.arg("--socket-path").arg(&self.disk.socket);
        command.arg("--blk-file").arg(&self.disk.image).args(more);
        command
    }

    pub(crate) fn start(&self, more: &[&str]) -> Daemon {
        Daemon::start(&mut self.command(more))
    }

    /// Another daemon, which takes over.
    pub(crate) fn take_over(&self, more: &[&str]) -> Daemon {
        let mut command = self.command(more);
        Daemon::start(command.arg("--take-over").arg(&self.control))
    }
}
