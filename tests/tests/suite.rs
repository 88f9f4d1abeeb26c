//! The guest suite: every case of the guest `suite`, on every accel, each in a VM of its own with
//! two disks, or a network card, a console and an entropy device. The backends are `pv-blkd` and
//! `pv-netd`; the cases that depend on them run a second time with backends in the VMM's own process
//! (`PV_BACKEND` chooses).
//!
//! Beside all of it runs, on each accel, a neighbour VM in the same process, which must not notice.

use anyhow::{Context, bail, ensure};
use libtest_mimic::{Arguments, Failed, Trial};
use paravane_tests::{
    Backend, Lan, Larger, accels, backends, blank_image, block_device, card, disk_in, net_device,
    patience, suite_vm,
};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};
use vhost_backends::net::{Drop as Dropped, NetDevice, NetSnapshot};
use vhost_backends::session::{Device, Server, SessionEnd};
use vmm_core::pv_abi::call::number;
use vmm_core::{
    Accel, BlockConfig, ExitReason, FaultClass, Image, LogLevel, NetConfig, Refusal, Stats,
    Violation, VmBuilder, VmHandle,
};

/// How a case has to end.
#[derive(Clone, Copy, Debug)]
enum End {
    /// Exit code 0: the guest found everything as it should be.
    Fine,
    /// This exit code.
    Code(u32),
    /// A panic.
    Panic,
    /// A CPU fault of this class.
    Fault(FaultClass),
    /// The same; but an emulated CPU may not raise it. Where a plain process of this CPU ends otherwise,
    /// the guest on KVM has to end as that one, and it is said that nothing more was proved.
    FaultOfCpu(FaultClass),
    /// Refused as something that a flat guest may not do, in whichever way the accel sees it.
    Forbidden,
    /// Ended by a typed fault, or answered with nothing done by the hypervisor that the instruction is a
    /// call to, which need not be ours: then the case goes on and is fine.
    Harmless,
    /// A call with a frame that does not exist.
    BadFrameIndex,
    /// Does not end: the host pauses, resumes and stops it.
    Endless,
}
use End::{BadFrameIndex, Code, Endless, Fault, FaultOfCpu, Fine, Forbidden, Harmless, Panic};

