//! What is compared: stores, loads, and the bar of each.

use crate::frontend::Load;
use crate::peers::Store;
use std::time::Duration;

/// What ours is compared with, and the least ratio wanted.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Bar {
    Fio(f64),
    BestPeer(f64),
    /// Processor time for each request, at a rate that all can keep.
    Cpu,
}

pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) store: Store,
    pub(crate) load: Load,
    pub(crate) bar: Bar,
}

/// Every case, in an order in which none disturbs the next: what dirties the page cache is last.
pub(crate) fn cases(time: Duration) -> Vec<Case> {
    let load = Load {
        depth: 1,
        block: 4096,
        write: false,
        sequential: false,
        busy: false,
        rate: None,
        time,
    };
    let deep = Load { depth: 32, ..load };
    let write = |load| Load {
        write: true,
        ..load
    };
    let busy = |load| Load { busy: true, ..load };
    let paced = |load, rate| Load {
        rate: Some(rate),
        ..load
    };
    let long = Load {
        depth: 8,
        block: 128 << 10,
        sequential: true,
        ..load
    };
    let case = |name, store, load, bar| Case {
        name,
        store,
        load,
        bar,
    };
    use Bar::{BestPeer, Cpu, Fio};
    use Store::{Cached, Direct, Null};
    vec![
        case("null QD1", Null, load, BestPeer(1.2)),
        case("null QD1 busy", Null, busy(load), BestPeer(1.2)),
        case("null QD32", Null, deep, BestPeer(1.2)),
        case("null QD32 busy", Null, busy(deep), BestPeer(1.2)),
        case("paced null QD32", Null, paced(deep, 50e3), Cpu),
        case("direct read QD1", Direct, load, Fio(0.95)),
        case("direct read QD1 busy", Direct, busy(load), Fio(0.95)),
        case("direct read QD32", Direct, deep, Fio(0.95)),
        case("direct read QD32 busy", Direct, busy(deep), Fio(0.95)),
        case("direct write QD1", Direct, write(load), Fio(0.95)),
        case(
            "direct write QD1 busy",
            Direct,
            busy(write(load)),
            Fio(0.95),
        ),
        case("direct write QD32", Direct, write(deep), Fio(0.95)),
        case(
            "direct write QD32 busy",
            Direct,
            busy(write(deep)),
            Fio(0.95),
        ),
        case("sequential 128K direct read", Direct, long, BestPeer(1.0)),
        case(
            "sequential 128K direct write",
            Direct,
            write(long),
            BestPeer(1.0),
        ),
        case("paced direct read QD1", Direct, paced(load, 4e3), Cpu),
        case("paced direct read QD32", Direct, paced(deep, 30e3), Cpu),
        case(
            "paced direct write QD32",
            Direct,
            paced(write(deep), 20e3),
            Cpu,
        ),
        case("cached read QD1", Cached, load, BestPeer(2.0)),
        case("cached read QD1 busy", Cached, busy(load), BestPeer(2.0)),
        case("cached read QD32", Cached, deep, BestPeer(1.4)),
        case("cached read QD32 busy", Cached, busy(deep), BestPeer(1.4)),
        case("sequential 128K cached read", Cached, long, BestPeer(1.0)),
        case("paced cached read QD1", Cached, paced(load, 5e3), Cpu),
        case("paced cached read QD32", Cached, paced(deep, 50e3), Cpu),
        case("cached write QD32", Cached, write(deep), BestPeer(1.5)),
        case(
            "cached write QD32 busy",
            Cached,
            busy(write(deep)),
            BestPeer(1.5),
        ),
        case(
            "sequential 128K cached write",
            Cached,
            write(long),
            BestPeer(1.0),
        ),
        case(
            "paced cached write QD32",
            Cached,
            paced(write(deep), 20e3),
            Cpu,
        ),
    ]
}
