//! What a backend can reach of its VM: its own arena, and nothing else.

use paravane_tests::{accels, blank_image, disk, patience, suite_vm};
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::mpsc;

/// Device and inode of every file that a process has mapped or open.
fn files_of(pid: u32) -> BTreeSet<(u64, u64)> {
    let mut found = BTreeSet::new();
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    for line in maps.lines() {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let [_, _, _, device, inode, ..] = fields[..] else {
            continue;
        };
        let (major, minor) = device.split_once(':').unwrap();
        let number = |hex| u32::from_str_radix(hex, 16).unwrap();
        let inode: u64 = inode.parse().unwrap();
        if inode != 0 {
            found.insert((libc::makedev(number(major), number(minor)), inode));
        }
    }
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).unwrap() {
        // Follows the link to what is open.
        if let Ok(meta) = fs::metadata(entry.unwrap().path()) {
            found.insert((meta.dev(), meta.ino()));
        }
    }
    found
}

/// Whether a mapping of this process, by name, is a memfd of the library's.
fn own_memfds() -> BTreeSet<(u64, u64)> {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let ours = maps.lines().filter(|l| l.contains("/memfd:pv-"));
    ours.map(|line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let (major, minor) = fields[3].split_once(':').unwrap();
        let number = |hex| u32::from_str_radix(hex, 16).unwrap();
        (
            libc::makedev(number(major), number(minor)),
            fields[4].parse().unwrap(),
        )
    })
    .collect()
}

#[test]
fn a_backend_has_its_own_arena_and_nothing_else_of_the_vm() {
    for accel in accels().unwrap() {
        let folder = tempfile::tempdir().unwrap();
        let images = ["disk", "other"].map(|name| folder.path().join(name));
        for image in &images {
            blank_image(image).unwrap();
        }
        let (sender, reached) = mpsc::channel();
        // The case has both disks active when it is done with 50 rounds; hold it there.
        let vm = suite_vm("device.table_is_alone", accel)
            .unwrap()
            .block(disk(&images[0], &[]).name("disk"))
            .block(disk(&images[1], &[]).name("other"))
            .console(std::io::sink())
            .rng()
            .log(move |_, line| drop(sender.send(line.to_owned())))
            .build()
            .unwrap()
            .run()
            .unwrap();
        // Arena 0 is the in-process devices', then one for each disk.
        let arenas = vm.arena_files();
        assert_eq!(arenas.len(), 3);
        let memfds = own_memfds();
        assert!(
            arenas.iter().all(|a| memfds.contains(a)),
            "the check can see memfds"
        );
        let pids = vm.backend_pids();
        assert!(pids.iter().all(|pid| *pid != 0));
        // Sampled while the guest runs and the tables are set; the sets only grow.
        let mut seen = [BTreeSet::new(), BTreeSet::new()];
        let deadline = std::time::Instant::now() + patience(60);
        while vm.exit().is_none() {
            assert!(std::time::Instant::now() < deadline);
            for (seen, pid) in seen.iter_mut().zip(&pids) {
                seen.extend(files_of(*pid));
            }
        }
        assert_eq!(
            vm.wait().code(),
            Some(0),
            "{:?}",
            reached.try_iter().collect::<Vec<_>>()
        );
        for (seen, pid) in seen.iter_mut().zip(&pids) {
            seen.extend(files_of(*pid));
        }
        for (index, seen) in seen.iter().enumerate() {
            let own = arenas[index + 1];
            assert!(
                seen.contains(&own),
                "{accel}: backend {index} does not have its arena"
            );
            let reachable: Vec<_> = memfds.intersection(seen).collect();
            assert_eq!(
                reachable,
                [&own],
                "{accel}: backend {index} has more of the VM"
            );
            for other in arenas.iter().filter(|a| **a != own) {
                assert!(
                    !seen.contains(other),
                    "{accel}: backend {index} has another arena"
                );
            }
        }
        println!(
            "{accel}: 2 backends, each with its own arena of {} memfds",
            memfds.len()
        );
    }
}
