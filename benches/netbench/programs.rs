//! The programs that are compared, and what is read from them.

use crate::latency::{self, Latency, Plan, RECEIVER, SENDER};
use std::error::Error;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The tap of a turn.
const TAP: &str = "pvbench0";

#[derive(Clone, Copy, Debug)]
pub(crate) enum Case {
    MemorySend {
        packed: bool,
    },
    MemoryForward {
        packed: bool,
    },
    /// Two ports of one backend, joined; what comes out of one goes into the other.
    Joined {
        packed: bool,
    },
    TapSend,
    TapReceive,
}

impl Case {
    fn tap(self) -> bool {
        matches!(self, Case::TapSend | Case::TapReceive)
    }

    fn packed(self) -> bool {
        match self {
            Case::MemorySend { packed }
            | Case::MemoryForward { packed }
            | Case::Joined { packed } => packed,
            Case::TapSend | Case::TapReceive => false,
        }
    }

    /// What is behind our port, or ports.
    fn peer(self) -> Peer {
        match self {
            Case::TapSend | Case::TapReceive => Peer::Tap,
            Case::Joined { .. } => Peer::Switch,
            Case::MemorySend { .. } | Case::MemoryForward { .. } => Peer::Loopback,
        }
    }
}

/// Where a port's packets go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Peer {
    Loopback,
    Switch,
    Tap,
}