/// Every case, by stable id.
const CASES: &[(&str, End)] = &[
    ("call.nop", Fine),
    ("call.unknown", Fine),
    ("call.bad_frame", Fine),
    ("call.unused_arguments", Fine),
    ("call.negotiate_twice", Fine),
    ("call.log_limits", Fine),
    ("call.clock", Fine),
    ("call.multicall", Fine),
    ("call.multicall_bad", Fine),
    ("call.embedder", Fine),
    ("call.embedder_later", Fine),
    ("call.embedder_refused", Fine),
    ("call.embedder_dropped", Fine),
    ("call.embedder_bad_address", Fine),
    ("call.frame_index", BadFrameIndex),
    ("call.second_frame", Fine),
    ("call.checkpoint_refused", Fine),
    ("life.boot_block", Fine),
    ("life.start_state", Fine),
    ("life.exit_code", Code(42)),
    ("life.panic", Panic),
    ("life.allocator", Fine),
    ("life.floating_point", Fine),
    ("life.memory", Fine),
    ("life.idle_times_out", Fine),
    ("life.idle_short", Fine),
    ("life.spin", Endless),
    ("life.idle_forever", Endless),
    ("life.bad_doorbells", Fine),
    ("life.doorbell_storm", Fine),
    ("life.log_storm", Fine),
    ("life.counted", Fine),
    ("smp.start_all", Fine),
    ("smp.wake", Fine),
    ("smp.bad_start", Fine),
    ("smp.queue_moves", Fine),
    ("smp.exit_from_secondary", Code(7)),
    ("fault.divide", Fault(FaultClass::Divide)),
    ("fault.divide_overflow", Fault(FaultClass::Divide)),
    ("fault.debug", Fault(FaultClass::Debug)),
    ("fault.icebp", FaultOfCpu(FaultClass::Debug)),
    ("fault.breakpoint", Fault(FaultClass::Breakpoint)),
    ("fault.invalid_opcode", Fault(FaultClass::InvalidOpcode)),
    ("fault.null", Fault(FaultClass::Page)),
    ("fault.unmapped", Fault(FaultClass::Page)),
    ("fault.past_the_image", Fault(FaultClass::Page)),
    ("fault.kernel_half", Fault(FaultClass::Page)),
    ("fault.monitor", Fault(FaultClass::Page)),
    ("fault.page_tables", Fault(FaultClass::Page)),
    ("fault.write_gate", Fault(FaultClass::Page)),
    ("fault.write_boot_block", Fault(FaultClass::Page)),
    ("fault.write_device_table", Fault(FaultClass::Page)),
    ("fault.write_clock", Fault(FaultClass::Page)),
    ("fault.write_text", Fault(FaultClass::Page)),
    ("fault.write_rodata", Fault(FaultClass::Page)),
    ("fault.jump_data", Fault(FaultClass::Page)),
    ("fault.jump_stack", Fault(FaultClass::Page)),
    ("fault.jump_arena", Fault(FaultClass::Page)),
    ("fault.jump_control", Fault(FaultClass::Page)),
    ("fault.jump_null", Fault(FaultClass::Page)),
    ("fault.stack_overflow", Fault(FaultClass::Page)),
    ("fault.stack_overflow_secondary", Fault(FaultClass::Page)),
    ("fault.non_canonical", Fault(FaultClass::Protection)),
    ("fault.non_canonical_jump", Fault(FaultClass::Protection)),
    ("fault.alignment", FaultOfCpu(FaultClass::Alignment)),
    ("fault.aligned_sse", Fault(FaultClass::Protection)),
    ("fault.x87", Fault(FaultClass::FloatingPoint)),
    ("fault.sse", FaultOfCpu(FaultClass::FloatingPoint)),
    ("fault.empty_slot", Fault(FaultClass::InvalidOpcode)),
    ("fault.bad_segment", Fault(FaultClass::Protection)),
    ("fault.stack_segment", Fault(FaultClass::Protection)),
    ("fault.gs_base", Fault(FaultClass::Page)),
    ("banned.hlt", Forbidden),
    ("banned.cli", Forbidden),
    ("banned.sti", Forbidden),
    ("banned.in", Forbidden),
    ("banned.out", Forbidden),
    ("banned.gate_port_byte", Forbidden),
    ("banned.gate_port_in", Forbidden),
    ("banned.fault_port", Forbidden),
    ("banned.int80", Forbidden),
    ("banned.int_2", Forbidden),
    ("banned.syscall", Forbidden),
    ("banned.rdmsr", Forbidden),
    ("banned.mov_cr3", Forbidden),
    ("banned.lgdt", Forbidden),
    ("banned.invlpg", Forbidden),
    ("banned.iopl", Forbidden),
    ("banned.vmcall", Harmless),
    ("banned.vmmcall", Harmless),
    ("banned.iretq", Fault(FaultClass::Protection)),
    ("banned.far_call", Fault(FaultClass::Protection)),
    ("banned.swapgs", Forbidden),
    ("banned.rdpmc", Forbidden),
    ("banned.sysenter", Forbidden),
    ("device.table", Fine),
    ("device.no_such_device", Fine),
    ("device.bad_setup_address", Fine),
    ("device.bad_setup_length", Fine),
    ("device.bad_queue_sizes", Fine),
    ("device.bad_queue_addresses", Fine),
    ("device.bad_vcpus_and_counts", Fine),
    ("device.features_not_offered", Fine),
    ("device.active_twice", Fine),
    ("device.reset_any_state", Fine),
    ("device.config_write", Fine),
    ("device.table_is_alone", Fine),
    ("console.output", Fine),
    ("console.echo", Fine),
    ("console.futures", Fine),
    ("rng.fill", Fine),
    ("block.read_write", Fine),
    ("block.sizes", Fine),
    ("block.depth", Fine),
    ("block.identify", Fine),
    ("block.out_of_range", Fine),
    ("block.read_only", Fine),
    ("block.discard", Fine),
    ("block.two_queues", Fine),
    ("block.two_vcpus", Fine),
    ("block.futures", Fine),
    ("block.reopen", Fine),
    ("block.disk_full", Fine),
    ("block.truncated", Fine),
    ("block.grow", Fine),
    ("ring.good", Fine),
    ("ring.private_ram", Fine),
    ("ring.other_arena", Fine),
    ("ring.unmapped", Fine),
    ("ring.monitor", Fine),
    ("ring.wrapping_address", Fine),
    ("ring.past_the_arena", Fine),
    ("ring.loop_of_one", Fine),
    ("ring.loop_of_two", Fine),
    ("ring.next_out_of_range", Fine),
    ("ring.head_out_of_range", Fine),
    ("ring.over_long", Fine),
    ("ring.indirect_in_indirect", Fine),
    ("ring.indirect_loop", Fine),
    ("ring.indirect_odd_length", Fine),
    ("ring.indirect_empty", Fine),
    ("ring.indirect_huge", Fine),
    ("ring.index_jump", Fine),
    ("ring.same_head_twice", Fine),
    ("ring.readable_after_writable", Fine),
    ("ring.no_status_byte", Fine),
    ("ring.short_header", Fine),
    ("soak.kill", Fine),
    ("net.echo", Fine),
    ("net.echo_unmerged", Fine),
    ("net.two_pairs", Fine),
    ("net.control", Fine),
    ("net.link", Fine),
    ("net.backend_link", Fine),
    ("net.reopen", Fine),
    ("net.forgotten", Fine),
    ("net.bad_setup", Fine),
    ("net.announce", Fine),
    ("net.coalesce", Fine),
    ("net.kill", Fine),
    ("net.raw_good", Fine),
    ("net.private_ram_sent", Fine),
    ("net.private_ram_received", Fine),
    ("net.other_arena", Fine),
    ("net.past_the_arena", Fine),
    ("net.short_header", Fine),
    ("net.written_by_the_device", Fine),
    ("net.every_length", Fine),
    ("net.wrong_headers", Fine),
    ("net.small_buffers", Fine),
    ("net.tiny_buffers", Fine),
    ("net.split_header", Fine),
    ("net.bad_commands", Fine),
    ("net.full_tables", Fine),
    ("net.flood", Fine),
    ("inert.never_starts", Fine),
];

