//! The guest suite: every case of the guest `suite`, on every accel, each in a VM of its own with
//! two disks, or a network card, a console and an entropy device. The backends are `pv-blkd` and
//! `pv-netd`; the cases that depend on them run a second time with backends in the VMM's own process
//! (`PV_BACKEND` chooses).
//!
//! Beside all of it runs, on each accel, a neighbour VM in the same process, which must not notice.
//!
//! | room | what happens there |
//! |---|---|
//! | `cases` | every case, and how it has to end |
//! | `expect` | whether it ended so, and what it has to have left behind |
//! | `host` | what the embedder does for the cases: disks, cards, calls |
//! | `beside` | what a case has beside it: the neighbour, a small file system |

mod beside;
mod cases;
mod expect;
mod host;

use anyhow::Context;
use beside::{Neighbour, Tmpfs, emulated, shut_down};
use cases::{CASES, End, about_backends, cases};
use expect::{Ran, as_in_a_process, check};
use host::{Host, Transcript, calls, endless, never_starts};
use libtest_mimic::{Arguments, Failed, Trial};
use paravane_tests::{
    Backend, Lan, accels, backends, blank_image, card, disk_in, patience, suite_vm,
};
use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vmm_core::{Accel, VmBuilder};

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::from_args();
    let accels = accels()?;
    let skipped: Arc<Mutex<Vec<String>>> = Arc::default();
    // Each case once, wherever its backends run.
    let ran: Arc<Mutex<HashSet<(Accel, &str)>>> = Arc::default();
    let neighbours = if arguments.list {
        Vec::new()
    } else {
        accels
            .iter()
            .map(|a| Neighbour::start(*a))
            .collect::<anyhow::Result<Vec<_>>>()?
    };
    let backends = backends()?;
    let mut trials = Vec::new();
    for accel in &accels {
        for (backend, (case, end)) in backends
            .iter()
            .flat_map(|b| cases(*b).map(move |c| (*b, c)))
        {
            let (accel, skipped, ran) = (*accel, Arc::clone(&skipped), Arc::clone(&ran));
            let place = match backend {
                Backend::Process => String::new(),
                Backend::InProcess => format!("{backend}::"),
            };
            trials.push(Trial::test(format!("{accel}::{place}{case}"), move || {
                lock(&ran).insert((accel, case));
                run_on_this_cpu(case, *end, accel, backend, &skipped)
                    .map_err(|e| Failed::from(format!("{e:#}")))
            }));
        }
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    if !arguments.list {
        for accel in &accels {
            let count = lock(&ran).iter().filter(|(on, _)| on == accel).count();
            let all = CASES.len();
            if count == all {
                println!("suite on {accel}: {count} cases");
            } else {
                println!("part of the suite on {accel}: {count} of {all} cases");
            }
            for backend in &backends {
                let count = cases(*backend).filter(|c| about_backends(c.0)).count();
                println!("cases of backends {backend} on {accel}: {count}");
            }
        }
        for line in lock(&skipped).iter() {
            println!("SKIPPED: {line}");
        }
        for neighbour in neighbours {
            neighbour.finish()?;
        }
    }
    conclusion.exit()
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs one case; once more where an emulated CPU has shut down under it, which is said.
///
/// Such a CPU now and then ends in a triple fault in a guest that has no fault at all. One that does so
/// twice, or that is not emulated, has failed.
fn run_on_this_cpu(
    case: &str,
    end: End,
    accel: Accel,
    backend: Backend,
    skipped: &Mutex<Vec<String>>,
) -> anyhow::Result<()> {
    match run(case, end, accel, backend, skipped) {
        Err(error) if emulated() && accel == Accel::Kvm && error.is::<ShutDown>() => {
            println!("REPEATED: {accel}::{case}, on an emulated CPU: {error:#}");
            run(case, end, accel, backend, skipped).context("the second time")
        }
        outcome => outcome,
    }
}

/// Runs one case, and looks at how it ended and at what it has left behind.
fn run(
    case: &str,
    end: End,
    accel: Accel,
    backend: Backend,
    skipped: &Mutex<Vec<String>>,
) -> anyhow::Result<()> {
    if case == "inert.never_starts" {
        return never_starts(accel);
    }
    let folder = tempfile::tempdir()?;
    let image = folder.path().join("disk.img");
    let mut tmpfs = None;
    let image = if case == "block.disk_full" {
        match Tmpfs::mount(folder.path()) {
            Ok(mount) => {
                let image = mount.0.join("disk.img");
                tmpfs = Some(mount);
                image
            }
            Err(error) => {
                let line = format!("{accel}::{case}: no tmpfs to fill: {error}");
                lock(skipped).push(line);
                return Ok(());
            }
        }
    } else {
        image
    };
    blank_image(&image)?;
    let other = folder.path().join("other.img");
    blank_image(&other)?;
    let transcript = Transcript::default();
    let mut host = Host::default();
    if case == "net.flood" {
        host.lan = Some(Lan::start(backend, folder.path())?);
    }
    let host = Arc::new(host);
    let builder = suite_vm(case, accel)?.rng();
    let builder = if let Some(lan) = &host.lan {
        lan.cards().into_iter().fold(builder, VmBuilder::net)
    } else if case.starts_with("net.") {
        builder.net(match backend {
            Backend::InProcess => host.card(),
            Backend::Process => card(),
        })
    } else {
        let disk = match backend {
            _ if case == "block.grow" => host.growing_disk(backend, &image)?,
            Backend::InProcess if case == "soak.kill" => host.disk(&image)?,
            _ => disk_in(backend, &image, case == "block.read_only"),
        };
        builder
            .block(disk.name("disk"))
            .block(disk_in(backend, &other, false).name("other"))
    };
    let builder = transcript.attach(calls(builder, &image, &host));
    let vm = builder.build().context("build")?.run().context("run")?;
    let vm = Arc::new(vm);
    let _ = host.vm.set(Arc::downgrade(&vm));
    if matches!(case, "console.echo" | "console.futures") {
        vm.console_input(b"hello, guest\n")?;
    }
    let reason = match end {
        End::Endless => endless(&vm)?,
        _ => {
            let limit = patience(if case.ends_with(".kill") { 120 } else { 60 });
            vm.wait_timeout(limit)
                .with_context(|| format!("not within {limit:?}"))?
        }
    };
    if let End::FaultOfCpu(class) = end
        && accel == Accel::Kvm
        && reason.fault_class() != Some(class)
    {
        return as_in_a_process(case, class, &reason, skipped).with_context(|| transcript.log());
    }
    check(end, &reason)
        .with_context(|| transcript.log())
        .map_err(|error| match shut_down(&reason) {
            true => error.context(ShutDown),
            false => error,
        })?;
    let ran = Ran {
        case,
        accel,
        backend,
        vm: &vm,
        host: &host,
        transcript: &transcript,
        image: &image,
    };
    ran.check()?;
    drop(vm);
    drop(tmpfs);
    Ok(())
}

/// The CPU shut down, and the case is not about that.
#[derive(Debug)]
struct ShutDown;

impl std::fmt::Display for ShutDown {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the CPU shut down")
    }
}
