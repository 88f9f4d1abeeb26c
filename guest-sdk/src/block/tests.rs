//! The driver against a model of the host, whose backend dies where the test says.

use super::{AsyncBlock, Block, BlockQueue, Completion, Error, QueueConfig, Request, open};
use crate::device::{Lost, OpenError};
use crate::fake::{Fake, enter_vcpu};
use crate::platform::Platform;
use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::future::Future;
use core::pin::{Pin, pin};
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use core::task::{Context, Poll};
use core::time::Duration;
use pv_abi::virtio::{block, feature};
use std::task::Wake;

const SECTORS: u64 = 512;

fn disk() -> (&'static Fake, BlockQueue<Fake>) {
    let fake = Fake::new(1, SECTORS, 1, true);
    let disk = open(fake, Some("disk")).expect("a disk");
    (fake, disk)
}

fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64)
        .map(|i| (seed.wrapping_mul(0x9e37_79b9) ^ (i * 31)) as u8)
        .collect()
}

fn write(disk: &BlockQueue<Fake>, sector: u64, data: &[u8]) -> Request {
    let mut buf = disk.alloc(data.len()).expect("room in the arena");
    buf.write(0, data);
    Request::Write { sector, buf }
}

fn read(disk: &BlockQueue<Fake>, sector: u64, len: usize) -> Request {
    let buf = disk.alloc(len).expect("room in the arena");
    Request::Read { sector, buf }
}

fn bytes(completion: &Completion) -> Vec<u8> {
    let buf = completion.buf.as_ref().expect("a buffer");
    let mut out = alloc::vec![0; buf.len()];
    buf.read(0, &mut out);
    out
}

#[test]
fn blocking_calls_do_what_they_say() {
    let (fake, mut disk) = disk();
    assert_eq!(disk.capacity(), SECTORS);
    let data = pattern(1, 200 * 512);
    disk.write_blocking(3, &data).expect("written");
    disk.flush().expect("flushed");
    let mut out = alloc::vec![0; data.len()];
    disk.read_blocking(3, &mut out).expect("read");
    assert_eq!(out, data);
    assert_eq!(fake.host().disk[3 * 512..203 * 512], data[..]);
    disk.discard(3, 10).expect("discarded");
    disk.write_zeroes(13, 10, true).expect("zeroed");
    disk.read_blocking(3, &mut out).expect("read");
    assert!(out[..20 * 512].iter().all(|&byte| byte == 0));
    assert_eq!(out[20 * 512..], data[20 * 512..]);
    assert_eq!(&disk.id().expect("an id")[..10], b"model disk");
    disk.read_blocking(0, &mut []).expect("nothing to read");
}

#[test]
fn everything_goes_back_to_the_arena() {
    let fake = Fake::new(1, SECTORS, 2, true);
    let before = fake.free_bytes();
    let mut disk = open(fake, None).expect("a disk");
    disk.write_blocking(0, &pattern(1, 64 << 10))
        .expect("written");
    let request = read(&disk, 0, 4096);
    disk.submit(request).expect("room");
    drop(disk);
    assert_eq!(fake.free_bytes(), before);
}

#[test]
fn refusals_give_the_request_back() {
    let (_fake, mut disk) = disk();
    let mut refused = |request| {
        let refused = disk.submit(request).expect_err("refused");
        (refused.error, refused.request)
    };
    let (_, spare) = self::disk();
    let mut small = [0; 512];
    for (request, error) in [
        (read(&spare, SECTORS, 512), Error::OutOfRange),
        (read(&spare, u64::MAX, 1024), Error::OutOfRange),
        (read(&spare, SECTORS - 1, 1024), Error::OutOfRange),
        (read(&spare, 0, 511), Error::BadLength),
        (read(&spare, 0, 0), Error::BadLength),
        (write(&spare, 0, &small[..100]), Error::BadLength),
        (read(&spare, 0, (1 << 20) + 512), Error::BadLength),
    ] {
        let (why, back) = refused(request);
        assert_eq!(why, error);
        assert!(matches!(back, Request::Read { .. } | Request::Write { .. }));
    }
    let discard = |sector, count| Request::Discard { sector, count };
    assert_eq!(refused(discard(0, 65)).0, Error::BadLength);
    assert_eq!(refused(discard(0, 0)).0, Error::BadLength);
    assert_eq!(refused(discard(SECTORS, 1)).0, Error::OutOfRange);
    assert_eq!(disk.in_flight(), 0);
    assert_eq!(
        disk.read_blocking(SECTORS, &mut small),
        Err(Error::OutOfRange)
    );
    assert_eq!(disk.write_blocking(0, &small[..7]), Err(Error::BadLength));
}

