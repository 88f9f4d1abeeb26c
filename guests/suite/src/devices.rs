//! The device calls with absurd arguments, and the console and entropy devices.

use crate::calls::BAD_ADDRESSES;
use crate::{Case, Outcome, ensure, text};
use alloc::vec::Vec;
use guest_sdk::flat::Boot;
use guest_sdk::platform::Platform;
use pv_abi::call::number;
use pv_abi::device::{DeviceState, kind};
use pv_abi::status::Status;
use pv_abi::virtio::feature;

pub const CASES: &[Case] = &[
    ("device.table", table),
    ("device.no_such_device", no_such_device),
    ("device.bad_setup_address", bad_setup_address),
    ("device.bad_setup_length", bad_setup_length),
    ("device.bad_queue_sizes", bad_queue_sizes),
    ("device.bad_queue_addresses", bad_queue_addresses),
    ("device.bad_vcpus_and_counts", bad_vcpus_and_counts),
    ("device.features_not_offered", features_not_offered),
    ("device.active_twice", active_twice),
    ("device.reset_any_state", reset_any_state),
    ("device.config_write", config_write),
    ("device.table_is_alone", table_is_alone),
    ("console.output", console_output),
    ("console.echo", console_echo),
    ("console.held", console_held),
    ("console.futures", console_futures),
    ("rng.fill", rng_fill),
];

/// A set-up of one queue, as bytes, to be spoilt.
#[derive(Clone, Copy)]
pub struct RawSetup {
    pub features: u64,
    pub queue_count: u32,
    pub config_vcpu: u32,
    pub desc: u64,
    pub avail: u64,
    pub used: u64,
    pub size: u16,
    pub flags: u16,
    pub vcpu: u32,
}

pub const SETUP_LEN: u64 = 48;

impl RawSetup {
    /// A good one for a queue whose parts lie one after the other from `at`.
    pub fn at(at: u64, size: u16) -> RawSetup {
        RawSetup {
            features: feature::VERSION_1,
            queue_count: 1,
            config_vcpu: 0,
            desc: at,
            avail: at + 16 * u64::from(size),
            used: (at + 18 * u64::from(size) + 6).next_multiple_of(4),
            size,
            flags: 0,
            vcpu: 0,
        }
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.features.to_le_bytes().to_vec();
        bytes.extend(self.queue_count.to_le_bytes());
        bytes.extend(self.config_vcpu.to_le_bytes());
        bytes.extend(self.desc.to_le_bytes());
        bytes.extend(self.avail.to_le_bytes());
        bytes.extend(self.used.to_le_bytes());
        bytes.extend(self.size.to_le_bytes());
        bytes.extend(self.flags.to_le_bytes());
        bytes.extend(self.vcpu.to_le_bytes());
        bytes
    }

    /// Calls `DEVICE_ACTIVATE` with it.
    pub fn activate(&self, boot: &Boot, device: u64) -> Result<u64, Status> {
        let bytes = self.bytes();
        let gpa = boot.platform().fill_scratch(&bytes).unwrap_or(0);
        activate(boot, device, gpa, bytes.len() as u64)
    }
}

pub fn activate(boot: &Boot, device: u64, gpa: u64, len: u64) -> Result<u64, Status> {
    let args = [device, gpa, len, 0, 0, 0];
    boot.platform()
        .call(number::DEVICE_ACTIVATE, args)
        .map_err(|e| e.status)
}

pub fn reset(boot: &Boot, device: u64) -> Result<u64, Status> {
    boot.platform()
        .call(number::DEVICE_RESET, [device, 0, 0, 0, 0, 0])
        .map_err(|e| e.status)
}

/// The first disk's index, and the start of its arena.
fn disk(boot: &Boot) -> Result<(u64, &'static guest_sdk::platform::Arena), alloc::string::String> {
    let info = boot
        .platform()
        .device_table()
        .find(kind::BLOCK, None)
        .ok_or("no disk")?;
    let arena = boot.platform().arena(info.arena).ok_or("no arena")?;
    Ok((info.index.into(), arena))
}