/// Times that `soak.kill` and `net.kill` end the backend.
const KILLS: u64 = 25;

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::from_args();
    let accels = accels()?;
    let skipped: Arc<Mutex<Vec<String>>> = Arc::default();
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
            let (accel, skipped) = (*accel, Arc::clone(&skipped));
            let place = match backend {
                Backend::Process => String::new(),
                Backend::InProcess => format!("{backend}::"),
            };
            trials.push(Trial::test(format!("{accel}::{place}{case}"), move || {
                run(case, *end, accel, backend, &skipped)
                    .map_err(|e| Failed::from(format!("{e:#}")))
            }));
        }
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    if !arguments.list {
        for accel in &accels {
            println!("suite on {accel}: {} cases", CASES.len());
            for backend in &backends {
                let count = cases(*backend).filter(|c| about_backends(c.0)).count();
                println!("cases of backends {backend} on {accel}: {count}");
            }
        }
        for line in skipped
            .lock()
            .map_err(|_| anyhow::anyhow!("poisoned"))?
            .iter()
        {
            println!("SKIPPED: {line}");
        }
        for neighbour in neighbours {
            neighbour.finish()?;
        }
    }
    conclusion.exit()
}

/// Whether a case depends on who serves disks and cards.
fn about_backends(case: &str) -> bool {
    ["block.", "ring.", "device.", "soak.", "net."]
        .iter()
        .any(|room| case.starts_with(room))
}

