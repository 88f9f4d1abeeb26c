//! The command line.

use crate::limits::MAX_SECONDS;
use clap::Parser;
use quickstart::accel::Accel;
use std::path::PathBuf;

/// Serves a folder over HTTP from a Paravane guest.
///
/// The folder becomes a FAT disk image, which pv-blkd serves. The guest brings up its network card,
/// which pv-netd serves, and answers requests with the files of its disk. A port forward inside this
/// program makes the guest reachable at 127.0.0.1. All of it without any privilege.
#[derive(Clone, Debug, Parser)]
#[command(name = "http-guest", version, max_term_width = 100, after_help = EXAMPLES)]
pub struct Args {
    /// The folder to serve [default: the repository's docs]
    #[arg(value_name = "FOLDER", conflicts_with = "pair")]
    pub folder: Option<PathBuf>,

    /// What runs the guest [default: what PV_ACCEL says, or auto]
    #[arg(long, value_enum)]
    pub accel: Option<Accel>,

    /// The port on 127.0.0.1; 0 takes a free one
    #[arg(long, value_name = "PORT", default_value_t = 8080)]
    pub port: u16,

    /// Fetch every file, this many requests in all, compare, and end
    #[arg(long, value_name = "N", conflicts_with = "pair",
          value_parser = clap::value_parser!(u64).range(1..))]
    pub requests: Option<u64>,

    /// Two guests on one switch instead: measure TCP between them, and end
    #[arg(long)]
    pub pair: bool,

    /// How long to measure
    #[arg(long, value_name = "SECONDS", default_value_t = 5, requires = "pair",
          value_parser = clap::value_parser!(u64).range(1..=MAX_SECONDS))]
    pub seconds: u64,
}

const EXAMPLES: &str = "\
Examples:
  http-guest                               the repository's docs at http://127.0.0.1:8080/
  http-guest --accel process ~/www
  http-guest --port 0 --requests 10000     fetch every file from eight connections, compare hashes
  http-guest --pair                        Gbit/s between two guests on pv-netd's switch";

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn nonsense_is_refused() {
        for line in [
            "--port 65536",
            "--port web",
            "--accel xen",
            "--requests 0",
            "--requests -1",
            "--pair --requests 5",
            "--pair .",
            "--seconds 3",
            "--pair --seconds 0",
            "--pair --seconds 3601",
            "docs guests",
            "--folder docs",
        ] {
            let words = ["http-guest"].into_iter().chain(line.split(' '));
            assert!(Args::try_parse_from(words).is_err(), "{line}");
        }
    }
}
