//! Two guests on one switch, measuring TCP between them.

use crate::app::println;
use crate::cli::Args;
use crate::limits::READY_DEADLINE;
use crate::vm::{Guest, NET_BACKEND, backend};
use anyhow::{Context, Result, bail};
use quickstart::accel::Wanted;
use quickstart::interrupt;
use std::io;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

/// How long the backend may take to make its sockets.
const SOCKETS_DEADLINE: Duration = Duration::from_secs(10);
/// The environment variable that tells the backend with whom to end.
const PARENT: &str = "HTTP_GUEST_PARENT";

/// Runs both guests, and prints how much went from one to the other.
///
/// # Errors
///
/// In one sentence, with its causes.
pub fn run(args: &Args, accel: Wanted) -> Result<()> {
    let scratch = tempfile::tempdir().context("cannot make a scratch folder")?;
    let [first, second] = ["first", "second"].map(|name| scratch.path().join(name));
    let _switch = Switch::start(&[&first, &second])?;
    let sink = "role=sink ip=10.0.3.1/24";
    let source = format!(
        "role=source ip=10.0.3.2/24 peer=10.0.3.1 seconds={}",
        args.seconds
    );
    let mut sink = Guest::on_switch(accel, "sink", &first, sink)?.run()?;
    sink.wait_ready(READY_DEADLINE)?;
    let mut source = Guest::on_switch(accel, "source", &second, &source)?.run()?;
    let limit = READY_DEADLINE + Duration::from_secs(args.seconds);
    let sent = source.wait_measured(limit)?;
    let got = sink.wait_measured(READY_DEADLINE)?;
    if sent.bytes != got.bytes {
        bail!("{} bytes were sent and {} came", sent.bytes, got.bytes);
    }
    let gigabits = got.bytes as f64 * 8.0 / got.nanoseconds.max(1) as f64;
    println(&format!(
        "{} bytes from guest to guest on {}, {gigabits:.2} Gbit/s",
        got.bytes,
        sink.accel()
    ))
}

/// In a backend that belongs to no VM, which would see to it: arranges that it ends when the program
/// that started it does, however that ends. Nothing in any other.
///
/// # Errors
///
/// When that program is gone already, or the kernel refuses.
pub fn end_with_parent() -> io::Result<()> {
    let Some(parent) = std::env::var_os(PARENT) else {
        return Ok(());
    };
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    // It may have ended before that.
    let now = rustix::process::getppid().map(|now| now.as_raw_pid().to_string());
    if now.is_some_and(|now| parent == *now) {
        Ok(())
    } else {
        Err(io::Error::other("it is gone"))
    }
}

/// pv-netd with two ports on one switch. It ends with this value, and with the thread that made it.
struct Switch(Child);

impl Switch {
    fn start(sockets: &[&Path]) -> Result<Switch> {
        let mut command = backend(NET_BACKEND);
        for socket in sockets {
            // Scratch folders have no commas, which would have to be written twice.
            let port = format!("socket={},switch=lan", socket.display());
            command.arg("--port").arg(port);
        }
        command.env(PARENT, std::process::id().to_string());
        let child = command.stdin(Stdio::null()).spawn();
        let mut switch = Switch(child.context("cannot start pv-netd")?);
        let start = Instant::now();
        while !sockets.iter().all(|socket| socket.exists()) {
            interrupt::check()?;
            if let Some(status) = switch.0.try_wait()? {
                bail!("pv-netd ended: {status}");
            }
            if start.elapsed() > SOCKETS_DEADLINE {
                bail!("pv-netd made no sockets");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(switch)
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        // It may be gone already.
        let _gone = self.0.kill().is_err();
        let _reaped = self.0.wait().is_err();
    }
}