/// The cases to run with backends there.
fn cases(backend: Backend) -> impl Iterator<Item = &'static (&'static str, End)> {
    CASES
        .iter()
        .filter(move |(case, _)| backend == Backend::Process || about_backends(case))
}

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
                if let Ok(mut list) = skipped.lock() {
                    list.push(format!("{accel}::{case}: no tmpfs to fill: {error}"));
                }
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
    let mut soak = Soak::default();
    if case == "net.flood" {
        soak.lan = Some(Lan::start(backend, folder.path())?);
    }
    let soak = Arc::new(soak);
    let builder = suite_vm(case, accel)?.rng();
    let builder = if let Some(lan) = &soak.lan {
        lan.cards().into_iter().fold(builder, VmBuilder::net)
    } else if case.starts_with("net.") {
        builder.net(match backend {
            Backend::InProcess => soak.card(),
            Backend::Process => card(),
        })
    } else {
        let disk = match backend {
            _ if case == "block.grow" => soak.growing_disk(backend, &image)?,
            Backend::InProcess if case == "soak.kill" => soak.disk(&image)?,
            _ => disk_in(backend, &image, case == "block.read_only"),
        };
        builder
            .block(disk.name("disk"))
            .block(disk_in(backend, &other, false).name("other"))
    };
    let builder = transcript.attach(calls(builder, &image, &soak));
    let vm = builder.build().context("build")?.run().context("run")?;
    let vm = Arc::new(vm);
    let _ = soak.vm.set(Arc::downgrade(&vm));
    if matches!(case, "console.echo" | "console.futures") {
        vm.console_input(b"hello, guest\n")?;
    }
    let reason = match end {
        Endless => endless(&vm)?,
        _ => {
            let limit = patience(if case.ends_with(".kill") { 120 } else { 60 });
            vm.wait_timeout(limit)
                .with_context(|| format!("not within {limit:?}"))?
        }
    };
    if let FaultOfCpu(class) = end
        && accel == Accel::Kvm
        && reason.fault_class() != Some(class)
    {
        return as_in_a_process(case, class, &reason, skipped).with_context(|| transcript.log());
    }
    check(end, &reason).with_context(|| transcript.log())?;
    match case {
        "console.output" => {
            let bytes = transcript.console();
            ensure!(
                bytes.starts_with(b"line 0\nline 1\n"),
                "console began otherwise"
            );
            ensure!(bytes.ends_with(&[b'x'; 10_000]), "console ended otherwise");
        }
        "console.echo" | "console.futures" => {
            let bytes = transcript.console();
            ensure!(
                bytes == b"\ntseug ,olleh",
                "echo: {:?}",
                String::from_utf8_lossy(&bytes)
            );
        }
        "soak.kill" | "net.kill" => {
            let kills = soak.kills.load(Ordering::Relaxed);
            let stats = vm.stats();
            // One end at a time, each after the guest had the device back from the one before, and the
            // guest went on until it was over the last one.
            ensure!(kills == KILLS, "{kills} ends");
            ensure!(stats.backend_reconnects >= KILLS, "{stats:?}");
            ensure!(stats.backend_losses >= KILLS, "{stats:?}");
            println!(
                "{accel}::{case}, backends {backend}: {kills} ends, {} {} verified, {} losses, {} reconnects",
                soak.done.load(Ordering::Relaxed),
                if case == "net.kill" {
                    "frames"
                } else {
                    "writes"
                },
                stats.backend_losses,
                stats.backend_reconnects
            );
        }
        "net.every_length" | "net.wrong_headers" => {
            if let Some(card) = soak.card.get() {
                every_one_counted(case, &card.stats().snapshot())?;
            }
        }
        "block.grow" => {
            let said = soak.larger.get().context("not this disk")?.said()?;
            ensure!(
                said.contains("32768 sectors became 49152; the frontend was told"),
                "{said}"
            );
            let bytes = std::fs::read(&image)?;
            ensure!(bytes.len() == 24 << 20, "{} bytes", bytes.len());
            ensure!(bytes.ends_with(&[0x5a; 4096]), "the new end");
        }
        "life.bad_doorbells" => {
            let bad = vm.stats().bad_doorbells;
            ensure!(bad == 9, "{bad} bad doorbells were counted");
        }
        "life.counted" => {
            let (idles, rounds) = *soak.counted.get().context("the guest told nothing")?;
            counts(accel, &vm.stats(), idles, rounds)?;
        }
        "life.log_storm" => {
            let dropped = vm.stats().log_dropped;
            ensure!(dropped > 0, "no log line was dropped");
        }
        _ => {}
    }
    drop(vm);
    drop(tmpfs);
    Ok(())
}

