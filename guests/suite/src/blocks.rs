//! The block driver against the real backend.

use crate::{Case, Outcome, ensure, text};
use alloc::vec::Vec;
use alloc::{format, vec};
use guest_sdk::block::{self, Error, QueueConfig, Request};
use guest_sdk::flat::{Boot, smp};
use guest_sdk::platform::Platform;

pub const CASES: &[Case] = &[
    ("block.read_write", read_write),
    ("block.sizes", sizes),
    ("block.depth", depth),
    ("block.identify", identify),
    ("block.out_of_range", out_of_range),
    ("block.read_only", read_only),
    ("block.discard", discard),
    ("block.two_queues", two_queues),
    ("block.two_vcpus", two_vcpus),
    ("block.futures", futures),
    ("block.reopen", reopen),
    ("block.disk_full", disk_full),
    ("block.truncated", truncated),
    ("block.grow", grow),
];

fn pattern(sector: u64, len: usize) -> Vec<u8> {
    (0..len as u64)
        .map(|i| (sector.wrapping_mul(31) + i / 512 * 7 + i % 251) as u8)
        .collect()
}

fn read_write(boot: &Boot) -> Outcome {
    let mut disk = block::open(boot.platform(), None).map_err(text("open"))?;
    for sector in [0, 1, 7, 100, disk.capacity() - 8] {
        disk.write_blocking(sector, &pattern(sector, 4096))
            .map_err(text("write"))?;
    }
    disk.flush().map_err(text("flush"))?;
    for sector in [0u64, 7, 100, disk.capacity() - 8] {
        let mut out = vec![0; 512];
        disk.read_blocking(sector + 7, &mut out)
            .map_err(text("read"))?;
        let expected = pattern(sector, 4096);
        // Sectors 0 and 1 were overwritten by the ones after them.
        if sector >= 7 {
            ensure!(out == expected[7 * 512..], "sector {sector}");
        }
    }
    Ok(())
}

fn sizes(boot: &Boot) -> Outcome {
    let mut disk = block::open(boot.platform(), None).map_err(text("open"))?;
    for len in [512, 1024, 4096, 12_800, 65_536, 1 << 20, 3 << 20] {
        let data = pattern(len as u64, len);
        disk.write_blocking(8, &data).map_err(text("write"))?;
        let mut back = vec![0; len];
        disk.read_blocking(8, &mut back).map_err(text("read"))?;
        ensure!(back == data, "{len} bytes differ");
    }
    for len in [1, 511, 513] {
        let got = disk.read_blocking(0, &mut vec![0; len]);
        ensure!(matches!(got, Err(Error::BadLength)), "{len}: {got:?}");
    }
    Ok(())
}

fn depth(boot: &Boot) -> Outcome {
    let mut disk = block::open(boot.platform(), None).map_err(text("open"))?;
    for round in 0..8u64 {
        let mut left = Vec::new();
        for i in 0..64u64 {
            let mut buf = disk.alloc(4096).map_err(text("alloc"))?;
            buf.write(0, &pattern(round * 64 + i, 4096));
            let request = Request::Write { sector: i * 8, buf };
            left.push(
                disk.submit(request)
                    .map_err(|e| format!("submit: {:?}", e.error))?,
            );
        }
        while !left.is_empty() {
            disk.wait_for(1, None).map_err(text("wait"))?;
            while let Some(done) = disk.poll().map_err(text("poll"))? {
                done.result.map_err(text("write"))?;
                let before = left.len();
                left.retain(|t| *t != done.token);
                ensure!(left.len() + 1 == before, "a token came twice");
            }
        }
        for i in 0..64u64 {
            let mut back = vec![0; 4096];
            disk.read_blocking(i * 8, &mut back).map_err(text("read"))?;
            ensure!(
                back == pattern(round * 64 + i, 4096),
                "round {round}, block {i}"
            );
        }
    }
    Ok(())
}

fn identify(boot: &Boot) -> Outcome {
    let mut disk = block::open(boot.platform(), None).map_err(text("open"))?;
    let id = disk.id().map_err(text("id"))?;
    ensure!(id.iter().any(|b| *b != 0), "an empty id");
    ensure!(disk.capacity() == 16 << 11, "capacity {}", disk.capacity());
    Ok(())
}

