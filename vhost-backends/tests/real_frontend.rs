//! The block device against a frontend that is not ours.

mod support;

use support::{Disk, FEATURES, Frontend, pattern};
use vhost_backends::engine::FileOptions;
use virtio_driver::VirtioFeatureFlags;

const MIB: u64 = 1 << 20;

fn verified(options: FileOptions, features: u64) {
    let disk = Disk::new(16 * MIB);
    let (server, device) = disk.serve(options, 1);
    let mut front = Frontend::connect(&disk.socket, features, 1, 128, MIB as usize);
    for i in 0..64u64 {
        let data = pattern(i, 4096 * (1 + i as usize % 5));
        assert_eq!(front.write_sync(0, i * 65536, &data), 0);
    }
    front.queues[0].flush(7).unwrap();
    front.kick(0);
    assert_eq!(front.complete(0), (7, 0));
    for i in 0..64u64 {
        let data = pattern(i, 4096 * (1 + i as usize % 5));
        assert_eq!(front.read_sync(0, i * 65536, data.len()), (0, data));
    }
    // One sector, misaligned for O_DIRECT on a 4096-byte disk.
    assert_eq!(front.write_sync(0, 512 * 3, &pattern(99, 512)), 0);
    assert_eq!(front.read_sync(0, 512 * 3, 512), (0, pattern(99, 512)));
    // Past the end. On a packed ring this frontend insists on a used length that counts every
    // writable byte, which a request that failed does not have.
    if features & VirtioFeatureFlags::RING_PACKED.bits() == 0 {
        assert_ne!(front.read_sync(0, 16 * MIB, 512).0, 0);
    }
    front.queues[0].write_zeroes(65536, 4096, false, 8).unwrap();
    front.queues[0].discard(2 * 65536, 4096, 9).unwrap();
    front.kick(0);
    let mut both = [front.complete(0), front.complete(0)];
    both.sort();
    assert_eq!(both, [(8, 0), (9, 0)]);
    assert_eq!(front.read_sync(0, 65536, 4096), (0, vec![0; 4096]));
    drop(front);
    server.stop().unwrap();
    let stats = device.stats();
    assert_eq!(stats.host_errors, 0);
    assert_eq!(stats.retired, 0);
    let image = std::fs::read(&disk.image).unwrap();
    assert_eq!(image[5 * 65536..][..4096], pattern(5, 4096)[..]);
}

#[test]
fn page_cache_verified() {
    verified(FileOptions::default(), FEATURES);
}

#[test]
fn page_cache_without_event_idx_or_indirect() {
    let plain = VirtioFeatureFlags::RING_EVENT_IDX | VirtioFeatureFlags::RING_INDIRECT_DESC;
    verified(FileOptions::default(), FEATURES & !plain.bits());
}

#[test]
fn packed_verified() {
    let packed = VirtioFeatureFlags::RING_PACKED.bits();
    verified(FileOptions::default(), FEATURES | packed);
    let plain = VirtioFeatureFlags::RING_EVENT_IDX | VirtioFeatureFlags::RING_INDIRECT_DESC;
    verified(FileOptions::default(), FEATURES & !plain.bits() | packed);
}

#[test]
fn direct_verified() {
    let direct = FileOptions {
        direct: true,
        ..Default::default()
    };
    verified(direct, FEATURES);
}

#[test]
fn deep_queue_and_several_queues() {
    let disk = Disk::new(64 * MIB);
    let (server, device) = disk.serve(FileOptions::default(), 4);
    let mut front = Frontend::connect(&disk.socket, FEATURES, 4, 128, MIB as usize);
    let data: Vec<Vec<u8>> = (0..128).map(|i| pattern(i, 4096)).collect();
    for (i, d) in data.iter().enumerate() {
        front.fill(i * 4096, d);
    }
    for i in 0..128usize {
        front.write(i % 4, i as u64 * 4096, i * 4096, 4096, i);
    }
    for queue in 0..4 {
        front.kick(queue);
        let mut seen: Vec<_> = (0..32).map(|_| front.complete(queue)).collect();
        seen.sort();
        let expected: Vec<_> = (0..32).map(|n| (n * 4 + queue, 0)).collect();
        assert_eq!(seen, expected);
    }
    for round in 0..50usize {
        for i in 0..32usize {
            front.read(
                round % 4,
                ((i + round) % 128) as u64 * 4096,
                i * 4096,
                4096,
                i,
            );
        }
        front.kick(round % 4);
        for _ in 0..32 {
            let (i, ret) = front.complete(round % 4);
            assert_eq!(ret, 0);
            assert!(front.bytes(i * 4096, 4096) == data[(i + round) % 128]);
        }
    }
    drop(front);
    server.stop().unwrap();
    assert_eq!(device.stats().requests, 128 + 50 * 32);
}

#[test]
fn read_only_refuses_writes() {
    let disk = Disk::new(MIB);
    let options = FileOptions {
        read_only: true,
        ..Default::default()
    };
    let (server, device) = disk.serve(options, 1);
    let mut front = Frontend::connect(&disk.socket, FEATURES, 1, 64, MIB as usize);
    assert_ne!(front.write_sync(0, 0, &[1; 512]), 0);
    assert_eq!(front.read_sync(0, 0, 512), (0, vec![0; 512]));
    drop(front);
    server.stop().unwrap();
    assert_eq!(device.stats().refused, 1);
}

#[test]
fn truncated_image_is_an_io_error_and_counted() {
    let disk = Disk::new(MIB);
    let (server, device) = disk.serve(FileOptions::default(), 1);
    let mut front = Frontend::connect(&disk.socket, FEATURES, 1, 64, MIB as usize);
    assert_eq!(front.read_sync(0, 512 * 1024, 4096).0, 0);
    let file = std::fs::File::options()
        .write(true)
        .open(&disk.image)
        .unwrap();
    file.set_len(256 * 1024).unwrap();
    assert_ne!(front.read_sync(0, 512 * 1024, 4096).0, 0);
    assert_eq!(front.read_sync(0, 0, 4096).0, 0);
    drop(front);
    server.stop().unwrap();
    assert_eq!(device.stats().host_errors, 1);
}
