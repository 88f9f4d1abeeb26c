//! pv-netd beside DPDK's net_vhost: the same frontend (testpmd on net_virtio_user), one processor
//! for the backend and one for the frontend, taken in turns.
//!
//! Needs root (a network namespace of its own), `dpdk-testpmd`, `taskset`, `unshare` and `ip`.
//! Every figure is the median over the rounds; each case ends with the ratio of ours to DPDK's and
//! the bar that it is held against. Figures of different runs are not comparable.

mod programs;

use clap::Parser;
use programs::{Backend, Case, Figures, run};
use std::error::Error;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

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

const CASES: [(&str, Case, f64); 6] = [
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
    ("tap, guest sends", Case::TapSend, 1.0),
    ("tap, guest receives", Case::TapReceive, 1.0),
];

fn compare(cli: &Cli) -> Result<ExitCode, Box<dyn Error>> {
    let beside = std::env::current_exe()?;
    let beside = beside
        .parent()
        .and_then(|p| p.parent())
        .ok_or("no folder")?;
    let daemon = cli.daemon.clone().unwrap_or(beside.join("pv-netd"));
    let dir = tempfile::tempdir()?;
    println!(
        "64-byte packets; packets per second, median of {} turns",
        cli.rounds
    );
    println!(
        "{:<32} {:>12} {:>12} {:>7} {:>5}  kicks, calls and sleeps per 1000 packets",
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
    let idle = programs::idle(&daemon, dir.path())?;
    println!("processor time of pv-netd with an idle frontend: {idle:.2} % of one processor");
    Ok(ExitCode::SUCCESS)
}

fn median(figures: &[Figures]) -> Figures {
    let mut sorted = figures.to_vec();
    sorted.sort_by(|a, b| a.packets.total_cmp(&b.packets));
    sorted
        .into_iter()
        .nth(figures.len() / 2)
        .unwrap_or_default()
}
