//! Descriptors: counted in a process of its own.

mod support;

use support::{Disk, FEATURES, Frontend, pattern};
use vhost_backends::engine::FileOptions;

const MIB: u64 = 1 << 20;

#[test]
fn second_connection_and_descriptors() {
    let disk = Disk::new(MIB);
    let (server, _device) = disk.serve(FileOptions::default(), 2);
    let mut baseline = None;
    for round in 0..20u64 {
        let mut front = Frontend::connect(&disk.socket, FEATURES, 2, 64, MIB as usize);
        if round > 0 {
            assert_eq!(
                front.read_sync(1, 4096, 4096),
                (0, pattern(round - 1, 4096))
            );
        }
        assert_eq!(front.write_sync(0, 4096, &pattern(round, 4096)), 0);
        drop(front);
        // The next connection is accepted only after the last one is closed here.
        if round == 1 {
            baseline = Some(support::settled_fds());
        }
    }
    let end = support::settled_fds();
    assert!(end <= baseline.unwrap() + 2, "{end} > {baseline:?}");
    server.stop().unwrap();
}
