//! `pv-blkd` on a disk.
#![allow(dead_code)]

use super::process::{Daemon, blkd};
use super::{Disk, FEATURES, Frontend};
use std::path::PathBuf;
use std::process::Command;

const MIB: u64 = 1 << 20;

impl Daemon {
    /// On this disk, with these arguments too.
    pub(crate) fn on(disk: &Disk, more: &[&str]) -> Daemon {
        Daemon::with(&mut blkd(), disk, more)
    }

    pub(crate) fn with(command: &mut Command, disk: &Disk, more: &[&str]) -> Daemon {
        command.arg("--socket-path").arg(&disk.socket);
        Daemon::start(command.arg("--blk-file").arg(&disk.image).args(more))
    }
}

/// A disk with statistics and control.
pub(crate) struct Managed {
    pub(crate) disk: Disk,
    pub(crate) daemon: Daemon,
    pub(crate) stats: PathBuf,
    pub(crate) control: PathBuf,
}

impl Managed {
    pub(crate) fn start(more: &[&str]) -> Managed {
        Managed::with(blkd(), more)
    }

    pub(crate) fn with(mut command: Command, more: &[&str]) -> Managed {
        let disk = Disk::new(4 * MIB);
        let (stats, control) = (disk.dir.path().join("stats"), disk.dir.path().join("ctl"));
        command.arg("--stats-socket").arg(&stats);
        command.arg("--control-socket").arg(&control);
        let daemon = Daemon::with(&mut command, &disk, more);
        Managed {
            disk,
            daemon,
            stats,
            control,
        }
    }

    pub(crate) fn frontend(&self) -> Frontend {
        Frontend::connect(&self.disk.socket, FEATURES, 1, 64, MIB as usize)
    }
}