/// What `life.counted` did, of which it told the host how often it idled and waited for an event.
fn counts(accel: Accel, stats: &Stats, idles: u64, rounds: u64) -> anyhow::Result<()> {
    let calls = [
        (number::NEGOTIATE, 1),
        (number::NOP, 17),
        (number::CLOCK, 5),
        (number::DEVICE_ACTIVATE, 1),
        (number::EMBEDDER, 5),
        (number::EMBEDDER + 20, 1),
    ];
    let (unknown, bad_doorbells) = (5, 3);
    ensure!(stats.calls == calls.into(), "calls: {stats:?}");
    ensure!(stats.refused_calls == unknown, "refused: {stats:?}");
    ensure!(stats.kicks == rounds + bad_doorbells, "kicks: {stats:?}");
    ensure!(stats.bad_doorbells == bad_doorbells, "doorbells: {stats:?}");
    ensure!(stats.idles == idles, "{idles} idles: {stats:?}");
    ensure!(stats.events == rounds, "events: {stats:?}");
    let exits = stats.exits;
    let made: u64 = calls.iter().map(|(_, times)| times).sum();
    ensure!(exits.call == made + unknown, "calls: {exits:?}");
    ensure!(exits.doorbell == bad_doorbells, "doorbells: {exits:?}");
    // On process the guest waits by itself.
    let waits = if accel == Accel::Kvm { idles } else { 0 };
    ensure!(exits.idle == waits, "{waits} waits: {exits:?}");
    ensure!((exits.fault, exits.other) == (0, 1), "end: {exits:?}");
    Ok(())
}

/// The CPU did not raise the fault under KVM: it must not do so without KVM either.
fn as_in_a_process(
    case: &str,
    class: FaultClass,
    reason: &ExitReason,
    skipped: &Mutex<Vec<String>>,
) -> anyhow::Result<()> {
    let vm = suite_vm(case, Accel::Process)?.build()?.run()?;
    let plain = vm
        .wait_timeout(patience(60))
        .context("not in time in a process")?;
    ensure!(
        plain.fault_class() == reason.fault_class() && plain.code() == reason.code(),
        "expected a {class:?} fault; the guest {reason} on kvm, and {plain} in a process"
    );
    if let Ok(mut list) = skipped.lock() {
        list.push(format!(
            "the {class:?} fault of {case}: this CPU does not raise it, with KVM or without: the guest {reason}"
        ));
    }
    Ok(())
}

/// What the guest sent and never got is counted, with its reason.
fn every_one_counted(case: &str, stats: &NetSnapshot) -> anyhow::Result<()> {
    let (short, long) = (12 + 14 - 1, 49);
    let (length, header, none) = (
        stats.dropped(Dropped::Length),
        stats.dropped(Dropped::BadHeader),
        stats.dropped(Dropped::NoBuffer),
    );
    if case == "net.wrong_headers" {
        ensure!(header == 14, "{stats:?}");
    } else {
        ensure!(length == short + long, "{stats:?}");
        // Those at both ends are never thinned out.
        ensure!(none >= 1600 - short + 100, "{stats:?}");
    }
    Ok(())
}

