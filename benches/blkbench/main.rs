//! pv-blkd beside qemu-storage-daemon and fio: one frontend, one file, taken in turns.
//!
//! `blkbench --image FILE` compares. In every round each program takes its turn, with a new
//! process and a new connection; every figure is the median over the rounds, and each case ends
//! with the ratio of ours to what it is compared with and the bar it is held against. A missed bar
//! is a line in the output, never an error.
//!
//! All servers get the same load from the same frontend: it does the same for all of them, runs on
//! a processor that no server may use, and costs a few stores for each request. In cases named
//! `busy` it looks at the ring all the time; in the others it sleeps until it is called, and what
//! waking a sleeping processor costs the host is part of every figure. Servers, and fio with them,
//! have all the other processors. fio is the file without any server: one thread that submits and
//! takes completions itself.
//!
//! The image has all its blocks. In direct cases none of it is in the page cache; in the others all
//! of it is, in single pages, as random I/O leaves it. After large reads it would hold large ones, and a file system may then go through all blocks
//! of one for each small write, which would be all that is measured.
//!
//! `--only TEXT` picks cases by name. `blkbench --socket PATH --bytes N` only loads what listens
//! there. `blkbench --costs` says what measuring and limiting cost for each request.

mod cases;
mod costs;
mod driver;
mod frontend;
mod peers;
mod processors;

use cases::{Bar, Case, cases};
use clap::Parser;
use frontend::{DEPTH_MAX, Frontend, Load, Outcome};
use peers::{Peer, Store, fio};
use processors::Processors;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::Duration;

#[derive(Debug, Parser)]
struct Cli {
    /// Compare on this file, which is overwritten; made if it is not there.
    #[arg(long, required_unless_present_any = ["socket", "costs"])]
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
    /// Only cases with one of these in their name.
    #[arg(long)]
    only: Vec<String>,
    /// See that everything runs: a short turn of each program in each case, not to be quoted.
    #[arg(long, conflicts_with_all = ["rounds", "seconds"])]
    smoke: bool,
    /// Let the scheduler choose the processors of frontend and servers.
    #[arg(long)]
    unpinned: bool,
    /// Measure what statistics and limits cost for each request, in this process.
    #[arg(long)]
    costs: bool,
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
    /// With --socket: one request after the other instead of anywhere.
    #[arg(long)]
    sequential: bool,
    /// With --socket: requests in a second.
    #[arg(long)]
    rate: Option<f64>,
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut cli = Cli::parse();
    if cli.smoke {
        (cli.rounds, cli.seconds) = (1, 0.05);
    }
    let time = Duration::from_secs_f64(cli.seconds);
    if cli.costs {
        costs::print();
        return Ok(());
    }
    let processors = Processors::share_out(!cli.unpinned)?;
    if let Some(socket) = &cli.socket {
        let load = Load {
            depth: cli.depth.clamp(1, DEPTH_MAX),
            block: cli.block,
            write: cli.write,
            sequential: cli.sequential,
            busy: cli.busy,
            rate: cli.rate,
            time,
        };
        processors.in_server(|| ())?;
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
    println!("{processors}");
    let dir = tempfile::tempdir()?;
    let bench = Bench {
        socket: dir.path().join("blk.sock"),
        cli,
        image,
        daemon,
        processors,
    };
    let (mut held, mut missed) = (0, 0);
    let mut cached = None;
    for case in cases(time) {
        let only = &bench.cli.only;
        if !only.is_empty() && !only.iter().any(|part| case.name.contains(part.as_str())) {
            continue;
        }
        let wants_cache = case.store == Store::Cached;
        if cached.replace(wants_cache) != Some(wants_cache) {
            fill_cache(&bench.image, wants_cache)?;
        }
        if bench.compare(&case)? {
            held += 1;
        } else {
            missed += 1;
        }
        // What a case wrote is on the disk before the next begins.
        std::fs::File::open(&bench.image)?.sync_data()?;
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

struct Bench {
    cli: Cli,
    image: PathBuf,
    daemon: PathBuf,
    socket: PathBuf,
    processors: Processors,
}

impl Bench {
    /// Runs a case, prints it, and says whether its bar is held.
    fn compare(&self, case: &Case) -> Result<bool, Box<dyn Error>> {
        let (image, bytes) = (&self.image, self.cli.bytes);
        let mut peers = vec![Peer::ours(&self.daemon, image, case.store, bytes)];
        peers.extend(Peer::qemu(image, case.store, bytes));
        let row = |name: &str| Row {
            name: name.into(),
            iops: Vec::new(),
            cpu: Vec::new(),
            last: Outcome::default(),
        };
        let mut rows: Vec<Row> = peers.iter().map(|peer| row(&peer.name)).collect();
        let mut raw = row("fio io_uring");
        for _ in 0..self.cli.rounds {
            for (peer, row) in peers.iter().zip(&mut rows) {
                self.turn(peer, case.load, row)?;
            }
            if case.store != Store::Null && case.load.rate.is_none() {
                let direct = case.store == Store::Direct;
                let run = || fio(image, direct, &case.load);
                let (iops, cpu) = self.processors.in_server(run)??;
                raw.iops.push(iops);
                raw.cpu.push(cpu);
            }
        }
        Ok(report(case, &rows, &raw))
    }

    /// One program's turn in a round.
    fn turn(&self, peer: &Peer, load: Load, row: &mut Row) -> Result<(), Box<dyn Error>> {
        let bytes = self.cli.bytes;
        let running = self.processors.in_server(|| peer.start(&self.socket))??;
        let mut frontend = running.connect(&self.socket, load.depth * load.block)?;
        let warm = Load {
            time: load.time.min(Duration::from_millis(100)),
            ..load
        };
        frontend.run(warm, bytes)?;
        let before = running.cpu()?;
        row.last = frontend.run(load, bytes)?;
        let used = running.cpu()? - before;
        row.cpu.push(used / row.last.requests.max(1) as f64);
        row.iops.push(row.last.iops());
        Ok(())
    }
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
    Ok(std::env::current_exe()?.with_file_name(name))
}

/// The file has all its blocks, on the disk.
fn prepare(image: &Path, bytes: u64) -> Result<(), Box<dyn Error>> {
    use std::io::Write;
    let mut file = std::fs::File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(image)?;
    if file.metadata()?.len() != bytes {
        let chunk: Vec<u8> = (0..1 << 20).map(|i: u32| ((i * 7) >> 3) as u8).collect();
        for _ in 0..bytes >> 20 {
            file.write_all(&chunk)?;
        }
        file.set_len(bytes)?;
    }
    // Pages must be clean to be dropped.
    Ok(file.sync_all()?)
}

/// Takes the file out of the page cache, or brings all of it there, page by page.
fn fill_cache(image: &Path, full: bool) -> Result<(), Box<dyn Error>> {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::open(image)?;
    processors::drop_pages(&file)?;
    let mut page = [0; 4096];
    let wanted = if full { file.metadata()?.len() } else { 0 };
    for at in (0..wanted).step_by(page.len()) {
        file.read_exact_at(&mut page, at)?;
    }
    Ok(())
}