#[test]
fn a_full_queue_says_so_and_goes_on() {
    let fake = Fake::new(1, SECTORS, 1, true);
    let config = QueueConfig { vcpu: 0, size: 16 };
    let (_device, mut queues) = Block::open(fake, None, &[config]).expect("a disk");
    let mut disk = queues.pop().expect("one queue");
    let mut taken = 0;
    let back = loop {
        let request = read(&disk, taken, 512);
        match disk.submit(request) {
            Ok(_) => taken += 1,
            Err(refused) => {
                assert_eq!(refused.error, Error::QueueFull);
                break refused.request;
            }
        }
    };
    assert!((8..=16).contains(&taken), "{taken}");
    assert_eq!(disk.wait_for(1, None).expect("completions"), taken as usize);
    disk.submit(back).expect("room again");
    // A blocking call among others' completions leaves them where they are.
    disk.write_blocking(9, &[7; 512]).expect("written");
    assert_eq!(disk.in_flight(), taken as usize + 1);
}

#[test]
fn features_that_are_not_there_are_not_used() {
    let fake = Fake::new(1, SECTORS, 1, true);
    fake.host().offered = feature::VERSION_1 | block::feature::RO;
    fake.host().show();
    let mut disk = open(fake, None).expect("a disk");
    assert!(disk.device().read_only());
    let mut out = [0; 1024];
    disk.read_blocking(1, &mut out).expect("read");
    assert_eq!(disk.write_blocking(1, &out), Err(Error::ReadOnly));
    disk.flush().expect("nothing to flush");
    assert_eq!(disk.discard(0, 1), Err(Error::Unsupported));
    let flush = disk.submit(Request::Flush).expect_err("not offered");
    assert_eq!(flush.error, Error::Unsupported);

    let fake = Fake::new(1, SECTORS, 1, true);
    fake.host().offered = 0;
    fake.host().show();
    let refused = open(fake, None).expect_err("no version 1");
    assert_eq!(refused, OpenError::MissingFeatures(feature::VERSION_1));
    assert_eq!(
        open(fake, Some("x")).expect_err("none"),
        OpenError::NotFound
    );
    let two = [QueueConfig { vcpu: 0, size: 64 }; 2];
    let refused = Block::open(fake, None, &two).expect_err("it has one");
    assert_eq!(refused, OpenError::BadQueues);
}

#[test]
fn the_status_byte_decides() {
    let (fake, mut disk) = disk();
    let mut out = [0; 512];
    for (answer, error) in [
        (block::status::IOERR, Error::Io),
        (block::status::UNSUPP, Error::Unsupported),
        (3, Error::Io),
        (0xff, Error::Io),
        // "done", but with one byte written instead of 513: the buffer would be stale.
        (block::status::OK, Error::Io),
    ] {
        fake.host().answer = Some(answer);
        assert_eq!(disk.read_blocking(0, &mut out), Err(error), "{answer}");
    }
}

#[test]
fn a_batch_costs_one_kick_and_one_wakeup() {
    let (fake, mut disk) = disk();
    for round in 0..4 {
        let (kicks, signals) = (fake.kicks.load(Ordering::Relaxed), fake.host().signals);
        for sector in 0..32 {
            let request = read(&disk, sector, 512);
            disk.submit(request).expect("room");
        }
        assert_eq!(disk.wait_for(32, None).expect("completions"), 32);
        while disk.poll().expect("fine").is_some() {}
        assert_eq!(fake.kicks.load(Ordering::Relaxed) - kicks, 1, "{round}");
        assert_eq!(fake.host().signals - signals, 1, "{round}");
    }
}