fn check(end: End, reason: &ExitReason) -> anyhow::Result<()> {
    let right = match end {
        Fine => reason.code() == Some(0),
        Code(code) => reason.code() == Some(code),
        Panic => matches!(reason, ExitReason::Panicked(m) if m.contains("as the case wants")),
        Fault(class) | FaultOfCpu(class) => reason.fault_class() == Some(class),
        Forbidden => match reason {
            ExitReason::Fault(fault) => fault.class == FaultClass::Forbidden,
            ExitReason::Violation(violation) => {
                matches!(
                    violation,
                    Violation::SystemCall { .. } | Violation::BadPort { .. }
                )
            }
            _ => false,
        },
        Harmless => reason.code() == Some(0) || matches!(reason, ExitReason::Fault(_)),
        BadFrameIndex => {
            matches!(
                reason,
                ExitReason::Violation(Violation::BadFrameIndex { index: 7 })
            )
        }
        Endless => matches!(reason, ExitReason::Stopped),
    };
    ensure!(right, "expected {end:?}, the guest {reason} ({reason:?})");
    Ok(())
}

/// Pauses, resumes and stops a guest that never ends by itself.
fn endless(vm: &VmHandle) -> anyhow::Result<ExitReason> {
    let limit = Instant::now() + patience(30);
    while !vm.stats().calls.contains_key(&number::NEGOTIATE) {
        ensure!(Instant::now() < limit, "it did not negotiate");
        std::thread::sleep(Duration::from_millis(2));
    }
    for _ in 0..3 {
        vm.pause()?;
        std::thread::sleep(Duration::from_millis(5));
        vm.resume()?;
        std::thread::sleep(Duration::from_millis(5));
    }
    vm.pause()?;
    vm.stop();
    vm.wait_timeout(patience(30)).context("it did not stop")
}

fn never_starts(accel: Accel) -> anyhow::Result<()> {
    let vm = VmBuilder::new(Image::from_bytes(guest_images::INERT)?)
        .accel(accel)
        .boot_deadline(Duration::from_millis(100))
        .build()?
        .run()?;
    let reason = vm
        .wait_timeout(patience(30))
        .context("the deadline passed unnoticed")?;
    let expected = Violation::NeverStarted { deadline_ms: 100 };
    match reason {
        ExitReason::Violation(violation) if violation == expected => Ok(()),
        other => bail!("{other:?}"),
    }
}

/// What the guest said.
#[derive(Clone, Default)]
struct Transcript {
    log: Arc<Mutex<Vec<String>>>,
    console: Arc<Mutex<Vec<u8>>>,
}

impl Transcript {
    fn attach(&self, builder: VmBuilder) -> VmBuilder {
        let (log, console) = (Arc::clone(&self.log), Arc::clone(&self.console));
        builder
            .log(move |level, line| {
                if let Ok(mut log) = log.lock()
                    && (level <= LogLevel::Info || log.len() < 10)
                {
                    log.push(format!("{level:?}: {line}"));
                }
            })
            .console_callback(move |bytes| {
                if let Ok(mut console) = console.lock() {
                    console.extend_from_slice(bytes);
                }
            })
    }

    fn log(&self) -> String {
        self.log.lock().map(|l| l.join("; ")).unwrap_or_default()
    }

    fn console(&self) -> Vec<u8> {
        self.console.lock().map(|c| c.clone()).unwrap_or_default()
    }
}

#[derive(Default)]
struct Soak {
    vm: OnceLock<std::sync::Weak<VmHandle>>,
    kills: AtomicU64,
    /// What `life.counted` has counted itself.
    counted: OnceLock<(u64, u64)>,
    /// Writes or frames that the guest has found to be right, when it was last over an end.
    done: AtomicU64,
    /// The card, if its backend runs in this process.
    card: OnceLock<Arc<NetDevice>>,
    /// What the card floods.
    lan: Option<Lan>,
    /// Dropped, it ends the backend that runs in this process now.
    ending: Mutex<Option<UnixStream>>,
    /// What makes the disk larger.
    larger: OnceLock<Arc<Larger>>,
}

