//! The command line. One port has flags; several have `--port`, whose keys are the same flags.

use crate::daemon::keys::{self, parse_bytes};
use crate::daemon::{Operation, SocketArgs};
use crate::limit::Limits;
use crate::limits::MAX_PORTS;
use crate::net::limits::MAX_QUEUE_PAIRS;
use crate::net::{Mac, OfferConfig};
use clap::{Args, Parser};
use std::path::PathBuf;

/// Longest name of a port.
const NAME_LEN: usize = 32;

/// Serves network ports as vhost-user network devices.
#[derive(Debug, Parser)]
#[command(
    name = "pv-netd",
    version,
    after_help = "\
Listens on --socket-path and serves one VMM after the other until SIGTERM. With --fd, a listening \
socket is used the same way; a connected one is served until its peer hangs up. Sockets passed by \
a service manager (LISTEN_FDS) are taken by ports that name none, in order or by --id.

Several ports: --port socket=a.sock,switch=lan --port socket=b.sock,switch=lan --port \
socket=c.sock,tap=tap0. Keys are the flags above without dashes in front; socket is short for \
socket-path. A comma within a value is written twice. Ports of the same switch are one network."
)]
pub(super) struct Cli {
    #[command(flatten)]
    pub(super) one: OnePort,
    /// One of several ports: KEY=VALUE,...
    #[arg(long, value_name = "KEYS")]
    port: Vec<String>,
    #[command(flatten)]
    pub(super) operation: Operation,
}

/// One port: where its frames go, how it is reached, what it may do.
#[derive(Args, Clone, Debug)]
pub(super) struct OnePort {
    #[command(flatten)]
    pub(super) socket: SocketArgs,
    #[command(flatten)]
    pub(super) peer: PeerArgs,
    /// The guest's address. One that stays the same for the same socket if not given.
    #[arg(long, value_name = "MAC")]
    pub(super) mac: Option<Mac>,
    /// Most bytes in a packet, told to the guest.
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u16).range(68..))]
    pub(super) mtu: Option<u16>,
    /// Pairs of queues, each with threads of its own.
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_QUEUE_PAIRS)))]
    pub(super) queue_pairs: u16,
    /// Which VMMs can read the device's configuration here. QEMU keeps its own, and some versions
    /// of it crash when a network backend has one.
    #[arg(long, value_enum, value_name = "WHEN", default_value_t)]
    pub(super) config: OfferConfig,
    /// Take memory from the VMM that it could cut off, which ends this program and all its ports.
    /// With one port that is always so.
    #[arg(long)]
    pub(super) unsealed_memory: bool,
    /// The port's name: in statistics, and among passed sockets.
    #[arg(long, value_name = "NAME", value_parser = parse_name)]
    pub(super) id: Option<String>,
    /// Packets that the guest may send per second; 0 is no limit.
    #[arg(long, value_name = "N", default_value_t = 0)]
    packets: u64,
    /// Packets at once after a pause; a tenth of a second's if not given.
    #[arg(long, value_name = "N", default_value_t = 0)]
    packets_burst: u64,
    /// Bytes that the guest may send per second (K, M, G); 0 is no limit.
    #[arg(long, value_name = "BYTES", default_value = "0", value_parser = parse_bytes)]
    bandwidth: u64,
    /// Bytes at once after a pause; a tenth of a second's if not given.
    #[arg(long, value_name = "BYTES", default_value = "0", value_parser = parse_bytes)]
    bandwidth_burst: u64,
}

/// Where frames go to and come from.
#[derive(Args, Clone, Debug)]
#[group(multiple = false)]
pub(super) struct PeerArgs {
    /// A tap interface of this name, made if it is not there.
    #[arg(long, value_name = "NAME")]
    pub(super) tap: Option<String>,
    /// An inherited tap interface; one descriptor for each pair of queues, as 3:4.
    #[arg(long, value_name = "FDS", value_delimiter = ':')]
    pub(super) tap_fd: Option<Vec<i32>>,
    /// A switch inside this program, shared by the ports that name it.
    #[arg(long, value_name = "NAME", value_parser = parse_name)]
    pub(super) switch: Option<String>,
    /// A Unix socket to connect to: passt, gvproxy, QEMU's -netdev stream.
    #[arg(long, value_name = "PATH")]
    pub(super) stream: Option<PathBuf>,
    /// A Unix socket to make, for such a program to connect to.
    #[arg(long, value_name = "PATH")]
    pub(super) stream_listen: Option<PathBuf>,
    /// A network interface of the host.
    #[arg(long, value_name = "NAME")]
    pub(super) interface: Option<String>,
    /// Back to the guest that sent it.
    #[arg(long)]
    pub(super) loopback: bool,
}

impl PeerArgs {
    fn is_given(&self) -> bool {
        self.loopback
            || self.tap.is_some()
            || self.tap_fd.is_some()
            || self.switch.is_some()
            || self.stream.is_some()
            || self.stream_listen.is_some()
            || self.interface.is_some()
    }
}

/// The keys of `--port`, as a command line of their own.
#[derive(Debug, Parser)]
#[command(name = "--port", disable_help_flag = true)]
struct Keys {
    #[command(flatten)]
    one: OnePort,
}