fn table(boot: &Boot) -> Outcome {
    let table = boot.platform().device_table();
    let kinds: Vec<u32> = table.iter().map(|d| d.kind).collect();
    ensure!(
        kinds == [kind::BLOCK, kind::BLOCK, kind::CONSOLE, kind::RNG],
        "{kinds:?}"
    );
    let names: Vec<_> = table
        .iter()
        .map(|d| alloc::string::String::from(d.name()))
        .collect();
    ensure!(names == ["disk", "other", "console", "rng"], "{names:?}");
    for device in table.iter() {
        let state = table.state(device.index).map(|s| s.0);
        ensure!(
            state == Some(DeviceState::Negotiated),
            "{}: {state:?}",
            device.name()
        );
        ensure!(
            device.features & feature::VERSION_1 != 0,
            "{}: not version 1",
            device.name()
        );
        ensure!(
            device.features & feature::RING_PACKED == 0,
            "{}: packed",
            device.name()
        );
    }
    Ok(())
}

fn no_such_device(boot: &Boot) -> Outcome {
    for index in [4, 32, 1 << 32, u64::MAX] {
        ensure!(
            activate(boot, index, 0, 48) == Err(Status::NotFound),
            "activate {index}"
        );
        ensure!(reset(boot, index) == Err(Status::NotFound), "reset {index}");
    }
    Ok(())
}

fn bad_setup_address(boot: &Boot) -> Outcome {
    let (device, arena) = disk(boot)?;
    for address in BAD_ADDRESSES {
        let got = activate(boot, device, address, SETUP_LEN);
        ensure!(got == Err(Status::BadAddress), "{address:#x}: {got:?}");
    }
    let end = arena.gpa() + arena.len();
    let got = activate(boot, device, end - SETUP_LEN + 1, SETUP_LEN);
    ensure!(got == Err(Status::BadAddress), "past the arena: {got:?}");
    // Another device's arena is not for this device.
    let other = boot
        .platform()
        .arena(arena.index() + 1)
        .ok_or("no second arena")?;
    let got = activate(boot, device, other.gpa(), SETUP_LEN);
    ensure!(got == Err(Status::BadAddress), "another arena: {got:?}");
    Ok(())
}

fn bad_setup_length(boot: &Boot) -> Outcome {
    let (device, arena) = disk(boot)?;
    for len in [0, 1, 15, 16, 47, 81, 4096, 1 << 40, u64::MAX] {
        let got = activate(boot, device, arena.gpa(), len);
        ensure!(got == Err(Status::BadLength), "{len}: {got:?}");
    }
    Ok(())
}

fn bad_queue_sizes(boot: &Boot) -> Outcome {
    let (device, arena) = disk(boot)?;
    let good = RawSetup::at(arena.gpa(), 256);
    for size in [0, 1, 3, 255, 257, 512, 1024, 0x7fff, 0x8000, u16::MAX] {
        let got = RawSetup { size, ..good }.activate(boot, device);
        ensure!(got == Err(Status::BadLength), "{size}: {got:?}");
    }
    let got = RawSetup { flags: 1, ..good }.activate(boot, device);
    ensure!(got == Err(Status::BadArgument), "flags: {got:?}");
    ensure!(good.activate(boot, device).is_ok(), "the good one");
    Ok(())
}

fn bad_queue_addresses(boot: &Boot) -> Outcome {
    let (device, arena) = disk(boot)?;
    let good = RawSetup::at(arena.gpa(), 256);
    let end = arena.gpa() + arena.len();
    let other = boot
        .platform()
        .arena(arena.index() + 1)
        .ok_or("no second arena")?;
    let more = [
        arena.gpa() + 1,
        end - 8,
        end,
        other.gpa(),
        arena.gpa() - 4096,
    ];
    for address in BAD_ADDRESSES.into_iter().chain(more) {
        for part in 0..3 {
            let mut setup = good;
            match part {
                0 => setup.desc = address,
                1 => setup.avail = address,
                _ => setup.used = address,
            }
            let got = setup.activate(boot, device);
            ensure!(
                got == Err(Status::BadAddress),
                "part {part} at {address:#x}: {got:?}"
            );
        }
    }
    Ok(())
}

