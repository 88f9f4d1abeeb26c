//! Console and entropy source against the model host.

use super::Console;
use crate::device::{Error, Wakers};
use crate::fake::Fake;
use crate::limits::LOSS_POLL;
use crate::platform::Platform;
use crate::rng::Rng;
use alloc::sync::Arc;
use alloc::task::Wake;
use alloc::vec::Vec;
use core::fmt::Write;
use core::future::Future;
use core::pin::pin;
use core::sync::atomic::{AtomicU32, Ordering};
use core::task::{Context, Poll, Waker};
use core::time::Duration;
use pv_abi::device::kind;

fn console() -> (&'static Fake, Console<Fake>) {
    let fake = Fake::new(1, 1, 2, true);
    fake.host().become_kind(kind::CONSOLE);
    fake.host().give = 100;
    let console = Console::open(fake, None).expect("a console");
    (fake, console)
}

#[derive(Default)]
struct Count(AtomicU32);

impl Wake for Count {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// An executor that polls again when the waker was called, and only then. What is around it, as a
/// kernel's interrupt glue would be, calls the device's wakers at the device's events; and after
/// `limit`, if there is one. Without one, the model host panics when nothing would ever happen again.
fn run<F: Future>(
    fake: &Fake,
    (wakers, events): (Wakers, &[u32]),
    limit: Option<Duration>,
    future: F,
) -> F::Output {
    let mut future = pin!(future);
    let count = Arc::new(Count::default());
    let waker = Waker::from(Arc::clone(&count));
    for polls in 1..10_000 {
        if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return output;
        }
        for idles in 0.. {
            if count.0.load(Ordering::Relaxed) >= polls {
                break;
            }
            assert!(idles < 1000, "no waker was kept");
            fake.idle(limit);
            let woken = events.iter().filter(|&&event| fake.take_event(event));
            if woken.count() != 0 || limit.is_some() {
                wakers.wake();
            }
        }
    }
    panic!("never ready");
}

#[test]
fn futures_need_no_more_than_their_wakers() {
    for (lives, limit) in [(&[][..], None), (&[3, 5, 4], Some(LOSS_POLL))] {
        let (fake, mut console) = console();
        fake.host().lives = lives.to_vec();
        let (wakers, events) = (console.wakers(), console.events());
        let long: Vec<u8> = (0..40_000u32).map(|i| (i / 7) as u8).collect();
        let write = async {
            console.write_async(&long).await?;
            console.flush_async().await
        };
        assert_eq!(run(fake, (wakers, &events), limit, write), Ok(()));
        let output = fake.host().output.clone();
        assert!(if lives.is_empty() {
            output == long
        } else {
            output.len() >= long.len()
        });

        let fake = Fake::new(1, 1, 1, true);
        fake.host().become_kind(kind::RNG);
        fake.host().give = 10;
        fake.host().lives = lives.to_vec();
        let mut rng = Rng::open(fake, None).expect("an entropy source");
        fake.host().input = (0..200).collect();
        let (wakers, events) = (rng.wakers(), rng.events());
        let mut out = [0; 60];
        let filled = run(
            fake,
            (wakers.clone(), &events),
            limit,
            rng.fill_async(&mut out),
        );
        assert_eq!(filled, Ok(()));
        assert!(out.is_sorted_by(|a, b| a < b));
        fake.host().input.clear();
        let filled = run(fake, (wakers, &events), limit, rng.fill_async(&mut out));
        assert_eq!(filled, Err(Error::Empty));
    }
}

#[test]
fn output_arrives_in_order_and_whole() {
    let (fake, mut console) = console();
    let mut expected = Vec::new();
    for line in 0..2000 {
        writeln!(console, "line {line}").expect("written");
        expected.extend(alloc::format!("line {line}\n").into_bytes());
    }
    console.flush().expect("flushed");
    assert!(fake.host().output == expected);
}

#[test]
fn output_survives_losses() {
    let (fake, mut console) = console();
    let long: Vec<u8> = (0..40_000u32).map(|i| i as u8).collect();
    fake.host().lives = alloc::vec![3, 5, 4];
    fake.host().die();
    console.write(&long).expect("written");
    console.flush().expect("flushed");
    // What was on its way when a backend died is sent again: nothing is missing.
    assert!(fake.host().output.len() >= long.len());
    assert_eq!(fake.host().activations, 5);
}

#[test]
fn input_is_read_whenever_it_comes() {
    let (fake, mut console) = console();
    let mut out = [0; 64];
    assert_eq!(console.try_read(&mut out).expect("fine"), 0);
    let typed: Vec<u8> = (0..1000u32).map(|i| (i * 7) as u8).collect();
    fake.host().input = typed.clone();
    fake.host().kicked = true;
    let mut got = Vec::new();
    while got.len() < typed.len() {
        let read = console.read(&mut out).expect("input");
        got.extend_from_slice(&out[..read]);
    }
    assert_eq!(got, typed);
    assert_eq!(console.read(&mut []).expect("nothing asked"), 0);

    let wakers = console.wakers();
    let mut late = [0; 64];
    let mut future = pin!(async {
        let read = console.read_async(&mut late).await;
        (read, late)
    });
    let wakes = Arc::new(Count::default());
    let waker = Waker::from(Arc::clone(&wakes));
    let mut context = Context::from_waker(&waker);
    assert!(future.as_mut().poll(&mut context).is_pending());
    fake.host().input = b"ping".to_vec();
    fake.host().kicked = true;
    fake.run_host();
    assert!(fake.take_event(3), "the wait was armed");
    wakers.wake();
    wakers.wake();
    assert_eq!(wakes.0.load(Ordering::Relaxed), 1);
    let Poll::Ready((read, late)) = future.poll(&mut context) else {
        panic!("there is input");
    };
    assert_eq!((read, &late[..4]), (Ok(4), &b"ping"[..]));
}

#[test]
fn entropy_is_whole_and_an_empty_answer_is_an_error() {
    let fake = Fake::new(1, 1, 1, true);
    fake.host().become_kind(kind::RNG);
    fake.host().give = 10;
    fake.host().lives = alloc::vec![4, 2];
    let mut rng = Rng::open(fake, None).expect("an entropy source");
    let bytes: Vec<u8> = (0..200).collect();
    fake.host().input = bytes.clone();
    let mut out = [0; 60];
    rng.fill(&mut out).expect("filled");
    // A backend that died with an answer took its bytes with it; the order is kept all the same.
    assert!(out.is_sorted_by(|a, b| a < b));
    let got = loop {
        let got = rng.try_fill(&mut out).expect("no error");
        if got != 0 {
            break got;
        }
        fake.run_host();
    };
    assert!(got <= 10);
    fake.host().input.clear();
    assert_eq!(rng.fill(&mut out), Err(Error::Empty));
}
