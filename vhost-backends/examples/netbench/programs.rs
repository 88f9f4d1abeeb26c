//! The programs that are compared, and what is read from them.

use std::error::Error;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The tap of a turn.
const TAP: &str = "pvbench0";

#[derive(Clone, Copy, Debug)]
pub(crate) enum Case {
    MemorySend { packed: bool },
    MemoryForward { packed: bool },
    TapSend,
    TapReceive,
}

impl Case {
    fn tap(self) -> bool {
        matches!(self, Case::TapSend | Case::TapReceive)
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

fn ours(daemon: &Path, dir: &Path, port: &str) -> Result<Running, Box<dyn Error>> {
    let (socket, stats) = (dir.join("vhost"), dir.join("stats"));
    let mut command = Command::new("taskset");
    command.args(["-c", "0"]).arg(daemon);
    command
        .arg("--port")
        .arg(format!("socket={},{port}", socket.display()));
    command.arg("--stats-socket").arg(stats);
    logged(&mut command, &dir.join("backend.log"))
}

fn dpdk(case: Case, dir: &Path) -> Result<Running, Box<dyn Error>> {
    let vhost = format!("net_vhost0,iface={},queues=1", dir.join("vhost").display());
    let (vdevs, mode) = match case {
        Case::MemorySend { .. } => (vec![vhost], "--forward-mode=rxonly"),
        Case::MemoryForward { .. } => (vec![vhost], "--forward-mode=io"),
        Case::TapSend | Case::TapReceive => (
            vec![vhost, format!("net_tap0,iface={TAP}")],
            "--forward-mode=io",
        ),
    };
    logged(
        &mut testpmd(0, "backend", &vdevs, &[mode]),
        &dir.join("backend.log"),
    )
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
    let socket = dir.join("vhost");
    let _ = std::fs::remove_file(&socket);
    let running = match backend {
        Backend::Ours(daemon) => {
            let port = if case.tap() {
                format!("tap={TAP}")
            } else {
                "loopback".into()
            };
            ours(daemon, dir, &port)?
        }
        Backend::Dpdk => dpdk(case, dir)?,
    };
    wait_for(&socket)?;
    if case.tap() {
        let up = Command::new("ip")
            .args(["link", "set", TAP, "up"])
            .status()?;
        if !up.success() {
            return Err("the tap cannot be brought up".into());
        }
    }
    let packed = match case {
        Case::MemorySend { packed } | Case::MemoryForward { packed } => u8::from(packed),
        _ => 0,
    };
    let user = format!(
        "net_virtio_user0,path={},queue_size=1024,packed_vq={packed}",
        socket.display()
    );
    let mode: &[&str] = match case {
        Case::MemorySend { .. } | Case::TapSend => &["--forward-mode=txonly"],
        Case::MemoryForward { .. } => &["--forward-mode=io", "--tx-first"],
        Case::TapReceive => &["--forward-mode=rxonly"],
    };
    let log = dir.join("frontend.log");
    let front = logged(&mut testpmd(1, "frontend", &[user], mode), &log)?;
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
        Backend::Ours(_) => Some(signals(&dir.join("stats"))?),
        Backend::Dpdk => None,
    };
    drop((load, front));
    let mut text = String::new();
    File::open(&log)?.read_to_string(&mut text)?;
    let packets = match case {
        Case::TapSend => tap,
        Case::MemorySend { .. } => best(&text, "Tx-pps:"),
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
    let all: serde_json::Value = serde_json::from_str(body)?;
    Ok(all.pointer("/ports/0").cloned().unwrap_or_default())
}

fn signals(path: &Path) -> Result<String, Box<dyn Error>> {
    let port = stats(path)?;
    let get = |name: &str| {
        port.get(name)
            .and_then(serde_json::Value::as_f64)
            .unwrap_or(0.0)
    };
    let thousands = (get("sent_frames").max(get("received_frames")) / 1000.0).max(1e-9);
    Ok(format!(
        "{:.3} calls, {:.3} sleeps (each ended by a kick or the port)",
        get("calls") / thousands,
        get("wakes") / thousands
    ))
}

/// Processor time of the daemon while a connected frontend does nothing, in percent.
pub(crate) fn idle(daemon: &Path, dir: &Path) -> Result<f64, Box<dyn Error>> {
    let socket = dir.join("vhost");
    let _ = std::fs::remove_file(&socket);
    let running = ours(daemon, dir, "loopback")?;
    wait_for(&socket)?;
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