fn bad_vcpus_and_counts(boot: &Boot) -> Outcome {
    let (device, arena) = disk(boot)?;
    let good = RawSetup::at(arena.gpa(), 64);
    let count = boot.vcpu_count();
    for vcpu in [count, 64, u32::MAX] {
        let got = RawSetup { vcpu, ..good }.activate(boot, device);
        ensure!(got == Err(Status::NotFound), "queue vCPU {vcpu}: {got:?}");
        let got = RawSetup {
            config_vcpu: vcpu,
            ..good
        }
        .activate(boot, device);
        ensure!(got == Err(Status::NotFound), "config vCPU {vcpu}: {got:?}");
    }
    for queue_count in [0, 3, 33, u32::MAX] {
        let got = RawSetup {
            queue_count,
            ..good
        }
        .activate(boot, device);
        ensure!(
            got == Err(Status::BadArgument),
            "{queue_count} queues: {got:?}"
        );
    }
    let got = RawSetup {
        queue_count: 2,
        ..good
    }
    .activate(boot, device);
    ensure!(
        got == Err(Status::BadLength),
        "two queues in the length of one: {got:?}"
    );
    Ok(())
}

fn features_not_offered(boot: &Boot) -> Outcome {
    let (device, arena) = disk(boot)?;
    let good = RawSetup::at(arena.gpa(), 64);
    for bit in [feature::RING_PACKED, 1 << 63, 1 << 30, u64::MAX] {
        let got = RawSetup {
            features: good.features | bit,
            ..good
        }
        .activate(boot, device);
        ensure!(got == Err(Status::NotSupported), "{bit:#x}: {got:?}");
    }
    Ok(())
}

fn active_twice(boot: &Boot) -> Outcome {
    let (device, arena) = disk(boot)?;
    let good = RawSetup::at(arena.gpa(), 64);
    let first = good.activate(boot, device).map_err(text("first"))?;
    ensure!(
        good.activate(boot, device) == Err(Status::BadState),
        "twice"
    );
    ensure!(reset(boot, device) == Ok(1), "reset");
    let second = good.activate(boot, device).map_err(text("after a reset"))?;
    ensure!(second > first, "generation {second} after {first}");
    Ok(())
}

fn reset_any_state(boot: &Boot) -> Outcome {
    let count = u64::from(boot.platform().device_table().len());
    for device in 0..count {
        for _ in 0..3 {
            let got = reset(boot, device);
            ensure!(
                got == Ok(DeviceState::Negotiated.code().into()),
                "{device}: {got:?}"
            );
        }
    }
    Ok(())
}

fn config_write(boot: &Boot) -> Outcome {
    let write = |device, offset, width, value| {
        let args = [device, offset, width, value, 0, 0];
        boot.platform()
            .call(number::DEVICE_CONFIG_WRITE, args)
            .map_err(|e| e.status)
    };
    let (device, _) = disk(boot)?;
    for width in [0, 3, 5, 9, u64::MAX] {
        ensure!(
            write(device, 0, width, 0) == Err(Status::BadLength),
            "width {width}"
        );
    }
    for offset in [60, 57, 256, 1 << 32, u64::MAX, u64::MAX - 3] {
        let got = write(device, offset, 4, 0);
        ensure!(got == Err(Status::BadAddress), "offset {offset}: {got:?}");
    }
    ensure!(
        write(device, 32, 1, 256) == Err(Status::BadArgument),
        "a value that is too wide"
    );
    ensure!(write(99, 0, 1, 0) == Err(Status::NotFound), "device 99");
    // The console takes no writes at all.
    ensure!(write(2, 0, 1, 0) == Err(Status::NotSupported), "console");
    Ok(())
}

