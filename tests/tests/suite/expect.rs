//! What is expected of a case: its end, and what it has to have left behind.

use crate::cases::End::{
    self, BadFrameIndex, Code, Endless, Fault, FaultOfCpu, Fine, Forbidden, Harmless, Panic,
};
use crate::host::{Host, KILLS, Transcript};
use anyhow::{Context, ensure};
use paravane_tests::{Backend, patience, suite_vm};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::Ordering;
use vhost_backends::net::{Drop as Dropped, NetSnapshot};
use vmm_core::pv_abi::call::number;
use vmm_core::{Accel, ExitReason, FaultClass, Stats, Violation, VmHandle};

/// A case that ended as it had to.
pub(crate) struct Ran<'a> {
    pub(crate) case: &'a str,
    pub(crate) accel: Accel,
    pub(crate) backend: Backend,
    pub(crate) vm: &'a VmHandle,
    pub(crate) host: &'a Host,
    pub(crate) transcript: &'a Transcript,
    pub(crate) image: &'a Path,
}

impl Ran<'_> {
    /// Whether it left behind what it had to.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        match self.case {
            "console.output" => {
                let bytes = self.transcript.console();
                ensure!(
                    bytes.starts_with(b"line 0\nline 1\n"),
                    "console began otherwise"
                );
                ensure!(bytes.ends_with(&[b'x'; 10_000]), "console ended otherwise");
            }
            "console.echo" | "console.futures" => {
                let bytes = self.transcript.console();
                ensure!(
                    bytes == b"\ntseug ,olleh",
                    "echo: {:?}",
                    String::from_utf8_lossy(&bytes)
                );
            }
            "soak.kill" | "net.kill" => {
                let kills = self.host.kills.load(Ordering::Relaxed);
                let stats = self.vm.stats();
                // One end at a time, each after the guest had the device back from the one before, and the
                // guest went on until it was over the last one.
                ensure!(kills == KILLS, "{kills} ends");
                ensure!(stats.backend_reconnects >= KILLS, "{stats:?}");
                ensure!(stats.backend_losses >= KILLS, "{stats:?}");
                println!(
                    "{}::{}, backends {}: {kills} ends, {} {} verified, {} losses, {} reconnects",
                    self.accel,
                    self.case,
                    self.backend,
                    self.host.done.load(Ordering::Relaxed),
                    if self.case == "net.kill" {
                        "frames"
                    } else {
                        "writes"
                    },
                    stats.backend_losses,
                    stats.backend_reconnects
                );
            }
            "net.every_length" | "net.wrong_headers" => {
                if let Some(card) = self.host.card.get() {
                    every_one_counted(self.case, &card.stats().snapshot())?;
                }
            }
            "block.grow" => {
                let said = self.host.larger.get().context("not this disk")?.said()?;
                ensure!(
                    said.contains("32768 sectors became 49152; the frontend was told"),
                    "{said}"
                );
                let bytes = std::fs::read(self.image)?;
                ensure!(bytes.len() == 24 << 20, "{} bytes", bytes.len());
                ensure!(bytes.ends_with(&[0x5a; 4096]), "the new end");
            }
            "life.bad_doorbells" => {
                let bad = self.vm.stats().bad_doorbells;
                ensure!(bad == 9, "{bad} bad doorbells were counted");
            }
            "life.counted" => {
                let (idles, rounds) = *self.host.counted.get().context("the guest told nothing")?;
                counts(self.accel, &self.vm.stats(), idles, rounds)?;
            }
            "life.log_storm" => {
                let dropped = self.vm.stats().log_dropped;
                ensure!(dropped > 0, "no log line was dropped");
            }
            _ => {}
        }
        Ok(())
    }
}

/// Whether the guest ended as its case has to.
pub(crate) fn check(end: End, reason: &ExitReason) -> anyhow::Result<()> {
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

/// The CPU did not raise the fault under KVM: it must not do so without KVM either.
pub(crate) fn as_in_a_process(
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