#[test]
fn configuration_changes_show_once() {
    let (fake, mut disk) = disk();
    let device = disk.device();
    assert!(!device.take_config_change());
    fake.host().set_capacity(SECTORS * 2);
    // Noticed even before anybody asks, where it matters.
    disk.write_blocking(SECTORS, &[1; 512])
        .expect("it has grown");
    assert!(device.take_config_change());
    assert!(!device.take_config_change());
    assert_eq!(device.capacity(), SECTORS * 2);
}

/// A verified run at depth eight against a model of the disk. Overlapping writes in flight are part
/// of it: a read that follows the completion of all of them must see one of them whole.
fn verified_run(fake: &'static Fake, disk: &mut BlockQueue<Fake>) {
    let mut tokens = BTreeMap::new();
    let mut completed = 0;
    for round in 0..6u64 {
        for slot in 0..8u64 {
            // Slots 6 and 7 write the same place.
            let place = slot.min(6);
            let data = pattern(round * 8 + slot, 1024);
            let request = write(disk, place * 2, &data);
            let token = disk.submit(request).expect("room");
            assert!(tokens.insert(token, (place, data)).is_none());
        }
        let token = disk.submit(Request::Flush).expect("room");
        tokens.insert(token, (100, Vec::new()));
        while disk.in_flight() != 0 {
            disk.wait_for(3, None).expect("never broken");
            while let Some(done) = disk.poll().expect("never broken") {
                let (place, data) = tokens.remove(&done.token).expect("once, and one of ours");
                assert_eq!(done.result, Ok(()));
                assert_eq!(done.buf.is_some(), place != 100);
                if done.buf.is_some() {
                    assert_eq!(bytes(&done), data);
                }
                completed += 1;
            }
        }
        assert!(tokens.is_empty(), "lost completions");
        let mut out = alloc::vec![0; 1024];
        for place in 0..=6 {
            disk.read_blocking(place * 2, &mut out).expect("read");
            let mut allowed = [place, 7]
                .into_iter()
                .take(if place == 6 { 2 } else { 1 })
                .map(|slot| pattern(round * 8 + slot, 1024));
            assert!(allowed.any(|data| data == out), "place {place} is torn");
        }
    }
    assert_eq!(completed, 6 * 9);
    assert_eq!(fake.host().disk[..512], pattern(40, 1024)[..512]);
}

#[test]
fn a_backend_may_die_at_every_point() {
    for event_idx in [true, false] {
        for fuel in 0..330 {
            let fake = Fake::new(1, SECTORS, 1, true);
            if !event_idx {
                fake.host().offered &= !(feature::EVENT_IDX | feature::INDIRECT_DESC);
                fake.host().show();
            }
            fake.host().lives = alloc::vec![fuel];
            fake.host().shuffle = fuel * 2 + 1;
            let mut disk = open(fake, None).expect("a disk");
            verified_run(fake, &mut disk);
        }
    }
}

#[test]
fn a_backend_may_die_again_and_again_and_come_back_late() {
    for fuel in 0..60 {
        let fake = Fake::new(1, SECTORS, 1, true);
        fake.host().lives = alloc::vec![fuel + 9, 0, fuel / 2, 1, fuel, 2, 30];
        fake.host().absence = Some((fuel % 4) as u32);
        fake.host().agains = (fuel % 3) as u32;
        fake.host().shuffle = fuel * 2 + 1;
        let mut disk = open(fake, None).expect("a disk");
        verified_run(fake, &mut disk);
        assert_eq!(fake.host().activations, 8);
    }
}

#[test]
fn it_may_come_back_with_less_but_not_with_too_little() {
    let (fake, mut disk) = disk();
    disk.write_blocking(0, &[1; 512]).expect("written");
    fake.host().offered = feature::VERSION_1;
    fake.host().die();
    disk.write_blocking(0, &[2; 512]).expect("written");
    assert_eq!(disk.device().features(), feature::VERSION_1);
    // What comes back later is not taken into use.
    fake.host().offered |= feature::EVENT_IDX;
    fake.host().die();
    disk.write_blocking(0, &[3; 512]).expect("written");
    assert_eq!(disk.device().features(), feature::VERSION_1);
    fake.host().offered = 0;
    fake.host().die();
    let lost = Err(Error::DeviceLost(Lost::Changed));
    assert_eq!(disk.write_blocking(0, &[4; 512]), lost);
}

