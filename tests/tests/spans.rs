//! What a subscriber of the embedder's sees of several VMs, and what it may do meanwhile.

use paravane_tests::{accels, blank_image, children_of, disk, patience, suite_vm, wait_until};
use std::collections::{BTreeMap, BTreeSet};
use std::panic::AssertUnwindSafe;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id};
use tracing::{Event, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry::{LookupSpan, SpanRef};
use vmm_core::pv_abi::call::number;
use vmm_core::{Accel, ExitReason, Violation, VmHandle};

/// What all tests of this file have in common: there is one subscriber in a process.
#[derive(Default)]
struct Seen {
    /// By VM: the spans that were opened in it.
    spans: Mutex<BTreeMap<u64, BTreeSet<&'static str>>>,
    /// Library threads and what they said or opened outside any VM's span.
    astray: Mutex<Vec<String>>,
    /// Asked when a VM ends.
    asked: Mutex<Weak<VmHandle>>,
    answered: AtomicBool,
    panics: AtomicBool,
}

fn seen() -> (&'static Seen, MutexGuard<'static, ()>) {
    static SEEN: OnceLock<Arc<Seen>> = OnceLock::new();
    static ALONE: Mutex<()> = Mutex::new(());
    let seen = SEEN.get_or_init(|| {
        let seen = Arc::<Seen>::default();
        let subscriber = tracing_subscriber::registry().with(Watcher(Arc::clone(&seen)));
        tracing::subscriber::set_global_default(subscriber).unwrap();
        seen
    });
    (seen, ALONE.lock().unwrap())
}

struct Watcher(Arc<Seen>);

/// The number of a VM, kept with its span.
struct Number(u64);

#[derive(Default)]
struct Found {
    number: Option<u64>,
    message: String,
}

impl Visit for Found {
    fn record_u64(&mut self, field: &Field, value: u64) {
        if field.name() == "vm" {
            self.number = Some(value);
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        if field.name() == "message" {
            self.message = format!("{value:?}");
        }
    }
}

fn vm_of<'a, S: LookupSpan<'a> + 'a>(spans: impl Iterator<Item = SpanRef<'a, S>>) -> Option<u64> {
    spans
        .filter_map(|span| span.extensions().get::<Number>().map(|number| number.0))
        .next()
}

impl Watcher {
    fn stray(&self, vm: Option<u64>, what: &str) {
        let thread = std::thread::current();
        let name = thread.name().unwrap_or_default();
        if vm.is_none() && name.starts_with("pv-") && name != "pv-supervisor" {
            self.0
                .astray
                .lock()
                .unwrap()
                .push(format!("{name}: {what}"));
        }
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Watcher {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        let mut found = Found::default();
        attributes.record(&mut found);
        if let Some(number) = found.number {
            span.extensions_mut().insert(Number(number));
        }
        let vm = vm_of(span.scope());
        self.stray(vm, span.name());
        if let Some(vm) = vm {
            let mut spans = self.0.spans.lock().unwrap();
            spans.entry(vm).or_default().insert(span.name());
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut found = Found::default();
        event.record(&mut found);
        let vm = context.event_scope(event).and_then(vm_of);
        self.stray(vm, &found.message);
        if found.message == "the VM ends" {
            let vm = self.0.asked.lock().unwrap().upgrade();
            if let Some(vm) = vm {
                let answered = vm.exit().is_some() && vm.stats().exits.call > 0;
                self.0.answered.store(answered, Ordering::Release);
            }
            if self.0.panics.load(Ordering::Acquire) {
                std::panic::resume_unwind(Box::new("as the test wants"));
            }
        }
    }
}

#[test]
fn vms_are_told_apart() {
    let (seen, _alone) = seen();
    for accel in accels().unwrap() {
        seen.spans.lock().unwrap().clear();
        let folder = tempfile::tempdir().unwrap();
        let vms: Vec<VmHandle> = ["a.img", "b.img"]
            .iter()
            .map(|name| {
                let image = folder.path().join(name);
                blank_image(&image).unwrap();
                let vm = suite_vm("block.reopen", accel).unwrap();
                let vm = vm.block(disk(&image, &[])).rng();
                vm.build().unwrap().run().unwrap()
            })
            .collect();
        for vm in &vms {
            // It may have ended by now; what counts is the span.
            let _ = vm.pause().and_then(|()| vm.resume());
        }
        for vm in vms {
            assert_eq!(vm.wait_timeout(patience(60)).unwrap().code(), Some(0));
        }
        let spans = seen.spans.lock().unwrap();
        assert_eq!(spans.len(), 2, "{accel}: {spans:?}");
        for found in spans.values() {
            for name in [
                "vm",
                "build",
                "backend",
                "handshake",
                "vcpu",
                "activate",
                "reset",
                "pause",
            ] {
                assert!(found.contains(name), "{accel}: no {name} in {found:?}");
            }
        }
        let astray = seen.astray.lock().unwrap();
        assert!(astray.is_empty(), "{accel}: {astray:?}");
    }
}

#[test]
fn a_subscriber_may_ask_the_vm_and_may_panic() {
    let (seen, _alone) = seen();
    for accel in accels().unwrap() {
        for panics in [false, true] {
            let vm = suite_vm("life.idle_forever", accel).unwrap();
            let vm = Arc::new(vm.build().unwrap().run().unwrap());
            wait_until("no call", || {
                vm.stats().calls.contains_key(&number::NEGOTIATE)
            });
            *seen.asked.lock().unwrap() = Arc::downgrade(&vm);
            seen.answered.store(false, Ordering::Release);
            seen.panics.store(panics, Ordering::Release);
            let stopped = std::panic::catch_unwind(AssertUnwindSafe(|| vm.stop()));
            assert_eq!(stopped.is_err(), panics, "{accel}");
            assert!(vm.wait_timeout(patience(60)).is_some(), "{accel}");
            assert!(seen.answered.load(Ordering::Acquire), "{accel}");
            // The same on a thread of the library.
            let vm = suite_vm("life.exit_code", accel).unwrap();
            let vm = Arc::new(vm.build().unwrap().run().unwrap());
            let reason = vm.wait_timeout(patience(60)).expect("it did not end");
            assert_eq!(reason.code(), Some(42), "{accel}");
            drop(vm);
            // And on the one that waits for a guest's process.
            if accel == Accel::Process {
                let vm = suite_vm("life.spin", accel).unwrap();
                let vm = vm.build().unwrap().run().unwrap();
                for pid in children_of(std::process::id()) {
                    let killed = Command::new("kill").args(["-9", &pid.to_string()]).status();
                    assert!(killed.unwrap().success());
                }
                let reason = vm.wait_timeout(patience(60)).expect("it did not end");
                let ended = matches!(
                    reason,
                    ExitReason::Violation(Violation::ProcessEnded { .. })
                );
                assert!(ended, "{reason:?}");
            }
            seen.panics.store(false, Ordering::Release);
        }
    }
}