fn out_of_range(boot: &Boot) -> Outcome {
    let mut disk = block::open(boot.platform(), None).map_err(text("open"))?;
    let capacity = disk.capacity();
    for sector in [capacity, capacity - 7, u64::MAX, u64::MAX / 512, 1 << 60] {
        let got = disk.read_blocking(sector, &mut [0; 4096]);
        ensure!(
            matches!(got, Err(Error::OutOfRange)),
            "read {sector}: {got:?}"
        );
        let got = disk.write_blocking(sector, &[0; 4096]);
        ensure!(
            matches!(got, Err(Error::OutOfRange)),
            "write {sector}: {got:?}"
        );
    }
    disk.read_blocking(capacity - 8, &mut [0; 4096])
        .map_err(text("the last block"))
}

fn read_only(boot: &Boot) -> Outcome {
    let mut disk = block::open(boot.platform(), None).map_err(text("open"))?;
    ensure!(disk.device().read_only(), "the disk is not read-only");
    let got = disk.write_blocking(0, &[1; 512]);
    ensure!(matches!(got, Err(Error::ReadOnly)), "write: {got:?}");
    disk.read_blocking(0, &mut [0; 512]).map_err(text("read"))
}

fn discard(boot: &Boot) -> Outcome {
    let mut disk = block::open(boot.platform(), None).map_err(text("open"))?;
    disk.write_blocking(0, &[0xee; 65_536])
        .map_err(text("write"))?;
    match disk.write_zeroes(16, 32, false) {
        Ok(()) => {
            let mut back = vec![1; 65_536];
            disk.read_blocking(0, &mut back).map_err(text("read"))?;
            let zero = 16 * 512..48 * 512;
            ensure!(back[zero.clone()].iter().all(|b| *b == 0), "not zero");
            ensure!(
                back[..zero.start].iter().all(|b| *b == 0xee),
                "zeroed before"
            );
            ensure!(back[zero.end..].iter().all(|b| *b == 0xee), "zeroed behind");
        }
        Err(Error::Unsupported) => {}
        Err(error) => return Err(format!("write zeroes: {error:?}")),
    }
    match disk.discard(0, 128) {
        Ok(()) | Err(Error::Unsupported) => Ok(()),
        Err(error) => Err(format!("discard: {error:?}")),
    }
}

fn two_queues(boot: &Boot) -> Outcome {
    let config = QueueConfig { vcpu: 0, size: 64 };
    let (device, mut queues) =
        block::Block::open(boot.platform(), None, &[config, config]).map_err(text("open"))?;
    ensure!(queues.len() == 2, "{} queues", queues.len());
    for (i, queue) in queues.iter_mut().enumerate() {
        queue
            .write_blocking(i as u64 * 64, &[i as u8 + 1; 8192])
            .map_err(text("write"))?;
    }
    for (i, queue) in queues.iter_mut().enumerate() {
        let mut back = vec![0; 8192];
        queue
            .read_blocking((1 - i as u64) * 64, &mut back)
            .map_err(text("read"))?;
        ensure!(back.iter().all(|b| *b == 2 - i as u8), "queue {i}");
    }
    ensure!(device.generation().is_some(), "not active");
    Ok(())
}

fn two_vcpus(boot: &Boot) -> Outcome {
    use core::sync::atomic::{AtomicU32, Ordering};
    static DONE: AtomicU32 = AtomicU32::new(0);
    static FAILED: AtomicU32 = AtomicU32::new(0);
    let configs = [
        QueueConfig { vcpu: 0, size: 64 },
        QueueConfig { vcpu: 1, size: 64 },
    ];
    let (_device, mut queues) =
        block::Block::open(boot.platform(), None, &configs).map_err(text("open"))?;
    let second = queues.pop().ok_or("one queue")?;
    let mut first = queues.pop().ok_or("no queue")?;
    type Queue = block::BlockQueue<guest_sdk::flat::Flat>;
    fn work(queue: &mut Queue, base: u64) -> Result<(), Error> {
        for round in 0..40u64 {
            let data = pattern(base + round, 4096);
            queue.write_blocking(base + round * 8, &data)?;
            let mut back = vec![0; 4096];
            queue.read_blocking(base + round * 8, &mut back)?;
            if back != data {
                return Err(Error::Io);
            }
        }
        Ok(())
    }
    let handed = alloc::boxed::Box::into_raw(alloc::boxed::Box::new(second)) as usize;
    smp::start(
        1,
        |address| {
            // The box was made for this vCPU alone.
            let mut queue = take::<Queue>(address);
            if work(&mut queue, 8192).is_err() {
                FAILED.store(1, Ordering::Release);
            }
            DONE.store(1, Ordering::Release);
            smp::wake(0);
        },
        handed,
    )
    .map_err(text("start"))?;
    work(&mut first, 0).map_err(text("vCPU 0"))?;
    while DONE.load(Ordering::Acquire) == 0 {
        boot.platform()
            .idle(Some(core::time::Duration::from_millis(5)));
    }
    ensure!(FAILED.load(Ordering::Acquire) == 0, "vCPU 1 failed");
    Ok(())
}

