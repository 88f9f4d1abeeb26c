//! 4 KiB random reads or writes through a vhost-user socket with the frontend of `virtio-driver`:
//! `blkbench SOCKET BYTES DEPTH SECONDS [read|write]`. Prints one line of JSON.
#![allow(unsafe_code)]
// UNSAFETY: the frontend takes raw buffers.

use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};
use virtio_driver::{VhostUser, VirtioBlkQueue, VirtioBlkTransport, VirtioFeatureFlags};
use vm_memory::FileOffset;
use vm_memory::mmap::MmapRegion;

const BLOCK: usize = 4096;
const DEPTH_MAX: usize = 128;

fn poll_in(fd: std::os::fd::RawFd) -> std::io::Result<()> {
    let mut entry = libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one valid entry.
    match unsafe { libc::poll(&mut entry, 1, 10_000) } {
        1 => Ok(()),
        0 => Err(std::io::ErrorKind::TimedOut.into()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().collect();
    let [_, socket, bytes, depth, seconds, rest @ ..] = args.as_slice() else {
        return Err("usage: blkbench SOCKET BYTES DEPTH SECONDS [read|write]".into());
    };
    let (bytes, depth): (u64, usize) = (bytes.parse()?, depth.parse()?);
    let limit = Duration::from_secs_f64(seconds.parse()?);
    let write = rest.first().is_some_and(|r| r == "write");
    let features = VirtioFeatureFlags::VERSION_1 | VirtioFeatureFlags::RING_EVENT_IDX;
    let vhost = VhostUser::new(socket, features.bits())?;
    let mut transport = Box::new(vhost) as Box<VirtioBlkTransport>;
    let mut queues = VirtioBlkQueue::<usize>::setup_queues(&mut *transport, 1, DEPTH_MAX as u16)?;
    let queue = queues.first_mut().ok_or("no queue")?;
    let file = tempfile::tempfile_in("/dev/shm")?;
    let len = depth.min(DEPTH_MAX) * BLOCK;
    file.set_len(len as u64)?;
    let fd = file.as_raw_fd();
    let buffers = MmapRegion::<()>::from_file(FileOffset::new(file, 0), len)?;
    transport.map_mem_region(buffers.as_ptr() as usize, len, fd, 0)?;
    let kick = transport.get_submission_notifier(0);
    let call = transport.get_completion_fd(0);

    let blocks = bytes / BLOCK as u64;
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    let mut submit = |queue: &mut VirtioBlkQueue<'_, usize>, slot: usize| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        let at = (seed % blocks) * BLOCK as u64;
        let buffer = buffers.as_ptr().wrapping_add(slot * BLOCK);
        // SAFETY: a slot of the mapping, used by one request at a time.
        unsafe {
            if write {
                queue.write_raw(at, buffer, BLOCK, slot)
            } else {
                queue.read_raw(at, buffer, BLOCK, slot)
            }
        }
    };
    let (mut done, mut kicks, mut waits) = (0u64, 0u64, 0u64);
    let mut ready = Vec::with_capacity(depth);
    for slot in 0..depth {
        submit(queue, slot)?;
    }
    kick.notify()?;
    let start = Instant::now();
    while start.elapsed() < limit {
        queue.set_used_notif_enabled(true);
        if !queue.completions().has_next() {
            waits += 1;
            // Some backends make the shared descriptor non-blocking.
            while let Err(error) = call.read() {
                if error.kind() != std::io::ErrorKind::WouldBlock {
                    return Err(error.into());
                }
                poll_in(call.as_raw_fd())?;
            }
        }
        for c in queue.completions() {
            if c.ret != 0 {
                return Err(format!("request failed: {}", c.ret).into());
            }
            ready.push(c.context);
        }
        done += ready.len() as u64;
        for slot in ready.drain(..) {
            submit(queue, slot)?;
        }
        if queue.avail_notif_needed() {
            kicks += 1;
            kick.notify()?;
        }
    }
    let iops = done as f64 / start.elapsed().as_secs_f64();
    let per = |n: u64| n as f64 / done as f64;
    println!(
        "{{\"iops\": {iops:.0}, \"kicks_per_request\": {:.3}, \"waits_per_request\": {:.3}}}",
        per(kicks),
        per(waits)
    );
    Ok(())
}