impl OnePort {
    pub(super) fn limits(&self) -> Result<Limits, String> {
        PortLimits {
            packets: self.packets,
            packets_burst: self.packets_burst,
            bandwidth: self.bandwidth,
            bandwidth_burst: self.bandwidth_burst,
        }
        .check()
    }
}

/// Limits of a port, as the control socket takes them and reports have them.
#[derive(Clone, Copy, Debug, Default, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct PortLimits {
    packets: u64,
    packets_burst: u64,
    bandwidth: u64,
    bandwidth_burst: u64,
}

impl PortLimits {
    /// In range, and as a limiter takes them.
    pub(super) fn check(self) -> Result<Limits, String> {
        Limits {
            iops: self.packets,
            iops_burst: self.packets_burst,
            bandwidth: self.bandwidth,
            bandwidth_burst: self.bandwidth_burst,
        }
        .check()
        .map_err(|error| error.to_string().replace("iops", "packets"))
    }
}

impl From<Limits> for PortLimits {
    fn from(limits: Limits) -> PortLimits {
        PortLimits {
            packets: limits.iops,
            packets_burst: limits.iops_burst,
            bandwidth: limits.bandwidth,
            bandwidth_burst: limits.bandwidth_burst,
        }
    }
}

impl Cli {
    /// The ports, each with its name. The error is a sentence.
    pub(super) fn ports(&self) -> Result<Vec<(String, OnePort)>, String> {
        let ports = if self.port.is_empty() {
            vec![self.one.clone()]
        } else if self.one.peer.is_given() || self.one.socket.is_given() {
            return Err(
                "--port names everything about a port; flags such as --tap and \
                        --socket-path are for a single one"
                    .into(),
            );
        } else {
            let parse = |text: &String| {
                keys::parse::<Keys>("--port", &[("socket", "socket-path")], text)
                    .map(|keys| keys.one)
                    .map_err(|reason| format!("--port {text}: {reason}"))
            };
            self.port.iter().map(parse).collect::<Result<_, _>>()?
        };
        if ports.len() > MAX_PORTS {
            return Err(format!("{} ports are more than {MAX_PORTS}", ports.len()));
        }
        let mut named = Vec::<(String, OnePort)>::new();
        for (index, port) in ports.into_iter().enumerate() {
            let name = port.id.clone().unwrap_or(format!("port{index}"));
            if named.iter().any(|(other, _)| *other == name) {
                return Err(format!("two ports have the name {name}"));
            }
            if !port.peer.is_given() {
                return Err(format!(
                    "{name}: where frames go is needed: --tap, --tap-fd, --switch, --stream, \
                     --stream-listen, --interface or --loopback"
                ));
            }
            let fds = port.peer.tap_fd.as_ref().map_or(0, Vec::len);
            if fds > usize::from(port.queue_pairs) {
                return Err(format!(
                    "{name}: {fds} descriptors of --tap-fd are more than {} pairs of queues: \
                     --queue-pairs",
                    port.queue_pairs
                ));
            }
            named.push((name, port));
        }
        Ok(named)
    }
}

fn parse_name(text: &str) -> Result<String, String> {
    keys::parse_name(text, NAME_LEN)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ports(args: &[&str]) -> Result<Vec<(String, OnePort)>, String> {
        Cli::try_parse_from([&["pv-netd"], args].concat())
            .map_err(|error| error.to_string())?
            .ports()
    }

    #[test]
    fn keys_are_flags() {
        let keys =
            "socket=a.sock,switch=lan,mac=52:54:00:00:00:01,mtu=9000,queue-pairs=2,packets=5";
        let named = ports(&["--port", keys, "--port", "socket=b,loopback,id=x"]).unwrap();
        assert_eq!((named[0].0.as_str(), named[1].0.as_str()), ("port0", "x"));
        let port = &named[0].1;
        assert_eq!(port.peer.switch.as_deref(), Some("lan"));
        assert_eq!(port.mac, Some(Mac([0x52, 0x54, 0, 0, 0, 1])));
        assert_eq!((port.mtu, port.queue_pairs), (Some(9000), 2));
        assert_eq!(port.limits().unwrap().iops, 5);
        let taps = ports(&["--port", "tap-fd=3:4,socket=c,queue-pairs=2"]).unwrap();
        assert_eq!(taps[0].1.peer.tap_fd, Some(vec![3, 4]));
    }

    #[test]
    fn bad_lines_get_a_sentence() {
        for (args, why) in [
            (&["--socket-path", "x"][..], "where frames go"),
            (&["--loopback", "--tap", "x"], "cannot be used with"),
            (&["--loopback", "--port", "loopback"], "single one"),
            (
                &["--port", "loopback,id=a", "--port", "loopback,id=a"],
                "two ports",
            ),
            (&["--port", "loopback,mac=01:00:00:00:00:01"], "one station"),
            (&["--port", "loopback,mac=1:2"], "not an address"),
            (&["--port", "loopback,mtu=10"], "10"),
            (&["--port", "loopback,queue-pairs=99"], "99"),
            (&["--port", "colour=red"], "no key"),
            (&["--port", "tap-fd=3:4"], "more than 1 pairs"),
        ] {
            let said = ports(args).unwrap_err();
            assert!(said.contains(why), "{args:?}: {said}");
        }
    }
}
