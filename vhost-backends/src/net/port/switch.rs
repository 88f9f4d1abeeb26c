//! A learning switch that joins guests of one daemon.
//!
//! A frame is copied once, by the thread of its sender's queue, from the sender's memory into the
//! receiver's buffers; large frames stay large for receivers that take them. What a port can cost
//! the others is bounded: stations that it claims and how often, frames that it has flooded,
//! addresses that are somebody else's. Nothing is copied while the table is locked.

use super::Port;
use crate::limit::{Limiter, Limits};
use crate::net::frame::{Frame, Mac};
use crate::net::limits::{
    EVICTION_COST, MAX_FLOOD_BYTES, MAX_FLOOD_RATE, MAX_LEARN_RATE, MAX_STATIONS,
    MAX_STATIONS_PER_PORT, MAX_SWITCH_PORTS, STATION_SECS,
};
use crate::net::offload::Offloads;
use crate::net::receive::Inlet;
use crate::net::stats::Drop;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, PoisonError, RwLock, Weak};
use std::time::Instant;

/// Stations that are learned from one batch: learning stops everybody for a moment.
const MAX_LEARNED: usize = 4;

/// A switch. Its ports are added one by one.
#[derive(Debug)]
pub struct Switch {
    start: Instant,
    state: RwLock<State>,
}

#[derive(Debug, Default)]
struct State {
    ports: Vec<Option<Weak<Inlet>>>,
    stations: HashMap<Mac, Station>,
    /// Stations behind each port.
    counts: Vec<usize>,
    /// When old stations were looked for last.
    cleaned: u32,
}

/// Where an address is.
#[derive(Debug)]
struct Station {
    port: usize,
    /// The port's own: it neither moves nor ages.
    fixed: bool,
    /// Seconds since the switch was made.
    seen: AtomicU32,
}

impl Station {
    fn is_fresh(&self, now: u32) -> bool {
        // Ordering: Relaxed, a time that stands for itself.
        let age = now.saturating_sub(self.seen.load(Ordering::Relaxed));
        self.fixed || u64::from(age) < STATION_SECS
    }
}

impl Default for Switch {
    fn default() -> Switch {
        Switch {
            start: Instant::now(),
            state: RwLock::default(),
        }
    }
}

impl Switch {
    /// A port for one guest. `None`: there are [`MAX_SWITCH_PORTS`].
    pub fn port(self: &Arc<Switch>) -> Option<SwitchPort> {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        let index = state.ports.len();
        if index >= MAX_SWITCH_PORTS {
            return None;
        }
        state.ports.push(None);
        state.counts.push(0);
        drop(state);
        Some(SwitchPort {
            switch: Arc::clone(self),
            index,
            floods: Limiter::new(Limits {
                iops: MAX_FLOOD_RATE,
                bandwidth: MAX_FLOOD_BYTES,
                ..Limits::default()
            }),
            learning: Limiter::new(Limits {
                iops: MAX_LEARN_RATE,
                ..Limits::default()
            }),
        })
    }

    fn now(&self) -> u32 {
        u32::try_from(self.start.elapsed().as_secs()).unwrap_or(u32::MAX)
    }

    /// Puts stations where they were seen. What that costs, of [`MAX_LEARN_RATE`].
    fn learn(&self, macs: &[Mac], port: usize, now: u32) -> u64 {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        let mut cost = 1;
        for mac in macs {
            match state.learn(*mac, port, now) {
                Learned::Kept => {}
                Learned::InPlaceOfAnother => cost += EVICTION_COST,
                // Not to ask again for a second.
                Learned::NoRoom => return MAX_LEARN_RATE,
            }
        }
        cost
    }
}

/// What became of a station.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Learned {
    Kept,
    InPlaceOfAnother,
    NoRoom,
}