impl Soak {
    /// A disk whose backend runs in this process.
    fn disk(self: &Arc<Soak>, image: &Path) -> std::io::Result<BlockConfig> {
        let serve = self.serve(block_device(image, false)?);
        Ok(BlockConfig::in_process(serve).queues(2))
    }

    /// A disk that can be made larger.
    fn growing_disk(&self, backend: Backend, image: &Path) -> anyhow::Result<BlockConfig> {
        let (disk, larger) = Larger::disk(backend, image)?;
        let _ = self.larger.set(larger);
        Ok(disk)
    }

    /// A card whose backend runs in this process.
    fn card(self: &Arc<Soak>) -> NetConfig {
        let device = Arc::clone(self.card.get_or_init(net_device));
        NetConfig::in_process(self.serve(device)).queue_pairs(2)
    }

    /// Serves a device until it is told to end: once with a panic.
    fn serve(
        self: &Arc<Soak>,
        device: Arc<dyn Device>,
    ) -> impl Fn(UnixStream) -> std::io::Result<()> + Send + Sync + 'static {
        let soak = Arc::clone(self);
        move |stream| {
            let (ending, stop) = UnixStream::pair()?;
            let server = Server::new(device.clone(), stop.into());
            if let Ok(mut slot) = soak.ending.lock() {
                *slot = Some(ending);
            }
            if server.serve(stream) == SessionEnd::Stopped
                && soak.kills.load(Ordering::Relaxed) == 2
            {
                // A panic that says nothing on standard error.
                std::panic::resume_unwind(Box::new("as the test wants"));
            }
            Ok(())
        }
    }

    /// Takes the card's link up or down, by the VM's switch or by the backend's; whether it can.
    fn set_link(&self, switch: u64, up: bool) -> Option<bool> {
        match switch {
            0 => self.vm.get()?.upgrade()?.set_link(0, up).ok()?,
            _ => match self.card.get() {
                Some(card) => card.set_link(up).ok()?,
                None => return Some(false),
            },
        }
        Some(true)
    }

    /// Ends the backend of the first device, unless the guest, which has found so much to be right,
    /// is not over the last end yet; whether it is over all of them.
    fn kill(&self, done: u64) -> Option<u64> {
        let vm = self.vm.get()?.upgrade()?;
        let kills = self.kills.load(Ordering::Relaxed);
        if vm.stats().backend_reconnects < kills || done <= self.done.load(Ordering::Relaxed) {
            return Some(0);
        }
        self.done.store(done, Ordering::Relaxed);
        if kills >= KILLS {
            return Some(1);
        }
        let pid = *vm.backend_pids().first()?;
        let ending = self.ending.lock().ok()?.take();
        if pid != 0 || ending.is_some() {
            self.kills.store(kills + 1, Ordering::Relaxed);
        }
        if pid != 0 {
            kill_9(pid);
        }
        Some(0)
    }
}

#[allow(unsafe_code)]
fn kill_9(pid: u32) {
    // SAFETY: a signal to a process that this test's VM supervises.
    unsafe { libc::kill(pid as libc::pid_t, libc::SIGKILL) };
}

