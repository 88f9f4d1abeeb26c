//! What statistics and limits cost for each request: the calls that a queue makes, in a loop.

use std::hint::black_box;
use std::time::Instant;
use vhost_backends::limit::{Limiter, Limits};
use vhost_backends::stats::{DeviceStats, Kind, Measure};

const REQUESTS: u32 = 2_000_000;
/// Turns, of which the fastest counts.
const TURNS: usize = 5;
/// Requests that a queue takes at once, and asks the clock twice for.
const BATCH: u32 = 32;

/// Prints nanoseconds for each request.
pub(crate) fn print() {
    let stats = DeviceStats::new(1);
    let empty = fastest(|n| {
        black_box(n);
    });
    let measured = fastest(|n| measure(&stats, n, n.is_multiple_of(BATCH)));
    let alone = fastest(|n| measure(&stats, n, true));
    let open = Limiter::default();
    let limited = Limiter::new(Limits {
        iops: 1 << 40,
        bandwidth: 1 << 45,
        ..Limits::default()
    });
    let limit = |limiter: &Limiter| {
        fastest(|n| {
            black_box(limiter.delay());
            limiter.charge(black_box(u64::from(n)));
        })
    };
    for (what, nanos) in [
        ("statistics, in batches of 32", measured),
        ("statistics, one by one", alone),
        ("limiter without limits", limit(&open)),
        ("limiter with both limits", limit(&limited)),
    ] {
        println!("{what:30} {:>6.1} ns/request", nanos - empty);
    }
}

fn measure(stats: &DeviceStats, n: u32, clock: bool) {
    let Some(queue) = stats.queue(0) else { return };
    let now = || if clock { stats.now() } else { u64::from(n) };
    // Of a token, which is below the most that are in flight.
    let token = (n % 32) as u16;
    let measure = Measure {
        kind: Kind::Read,
        bytes: 4096,
        began: now(),
    };
    queue.flies(token, black_box(measure));
    queue.landed(token);
    queue.done(measure, black_box(now()));
}

fn fastest(mut each: impl FnMut(u32)) -> f64 {
    let turn = |each: &mut dyn FnMut(u32)| {
        let start = Instant::now();
        for n in 0..REQUESTS {
            each(n);
        }
        start.elapsed().as_nanos() as f64 / f64::from(REQUESTS)
    };
    (0..TURNS)
        .map(|_| turn(&mut each))
        .fold(f64::INFINITY, f64::min)
}