impl State {
    fn learn(&mut self, mac: Mac, port: usize, now: u32) -> Learned {
        let state = self;
        if state.stations.len() >= MAX_STATIONS
            || state
                .counts
                .get(port)
                .is_none_or(|count| *count >= MAX_STATIONS_PER_PORT)
        {
            state.forget_old(now);
        }
        let mut learned = Learned::Kept;
        let moved = match state.stations.get(&mac) {
            Some(station) if station.fixed => return Learned::Kept,
            Some(station) => Some(station.port),
            None if state.stations.len() >= MAX_STATIONS => {
                if !state.evict_for(port) {
                    return Learned::NoRoom;
                }
                learned = Learned::InPlaceOfAnother;
                None
            }
            None => None,
        };
        let Some(count) = state.counts.get_mut(port) else {
            return Learned::NoRoom;
        };
        if *count >= MAX_STATIONS_PER_PORT {
            return Learned::NoRoom;
        }
        *count += 1;
        if let Some(before) = moved.and_then(|port| state.counts.get_mut(port)) {
            *before = before.saturating_sub(1);
        }
        let station = Station {
            port,
            fixed: false,
            seen: AtomicU32::new(now),
        };
        state.stations.insert(mac, station);
        learned
    }

    /// Forgets the station of the port with most that was silent for longest, if `port` has fewer
    /// than its share and than that one.
    fn evict_for(&mut self, port: usize) -> bool {
        let share = MAX_STATIONS / self.ports.len().max(1);
        let own = self.counts.get(port).copied().unwrap_or(usize::MAX);
        let most = (0..).zip(&self.counts).max_by_key(|(_, count)| **count);
        let Some((fullest, _)) = most.filter(|(_, count)| own < share && own < **count) else {
            return false;
        };
        // Ordering: Relaxed, as in `is_fresh`.
        let oldest = (self.stations.iter())
            .filter(|(_, station)| station.port == fullest && !station.fixed)
            .min_by_key(|(_, station)| station.seen.load(Ordering::Relaxed));
        let Some((&mac, _)) = oldest else {
            return false;
        };
        self.stations.remove(&mac);
        if let Some(count) = self.counts.get_mut(fullest) {
            *count = count.saturating_sub(1);
        }
        true
    }

    /// Makes room; looks through the table once a second at most.
    fn forget_old(&mut self, now: u32) {
        if std::mem::replace(&mut self.cleaned, now) == now {
            return;
        }
        let counts = &mut self.counts;
        self.stations.retain(|_, station| {
            let fresh = station.is_fresh(now);
            if !fresh && let Some(count) = counts.get_mut(station.port) {
                *count = count.saturating_sub(1);
            }
            fresh
        });
    }
}

/// One guest's port of a [`Switch`].
#[derive(Debug)]
pub struct SwitchPort {
    switch: Arc<Switch>,
    index: usize,
    floods: Limiter,
    learning: Limiter,
}

/// Where a frame goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    To(usize),
    /// To every other port.
    Flood,
    /// Nowhere.
    Drop(Drop),
}

impl SwitchPort {
    fn way(&self, state: &State, frame: &Frame<'_>, now: u32, strangers: &mut Vec<Mac>) -> Way {
        let source = frame.source();
        if !source.is_group() {
            match state.stations.get(&source) {
                Some(station) if station.port == self.index => {
                    // Ordering: Relaxed, as in `is_fresh`.
                    if station.seen.load(Ordering::Relaxed) != now {
                        station.seen.store(now, Ordering::Relaxed);
                    }
                }
                // Somebody says it is the station of another port.
                Some(station) if station.fixed => return Way::Drop(Drop::Spoofed),
                _ => {
                    if strangers.len() < MAX_LEARNED && !strangers.contains(&source) {
                        strangers.push(source);
                    }
                }
            }
        }
        let to = frame.destination();
        let known = if to.is_group() {
            None
        } else {
            state.stations.get(&to).filter(|s| s.is_fresh(now))
        };
        match known {
            // It is on the sender's side of the switch.
            Some(station) if station.port == self.index => Way::Drop(Drop::Filtered),
            Some(station) => Way::To(station.port),
            None if self.floods.delay().is_some() => Way::Drop(Drop::Flood),
            None => {
                self.floods
                    .charge_many(frame.segments(), frame.len() as u64);
                Way::Flood
            }
        }
    }
}

impl SwitchPort {
    fn leads_to(&self, way: Way, port: usize) -> bool {
        match way {
            Way::To(to) => to == port,
            Way::Flood => port != self.index,
            Way::Drop(_) => false,
        }
    }
}