#[allow(unsafe_code)]
fn take<T>(address: usize) -> alloc::boxed::Box<T> {
    // SAFETY: the address came from `Box::into_raw` of the same type, and is used once.
    unsafe { alloc::boxed::Box::from_raw(address as *mut T) }
}

fn futures(boot: &Boot) -> Outcome {
    let queue = block::open(boot.platform(), None).map_err(text("open"))?;
    let disk = block::AsyncBlock::new(queue);
    guest_sdk::flat::block_on(async {
        for i in 0..16u64 {
            let mut buf = disk.alloc(4096).map_err(text("alloc"))?;
            buf.write(0, &pattern(i, 4096));
            disk.write(i * 8, buf).await.map_err(text("write"))?;
        }
        disk.flush().await.map_err(text("flush"))?;
        for i in 0..16u64 {
            let buf = disk.alloc(4096).map_err(text("alloc"))?;
            let done = disk.read(i * 8, buf).await.map_err(text("read"))?;
            let mut out = vec![0; 4096];
            let buf = done.buf.as_ref().ok_or("no buffer")?;
            buf.read(0, &mut out);
            ensure!(out == pattern(i, 4096), "block {i}");
        }
        Ok(())
    })
}

fn reopen(boot: &Boot) -> Outcome {
    for round in 0..10u64 {
        let mut disk = block::open(boot.platform(), None).map_err(text("open"))?;
        disk.write_blocking(round, &[round as u8; 512])
            .map_err(text("write"))?;
        disk.device().reset();
        let mut back = [0xff; 512];
        disk.read_blocking(round, &mut back)
            .map_err(text("read after a reset"))?;
        ensure!(back == [round as u8; 512], "round {round}");
    }
    Ok(())
}

/// The host has made the image's file system full: writes fail, reads go on.
fn disk_full(boot: &Boot) -> Outcome {
    let mut disk = block::open(boot.platform(), None).map_err(text("open"))?;
    let mut failed = 0;
    for i in 0..disk.capacity() / 128 {
        match disk.write_blocking(i * 128, &[0xab; 65_536]) {
            Ok(()) => {}
            Err(Error::Io) => failed += 1,
            Err(error) => return Err(format!("write {i}: {error:?}")),
        }
    }
    ensure!(failed > 0, "nothing failed");
    disk.read_blocking(0, &mut [0; 4096]).map_err(text("read"))
}

/// The host cuts the image while the guest reads it.
fn truncated(boot: &Boot) -> Outcome {
    let mut disk = block::open(boot.platform(), None).map_err(text("open"))?;
    let last = disk.capacity() - 8;
    disk.read_blocking(last, &mut [0; 4096])
        .map_err(text("before"))?;
    boot.platform()
        .call(pv_abi::call::number::EMBEDDER + 6, [0; 6])
        .map_err(text("ask for the cut"))?;
    let got = disk.read_blocking(last, &mut [0; 4096]);
    ensure!(matches!(got, Err(Error::Io)), "past the cut: {got:?}");
    disk.read_blocking(0, &mut [0; 4096])
        .map_err(text("before the cut"))
}

/// The host makes the disk larger while the guest idles, which is told of it and uses what is new.
fn grow(boot: &Boot) -> Outcome {
    let platform = boot.platform();
    let mut disk = block::open(platform, None).map_err(text("open"))?;
    let device = disk.device();
    let before = disk.capacity();
    let got = disk.write_blocking(before, &[1; 512]);
    ensure!(matches!(got, Err(Error::OutOfRange)), "not yet: {got:?}");
    platform
        .call(pv_abi::call::number::EMBEDDER + 10, [0; 6])
        .map_err(text("ask for more"))?;
    // Nothing but the event ends this.
    while !device.take_config_change() {
        platform.idle(None);
    }
    let after = disk.capacity();
    ensure!(after == before + (8 << 11), "{before} became {after}");
    // Across the old end, and at the new one.
    for (sector, byte) in [(before - 4, 0xa5u8), (after - 8, 0x5a)] {
        disk.write_blocking(sector, &[byte; 4096])
            .map_err(text("write"))?;
        let mut back = [0; 4096];
        disk.read_blocking(sector, &mut back)
            .map_err(text("read"))?;
        ensure!(back == [byte; 4096], "sector {sector}");
    }
    let got = disk.read_blocking(after - 7, &mut [0; 4096]);
    ensure!(matches!(got, Err(Error::OutOfRange)), "too much: {got:?}");
    disk.flush().map_err(text("flush"))
}
