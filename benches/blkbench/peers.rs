//! The programs that are compared.

use crate::frontend::Frontend;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long a program may take to end when it is asked to.
const TIME_TO_END: Duration = Duration::from_secs(5);

/// How the disk is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Store {
    Direct,
    Cached,
    Null,
}

/// A program that serves the disk.
#[derive(Clone, Debug)]
pub(crate) struct Peer {
    pub(crate) name: String,
    program: PathBuf,
    arguments: Vec<String>,
}

impl Peer {
    /// The daemon of this project.
    pub(crate) fn ours(program: &Path, image: &Path, store: Store, bytes: u64) -> Peer {
        let image = image.display().to_string();
        let arguments = match store {
            Store::Direct => vec!["--blk-file".into(), image, "--direct".into()],
            Store::Cached => vec!["--blk-file".into(), image],
            Store::Null => vec!["--null".into(), bytes.to_string()],
        };
        Peer {
            name: "pv-blkd".into(),
            program: program.into(),
            arguments,
        }
    }

    /// qemu-storage-daemon, once for each of its engines that can serve this.
    pub(crate) fn qemu(image: &Path, store: Store, bytes: u64) -> Vec<Peer> {
        let engines: &[&str] = match store {
            Store::Direct => &["threads", "native", "io_uring"],
            Store::Cached => &["threads", "io_uring"],
            Store::Null => &["null-co"],
        };
        let image = image.display();
        let peer = |engine: &&str| {
            let disk = match store {
                Store::Null => format!("driver=null-co,node-name=d,size={bytes},read-zeroes=off"),
                _ => format!(
                    "driver=file,node-name=d,filename={image},aio={engine},cache.direct={}",
                    if store == Store::Direct { "on" } else { "off" }
                ),
            };
            Peer {
                name: format!("qsd {engine}"),
                program: "qemu-storage-daemon".into(),
                arguments: vec![
                    "--object".into(),
                    "iothread,id=io".into(),
                    "--blockdev".into(),
                    disk,
                ],
            }
        };
        engines.iter().map(peer).collect()
    }

    /// Starts it, and waits until it listens.
    pub(crate) fn start(&self, socket: &Path) -> Result<Running, Box<dyn Error>> {
        let _ = std::fs::remove_file(socket);
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).stdin(Stdio::null());
        let shown = socket.display();
        if self.name == "pv-blkd" {
            command.arg("--socket-path").arg(socket);
        } else {
            command.arg("--export").arg(format!(
                "vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={shown},writable=on,\
                 iothread=io"
            ));
        }
        let mut running = Running(
            command
                .spawn()
                .map_err(|e| format!("{}: {e}", self.program.display()))?,
        );
        let deadline = Instant::now() + Duration::from_secs(10);
        while !socket.exists() {
            if let Some(status) = running.0.try_wait()? {
                return Err(format!("{} ended with {status}", self.name).into());
            }
            if Instant::now() > deadline {
                return Err(format!("{} does not listen", self.name).into());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(running)
    }
}

/// A started program; ended on drop.
pub(crate) struct Running(Child);

impl Running {
    /// Connects, once it listens: the socket's file is there a moment before.
    pub(crate) fn connect(&self, socket: &Path, bytes: usize) -> Result<Frontend, Box<dyn Error>> {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            match Frontend::connect(socket, bytes) {
                Err(_) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                result => return result,
            }
        }
    }

    /// Processor time of all its threads, in microseconds.
    pub(crate) fn cpu(&self) -> Result<f64, Box<dyn Error>> {
        let mut nanos = 0;
        for thread in std::fs::read_dir(format!("/proc/{}/task", self.0.id()))? {
            // One that has just ended is left out.
            let times = std::fs::read_to_string(thread?.path().join("schedstat"));
            let times = times.unwrap_or_default();
            nanos += times
                .split_whitespace()
                .next()
                .and_then(|on_cpu| on_cpu.parse::<u64>().ok())
                .unwrap_or(0);
        }
        Ok(nanos as f64 / 1e3)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // As one that lets go of the image: a killed one keeps the lock for as long as the kernel still
        // has requests of its in hand, and the next program has to find it free.
        let asked = Command::new("kill").arg(self.0.id().to_string()).status();
        let until = Instant::now() + TIME_TO_END;
        while asked.is_ok() && Instant::now() < until {
            if !matches!(self.0.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What fio's io_uring does on the file itself: requests in a second, and microseconds of
/// processor for each.
pub(crate) fn fio(
    image: &Path,
    direct: bool,
    load: &crate::frontend::Load,
) -> Result<(f64, f64), Box<dyn Error>> {
    let mode = match (load.sequential, load.write) {
        (false, false) => "randread",
        (false, true) => "randwrite",
        (true, false) => "read",
        (true, true) => "write",
    };
    let output = Command::new("fio")
        .args(["--name=x", "--ioengine=io_uring", "--time_based=1"])
        .args([
            "--output-format=json",
            "--invalidate=0",
            "--randrepeat=0",
            "--norandommap",
        ])
        .arg(format!("--filename={}", image.display()))
        .arg(format!("--direct={}", u8::from(direct)))
        .arg(format!("--rw={mode}"))
        .arg(format!("--bs={}", load.block))
        .arg(format!("--iodepth={}", load.depth))
        .arg(format!("--runtime={}ms", load.time.as_millis()))
        .output()?;
    let json: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let job = &json["jobs"][0];
    let side = if load.write { "write" } else { "read" };
    let iops = job[side]["iops"].as_f64().ok_or("fio gave no result")?;
    let cpu = job["usr_cpu"].as_f64().unwrap_or(0.0) + job["sys_cpu"].as_f64().unwrap_or(0.0);
    Ok((iops, cpu / 100.0 * 1e6 / iops.max(1.0)))
}
