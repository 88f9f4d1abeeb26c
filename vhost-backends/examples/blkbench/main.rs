//! pv-blkd beside qemu-storage-daemon and fio: one frontend, one file, taken in turns.
//!
//! `blkbench --image FILE` compares; every figure is the median over the rounds, and each case
//! ends with the ratio of ours to the best peer and the bar it is held against. `blkbench
//! --socket PATH --bytes N` only loads what listens there. `--only TEXT` picks cases by name.

mod frontend;
mod peers;

use clap::Parser;
use frontend::{DEPTH_MAX, Frontend, Load, Outcome};
use peers::{Peer, Store, fio};
use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::Duration;

#[derive(Debug, Parser)]
struct Cli {
    /// Compare on this file, which is overwritten; made if it is not there.
    #[arg(long, required_unless_present = "socket")]
    image: Option<PathBuf>,
    /// Load the backend that listens here, and nothing else.
    #[arg(long, conflicts_with = "image")]
    socket: Option<PathBuf>,
    /// Bytes of the disk.
    #[arg(long, default_value_t = 1 << 30)]
    bytes: u64,
    /// Times that each program takes its turn.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Seconds of one turn.
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Only cases with this in their name.
    #[arg(long, default_value = "")]
    only: String,
    /// The daemon; the one beside this program by default.
    #[arg(long)]
    daemon: Option<PathBuf>,
    /// With --socket: requests in flight.
    #[arg(long, default_value_t = 1)]
    depth: usize,
    /// With --socket: bytes of a request.
    #[arg(long, default_value_t = 4096)]
    block: usize,
    /// With --socket: write instead of read.
    #[arg(long)]
    write: bool,
    /// With --socket: look at the ring all the time instead of sleeping.
    #[arg(long)]
    busy: bool,
    /// With --socket: requests in a second.
    #[arg(long)]
    rate: Option<f64>,
}

/// What ours is compared with, and the least ratio wanted.
#[derive(Clone, Copy, Debug)]
enum Bar {
    Fio(f64),
    BestPeer(f64),
    /// Processor time for each request, at a rate that all can keep.
    Cpu,
}

struct Case {
    name: &'static str,
    store: Store,
    load: Load,
    bar: Bar,
}

fn cases(time: Duration) -> Vec<Case> {
    let load = Load {
        depth: 1,
        block: 4096,
        write: false,
        sequential: false,
        busy: false,
        rate: None,
        time,
    };
    let deep = Load { depth: 32, ..load };
    let write = |load| Load {
        write: true,
        ..load
    };
    let busy = |load| Load { busy: true, ..load };
    let paced = |load, rate| Load {
        rate: Some(rate),
        ..load
    };
    let long = Load {
        depth: 8,
        block: 128 << 10,
        sequential: true,
        ..load
    };
    let case = |name, store, load, bar| Case {
        name,
        store,
        load,
        bar,
    };
    use Bar::{BestPeer, Cpu, Fio};
    use Store::{Cached, Direct, Null};
    vec![
        case("direct read QD1", Direct, load, Fio(0.95)),
        case("direct read QD1 busy", Direct, busy(load), Fio(0.95)),
        case("direct read QD32", Direct, deep, Fio(0.95)),
        case("direct read QD32 busy", Direct, busy(deep), Fio(0.95)),
        case("direct write QD32", Direct, write(deep), Fio(0.95)),
        case("cached read QD1", Cached, load, BestPeer(2.0)),
        case("cached read QD1 busy", Cached, busy(load), BestPeer(2.0)),
        case("cached read QD32", Cached, deep, BestPeer(1.4)),
        case("cached read QD32 busy", Cached, busy(deep), BestPeer(1.4)),
        case("cached write QD32", Cached, write(deep), BestPeer(1.5)),
        case("sequential 128K direct read", Direct, long, BestPeer(1.0)),
        case(
            "sequential 128K direct write",
            Direct,
            write(long),
            BestPeer(1.0),
        ),
        case("sequential 128K cached read", Cached, long, BestPeer(1.0)),
        case(
            "sequential 128K cached write",
            Cached,
            write(long),
            BestPeer(1.0),
        ),
        case("null QD1", Null, load, BestPeer(1.2)),
        case("null QD1 busy", Null, busy(load), BestPeer(1.2)),
        case("null QD32", Null, deep, BestPeer(1.2)),
        case("null QD32 busy", Null, busy(deep), BestPeer(1.2)),
        case("paced direct read QD1", Direct, paced(load, 4e3), Cpu),
        case("paced direct read QD32", Direct, paced(deep, 30e3), Cpu),
        case("paced cached read QD1", Cached, paced(load, 5e3), Cpu),
        case("paced cached read QD32", Cached, paced(deep, 50e3), Cpu),
        case("paced null QD32", Null, paced(deep, 50e3), Cpu),
    ]
}

