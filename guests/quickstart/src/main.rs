//! The quickstart's guest: hashes every file of its disk and writes a manifest.
//!
//! The file system work is `quickstart-fs`, which the host tests on a file; here it meets the block
//! driver. Two calls tell the host how it went: one when `main` begins, one with the figures.
#![no_std]
#![no_main]

extern crate alloc;

use driver_disk::DriverDisk;
use guest_sdk::abi::call::number::EMBEDDER;
use guest_sdk::block;
use guest_sdk::flat::{Boot, ExitCode};
use guest_sdk::log::{error, info};
use guest_sdk::platform::{CallError, Platform};
use quickstart_fs::count::Counted;
use quickstart_fs::manifest::{REPORT_CALL, Report, STARTED_CALL};
use quickstart_fs::walk::{WalkError, hash_volume, timestamp};

guest_sdk::entry!(main);

fn main(boot: &Boot) -> ExitCode {
    match run(boot) {
        Ok(()) => ExitCode(0),
        Err(failure) => {
            error!("{failure}");
            ExitCode(1)
        }
    }
}

fn run(boot: &Boot) -> Result<(), Failure> {
    let platform = boot.platform();
    let call = |number, args| {
        platform
            .call(EMBEDDER + number, args)
            .map_err(Failure::Call)
    };
    call(STARTED_CALL, [0; 6])?;
    let start = platform.now_ns();
    let queue = block::open(platform, None).map_err(Failure::Open)?;
    let disk = DriverDisk::new(queue);
    let now = timestamp(platform.wall_time().as_secs());
    let (summary, disk) = hash_volume(disk, || platform.now_ns(), now).map_err(Failure::Walk)?;
    info!(
        "{} in {}, {}",
        Counted(summary.files, "file"),
        Counted(summary.folders, "folder"),
        Counted(summary.bytes, "byte")
    );
    let report = Report {
        files: summary.files,
        folders: summary.folders,
        bytes: summary.bytes,
        total_ns: platform.now_ns().saturating_sub(start),
        hash_ns: summary.hash_ns,
        requests: disk.requests(),
    };
    call(REPORT_CALL, report.to_args())?;
    Ok(())
}

/// Why the guest gives up.
enum Failure {
    Open(guest_sdk::device::OpenError),
    Walk(WalkError<driver_disk::Error>),
    Call(CallError),
}

impl core::fmt::Display for Failure {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Failure::Open(source) => write!(f, "cannot open the disk: {source}"),
            Failure::Walk(source) => write!(f, "{source}"),
            Failure::Call(source) => write!(f, "cannot report to the host: {source:?}"),
        }
    }
}
