//! A learning switch that joins guests of one daemon.
//!
//! A frame is copied once, by the thread of its sender's queue, from the sender's memory into the
//! receiver's buffers; large frames stay large for receivers that take them. What a port can cost
//! the others is bounded: stations that it claims, frames that it has flooded, addresses that are
//! somebody else's.

use super::Port;
use crate::limit::{Limiter, Limits};
use crate::net::frame::{Frame, Mac};
use crate::net::limits::{
    MAX_FLOOD_RATE, MAX_STATIONS, MAX_STATIONS_PER_PORT, MAX_SWITCH_PORTS, STATION_SECS,
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
                ..Limits::default()
            }),
        })
    }

    fn now(&self) -> u32 {
        u32::try_from(self.start.elapsed().as_secs()).unwrap_or(u32::MAX)
    }

    /// Puts a station where it was seen, if there is room for it.
    fn learn(&self, mac: Mac, port: usize, now: u32) {
        let mut guard = self.state.write().unwrap_or_else(PoisonError::into_inner);
        let state = &mut *guard;
        if state.stations.len() >= MAX_STATIONS
            || state
                .counts
                .get(port)
                .is_none_or(|count| *count >= MAX_STATIONS_PER_PORT)
        {
            state.forget_old(now);
        }
        let moved = match state.stations.get(&mac) {
            Some(station) if station.fixed => return,
            Some(station) => Some(station.port),
            None if state.stations.len() >= MAX_STATIONS => return,
            None => None,
        };
        let Some(count) = state.counts.get_mut(port) else {
            return;
        };
        if *count >= MAX_STATIONS_PER_PORT {
            return;
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
    }
}

impl State {
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
                self.floods.charge(0);
                Way::Flood
            }
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
        {
            let state = self
                .switch
                .state
                .read()
                .unwrap_or_else(PoisonError::into_inner);
            let ways: Vec<Way> = frames
                .iter()
                .map(|frame| self.way(&state, frame, now, &mut strangers))
                .collect();
            for (index, port) in state.ports.iter().enumerate() {
                let mut chosen = frames
                    .iter()
                    .zip(&ways)
                    .filter(|(_, way)| match way {
                        Way::To(to) => *to == index,
                        Way::Flood => index != self.index,
                        Way::Drop(_) => false,
                    })
                    .map(|(frame, _)| frame)
                    .peekable();
                if chosen.peek().is_none() {
                    continue;
                }
                if let Some(guest) = port.as_ref().and_then(Weak::upgrade) {
                    guest.deliver(&mut chosen);
                }
            }
            let own = state.ports.get(self.index).and_then(Option::as_ref);
            if let Some(own) = own.and_then(Weak::upgrade) {
                for way in &ways {
                    if let Way::Drop(reason) = way {
                        own.count_drop(*reason);
                    }
                }
            }
        }
        for mac in strangers {
            self.switch.learn(mac, self.index, now);
        }
        frames.len()
    }
}
