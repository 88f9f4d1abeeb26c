//! The whole job, from the command line to the last line.

use crate::cli::Args;
use crate::fetch;
use crate::forward::Forward;
use crate::limits::READY_DEADLINE;
use crate::pair;
use crate::vm::{Guest, Running};
use anyhow::{Context, Result, bail};
use quickstart::accel::Wanted;
use quickstart::interrupt;
use quickstart::pack::{Contents, pack};
use quickstart::place::{Draft, Place};
use quickstart::report::say;
use quickstart::scan::Plan;
use quickstart_fs::count::Counted;
use std::io::{ErrorKind, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;

/// Does what the command line says.
///
/// # Errors
///
/// In one sentence, with its causes.
pub fn run(args: &Args) -> Result<()> {
    let accel = Wanted::new(args.accel)?;
    accel.check()?;
    if args.pair {
        return pair::run(args, accel);
    }
    // First of all what is most likely to be wrong.
    let listener = listen(args.port)?;
    let url = format!("http://{}/", listener.local_addr()?);
    let (disk, contents) = prepare(args)?;
    let scratch = tempfile::tempdir().context("cannot make a scratch folder")?;
    let socket = scratch.path().join("network.sock");
    let forward = Forward::start(&socket, listener)?;
    let guest = Guest::server(accel, disk.path(), &socket)?;
    let mut running = guest.run()?;
    let (files, bytes) = running.wait_ready(READY_DEADLINE)?;
    if files != contents.digests.len() as u64 {
        bail!(
            "the guest has {files} files, and there are {}",
            contents.digests.len()
        );
    }
    say(format_args!(
        "a guest on {} serves {}, {}",
        running.accel(),
        Counted(files, "file"),
        Counted(bytes, "byte")
    ));
    println(&url)?;
    let outcome = match args.requests {
        Some(requests) => self_test(&mut running, &listener_address(&url), &contents, requests),
        None => running.wait_until_interrupted(),
    };
    running.stop();
    let forwarded = forward.stop();
    outcome?;
    say(format_args!(
        "{} forwarded, {} of them broken off",
        Counted(forwarded.connections, "connection"),
        forwarded.broken
    ));
    Ok(())
}

fn self_test(
    running: &mut Running,
    address: &str,
    contents: &Contents,
    requests: u64,
) -> Result<()> {
    let fetched = fetch::run(address, contents, requests)?;
    running.check()?;
    println(&format!(
        "{} requests, {} files, {} bytes, {} errors, {:.0} requests/s",
        fetched.requests,
        contents.digests.len(),
        fetched.bytes,
        fetched.errors,
        fetched.requests as f64 / fetched.elapsed.as_secs_f64()
    ))?;
    match fetched.first_error {
        Some(error) => bail!("{} of {requests} requests failed: {error}", fetched.errors),
        None => Ok(()),
    }
}

fn listener_address(url: &str) -> String {
    url.trim_start_matches("http://")
        .trim_end_matches('/')
        .into()
}

fn listen(port: u16) -> Result<TcpListener> {
    match TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
        Err(error) if error.kind() == ErrorKind::AddrInUse => {
            bail!("port {port} is taken: give another with --port, or 0 for a free one")
        }
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            bail!("port {port} takes a privilege: give one above 1023 with --port")
        }
        listener => listener.with_context(|| format!("cannot listen on port {port}")),
    }
}

/// Packs the folder into a disk image without a name.
fn prepare(args: &Args) -> Result<(Place, Contents)> {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = own.ancestors().nth(2).unwrap_or(own);
    let folder = args.folder.clone().unwrap_or_else(|| root.join("docs"));
    let plan = Plan::scan(&folder)?;
    for problem in &plan.problems {
        say(format_args!("left out: {problem}"));
    }
    if plan.files.is_empty() {
        bail!(
            "{} holds no file to serve: give a folder with files",
            folder.display()
        );
    }
    let draft = Draft::scratch()?;
    let contents = pack(&plan, draft.file(), |_| {})?;
    interrupt::check()?;
    Ok((draft.finish()?, contents))
}

/// A line for whoever asked; nobody may be reading.
pub(crate) fn println(line: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")
        .and_then(|()| out.flush())
        .context("cannot print the result")
}
