//! pv-netd beside DPDK's net_vhost: the same frontend (testpmd on net_virtio_user), one processor
//! for the backend and one for the frontend, taken in turns.
//!
//! Needs root (a network namespace of its own), `dpdk-testpmd`, `taskset`, `unshare` and `ip`.
//! Every figure is the median over the rounds; each case ends with the ratio of ours to DPDK's and
//! the bar that it is held against. Figures of different runs are not comparable.

mod latency;
mod programs;

use clap::Parser;
use latency::{Latency, Plan};
use programs::{Backend, Case, Figures, Peer, ping, run};
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

#[derive(Debug, Parser)]
struct Cli {
    /// Times that each program takes its turn.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Seconds of one turn, the start included, which takes about two.
    #[arg(long, default_value_t = 6)]
    seconds: u64,
    /// Only cases with this in their name.
    #[arg(long, default_value = "")]
    only: String,
    /// The daemon; the one beside this program by default.
    #[arg(long)]
    daemon: Option<PathBuf>,
    /// Already inside the namespace.
    #[arg(long, hide = true)]
    inside: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let outcome = if cli.inside { compare(&cli) } else { enter() };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            eprintln!("netbench: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Starts this program again in a network namespace of its own.
fn enter() -> Result<ExitCode, Box<dyn Error>> {
    let status = Command::new("unshare")
        .arg("--net")
        .arg(std::env::current_exe()?)
        .arg("--inside")
        .args(std::env::args_os().skip(1))
        .status()?;
    Ok(if status.success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

const CASES: [(&str, Case, f64); 8] = [
    (
        "memory, guest sends",
        Case::MemorySend { packed: false },
        0.7,
    ),
    (
        "memory, there and back",
        Case::MemoryForward { packed: false },
        0.7,
    ),
    (
        "memory, guest sends, packed",
        Case::MemorySend { packed: true },
        0.7,
    ),
    (
        "memory, there and back, packed",
        Case::MemoryForward { packed: true },
        0.7,
    ),
    ("switch, two guests", Case::Joined { packed: false }, 0.7),
    (
        "switch, two guests, packed",
        Case::Joined { packed: true },
        0.7,
    ),
    ("tap, guest sends", Case::TapSend, 1.0),
    ("tap, guest receives", Case::TapReceive, 1.0),
];

fn compare(cli: &Cli) -> Result<ExitCode, Box<dyn Error>> {
    let daemon = match &cli.daemon {
        Some(path) => path.clone(),
        None => std::env::current_exe()?.with_file_name("pv-netd"),
    };
    let dir = tempfile::tempdir()?;
    println!(
        "64-byte packets; packets per second, median of {} turns",
        cli.rounds
    );
    println!(
        "{:<32} {:>12} {:>12} {:>7} {:>5}  pv-netd, for each packet",
        "", "pv-netd", "net_vhost", "ratio", "bar"
    );
    for (name, case, bar) in CASES.iter().filter(|(name, ..)| name.contains(&cli.only)) {
        let (mut ours, mut peer) = (Vec::new(), Vec::new());
        for round in 0..cli.rounds {
            let mut turns = [true, false];
            turns.rotate_left(round % 2);
            for turn in turns {
                let backend = if turn {
                    Backend::Ours(&daemon)
                } else {
                    Backend::Dpdk
                };
                let figures = run(*case, backend, dir.path(), cli.seconds)?;
                if turn { &mut ours } else { &mut peer }.push(figures);
            }
        }
        let (a, b) = (median(&ours), median(&peer));
        let ratio = a.packets / b.packets.max(1.0);
        println!(
            "{name:<32} {:>12.0} {:>12.0} {ratio:>7.2} {bar:>5.1}  {}",
            a.packets,
            b.packets,
            a.signals.unwrap_or_default()
        );
    }
    latencies(cli, &daemon, dir.path())?;
    let idle = programs::idle(&daemon, dir.path())?;
    println!("processor time of pv-netd with an idle frontend: {idle:.2} % of one processor");
    Ok(ExitCode::SUCCESS)
}

/// Ports, packets, and the pause before each: none, so that a backend that polls for a moment is
/// still awake, and one after which it sleeps.
const PINGS: [(&str, Peer, Plan); 4] = [
    ("loopback", Peer::Loopback, WITHOUT_PAUSE),
    ("switch", Peer::Switch, WITHOUT_PAUSE),
    ("loopback, after 1 ms", Peer::Loopback, AFTER_PAUSE),
    ("switch, after 1 ms", Peer::Switch, AFTER_PAUSE),
];
const WITHOUT_PAUSE: Plan = Plan {
    packets: 50_000,
    pause: Duration::ZERO,
};
const AFTER_PAUSE: Plan = Plan {
    packets: 500,
    pause: Duration::from_millis(1),
};

fn latencies(cli: &Cli, daemon: &Path, dir: &Path) -> Result<(), Box<dyn Error>> {
    println!();
    println!("one packet, from a guest to a guest; microseconds, the median turn's");
    println!(
        "{:<32} {:>17} {:>17} {:>7}",
        "", "pv-netd p50/p99", "net_vhost p50/p99", "ratio"
    );
    // The frontend's processor, as in the other cases.
    processors("1")?;
    let wanted = |name: &str| format!("latency, {name}").contains(&cli.only);
    for (name, peer, plan) in PINGS.iter().filter(|(name, ..)| wanted(name)) {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..cli.rounds {
            ours.push(ping(Backend::Ours(daemon), *peer, *plan, dir)?);
            theirs.push(ping(Backend::Dpdk, *peer, *plan, dir)?);
        }
        let (a, b) = (middle(&mut ours), middle(&mut theirs));
        println!(
            "latency, {name:<23} {:>8.1} {:>8.1} {:>8.1} {:>8.1} {:>7.2}  {:.3} kicks a packet",
            a.p50,
            a.p99,
            b.p50,
            b.p99,
            a.p50 / b.p50.max(1e-9),
            a.kicks
        );
    }
    processors("0-1")
}

/// Keeps this program's thread on these processors.
fn processors(list: &str) -> Result<(), Box<dyn Error>> {
    let own = std::process::id().to_string();
    let output = Command::new("taskset")
        .args(["-p", "-c", list, &own])
        .output()?;
    if output.status.success() {
        Ok(())
    } else {
        Err("taskset does not move this program".into())
    }
}

fn middle(turns: &mut [Latency]) -> Latency {
    turns.sort_by(|a, b| a.p50.total_cmp(&b.p50));
    turns.get(turns.len() / 2).copied().unwrap_or_default()
}

fn median(figures: &[Figures]) -> Figures {
    let mut sorted = figures.to_vec();
    sorted.sort_by(|a, b| a.packets.total_cmp(&b.packets));
    sorted
        .into_iter()
        .nth(figures.len() / 2)
        .unwrap_or_default()
}
