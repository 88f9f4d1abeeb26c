//! The command line.

use crate::accel::Accel;
use crate::limits::MIN_MEMORY;
use clap::{Parser, ValueEnum};
use std::path::PathBuf;
use std::time::Duration;

/// Packs a folder into a disk, lets a Paravane guest hash it, and checks the result.
///
/// The folder becomes a FAT disk image. A separate process, pv-blkd, serves it over vhost-user (or a
/// thread of this one does, with the same code). The guest mounts it, hashes every file with SHA-256, writes the manifest SHA256.TXT into the root and
/// flushes. Then the image is opened again here, and every file and every line is checked.
#[derive(Clone, Debug, Parser)]
#[command(name = "quickstart", version, max_term_width = 100, after_help = EXAMPLES)]
pub struct Args {
    /// The folder to pack [default: the repository's docs]
    #[arg(value_name = "FOLDER")]
    pub folder: Option<PathBuf>,

    /// What runs the guest [default: what PV_ACCEL says, or auto]
    #[arg(long, value_enum)]
    pub accel: Option<Accel>,

    /// Where the disk's backend runs
    #[arg(long, value_enum, default_value_t = Backend::Process)]
    pub backend: Backend,

    /// With a FOLDER: keep the new disk image here. Without: take this image, which exists, as it is
    #[arg(long, value_name = "PATH")]
    pub disk: Option<PathBuf>,

    /// The guest's virtual CPUs
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u32).range(1..=MAX_VCPUS))]
    pub vcpus: u32,

    /// The guest's memory, 64M or more
    #[arg(long, value_name = "SIZE", default_value = "64M", value_parser = parse_memory)]
    pub memory: u64,

    /// Run this guest instead of the one that is built in
    #[arg(long, value_name = "ELF")]
    pub guest: Option<PathBuf>,

    /// Leave out what FAT cannot hold or what cannot be read, naming it, instead of giving up
    #[arg(long)]
    pub skip: bool,

    /// Stop the guest after this many seconds
    #[arg(long, value_name = "SECONDS", default_value = "600", value_parser = parse_seconds)]
    pub timeout: Duration,
}

/// Virtual CPUs that the ABI has room for.
const MAX_VCPUS: i64 = pv_abi::limits::MAX_VCPUS as i64;

const EXAMPLES: &str = "\
Examples:
  quickstart                         the repository's docs, on whatever accel there is
  quickstart --accel process ~/notes without /dev/kvm, in a confined process
  quickstart --disk notes.img ~/notes
                                     keeps the image that it makes
  quickstart --disk notes.img        the same image again";

/// Where the disk's backend runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Backend {
    /// A process of its own, in a sandbox of its own
    Process,
    /// A thread of this process
    InProcess,
}

/// Bytes from `512M`, `1G`, `65536K` or a plain number; `MiB` and `MB` mean the same as `M`.
fn parse_memory(text: &str) -> Result<u64, String> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim().to_ascii_uppercase().as_str() {
        "" | "B" => 0,
        "K" | "KB" | "KIB" => 10,
        "M" | "MB" | "MIB" => 20,
        "G" | "GB" | "GIB" => 30,
        "T" | "TB" | "TIB" => 40,
        _ => return Err(format!("`{text}` is not a size: write it as 64M or 1G")),
    };
    let number: u64 = number
        .parse()
        .map_err(|_| format!("`{text}` is not a size: write it as 64M or 1G"))?;
    let bytes = number
        .checked_mul(1 << shift)
        .filter(|bytes| *bytes <= MAX_MEMORY)
        .ok_or_else(|| format!("`{text}` is more than {} GiB", MAX_MEMORY >> 30))?;
    if bytes < MIN_MEMORY {
        return Err(format!("`{text}` is less than {} MiB", MIN_MEMORY >> 20));
    }
    Ok(bytes.next_multiple_of(pv_abi::layout::LARGE_PAGE_SIZE))
}

/// Private RAM that the guest-physical map has room for.
const MAX_MEMORY: u64 = pv_abi::layout::RAM_HIGH_END - pv_abi::layout::RAM_HIGH_BASE;

fn parse_seconds(text: &str) -> Result<Duration, String> {
    match text.parse::<u32>() {
        Ok(seconds) if seconds > 0 => Ok(Duration::from_secs(seconds.into())),
        _ => Err(format!("`{text}` is not a number of seconds")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn memory_sizes() {
        assert_eq!(parse_memory("64M"), Ok(64 << 20));
        assert_eq!(parse_memory("64MiB"), Ok(64 << 20));
        assert_eq!(parse_memory("1g"), Ok(1 << 30));
        assert_eq!(parse_memory("67108864"), Ok(64 << 20));
        assert_eq!(parse_memory("66561K"), Ok(66 << 20));
        let wrong = [
            "",
            "M",
            "63M",
            "64X",
            "-1",
            "1.5G",
            "99999999999999999999",
            "61G",
            "1T",
            "16777216T",
            "18446744073709551615G",
        ];
        for text in wrong {
            parse_memory(text).unwrap_err();
        }
    }

    #[test]
    fn too_much_memory_is_said_to_be_that() {
        for text in ["61G", "1T", "64TiB", "18446744073709551615T"] {
            let said = parse_memory(text).unwrap_err();
            assert_eq!(said, format!("`{text}` is more than 60 GiB"));
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for line in [
            "--vcpus 0",
            "--vcpus 65",
            "--accel xen",
            "--timeout 0",
            "--memory 1M",
            "a b",
        ] {
            let words = ["quickstart"].into_iter().chain(line.split(' '));
            assert!(Args::try_parse_from(words).is_err(), "{line}");
        }
    }
}
