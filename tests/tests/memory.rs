//! What the embedder asked of the host for guest memory is so, where the guest runs too.

use paravane_tests::{accels, children_of, suite_vm, wait_until};
use std::fs;
use vmm_core::pv_abi::layout::{RAM_BASE, RAM_LOW_END};
use vmm_core::{Accel, VmHandle};

/// Bytes of RAM: small, and with huge pages in it.
const MEMORY: u64 = 32 << 20;

fn run(accel: Accel, huge: bool, prefault: bool) -> VmHandle {
    let vm = suite_vm("life.idle_forever", accel)
        .unwrap()
        .memory(MEMORY)
        .huge_pages(huge)
        .prefault(prefault)
        .build()
        .unwrap()
        .run()
        .unwrap();
    wait_until("the guest is not there", || !vm.stats().calls.is_empty());
    vm
}

/// Resident bytes of RAM in a guest's process, and whether it asks for huge pages there.
fn seen_in(pid: u32) -> (u64, bool) {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let (mut resident, mut huge, mut ram) = (0, false, false);
    for line in smaps.lines() {
        let (key, rest) = line.split_once(' ').unwrap();
        if let Some((from, _)) = key.split_once('-') {
            let from = u64::from_str_radix(from, 16).unwrap();
            ram = (RAM_BASE..RAM_LOW_END).contains(&from);
        } else if ram && key == "Rss:" {
            let kib = rest.trim().strip_suffix(" kB").unwrap();
            resident += kib.parse::<u64>().unwrap() << 10;
        } else if ram && key == "VmFlags:" {
            huge |= rest.split_whitespace().any(|flag| flag == "hg");
        }
    }
    (resident, huge)
}

#[test]
fn huge_pages_and_prefault_reach_the_guest() {
    for accel in accels().unwrap() {
        for (huge, prefault) in [(false, false), (true, false), (false, true)] {
            let what = format!("{accel}: huge {huge}, prefault {prefault}");
            let vm = run(accel, huge, prefault);
            let report = vm.memory_report();
            assert_eq!(report.private, MEMORY, "{what}");
            assert!(!report.huge.asked || huge, "{what}: {report:?}");
            assert_eq!(report.resident >= MEMORY, prefault, "{what}: {report:?}");
            if accel == Accel::Process {
                let children = children_of(std::process::id());
                let [guest] = children[..] else {
                    panic!("{what}: children {children:?}");
                };
                let (resident, asks) = seen_in(guest);
                // Stacks have guards without memory between them.
                assert_eq!(resident > MEMORY / 4 * 3, prefault, "{what}: {resident}");
                assert_eq!(asks, report.huge.asked, "{what}");
            }
            drop(vm);
        }
    }
}