impl Port for SwitchPort {
    fn attach(&self, guest: &Arc<Inlet>, mac: Mac) {
        let mut guard = self
            .switch
            .state
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let state = &mut *guard;
        if let Some(port) = state.ports.get_mut(self.index) {
            *port = Some(Arc::downgrade(guest));
        }
        let station = Station {
            port: self.index,
            fixed: true,
            seen: AtomicU32::new(0),
        };
        state.stations.insert(mac, station);
    }

    fn offloads(&self) -> Offloads {
        Offloads::ALL
    }

    fn send(&self, _pair: u16, frames: &[Frame<'_>]) -> usize {
        let now = self.switch.now();
        let mut strangers = Vec::new();
        let state = self
            .switch
            .state
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        // Frames of a batch are often from one station to one other.
        let mut before = None;
        let ways: Vec<Way> = frames
            .iter()
            .map(|frame| {
                let addresses = frame.addresses();
                if let Some((same, way)) = before
                    && same == addresses
                {
                    return way;
                }
                let way = self.way(&state, frame, now, &mut strangers);
                // What is flooded or dropped is counted one by one.
                before = matches!(way, Way::To(_)).then_some((addresses, way));
                way
            })
            .collect();
        let guests: Vec<(usize, Arc<Inlet>)> = (0..)
            .zip(&state.ports)
            .filter(|(index, _)| ways.iter().any(|way| self.leads_to(*way, *index)))
            .filter_map(|(index, port)| Some((index, port.as_ref()?.upgrade()?)))
            .collect();
        let own = state.ports.get(self.index).and_then(Option::as_ref);
        let own = own.and_then(Weak::upgrade);
        // Others go on while this thread copies.
        drop(state);
        for (index, guest) in guests {
            let chosen = frames.iter().zip(&ways);
            let chosen = chosen.filter(|(_, way)| self.leads_to(**way, index));
            guest.deliver(&mut chosen.map(|(frame, _)| frame));
        }
        for way in &ways {
            if let (Way::Drop(reason), Some(own)) = (way, &own) {
                own.count_drop(*reason);
            }
        }
        if !strangers.is_empty() && self.learning.delay().is_none() {
            let cost = self.switch.learn(&strangers, self.index, now);
            self.learning.charge_many(cost, 0);
        }
        frames.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::{NetDevice, NetOptions};
    use pv_abi::virtio::net::Header;
    use std::sync::mpsc;
    use std::time::Duration;
    use vm_memory::VolatileSlice;

    fn joined(switch: &Arc<Switch>, index: u8) -> (Arc<SwitchPort>, NetDevice) {
        let port = Arc::new(switch.port().unwrap());
        let options = NetOptions::with_mac(Mac([2, 0, 0, 0, 0, index]));
        (Arc::clone(&port), NetDevice::new(port, options))
    }

    fn send(port: &SwitchPort, to: u8, from: [u8; 6]) {
        let mut bytes = [&[2, 0, 0, 0, 0, to], &from[..], &[0x88, 0xb5], &[0; 46]].concat();
        let pieces = [VolatileSlice::from(&mut bytes[..])];
        port.send(0, &[Frame::new(Header::default(), &pieces, 60)]);
    }

    #[test]
    fn a_receiver_that_takes_long_holds_nobody_else_up() {
        let switch = Arc::new(Switch::default());
        let (first, _device) = joined(&switch, 1);
        let (_, slow) = joined(&switch, 2);
        let held = slow.inlet.lock(0).unwrap();
        std::thread::scope(|scope| {
            let stuck = scope.spawn(move || send(&first, 2, [2, 0, 0, 0, 0, 1]));
            let (done, wait) = mpsc::channel();
            let switch = &switch;
            scope.spawn(move || {
                // Until the first sender waits for the receiver, or has had time to.
                std::thread::sleep(Duration::from_millis(100));
                let (third, _device) = joined(switch, 3);
                let (_, fourth) = joined(switch, 4);
                // A stranger's address, so that it is learned as well.
                send(&third, 4, [2, 0, 0, 0, 0, 9]);
                let stats = fourth.stats().snapshot();
                assert_eq!(stats.dropped(Drop::NoQueue), 1, "it has no queue open");
                done.send(()).unwrap();
            });
            let others = wait.recv_timeout(Duration::from_secs(20));
            let waits = !stuck.is_finished();
            drop(held);
            others.expect("the others went on");
            assert!(waits, "the first one waits for its receiver");
        });
    }

    #[test]
    fn learning_ends_at_a_ports_share() {
        let switch = Arc::new(Switch::default());
        let (port, _device) = joined(&switch, 1);
        let macs: Vec<Mac> = (0..2000u16)
            .map(|i| Mac([2, 1, 0, 0, (i >> 8) as u8, i as u8]))
            .collect();
        let learned = macs
            .chunks(4)
            .filter(|four| switch.learn(four, port.index, 0) == 1);
        // One is the port's own, which does not count.
        assert_eq!(learned.count(), MAX_STATIONS_PER_PORT / 4);
        // Once there is no room, nothing is asked for a while.
        send(&port, 9, [2, 3, 0, 0, 0, 0]);
        assert!(port.learning.delay().is_some());
    }

    #[test]
    fn a_batch_teaches_few_addresses() {
        let switch = Arc::new(Switch::default());
        let (port, _device) = joined(&switch, 1);
        let mut batch: Vec<[u8; 60]> = (0..2 * MAX_LEARNED as u8)
            .map(|i| {
                let mut bytes = [0; 60];
                bytes[..12].copy_from_slice(&[2, 0, 0, 0, 0, 1, 2, 4, 0, 0, 0, i]);
                bytes
            })
            .collect();
        let pieces: Vec<_> = batch
            .iter_mut()
            .map(|bytes| [VolatileSlice::from(&mut bytes[..])])
            .collect();
        let frames: Vec<_> = pieces
            .iter()
            .map(|pieces| Frame::new(Header::default(), pieces, 60))
            .collect();
        port.send(0, &frames);
        assert_eq!(switch.state.read().unwrap().counts[port.index], MAX_LEARNED);
    }

    /// As many addresses as a port may have, and a few more.
    fn claim(switch: &Switch, port: usize, now: u32) {
        for i in 0..MAX_STATIONS_PER_PORT as u16 + 8 {
            let [high, low] = i.to_be_bytes();
            switch.learn(&[Mac([2, 7, port as u8, 0, high, low])], port, now);
        }
    }

    #[test]
    fn ports_that_claim_all_leave_the_others_their_share() {
        let switch = Arc::new(Switch::default());
        let greedy: Vec<_> = (1..=8).map(|index| joined(&switch, index)).collect();
        for (port, _) in &greedy {
            claim(&switch, port.index, 1);
        }
        let known = |mac: [u8; 6]| {
            let state = switch.state.read().unwrap();
            state.stations.get(&Mac(mac)).map(|station| station.port)
        };
        let counts = || switch.state.read().unwrap().counts.clone();
        let (late, _device) = joined(&switch, 9);
        let own = |i: u8| Mac([2, 9, 0, 0, 0, i]);
        // One of the others' has said something lately.
        let lively = [2, 7, 3, 0, 0, 5];
        (switch.state.read().unwrap().stations[&Mac(lively)].seen).store(2, Ordering::Relaxed);
        for i in 0..200 {
            assert!(
                switch.learn(&[own(i)], late.index, 2) < MAX_LEARN_RATE,
                "{i}"
            );
        }
        assert_eq!(known(own(199).0), Some(late.index));
        assert_eq!(known(lively), Some(3));
        let total: usize = counts().iter().sum();
        assert!(total <= MAX_STATIONS);
        // Nobody can do the same to it, or to one of those with fewer.
        claim(&switch, 0, 3);
        assert_eq!(counts()[late.index], 200);
        let few = counts().into_iter().min().unwrap();
        assert_eq!(few, 200);
        // Its share, and no more than the one with most.
        for _ in 0..2 {
            claim(&switch, late.index, 4);
        }
        let counts = counts();
        let most = counts.iter().max().unwrap();
        assert!(
            counts[late.index] >= MAX_STATIONS / 9 && counts[late.index] <= *most,
            "{counts:?}"
        );
        for (port, _) in &greedy {
            let mac = [2, 0, 0, 0, 0, port.index as u8 + 1];
            assert_eq!(known(mac), Some(port.index), "its own never goes");
        }
    }
}
