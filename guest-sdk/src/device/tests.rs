//! What all drivers share, with a disk as the driver.

use crate::block::{Block, BlockQueue, Error, QueueConfig, Request, open};
use crate::fake::{Fake, enter_vcpu};
use core::sync::atomic::Ordering;
use core::time::Duration;

fn queue(fake: &'static Fake, vcpu: u32) -> BlockQueue<Fake> {
    let config = QueueConfig { vcpu, size: 16 };
    let (_device, mut queues) = Block::open(fake, None, &[config]).expect("a disk");
    queues.pop().expect("one queue")
}

/// The event goes to the vCPU that the queue was made for. A wait on another one ends all the same.
#[test]
fn a_wait_on_another_vcpu_ends() {
    for (owner, configuration) in [(1, 1), (0, 1), (1, 0)] {
        let fake = Fake::new(2, 64, 2, true);
        let configs = [configuration, owner].map(|vcpu| QueueConfig { vcpu, size: 16 });
        let (_device, mut queues) = Block::open(fake, None, &configs).expect("a disk");
        enter_vcpu(1 - owner);
        let mut disk = queues.pop().expect("two queues");
        let mut out = [0; 512];
        disk.read_blocking(0, &mut out).expect("read");
        enter_vcpu(0);
    }
}

/// Without event index the device signals every completion for as long as it is asked to.
#[test]
fn a_wait_that_is_over_takes_its_wish_back() {
    let fake = Fake::new(1, 64, 1, true);
    fake.host().offered &= !pv_abi::virtio::feature::EVENT_IDX;
    fake.host().show();
    let mut disk = queue(fake, 0);
    disk.write_blocking(0, &[1; 512]).expect("written");
    let signals = fake.host().signals;
    for sector in 0..5 {
        let buf = disk.alloc(512).expect("room");
        disk.submit(Request::Read { sector, buf }).expect("room");
        disk.kick();
        fake.run_host();
        assert!(disk.poll().expect("fine").is_some());
    }
    assert_eq!(fake.host().signals, signals);
}

/// Real backends count the status byte, or the data alone. Neither is a reason to fail.
#[test]
fn lengths_without_the_status_byte_are_accepted() {
    let fake = Fake::new(1, 64, 1, true);
    fake.host().counts_data_only = true;
    let mut disk = open(fake, None).expect("a disk");
    let mut out = [0; 1024];
    disk.write_blocking(2, &[7; 1024]).expect("written");
    disk.flush().expect("flushed");
    disk.read_blocking(2, &mut out).expect("read");
    assert_eq!(out, [7; 1024]);
    disk.discard(0, 1).expect("discarded");
    disk.id().expect("an id");
    // A read whose data is not all there is an error.
    fake.host().counts_less = 1;
    assert_eq!(disk.read_blocking(2, &mut out), Err(Error::Io));
    disk.write_blocking(2, &[8; 1024]).expect("nothing is due");
}

/// What a blocking call leaves behind when the queue breaks under it is nobody's, and so comes out
/// nowhere; its buffers go back.
#[test]
fn a_blocking_call_that_fails_leaves_no_token() {
    let fake = Fake::new(1, 1024, 1, true);
    let mut disk = queue(fake, 0);
    let before = fake.free_bytes();
    let buf = disk.alloc(512).expect("room");
    let own = disk.submit(Request::Read { sector: 0, buf }).expect("room");
    fake.host().forge_used_index(77);
    let mut out = alloc::vec![0; 300 * 512];
    assert!(matches!(
        disk.read_blocking(0, &mut out),
        Err(Error::Broken(_))
    ));
    assert!(matches!(disk.flush(), Err(Error::Broken(_))));
    disk.device().reset();
    let mut tokens = alloc::vec::Vec::new();
    while disk.in_flight() != 0 {
        disk.wait_for(1, None).expect("healed");
        while let Some(done) = disk.poll().expect("healed") {
            tokens.push(done.token);
        }
    }
    assert_eq!(tokens, [own]);
    disk.read_blocking(0, &mut out).expect("read");
    drop(disk);
    assert!(fake.free_bytes() > before);
    assert_eq!(fake.free_bytes(), fake.the_arena().len());
}

/// While one vCPU waits for the host, nobody spins for what it holds.
#[test]
fn nobody_spins_while_a_call_takes_its_time() {
    let fake = Fake::new(2, 64, 2, false);
    let configs = [0, 1].map(|vcpu| QueueConfig { vcpu, size: 16 });
    let (device, mut queues) = Block::open(fake, None, &configs).expect("a disk");
    let mut second = queues.pop().expect("two");
    let mut first = queues.pop().expect("two");
    let activations = fake.host().activations;
    fake.hold_calls.store(true, Ordering::Release);
    fake.host().die();
    std::thread::scope(|scope| {
        let (done, outcome) = std::sync::mpsc::channel();
        scope.spawn(move || {
            enter_vcpu(1);
            second.write_blocking(0, &[1; 512]).expect("written");
        });
        while !fake.call_held.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
        let device = &device;
        scope.spawn(move || {
            enter_vcpu(0);
            // All of these need what the other one's call is about.
            assert_eq!(device.generation(), None);
            device.set_loss_timeout(Duration::from_secs(5));
            device.reset();
            assert!(first.poll().expect("it waits").is_none());
            done.send(first).expect("the test listens");
        });
        let first = outcome.recv_timeout(Duration::from_secs(20));
        // Before anything can fail, lest the scope waits for ever.
        fake.hold_calls.store(false, Ordering::Release);
        let mut first = first.expect("it waited for the call");
        enter_vcpu(0);
        first.write_blocking(1, &[2; 512]).expect("written");
    });
    // The one that was under way, and the one that was wanted meanwhile.
    let host = fake.host();
    assert!(host.activations > activations);
    assert_eq!(device.generation(), Some(host.generation));
    assert_eq!((host.disk[0], host.disk[512]), (1, 2));
}
