//! The descriptor budget of a VM, as `docs/THREAT_MODEL.md` states it, counted.
//!
//! One test in a process of its own: anything else that runs here would be counted too.

use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};
use vhost_backends::block::{BlockDevice, BlockOptions};
use vhost_backends::engine::NullStore;
use vhost_backends::session;
use vmm_core::{Accel, BlockConfig, Image, VmBuilder};

/// The shape of a VM.
#[derive(Clone, Copy, Debug)]
struct Shape {
    vcpus: u32,
    /// Queues of each block device.
    blocks: &'static [u16],
    /// Of these, as many have their backends in this process, the first ones.
    in_process: usize,
    console: bool,
    rng: bool,
    memory: u64,
}

/// What is open while a VM of this shape is built and its guest has not started.
fn budget(accel: Accel, shape: Shape) -> usize {
    let vcpus = shape.vcpus as usize;
    let blocks = shape.blocks.len();
    let local = usize::from(shape.console) + usize::from(shape.rng);
    let devices = blocks + local;
    let queues = shape.blocks.iter().map(|q| usize::from(*q)).sum::<usize>()
        + 2 * usize::from(shape.console)
        + usize::from(shape.rng);
    let arenas = blocks + usize::from(local > 0);
    let events = 2 * queues + devices + vcpus;
    let common = events
        + 1
        + 2 * arenas
        + 2
        + 7 * blocks
        + 4 * shape.in_process
        + (blocks - shape.in_process)
        + 2 * usize::from(shape.console);
    common
        + match accel {
            Accel::Kvm => 1 + 2 * vcpus,
            // The guest's memory is in files, so that its process can map it.
            _ => 2 + 2 + 2 * usize::from(shape.memory > (3 << 30) - (16 << 20)) + 1,
        }
}

fn build(accel: Accel, shape: Shape) -> vmm_core::Vm {
    let image = Image::from_bytes(guest_images::FIRST_GUEST).expect("the guest");
    let mut builder = VmBuilder::new(image)
        .accel(accel)
        .vcpus(shape.vcpus)
        .memory(shape.memory);
    if shape.console {
        builder = builder.console(io::sink());
    }
    if shape.rng {
        builder = builder.rng();
    }
    for (index, queues) in shape.blocks.iter().enumerate() {
        let queues = *queues;
        if index < shape.in_process {
            let device =
                BlockDevice::new(NullStore::new(1 << 20), BlockOptions::with_queues(queues));
            let backend = BlockConfig::in_process(move |stream| session::serve(&device, stream));
            builder = builder.block(backend.queues(queues));
            continue;
        }
        let backend = BlockConfig::spawn(move || {
            let mut command = Command::new(env!("CARGO_BIN_EXE_first-vmm"));
            command.arg0("pv-blkd").args(["--null", "1M"]);
            command.args(["--num-queues", &queues.to_string()]);
            command
        });
        builder = builder.block(backend.queues(queues));
    }
    builder.build().expect("the VM")
}

fn open_descriptors() -> usize {
    // Less the one with which the directory is read.
    std::fs::read_dir("/proc/self/fd").expect("/proc").count() - 1
}

/// Descriptors that a program run now would be given, and what they are.
fn inherited() -> Vec<String> {
    const CLOEXEC: u32 = 0o2_000_000;
    let mut list = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fdinfo").expect("/proc") {
        let name = entry.expect("an entry").file_name();
        let name = name.to_str().expect("a number");
        // The one with which the directory is read may be gone.
        let Ok(info) = std::fs::read_to_string(format!("/proc/self/fdinfo/{name}")) else {
            continue;
        };
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
        let flags = u32::from_str_radix(flags.expect("flags").trim(), 8).expect("octal");
        if flags & CLOEXEC == 0 {
            let what = std::fs::read_link(format!("/proc/self/fd/{name}"));
            list.push(format!("{name}: {what:?}"));
        }
    }
    list.sort();
    list
}

#[test]
fn a_vm_holds_the_descriptors_that_the_threat_model_says() {
    let standard = inherited();
    let small = Shape {
        vcpus: 1,
        blocks: &[],
        in_process: 0,
        console: false,
        rng: false,
        memory: 16 << 20,
    };
    let shapes = [
        small,
        Shape { vcpus: 4, ..small },
        Shape {
            console: true,
            rng: true,
            ..small
        },
        Shape {
            vcpus: 2,
            blocks: &[1, 4],
            console: true,
            ..small
        },
        Shape {
            memory: 4 << 30,
            blocks: &[2],
            ..small
        },
        Shape {
            blocks: &[4, 1],
            in_process: 1,
            ..small
        },
    ];
    let forced = std::env::var("PV_ACCEL").unwrap_or_default();
    for accel in [Accel::Kvm, Accel::Process] {
        if !["", "all", accel.name()].contains(&forced.as_str()) {
            continue;
        }
        if let Err(why) = accel.check().map_err(anyhow::Error::new) {
            assert!(forced.is_empty(), "{accel} was asked for: {why:#}");
            // Past the test runner, which keeps what tests print.
            let _ = writeln!(io::stderr(), "\nSKIPPED: everything on {accel}: {why:#}");
            continue;
        }
        // What a process opens once, for all its VMs.
        drop(build(accel, small));
        let before = open_descriptors();
        for shape in shapes {
            let vm = build(accel, shape);
            let wanted = budget(accel, shape);
            // The threads that watch backends open their last descriptor when they come to it.
            let deadline = Instant::now() + Duration::from_secs(10);
            while open_descriptors() - before < wanted && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(1));
            }
            assert_eq!(open_descriptors() - before, wanted, "{accel} {shape:?}");
            assert_eq!(inherited(), standard, "{accel} {shape:?}: left to programs");
            drop(vm);
            assert_eq!(open_descriptors(), before, "{accel} {shape:?}: left behind");
        }
    }
}