impl Peer {
    /// The ports' sockets in this folder.
    fn sockets(self, dir: &Path) -> Vec<PathBuf> {
        let names: &[&str] = match self {
            Peer::Switch => &["vhost", "second"],
            Peer::Loopback | Peer::Tap => &["vhost"],
        };
        names.iter().map(|name| dir.join(name)).collect()
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Backend<'p> {
    Ours(&'p Path),
    Dpdk,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Figures {
    pub(crate) packets: f64,
    pub(crate) signals: Option<String>,
}

/// A program that ends with this.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may be over already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn testpmd(cpu: usize, prefix: &str, vdevs: &[String], mode: &[&str]) -> Command {
    let mut command = Command::new("dpdk-testpmd");
    command
        .arg(format!("--lcores=0@{cpu},1@{cpu}"))
        .args(["--main-lcore", "0", "--no-huge", "-m", "256", "--no-pci"])
        .arg(format!("--file-prefix=netbench-{prefix}"));
    command.args(vdevs.iter().map(|vdev| format!("--vdev={vdev}")));
    command.arg("--").args(mode).args([
        "--txpkts=64",
        "--burst=64",
        "--total-num-mbufs=16384",
        "--stats-period=1",
    ]);
    command.stdin(Stdio::null());
    command
}

fn logged(command: &mut Command, log: &Path) -> Result<Running, Box<dyn Error>> {
    let file = File::create(log)?;
    command.stdout(file.try_clone()?).stderr(file);
    Ok(Running(command.spawn()?))
}

fn ours(daemon: &Path, dir: &Path, peer: Peer) -> Result<Running, Box<dyn Error>> {
    let mut command = Command::new("taskset");
    command.args(["-c", "0"]).arg(daemon);
    let to = match peer {
        Peer::Loopback => "loopback".into(),
        // Whose memory is not sealed may still have one of several ports here.
        Peer::Switch => "switch=lan,unsealed-memory".into(),
        Peer::Tap => format!("tap={TAP}"),
    };
    for (socket, mac) in peer.sockets(dir).iter().zip([SENDER, RECEIVER]) {
        let (socket, mac) = (socket.display(), address(mac));
        command.arg("--port");
        command.arg(format!("socket={socket},mac={mac},{to}"));
    }
    command.arg("--stats-socket").arg(dir.join("stats"));
    logged(&mut command, &dir.join("backend.log"))
}

fn dpdk(peer: Peer, mode: &str, dir: &Path) -> Result<Running, Box<dyn Error>> {
    let vhost = |(index, socket): (usize, &PathBuf)| {
        format!("net_vhost{index},iface={},queues=1", socket.display())
    };
    let mut vdevs: Vec<String> = peer.sockets(dir).iter().enumerate().map(vhost).collect();
    if peer == Peer::Tap {
        vdevs.push(format!("net_tap0,iface={TAP}"));
    }
    logged(
        &mut testpmd(0, "backend", &vdevs, &[mode]),
        &dir.join("backend.log"),
    )
}

fn address(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// Starts a backend and waits for its sockets.
fn start(
    backend: Backend<'_>,
    peer: Peer,
    mode: &str,
    dir: &Path,
) -> Result<Running, Box<dyn Error>> {
    for socket in peer.sockets(dir) {
        // Of the turn before.
        let _ = std::fs::remove_file(socket);
    }
    let running = match backend {
        Backend::Ours(daemon) => ours(daemon, dir, peer)?,
        Backend::Dpdk => dpdk(peer, mode, dir)?,
    };
    peer.sockets(dir)
        .iter()
        .try_for_each(|socket| wait_for(socket))?;
    Ok(running)
}

fn wait_for(path: &Path) -> Result<(), Box<dyn Error>> {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !path.exists() {
        if Instant::now() > deadline {
            return Err(format!("{} does not appear", path.display()).into());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    // Made a moment before anybody listens.
    std::thread::sleep(Duration::from_millis(300));
    Ok(())
}

/// Packets that the host's side of the tap has got.
fn tap_received() -> f64 {
    let path = format!("/sys/class/net/{TAP}/statistics/rx_packets");
    // A namespace's own /sys may not be mounted: then `ip` knows.
    let output = Command::new("ip")
        .args(["-j", "-s", "link", "show", TAP])
        .output();
    let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned());
    let from_ip = text.ok().and_then(|text| {
        let links: serde_json::Value = serde_json::from_str(&text).ok()?;
        links
            .get(0)?
            .get("stats64")?
            .get("rx")?
            .get("packets")?
            .as_f64()
    });
    from_ip.unwrap_or_else(|| {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        text.trim().parse().unwrap_or(0.0)
    })
}

/// One turn of one program.
pub(crate) fn run(
    case: Case,
    backend: Backend<'_>,
    dir: &Path,
    seconds: u64,
) -> Result<Figures, Box<dyn Error>> {
    let (peer, sends) = (case.peer(), matches!(case, Case::MemorySend { .. }));
    let mode = if sends {
        "--forward-mode=rxonly"
    } else {
        "--forward-mode=io"
    };
    let running = start(backend, peer, mode, dir)?;
    if case.tap() {
        let up = Command::new("ip")
            .args(["link", "set", TAP, "up"])
            .status()?;
        if !up.success() {
            return Err("the tap cannot be brought up".into());
        }
    }
    let packed = u8::from(case.packed());
    let users: Vec<String> = (peer.sockets(dir).iter().enumerate().zip([SENDER, RECEIVER]))
        .map(|((index, socket), mac)| {
            let (socket, mac) = (socket.display(), address(mac));
            format!(
                "net_virtio_user{index},path={socket},queue_size=1024,packed_vq={packed},mac={mac}"
            )
        })
        .collect();
    // What a port sends is for the other one.
    let peers = [(0, RECEIVER), (1, SENDER)];
    let peers = peers.map(|(port, mac)| format!("--eth-peer={port},{}", address(mac)));
    let mode: Vec<&str> = match case {
        Case::MemorySend { .. } | Case::TapSend => vec!["--forward-mode=txonly"],
        Case::MemoryForward { .. } => vec!["--forward-mode=io", "--tx-first"],
        Case::Joined { .. } => {
            let mut mode = vec!["--forward-mode=io", "--tx-first"];
            mode.extend(peers.iter().map(String::as_str));
            mode
        }
        Case::TapReceive => vec!["--forward-mode=rxonly"],
    };
    let log = dir.join("frontend.log");
    let front = logged(&mut testpmd(1, "frontend", &users, &mode), &log)?;
    let load = if matches!(case, Case::TapReceive) {
        let vdev = format!("net_af_packet0,iface={TAP}");
        let mode = ["--forward-mode=txonly"];
        let load = testpmd(1, "load", &[vdev], &mode)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        Some(Running(load))
    } else {
        None
    };
    // The start of the frontend is not measured on the tap, and left out of its own figures.
    std::thread::sleep(Duration::from_secs(2));
    let (start, before) = (Instant::now(), tap_received());
    std::thread::sleep(Duration::from_secs(seconds.saturating_sub(2).max(2)));
    let tap = (tap_received() - before) / start.elapsed().as_secs_f64();
    let signals = match backend {
        Backend::Ours(_) => Some(signals(&running, &dir.join("stats"))?),
        Backend::Dpdk => None,
    };
    drop((load, front));
    let mut text = String::new();
    File::open(&log)?.read_to_string(&mut text)?;
    let packets = match case {
        Case::TapSend => tap,
        Case::MemorySend { .. } => best(&text, "Tx-pps:"),
        // Of each port.
        Case::Joined { .. } => 2.0 * best(&text, "Rx-pps:"),
        _ => best(&text, "Rx-pps:"),
    };
    drop(running);
    Ok(Figures { packets, signals })
}

/// The median of a frontend's figures; the seconds in which it did nothing are left out.
fn best(text: &str, name: &str) -> f64 {
    let mut values: Vec<f64> = text
        .lines()
        .filter_map(|line| line.trim().strip_prefix(name))
        .filter_map(|rest| rest.split_whitespace().next()?.parse().ok())
        .filter(|value| *value > 0.0)
        .collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

fn stats(path: &Path) -> Result<serde_json::Value, Box<dyn Error>> {
    let mut stream = UnixStream::connect(path)?;
    stream.write_all(b"GET /stats HTTP/1.0\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let (_, body) = text.split_once("\r\n\r\n").ok_or("no answer")?;
    Ok(serde_json::from_str(body)?)
}

/// A counter, of all ports together.
fn counted(stats: &serde_json::Value, name: &str) -> f64 {
    let ports = stats.get("ports").and_then(serde_json::Value::as_array);
    let of_port = |port: &serde_json::Value| port.get(name)?.as_f64();
    ports.into_iter().flatten().filter_map(of_port).sum()
}

/// What a packet cost beside its copy: counted by the daemon, and its system calls by the kernel.
fn signals(running: &Running, path: &Path) -> Result<String, Box<dyn Error>> {
    let before = stats(path)?;
    let calls = system_calls(running);
    let after = stats(path)?;
    let get = |name| counted(&after, name) - counted(&before, name);
    let (sent, received) = (get("sent_frames"), get("received_frames"));
    let packets = sent.max(received).max(1.0);
    let exits = match calls {
        Some(calls) => format!("{:.4} exits", calls / packets),
        None => "exits not counted (no perf)".into(),
    };
    Ok(format!(
        "{:.4} kicks or wakes, {:.4} calls, {exits}; {:.2} got to a guest",
        get("wakes") / packets,
        get("calls") / packets,
        received / packets,
    ))
}

/// System calls of a program in a second, where `perf` can count them.
fn system_calls(running: &Running) -> Option<f64> {
    let output = Command::new("perf")
        .args(["stat", "-x,", "-e", "raw_syscalls:sys_enter", "-p"])
        .arg(running.0.id().to_string())
        .args(["--", "sleep", "1"])
        .output();
    let output = output.ok().filter(|output| output.status.success());
    if output.is_none() {
        // As long without it.
        std::thread::sleep(Duration::from_secs(1));
    }
    let text = String::from_utf8(output?.stderr).ok()?;
    let line = text.lines().find(|line| line.contains("sys_enter"))?;
    // None at all are not counted.
    let count = line.split(',').next()?;
    count
        .parse()
        .ok()
        .or_else(|| count.contains("not counted").then_some(0.0))
}

/// One packet there and back through a backend, on ports that are joined like this.
pub(crate) fn ping(
    backend: Backend<'_>,
    peer: Peer,
    plan: Plan,
    dir: &Path,
) -> Result<Latency, Box<dyn Error>> {
    let _running = start(backend, peer, "--forward-mode=io", dir)?;
    let sockets = peer.sockets(dir);
    let sockets: Vec<&Path> = sockets.iter().map(PathBuf::as_path).collect();
    latency::measure(&sockets, RECEIVER, plan)
}

/// Processor time of the daemon while a connected frontend does nothing, in percent.
pub(crate) fn idle(daemon: &Path, dir: &Path) -> Result<f64, Box<dyn Error>> {
    let socket = dir.join("vhost");
    let running = start(Backend::Ours(daemon), Peer::Loopback, "", dir)?;
    let user = format!("net_virtio_user0,path={}", socket.display());
    let mode = ["--forward-mode=rxonly"];
    let front = logged(
        &mut testpmd(1, "frontend", &[user], &mode),
        &dir.join("frontend.log"),
    )?;
    std::thread::sleep(Duration::from_secs(3));
    let ticks = || -> Result<f64, Box<dyn Error>> {
        let text = std::fs::read_to_string(format!("/proc/{}/stat", running.0.id()))?;
        let (_, rest) = text.rsplit_once(')').ok_or("no stat")?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        let field = |i: usize| {
            fields
                .get(i)
                .and_then(|f| f.parse::<f64>().ok())
                .unwrap_or(0.0)
        };
        Ok(field(11) + field(12))
    };
    let before = ticks()?;
    let seconds = 4.0;
    std::thread::sleep(Duration::from_secs_f64(seconds));
    // Ticks are hundredths of a second.
    let used = ticks()? - before;
    drop(front);
    Ok(used / seconds)
}