/// Twelve requests in flight on indirect chains, and a new backend without them, on which five fit:
/// the rest waits for room, in order.
#[test]
fn requests_that_do_not_fit_any_more_wait_for_room() {
    let fake = Fake::new(1, SECTORS, 1, true);
    let config = QueueConfig { vcpu: 0, size: 16 };
    let (_device, mut queues) = Block::open(fake, None, &[config]).expect("a disk");
    let mut disk = queues.pop().expect("one queue");
    for sector in 0..12 {
        let request = write(&disk, sector, &pattern(sector, 512));
        disk.submit(request).expect("room");
    }
    disk.kick();
    fake.host().offered &= !feature::INDIRECT_DESC;
    fake.host().shuffle = 0;
    fake.host().die();
    assert_eq!(disk.wait_for(12, None).expect("not broken"), 12);
    let order: Vec<_> = fake.host().executed.iter().map(|&(_, s)| s).collect();
    assert_eq!(order, (0..12).collect::<Vec<_>>());
    for sector in 0..12 {
        let at = sector as usize * 512;
        assert_eq!(fake.host().disk[at..at + 512], pattern(sector, 512)[..]);
    }
}

/// A wait consumes its own events and puts the others back, for whoever waits for them.
#[test]
fn a_wait_leaves_other_events_pending() {
    let (fake, mut disk) = disk();
    fake.raise_events(0, 1 << 40);
    fake.raise_events(2, 1);
    disk.write_blocking(0, &[1; 512]).expect("written");
    assert!(fake.take_event(40));
    assert!(fake.take_event(128));
    assert!(!fake.take_event(disk.event()));
}

#[test]
fn a_device_that_stays_away_fails_every_request_once() {
    let (fake, mut disk) = disk();
    disk.device().set_loss_timeout(Duration::from_secs(3));
    let before = fake.free_bytes();
    let mut tokens = Vec::new();
    for sector in 0..5 {
        let request = read(&disk, sector, 512);
        tokens.push(disk.submit(request).expect("room"));
    }
    disk.kick();
    fake.host().absence = None;
    fake.host().die();
    assert_eq!(disk.wait_for(5, None).expect("errors, not broken"), 5);
    for token in tokens {
        let done = disk.poll().expect("fine").expect("one each");
        assert_eq!(done.token, token);
        assert_eq!(done.result, Err(Error::DeviceLost(Lost::TimedOut)));
        assert!(
            done.buf.is_some(),
            "the device was reset: the buffer is ours"
        );
    }
    assert!(disk.poll().expect("fine").is_none());
    assert_eq!(fake.free_bytes(), before);
    // For good, and without waiting again.
    let lost = Err(Error::DeviceLost(Lost::TimedOut));
    assert_eq!(disk.flush(), lost);
}

/// The backend is away and nobody could make it let go: what it had is not touched again, and what
/// comes after is refused at once, costs nothing, and goes back to its owner, however much it is.
#[test]
fn a_device_that_never_let_go_refuses_what_comes_after() {
    let (fake, mut disk) = disk();
    disk.device().set_loss_timeout(Duration::from_secs(3));
    let request = read(&disk, 0, 512);
    disk.submit(request).expect("room");
    disk.kick();
    fake.host().holds_on = true;
    fake.host().die();
    assert_eq!(disk.wait_for(1, None).expect("an error, not broken"), 1);
    let done = disk.poll().expect("fine").expect("one");
    assert_eq!(done.result, Err(Error::DeviceLost(Lost::TimedOut)));
    assert!(done.buf.is_none(), "the device may still write there");
    let before = fake.free_bytes();
    for sector in 0..600 {
        let request = read(&disk, sector % SECTORS, 512);
        let refused = disk.submit(request).expect_err("it is gone");
        assert_eq!(refused.error, Error::DeviceLost(Lost::TimedOut));
        assert!(matches!(refused.request, Request::Read { .. }));
    }
    assert_eq!(fake.free_bytes(), before);
    for _ in 0..300 {
        let outcome = disk.read_blocking(0, &mut [0; 1024]);
        assert_eq!(outcome, Err(Error::DeviceLost(Lost::TimedOut)));
    }
    assert_eq!(fake.free_bytes(), before);
    let disk = AsyncBlock::new(disk);
    for _ in 0..300 {
        let outcome = run(fake, disk.read(0, disk.alloc(512).expect("room")));
        assert_eq!(outcome.err(), Some(Error::DeviceLost(Lost::TimedOut)));
    }
    assert_eq!(fake.free_bytes(), before);
}

