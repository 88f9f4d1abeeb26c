use super::*;
use proptest::prelude::*;

/// Lets `demand` requests of so many bytes through as fast as the bucket allows; the time it took.
fn run(bucket: &Bucket, demand: u64, units: u64) -> u64 {
    let mut now = 0;
    for _ in 0..demand {
        now += bucket.delay(now);
        assert_eq!(
            bucket.delay(now),
            0,
            "the wait that was asked for is enough"
        );
        bucket.charge(units, now);
    }
    now
}

proptest! {
    #[test]
    fn the_average_is_exact_after_the_burst(
        rate in 1u64..10_000_000, burst in 1u64..1000, units in 1u64..5000, demand in 1u64..2000,
    ) {
        let bucket = Bucket::default();
        bucket.set(rate, burst, 0);
        let took = run(&bucket, demand, units);
        // Everything before the last request has been paid for, but for the burst.
        let paid = u128::from((demand - 1) * units).saturating_sub(u128::from(burst));
        let least = paid * u128::from(NANOS) / u128::from(rate);
        // Each division may round down by a nanosecond, each wait up by one.
        let slack = u128::from(2 * demand + 2);
        prop_assert!(u128::from(took) + slack >= least, "{took} < {least}");
        let most = u128::from(demand * units) * u128::from(NANOS) / u128::from(rate) + slack;
        prop_assert!(u128::from(took) <= most, "{took} > {most}");
    }
}

#[test]
fn no_limit_never_waits() {
    let limiter = Limiter::default();
    for _ in 0..1000 {
        assert_eq!(limiter.delay(), None);
        limiter.charge(u64::MAX);
    }
    assert_eq!(limiter.get(), Limits::default());
}

#[test]
fn each_of_the_two_limits_holds_back() {
    let slow = |limits| {
        let limiter = Limiter::new(limits);
        assert_eq!(limiter.delay(), None, "the burst is there");
        limiter.charge(4096);
        limiter.charge(4096);
        limiter.delay().is_some()
    };
    let none = Limits::default();
    assert!(slow(Limits { iops: 1, ..none }));
    assert!(slow(Limits {
        bandwidth: 1024,
        ..none
    }));
    assert!(!slow(Limits {
        bandwidth: 1024,
        bandwidth_burst: 1 << 20,
        ..none
    }));
    assert!(!slow(Limits {
        iops: 1_000_000,
        iops_burst: 100,
        ..none
    }));
}

#[test]
fn a_change_forgets_the_debt_and_takes_effect() {
    let limiter = Limiter::new(Limits {
        bandwidth: 1,
        ..Limits::default()
    });
    limiter.charge(1 << 30);
    assert!(limiter.delay().unwrap() > Duration::from_secs(1_000_000));
    limiter.set(Limits {
        bandwidth: 1 << 20,
        ..Limits::default()
    });
    assert_eq!(limiter.delay(), None);
    limiter.charge(1 << 30);
    limiter.set(Limits::default());
    assert_eq!(limiter.delay(), None);
}

#[test]
fn extremes_do_not_overflow() {
    let most = Limits {
        iops: MAX_RATE,
        iops_burst: MAX_RATE_BURST,
        bandwidth: MAX_RATE,
        bandwidth_burst: MAX_RATE_BURST,
    };
    assert_eq!(most.check(), Ok(most));
    let over = Limits {
        iops: MAX_RATE + 1,
        ..most
    };
    assert_eq!(over.check().unwrap_err().name, "iops");
    let over = Limits {
        bandwidth_burst: MAX_RATE_BURST + 1,
        ..most
    };
    assert_eq!(over.check().unwrap_err().name, "bandwidth-burst");
    let limiter = Limiter::new(Limits {
        iops: u64::MAX,
        bandwidth: u64::MAX,
        ..most
    });
    assert_eq!(limiter.get().iops, MAX_RATE);
    for _ in 0..100 {
        limiter.charge(u64::MAX);
    }
    limiter.set(Limits {
        bandwidth: 1,
        bandwidth_burst: u64::MAX,
        ..most
    });
    limiter.charge(u64::MAX);
    limiter.charge(u64::MAX);
    // A debt that is never paid is a long wait, not a short one.
    assert!(limiter.delay().unwrap() > Duration::from_secs(1 << 30));
}
