//! The command line. One disk has flags; several have `--disk`, whose keys are the same flags.

use super::disk::{DiskArgs, UseArgs};
use crate::daemon::keys::{self, parse_bytes};
use crate::daemon::{Operation, SocketArgs};
use crate::limit::Limits;
use crate::limits::{MAX_DISKS, MAX_QUEUES};
use clap::{Args, Parser};
use pv_abi::virtio::block::ID_LEN;

/// Serves disk images as vhost-user block devices.
#[derive(Debug, Parser)]
#[command(
    name = "pv-blkd",
    version,
    after_help = "\
Listens on --socket-path and serves one VMM after the other until SIGTERM. With --fd, a listening \
socket is used the same way; a connected one is served until its peer hangs up. Sockets passed by \
a service manager (LISTEN_FDS) are taken by disks that name none, in order or by --id.

Several disks: --disk socket=a.sock,file=a.img --disk socket=b.sock,file=b.img,read-only=on. Keys \
are the flags of a single disk without dashes in front; socket and file are short for socket-path \
and blk-file. Each disk has its own: beside --disk, such flags are refused. A comma within a value is \
written twice."
)]
pub(super) struct Cli {
    #[command(flatten)]
    pub(super) one: OneDisk,
    /// One of several disks: KEY=VALUE,... Flags of a single disk are not for these.
    #[arg(long, value_name = "KEYS",
          conflicts_with_all = ["SocketArgs", "DiskArgs", "UseArgs", "num_queues", "id", "iops",
                                "iops_burst", "bandwidth", "bandwidth_burst"])]
    disk: Vec<String>,
    #[command(flatten)]
    pub(super) operation: Operation,
}

/// One disk: what it is, how it is reached, what it may do.
#[derive(Args, Clone, Debug)]
pub(super) struct OneDisk {
    #[command(flatten)]
    pub(super) socket: SocketArgs,
    #[command(flatten)]
    pub(super) source: DiskArgs,
    #[command(flatten)]
    pub(super) how: UseArgs,
    /// Queues, each with a thread of its own.
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_QUEUES)))]
    pub(super) num_queues: u16,
    /// The disk's name: for the guest, in statistics, and among passed sockets.
    #[arg(long, value_name = "NAME", value_parser = parse_id)]
    pub(super) id: Option<String>,
    /// Requests per second; 0 is no limit.
    #[arg(long, value_name = "N", default_value_t = 0)]
    iops: u64,
    /// Requests at once after a pause; a tenth of a second's if not given.
    #[arg(long, value_name = "N", default_value_t = 0)]
    iops_burst: u64,
    /// Bytes per second (K, M, G); 0 is no limit.
    #[arg(long, value_name = "BYTES", default_value = "0", value_parser = parse_bytes)]
    bandwidth: u64,
    /// Bytes at once after a pause; a tenth of a second's if not given.
    #[arg(long, value_name = "BYTES", default_value = "0", value_parser = parse_bytes)]
    bandwidth_burst: u64,
}

/// The keys of `--disk`, as a command line of their own.
#[derive(Debug, Parser)]
#[command(name = "--disk", disable_help_flag = true)]
struct Keys {
    #[command(flatten)]
    one: OneDisk,
}

impl OneDisk {
    pub(super) fn limits(&self) -> Result<Limits, String> {
        Limits {
            iops: self.iops,
            iops_burst: self.iops_burst,
            bandwidth: self.bandwidth,
            bandwidth_burst: self.bandwidth_burst,
        }
        .check()
        .map_err(|error| format!("--{error}"))
    }
}

impl Cli {
    /// The disks, each with its name. The error is a sentence.
    pub(super) fn disks(&self) -> Result<Vec<(String, OneDisk)>, String> {
        let disks = if self.disk.is_empty() {
            vec![self.one.clone()]
        } else {
            self.disk
                .iter()
                .map(|text| parse_keys(text).map_err(|reason| format!("--disk {text}: {reason}")))
                .collect::<Result<_, _>>()?
        };
        if disks.len() > MAX_DISKS {
            return Err(format!("{} disks are more than {MAX_DISKS}", disks.len()));
        }
        let mut named = Vec::<(String, OneDisk)>::new();
        for (index, disk) in disks.into_iter().enumerate() {
            let name = disk.id.clone().unwrap_or(format!("disk{index}"));
            if named.iter().any(|(other, _)| *other == name) {
                return Err(format!("two disks have the name {name}"));
            }
            named.push((name, disk));
        }
        Ok(named)
    }
}

fn parse_keys(text: &str) -> Result<OneDisk, String> {
    let short = [("socket", "socket-path"), ("file", "blk-file")];
    keys::parse::<Keys>("--disk", &short, text).map(|keys| keys.one)
}

fn parse_id(text: &str) -> Result<String, String> {
    keys::parse_name(text, ID_LEN)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn keys_are_flags() {
        let disk = parse_keys("socket=a,,b.sock,file=x.img,read-only=on,num-queues=4,bandwidth=2M")
            .unwrap();
        assert_eq!(disk.socket.socket_path.unwrap().to_str(), Some("a,b.sock"));
        assert!(disk.source.is_given());
        assert_eq!((disk.how.read_only, disk.how.direct), (true, false));
        assert_eq!((disk.num_queues, disk.bandwidth), (4, 2 << 20));
        assert!(parse_keys("direct,read-only=off").unwrap().how.direct);
        for (bad, why) in [
            ("color=red", "no key \"color\""),
            ("read-only=maybe", "neither on nor off"),
            ("num-queues=99", "99"),
            ("socket=a,fd=3", "cannot be used with"),
            ("socket=a,socket=b", "cannot be used multiple times"),
            ("id=a b", "are a name"),
            ("bandwidth=fast", "not a number of bytes"),
            ("", "no key \"\""),
        ] {
            let said = parse_keys(bad).unwrap_err();
            assert!(said.contains(why), "{bad}: {said}");
        }
    }

    #[test]
    fn names_are_unique() {
        let cli = |args: &[&str]| Cli::try_parse_from([&["pv-blkd"], args].concat()).unwrap();
        let names = |cli: Cli| Ok::<_, String>(cli.disks()?.into_iter().map(|d| d.0).collect());
        let two = cli(&["--disk", "file=a", "--disk", "file=b,id=root"]);
        assert_eq!(names(two), Ok(vec!["disk0".to_owned(), "root".into()]));
        let same = cli(&["--disk", "file=a,id=x", "--disk", "file=b,id=x"]);
        assert!(names(same).unwrap_err().contains("two disks"));
    }

    #[test]
    fn no_flag_of_a_single_disk_is_taken_beside_several() {
        let keys = Keys::command();
        let flags: Vec<_> = keys.get_arguments().filter_map(|a| a.get_long()).collect();
        assert!(flags.len() > 12, "{flags:?}");
        for flag in flags {
            let value = match flag {
                "format" => "=qcow2",
                "nbd" => "=unix:a",
                "read-only" | "direct" | "no-lock" => "",
                _ => "=1",
            };
            let flag = format!("--{flag}{value}");
            let line = ["pv-blkd", "--disk", "file=a", &flag];
            let said = Cli::try_parse_from(line).unwrap_err().to_string();
            assert!(said.contains("cannot be used with"), "{flag}: {said}");
        }
    }
}