/// The embedder's calls that the cases make.
fn calls(builder: VmBuilder, image: &Path, soak: &Arc<Soak>) -> VmBuilder {
    let (image, soak): (PathBuf, _) = (image.into(), Arc::clone(soak));
    let (linked, flooded) = (Arc::clone(&soak), Arc::clone(&soak));
    let growing = Arc::clone(&soak);
    let told = Arc::clone(&soak);
    builder
        .call(0, |call| {
            let sum = call.args().iter().sum();
            call.finish(Ok(sum));
        })
        .call(1, |call| {
            let [gpa, len, ..] = call.args();
            let mut bytes = vec![0; usize::try_from(len).unwrap_or(0).min(4096)];
            let result = call.read(gpa, &mut bytes).and_then(|()| {
                bytes.reverse();
                call.write(gpa, &bytes)
            });
            call.finish(result.map(|()| len).map_err(Refusal::from));
        })
        .call(2, |call| {
            std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(30));
                let [value, ..] = call.args();
                call.finish(Ok(value * 2));
            });
        })
        .call(3, |call| {
            let [code, ..] = call.args();
            call.finish(Err(Refusal::code(code)));
        })
        .call(4, drop)
        .call(6, move |call| {
            let cut = std::fs::OpenOptions::new().write(true).open(&image);
            let cut = cut.and_then(|file| file.set_len(1 << 20));
            call.finish(cut.map(|()| 0).map_err(|_| Refusal::code(1)));
        })
        .call(7, move |call| {
            let [completed, ..] = call.args();
            let enough = soak.kill(completed).unwrap_or(0);
            call.finish(Ok(enough));
        })
        .call(8, move |call| {
            let [switch, up, ..] = call.args();
            let done = linked.set_link(switch, up != 0);
            call.finish(done.map(u64::from).ok_or(Refusal::code(2)));
        })
        .call(20, move |call| {
            let [idles, rounds, ..] = call.args();
            let _ = told.counted.set((idles, rounds));
            call.finish(Ok(0));
        })
        .call(9, move |call| {
            let dropped = flooded.lan.as_ref().and_then(|lan| lan.flood_drops().ok());
            call.finish(dropped.ok_or(Refusal::code(3)));
        })
        .call(10, move |call| {
            let begun = growing.larger.get().map(|larger| larger.begin(24 << 20));
            call.finish(begun.map(|()| 0).ok_or(Refusal::code(4)));
        })
}

/// A small file system to be filled.
struct Tmpfs(PathBuf);

impl Tmpfs {
    #[allow(unsafe_code)]
    fn mount(folder: &Path) -> std::io::Result<Tmpfs> {
        let at = folder.join("small");
        std::fs::create_dir(&at)?;
        let target = std::ffi::CString::new(at.as_os_str().as_encoded_bytes())?;
        let (kind, options) = (c"tmpfs".as_ptr(), c"size=6m".as_ptr());
        // SAFETY: four valid strings.
        let r = unsafe { libc::mount(kind, target.as_ptr(), kind, 0, options.cast()) };
        if r == 0 {
            Ok(Tmpfs(at))
        } else {
            Err(std::io::Error::last_os_error())
        }
    }
}

impl Drop for Tmpfs {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        if let Ok(target) = std::ffi::CString::new(self.0.as_os_str().as_encoded_bytes()) {
            // SAFETY: a valid string.
            unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
        }
    }
}

/// Another VM of this process, which goes on with its own business.
struct Neighbour {
    vm: VmHandle,
    ticks: Arc<AtomicU64>,
    accel: Accel,
}

impl Neighbour {
    fn start(accel: Accel) -> anyhow::Result<Neighbour> {
        let ticks: Arc<AtomicU64> = Arc::default();
        let counted = Arc::clone(&ticks);
        let vm = suite_vm("life.ticker", accel)?
            .call(5, move |call| {
                counted.fetch_add(1, Ordering::Relaxed);
                call.finish(Ok(0));
            })
            .build()?
            .run()?;
        Ok(Neighbour { vm, ticks, accel })
    }

    fn finish(self) -> anyhow::Result<()> {
        let before = self.ticks.load(Ordering::Relaxed);
        std::thread::sleep(patience(1) / 4);
        let after = self.ticks.load(Ordering::Relaxed);
        ensure!(
            after > before,
            "the neighbour on {} stands still",
            self.accel
        );
        if let Some(reason) = self.vm.exit() {
            bail!("the neighbour on {} has ended: {reason}", self.accel);
        }
        self.vm.stop();
        println!(
            "the neighbour on {} ticked {after} times and noticed nothing",
            self.accel
        );
        Ok(())
    }
}