#[test]
fn waits_end_when_their_time_is_up() {
    let (fake, mut disk) = disk();
    fake.host().absence = None;
    fake.host().die();
    let request = read(&disk, 0, 512);
    disk.submit(request).expect("it waits for the device");
    let start = fake.now_ns();
    let limit = Duration::from_millis(200);
    assert_eq!(disk.wait_for(1, Some(limit)).expect("nothing broken"), 0);
    assert!(fake.now_ns() - start >= 200_000_000);
    assert_eq!(disk.in_flight(), 1);
}

#[test]
fn a_broken_queue_is_healed_by_a_reset() {
    let (fake, mut disk) = disk();
    let request = write(&disk, 5, &[9; 512]);
    let token = disk.submit(request).expect("room");
    disk.kick();
    fake.host().forge_used_index(77);
    assert!(matches!(disk.poll(), Err(Error::Broken(_))));
    assert!(matches!(disk.wait_for(1, None), Err(Error::Broken(_))));
    let refused = disk.submit(Request::Flush).expect_err("broken");
    assert!(matches!(refused.error, Error::Broken(_)));
    disk.device().reset();
    assert_eq!(disk.wait_for(1, None).expect("healed"), 1);
    let done = disk.poll().expect("healed").expect("one");
    assert_eq!((done.token, done.result), (token, Ok(())));
    assert_eq!(fake.host().disk[5 * 512], 9);
}

/// Three vCPUs with a queue each, a host on a thread of its own, and a backend that dies a hundred
/// times: every queue's every request completes once, and what was written is there.
#[test]
fn queues_on_several_vcpus_survive_losses_together() {
    const VCPUS: u32 = 3;
    const ROUNDS: u64 = 400;
    let fake = Fake::new(VCPUS, SECTORS, VCPUS as u16, false);
    fake.host().lives = (0..100).map(|life| 20 + life * 7 % 90).collect();
    fake.host().absence = Some(2);
    let configs: Vec<_> = (0..VCPUS)
        .map(|vcpu| QueueConfig { vcpu, size: 64 })
        .collect();
    let (device, queues) = Block::open(fake, None, &configs).expect("a disk");
    let running = AtomicUsize::new(VCPUS as usize);
    std::thread::scope(|scope| {
        for (vcpu, mut queue) in (0u32..).zip(queues) {
            let running = &running;
            scope.spawn(move || {
                enter_vcpu(vcpu);
                for round in 0..ROUNDS {
                    let base = u64::from(vcpu) * 100;
                    for slot in 0..8 {
                        let data = pattern(round * 1000 + base + slot, 512);
                        let request = write(&queue, base + slot, &data);
                        queue.submit(request).expect("room");
                    }
                    let ready = queue.wait_for(8, None).expect("never broken");
                    assert_eq!(ready, 8);
                    while let Some(done) = queue.poll().expect("never broken") {
                        assert_eq!(done.result, Ok(()));
                    }
                    let slot = round % 8;
                    let mut out = [0; 512];
                    queue.read_blocking(base + slot, &mut out).expect("read");
                    assert_eq!(out[..], pattern(round * 1000 + base + slot, 512)[..]);
                }
                running.fetch_sub(1, Ordering::Relaxed);
            });
        }
        while running.load(Ordering::Relaxed) != 0 {
            fake.run_host();
            std::thread::yield_now();
        }
    });
    assert!(fake.host().activations > 50, "{}", fake.host().activations);
    assert_eq!(device.generation(), Some(fake.host().generation));
}