fn main() -> Result<(), Box<dyn Error>> {
    let cli = Cli::parse();
    let time = Duration::from_secs_f64(cli.seconds);
    if let Some(socket) = &cli.socket {
        let load = Load {
            depth: cli.depth.clamp(1, DEPTH_MAX),
            block: cli.block,
            write: cli.write,
            sequential: false,
            busy: cli.busy,
            rate: cli.rate,
            time,
        };
        let mut frontend = Frontend::connect(socket, load.depth * load.block)?;
        let outcome = frontend.run(load, cli.bytes)?;
        let per = |n: u64| n as f64 / outcome.requests as f64;
        println!(
            "{{\"iops\": {:.0}, \"kicks_per_request\": {:.3}, \"waits_per_request\": {:.3}}}",
            outcome.iops(),
            per(outcome.kicks),
            per(outcome.sleeps)
        );
        return Ok(());
    }
    let image = cli.image.clone().ok_or("--image is needed")?;
    let daemon = match &cli.daemon {
        Some(path) => path.clone(),
        None => beside_this("pv-blkd")?,
    };
    prepare(&image, cli.bytes)?;
    let dir = tempfile::tempdir()?;
    let socket = dir.path().join("blk.sock");
    let (mut held, mut missed) = (0, 0);
    for case in cases(time) {
        if !case.name.contains(&cli.only) {
            continue;
        }
        if compare(&cli, &case, &image, &daemon, &socket)? {
            held += 1;
        } else {
            missed += 1;
        }
    }
    println!("{held} bars held, {missed} missed");
    Ok(())
}

/// The figures of one program in one case.
struct Row {
    name: String,
    iops: Vec<f64>,
    cpu: Vec<f64>,
    last: Outcome,
}

/// Runs a case, prints it, and says whether its bar is held.
fn compare(
    cli: &Cli,
    case: &Case,
    image: &Path,
    daemon: &Path,
    socket: &Path,
) -> Result<bool, Box<dyn Error>> {
    let mut peers = vec![Peer::ours(daemon, image, case.store, cli.bytes)];
    peers.extend(Peer::qemu(image, case.store, cli.bytes));
    let row = |name: &str| Row {
        name: name.into(),
        iops: Vec::new(),
        cpu: Vec::new(),
        last: Outcome::default(),
    };
    let mut rows: Vec<Row> = peers.iter().map(|peer| row(&peer.name)).collect();
    let mut raw = row("fio io_uring");
    for _ in 0..cli.rounds {
        for (peer, row) in peers.iter().zip(&mut rows) {
            let running = peer.start(socket)?;
            let mut frontend = running.connect(socket, case.load.depth * case.load.block)?;
            let warm = Load {
                time: Duration::from_millis(100),
                ..case.load
            };
            frontend.run(warm, cli.bytes)?;
            let before = running.cpu()?;
            row.last = frontend.run(case.load, cli.bytes)?;
            row.cpu
                .push((running.cpu()? - before) / row.last.requests as f64);
            row.iops.push(row.last.iops());
        }
        if case.store != Store::Null && case.load.rate.is_none() {
            let (iops, cpu) = fio(image, case.store == Store::Direct, &case.load)?;
            raw.iops.push(iops);
            raw.cpu.push(cpu);
        }
    }
    Ok(report(case, &rows, &raw))
}

fn report(case: &Case, rows: &[Row], raw: &Row) -> bool {
    println!("{}", case.name);
    let ours = &rows[0];
    for row in rows.iter().chain(std::iter::once(raw)) {
        if row.iops.is_empty() {
            continue;
        }
        let per = |n: u64| n as f64 / row.last.requests.max(1) as f64;
        println!(
            "  {:16} {:>9.0} IOPS  {:>6.2} us CPU/request  {:.2} kicks  {:.2} sleeps  ours {:.2}x",
            row.name,
            median(&row.iops),
            median(&row.cpu),
            per(row.last.kicks),
            per(row.last.sleeps),
            median(&ours.iops) / median(&row.iops),
        );
    }
    let best = |f: fn(&Row) -> f64, pick: fn(f64, f64) -> f64| {
        rows.iter().skip(1).map(f).reduce(pick).unwrap_or(f64::NAN)
    };
    let (ratio, bar, what) = match case.bar {
        Bar::Fio(bar) => (median(&ours.iops) / median(&raw.iops), bar, "of fio"),
        Bar::BestPeer(bar) => {
            let best = best(|row| median(&row.iops), f64::max);
            (median(&ours.iops) / best, bar, "of the best peer")
        }
        Bar::Cpu => {
            let best = best(|row| median(&row.cpu), f64::min);
            (
                best / median(&ours.cpu),
                1.0,
                "thrift of the thriftiest peer",
            )
        }
    };
    let held = ratio >= bar;
    let verdict = if held { "held" } else { "MISSED" };
    println!("  {ratio:.2} {what}; bar {bar:.2}: {verdict}");
    held
}

fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn beside_this(name: &str) -> Result<PathBuf, Box<dyn Error>> {
    let this = std::env::current_exe()?;
    let dir = this.parent().and_then(Path::parent).ok_or("odd path")?;
    Ok(dir.join(name))
}

/// The file has all its blocks, and the page cache has them too.
fn prepare(image: &Path, bytes: u64) -> Result<(), Box<dyn Error>> {
    use std::io::{Read, Write};
    let mut file = std::fs::File::options()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(image)?;
    let mut chunk: Vec<u8> = (0..1 << 20).map(|i: u32| ((i * 7) >> 3) as u8).collect();
    if file.metadata()?.len() != bytes {
        for _ in 0..bytes >> 20 {
            file.write_all(&chunk)?;
        }
        file.set_len(bytes)?;
        file.sync_all()?;
    } else {
        while file.read(&mut chunk)? > 0 {}
    }
    Ok(())
}