fn table_is_alone(boot: &Boot) -> Outcome {
    // Both disks at once, each in its arena, and a third of the calls on each.
    let mut first = guest_sdk::block::open(boot.platform(), Some("disk")).map_err(text("disk"))?;
    let mut second =
        guest_sdk::block::open(boot.platform(), Some("other")).map_err(text("other"))?;
    let mut sector = [0; 512];
    for round in 0..50 {
        first
            .write_blocking(round, &[0x11; 512])
            .map_err(text("write disk"))?;
        second
            .write_blocking(round, &[0x22; 512])
            .map_err(text("write other"))?;
        first
            .read_blocking(round, &mut sector)
            .map_err(text("read disk"))?;
        ensure!(sector == [0x11; 512], "disk holds {:#x}", sector[0]);
        second
            .read_blocking(round, &mut sector)
            .map_err(text("read other"))?;
        ensure!(sector == [0x22; 512], "other holds {:#x}", sector[0]);
    }
    Ok(())
}

fn console_output(boot: &Boot) -> Outcome {
    let mut console =
        guest_sdk::console::Console::open(boot.platform(), None).map_err(text("open"))?;
    for line in 0..100 {
        console
            .write(alloc::format!("line {line}\n").as_bytes())
            .map_err(text("write"))?;
    }
    console.write(&[b'x'; 10_000]).map_err(text("long write"))?;
    console.flush().map_err(text("flush"))
}

fn console_echo(boot: &Boot) -> Outcome {
    let mut console =
        guest_sdk::console::Console::open(boot.platform(), None).map_err(text("open"))?;
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut bytes = [0; 16];
        let count = console.read(&mut bytes).map_err(text("read"))?;
        line.extend_from_slice(&bytes[..count]);
    }
    line.reverse();
    console.write(&line).map_err(text("write"))?;
    console.flush().map_err(text("flush"))
}

/// As `console.echo`, and entropy beside it, as futures.
fn console_futures(boot: &Boot) -> Outcome {
    let platform = boot.platform();
    let mut console = guest_sdk::console::Console::open(platform, None).map_err(text("open"))?;
    let mut rng = guest_sdk::rng::Rng::open(platform, None).map_err(text("open rng"))?;
    guest_sdk::flat::block_on(async {
        let mut line = Vec::new();
        while line.last() != Some(&b'\n') {
            let mut bytes = [0; 16];
            let count = console.read_async(&mut bytes).await.map_err(text("read"))?;
            line.extend_from_slice(&bytes[..count]);
        }
        let mut random = [0; 300];
        rng.fill_async(&mut random).await.map_err(text("fill"))?;
        ensure!(random[200..].iter().any(|byte| *byte != 0), "no entropy");
        line.reverse();
        console.write_async(&line).await.map_err(text("write"))?;
        console.flush_async().await.map_err(text("flush"))
    })
}

/// The host does not take the output: the chain stays away, and a reset does not wait for it.
fn console_held(boot: &Boot) -> Outcome {
    let platform = boot.platform();
    let console = platform.device_table().find(kind::CONSOLE, None);
    let console = console.ok_or("no console")?;
    let (index, event) = (console.index.into(), console.queue_event(1));
    for round in 0..3 {
        let mut raw = crate::cards::RawCard::new(boot, console, 2, 16, 1)?;
        raw.activate(boot).map_err(text("activate"))?;
        raw.send(64);
        platform.notify(event);
        platform.idle(Some(core::time::Duration::from_millis(20)));
        ensure!(raw.used(1) == 0, "round {round}: it was written");
        reset(boot, index).map_err(text("reset"))?;
    }
    Ok(())
}

fn rng_fill(boot: &Boot) -> Outcome {
    let mut rng = guest_sdk::rng::Rng::open(boot.platform(), None).map_err(text("open"))?;
    let (mut a, mut b) = ([0; 4096], [0; 4096]);
    rng.fill(&mut a).map_err(text("fill"))?;
    rng.fill(&mut b).map_err(text("fill"))?;
    ensure!(a != b, "the same bytes twice");
    let ones: u32 = a.iter().map(|byte| byte.count_ones()).sum();
    ensure!(
        (14_000..19_000).contains(&ones),
        "{ones} of 32768 bits are set"
    );
    Ok(())
}