#[derive(Default)]
struct Count(AtomicU64);

impl Wake for Count {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// Polls until ready, with the host at work whenever there is nothing to do.
fn run<F: Future>(fake: &Fake, future: F) -> F::Output {
    let wakes = Arc::new(Count::default());
    let waker = std::task::Waker::from(wakes);
    let mut context = Context::from_waker(&waker);
    let mut future = pin!(future);
    for _ in 0..10_000 {
        for word in 0..4 {
            fake.take_events(word, u64::MAX);
        }
        if let Poll::Ready(output) = future.as_mut().poll(&mut context) {
            return output;
        }
        fake.idle(Some(Duration::from_millis(1)));
    }
    panic!("never ready");
}

#[test]
fn futures_complete_and_wake() {
    let (fake, disk) = disk();
    let disk = AsyncBlock::new(disk);
    let mut buf = disk.alloc(1024).expect("room");
    buf.write(0, &pattern(5, 1024));
    let done = run(fake, disk.write(4, buf)).expect("not broken");
    assert_eq!(done.result, Ok(()));
    let wakes = Arc::new(Count::default());
    let waker = std::task::Waker::from(Arc::clone(&wakes));
    let mut context = Context::from_waker(&waker);
    let mut first = disk.read(4, disk.alloc(512).expect("room"));
    let mut second = disk.read(5, disk.alloc(512).expect("room"));
    let mut abandoned = disk.read(6, disk.alloc(512).expect("room"));
    assert!(Pin::new(&mut first).poll(&mut context).is_pending());
    assert!(Pin::new(&mut second).poll(&mut context).is_pending());
    assert!(Pin::new(&mut abandoned).poll(&mut context).is_pending());
    drop(abandoned);
    fake.run_host();
    disk.process();
    assert_eq!(wakes.0.load(Ordering::Relaxed), 2);
    for (future, half) in [(&mut second, 512..1024), (&mut first, 0..512)] {
        let Poll::Ready(Ok(done)) = Pin::new(future).poll(&mut context) else {
            panic!("it was woken");
        };
        assert_eq!(bytes(&done), pattern(5, 1024)[half]);
    }
    drop((first, second));
    assert_eq!(disk.into_queue().in_flight(), 0);
}

#[test]
fn futures_survive_losses_and_a_full_queue() {
    let fake = Fake::new(1, SECTORS, 1, true);
    fake.host().lives = alloc::vec![17, 3, 0, 40];
    let config = QueueConfig { vcpu: 0, size: 4 };
    let (_device, mut queues) = Block::open(fake, None, &[config]).expect("a disk");
    let disk = AsyncBlock::new(queues.pop().expect("one"));
    let mut futures: Vec<_> = (0..20)
        .map(|sector| {
            let mut buf = disk.alloc(512).expect("room");
            buf.write(0, &pattern(sector, 512));
            Some(disk.write(sector, buf))
        })
        .collect();
    run(
        fake,
        core::future::poll_fn(|context| {
            for slot in &mut futures {
                if let Some(future) = slot
                    && let Poll::Ready(done) = Pin::new(future).poll(context)
                {
                    assert_eq!(done.expect("not broken").result, Ok(()));
                    *slot = None;
                }
            }
            if futures.iter().all(Option::is_none) {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        }),
    );
    drop(futures);
    for sector in 0..20 {
        let at = sector as usize * 512;
        assert_eq!(fake.host().disk[at..at + 512], pattern(sector, 512)[..]);
    }
}

#[test]
fn futures_of_a_broken_queue_fail() {
    let (fake, disk) = disk();
    let disk = AsyncBlock::new(disk);
    let mut future = disk.read(0, disk.alloc(512).expect("room"));
    let waker = std::task::Waker::from(Arc::new(Count::default()));
    let mut context = Context::from_waker(&waker);
    assert!(Pin::new(&mut future).poll(&mut context).is_pending());
    fake.host().forge_used_index(9);
    let outcome = Pin::new(&mut future).poll(&mut context);
    assert!(matches!(outcome, Poll::Ready(Err(Error::Broken(_)))));
}
