//! The control queue: what the card receives, and what it is told (virtio 1.3 §5.1.6.5).
//!
//! What was set is remembered, and a device that comes back is told all of it again before anything
//! else, by [`ControlRing::attach`]. Its answers are taken by whoever polls a queue of the card next.

use super::config::Shared;
use super::{Error, Nic};
use crate::device::{Channel, Core, Failed, Ring, Segments, Submission};
use crate::limits::{MAX_FILTER, MAX_VLANS};
use crate::platform::{Arena, DmaBuf, OutOfArena, Platform};
use crate::sync::SpinLock;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU16, Ordering};
use core::time::Duration;
use pv_abi::device::QueueSetup;
use pv_abi::virtio::net::{control, feature};

/// The answer before the device has written one.
const UNANSWERED: u8 = 0xff;

/// Highest VLAN number (IEEE 802.1Q: 4095 is reserved).
const MAX_VLAN: u16 = 4094;

/// A command on its way.
#[derive(Debug)]
pub(super) struct Command {
    bytes: Vec<u8>,
    /// The bytes and, behind them, the answer.
    buf: DmaBuf,
    /// Who waits for it; nobody, if it tells a device that came back what was set.
    ticket: Option<u64>,
}

impl Command {
    fn new(
        arena: &'static Arena,
        command: (u8, u8),
        data: &[u8],
        ticket: Option<u64>,
    ) -> Result<Self, OutOfArena> {
        let mut bytes = Vec::with_capacity(2 + data.len());
        bytes.extend_from_slice(&[command.0, command.1]);
        bytes.extend_from_slice(data);
        Ok(Command {
            buf: arena.alloc(bytes.len() + 1)?,
            bytes,
            ticket,
        })
    }

    fn answer(&self) -> u8 {
        let mut answer = [UNANSWERED];
        self.buf.read(self.bytes.len(), &mut answer);
        answer[0]
    }
}

impl Submission for Command {
    fn prepare(&mut self, segments: &mut Segments) {
        // Written again for each generation: a peer may have changed it.
        self.buf.write(0, &self.bytes);
        self.buf.write(self.bytes.len(), &[UNANSWERED]);
        // At most two tables of `MAX_FILTER` addresses.
        let len = self.bytes.len() as u32;
        segments.push(self.buf.gpa(), len, false);
        segments.push(self.buf.gpa() + u64::from(len), 1, true);
    }
}

/// What the device was told, and is told again.
#[derive(Debug, Default)]
struct Settings {
    pairs: Option<u16>,
    promiscuous: bool,
    all_multicast: bool,
    mac: Option<[u8; 6]>,
    filter: Option<Vec<u8>>,
    vlans: BTreeSet<u16>,
}

impl Settings {
    fn commands(&self) -> Vec<((u8, u8), Vec<u8>)> {
        let mut commands = Vec::new();
        if let Some(pairs) = self.pairs {
            commands.push((control::MQ_VQ_PAIRS_SET, pairs.to_le_bytes().to_vec()));
        }
        for (on, command) in [
            (self.promiscuous, control::RX_PROMISC),
            (self.all_multicast, control::RX_ALLMULTI),
        ] {
            if on {
                commands.push((command, [1].to_vec()));
            }
        }
        if let Some(mac) = self.mac {
            commands.push((control::MAC_ADDR_SET, mac.to_vec()));
        }
        if let Some(filter) = &self.filter {
            commands.push((control::MAC_TABLE_SET, filter.clone()));
        }
        for vlan in &self.vlans {
            commands.push((control::VLAN_ADD, vlan.to_le_bytes().to_vec()));
        }
        commands
    }
}

/// The control queue, as the core sees it.
pub(crate) struct ControlRing {
    channel: Channel<Command>,
    arena: &'static Arena,
    state: SpinLock<State>,
    /// Commands that nobody waits for and that are not answered.
    replaying: AtomicU16,
}

#[derive(Debug, Default)]
struct State {
    settings: Settings,
    next_ticket: u64,
    /// For those who wait: their answers, once they are there.
    answers: BTreeMap<u64, Option<u8>>,
}

impl ControlRing {
    pub(super) fn new(
        channel: Channel<Command>,
        arena: &'static Arena,
        pairs: Option<u16>,
    ) -> Self {
        let settings = Settings {
            pairs,
            ..Settings::default()
        };
        ControlRing {
            channel,
            arena,
            state: SpinLock::new(State {
                settings,
                ..State::default()
            }),
            replaying: AtomicU16::new(0),
        }
    }

    pub(super) fn is_replaying(&self) -> bool {
        // Ordering: Relaxed, a hint; the channel's lock orders the rest.
        self.replaying.load(Ordering::Relaxed) != 0
    }

    /// Takes the answers that are there.
    pub(super) fn pump<P: Platform>(&self, core: &Core<P>) {
        // What it fails with, the queue that is polled meets as well.
        while let Ok(Some((command, _))) = self.channel.poll(core) {
            self.answered(&command);
        }
    }

    fn answered(&self, command: &Command) {
        let answer = command.answer();
        match command.ticket {
            Some(ticket) => {
                // Nobody waits for a ticket that was given up; it is taken out here for good.
                if let Some(place) = self.state.lock().answers.get_mut(&ticket) {
                    *place = Some(answer);
                }
            }
            None => {
                let less = |count: u16| count.checked_sub(1);
                // Ordering: Relaxed, as in `is_replaying`; one of an older generation counts for none.
                let _none_left =
                    self.replaying
                        .fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
                if answer != control::OK {
                    let name = command.bytes.get(..2).unwrap_or_default();
                    log::warn!("network card: it came back and refuses command {name:?}");
                }
            }
        }
    }

    /// Puts what was set in front of what waits; the device is told it first.
    fn replay(&self) {
        let commands = self.state.lock().settings.commands();
        let mut list = Vec::with_capacity(commands.len());
        for (command, data) in commands {
            match Command::new(self.arena, command, &data, None) {
                Ok(command) => list.push(command),
                Err(error) => log::error!("network card: cannot tell it what was set: {error}"),
            }
        }
        let count = u16::try_from(list.len()).unwrap_or(u16::MAX);
        // Ordering: Relaxed, as in `is_replaying`.
        self.replaying.store(count, Ordering::Relaxed);
        self.channel.go_first(|old| old.ticket.is_some(), list);
    }
}

impl Ring for ControlRing {
    fn setup(&self) -> QueueSetup {
        self.channel.setup()
    }

    fn vcpu(&self) -> u32 {
        self.channel.vcpu()
    }

    fn detach(&self) {
        self.channel.detach();
    }

    fn rebuild(&self, event_idx: bool, indirect: bool) {
        self.channel.rebuild(event_idx, indirect);
    }

    fn attach(&self, generation: u32) -> bool {
        self.replay();
        self.channel.attach(generation)
    }
}

/// What a card is told. One for each card; its commands go out one by one.
pub struct Control<P: Platform> {
    shared: Arc<Shared<P>>,
    ring: Arc<ControlRing>,
    timeout: Option<Duration>,
}

impl<P: Platform> Control<P> {
    pub(super) fn new(shared: Arc<Shared<P>>, ring: Arc<ControlRing>) -> Self {
        Control {
            shared,
            ring,
            timeout: None,
        }
    }

    /// The card.
    pub fn nic(&self) -> Nic<P> {
        Nic::from_shared(&self.shared)
    }

    /// How long a command may take; as long as the device may stay away unless set.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = Some(timeout);
    }

    /// Receives every frame, whomever it is for.
    ///
    /// # Errors
    ///
    /// [`Error`]; what is set stays as it was.
    pub fn set_promiscuous(&mut self, on: bool) -> Result<(), Error> {
        self.command(feature::CTRL_RX, control::RX_PROMISC, &[on.into()])?;
        self.ring.state.lock().settings.promiscuous = on;
        Ok(())
    }

    /// Receives every multicast frame.
    ///
    /// # Errors
    ///
    /// As [`set_promiscuous`](Self::set_promiscuous).
    pub fn set_all_multicast(&mut self, on: bool) -> Result<(), Error> {
        self.command(feature::CTRL_RX, control::RX_ALLMULTI, &[on.into()])?;
        self.ring.state.lock().settings.all_multicast = on;
        Ok(())
    }

    /// Gives the card another address.
    ///
    /// # Errors
    ///
    /// As [`set_promiscuous`](Self::set_promiscuous).
    pub fn set_mac(&mut self, mac: [u8; 6]) -> Result<(), Error> {
        self.command(feature::CTRL_MAC_ADDR, control::MAC_ADDR_SET, &mac)?;
        self.ring.state.lock().settings.mac = Some(mac);
        Ok(())
    }

    /// Receives frames for these addresses beside the card's own, and no others.
    ///
    /// # Errors
    ///
    /// As [`set_promiscuous`](Self::set_promiscuous); `TooMany` for more than
    /// [`MAX_FILTER`] of either kind.
    pub fn set_filter(&mut self, unicast: &[[u8; 6]], multicast: &[[u8; 6]]) -> Result<(), Error> {
        let mut data = Vec::new();
        for table in [unicast, multicast] {
            let count = u32::try_from(table.len()).ok();
            let count = count.filter(|&count| count as usize <= MAX_FILTER);
            data.extend_from_slice(&count.ok_or(Error::TooMany)?.to_le_bytes());
            data.extend(table.iter().flatten());
        }
        self.command(feature::CTRL_RX, control::MAC_TABLE_SET, &data)?;
        self.ring.state.lock().settings.filter = Some(data);
        Ok(())
    }

    /// Receives frames of this VLAN, 0 to 4094.
    ///
    /// # Errors
    ///
    /// As [`set_promiscuous`](Self::set_promiscuous); `TooMany` for more than [`MAX_VLANS`], or a
    /// number that is none.
    pub fn add_vlan(&mut self, vlan: u16) -> Result<(), Error> {
        let full = {
            let vlans = &self.ring.state.lock().settings.vlans;
            vlans.len() >= MAX_VLANS && !vlans.contains(&vlan)
        };
        if full || vlan > MAX_VLAN {
            return Err(Error::TooMany);
        }
        self.command(feature::CTRL_VLAN, control::VLAN_ADD, &vlan.to_le_bytes())?;
        self.ring.state.lock().settings.vlans.insert(vlan);
        Ok(())
    }

    /// Receives frames of this VLAN no more.
    ///
    /// # Errors
    ///
    /// As [`add_vlan`](Self::add_vlan).
    pub fn remove_vlan(&mut self, vlan: u16) -> Result<(), Error> {
        if vlan > MAX_VLAN {
            return Err(Error::TooMany);
        }
        self.command(feature::CTRL_VLAN, control::VLAN_DEL, &vlan.to_le_bytes())?;
        self.ring.state.lock().settings.vlans.remove(&vlan);
        Ok(())
    }

    /// Uses so many of the queue pairs that were opened for receiving.
    ///
    /// # Errors
    ///
    /// As [`set_promiscuous`](Self::set_promiscuous); `TooMany` for none or more than were opened.
    pub fn set_pairs(&mut self, pairs: u16) -> Result<(), Error> {
        let opened = self.shared.core.features() & feature::MQ != 0;
        if pairs == 0 || (opened && pairs > self.nic().pairs()) {
            return Err(Error::TooMany);
        }
        self.command(feature::MQ, control::MQ_VQ_PAIRS_SET, &pairs.to_le_bytes())?;
        self.ring.state.lock().settings.pairs = Some(pairs);
        Ok(())
    }

    /// Tells the device that the card has said where it is.
    ///
    /// # Errors
    ///
    /// As [`set_promiscuous`](Self::set_promiscuous).
    pub fn acknowledge_announce(&mut self) -> Result<(), Error> {
        self.command(feature::GUEST_ANNOUNCE, control::ANNOUNCE_ACK, &[])
    }

    /// Sends a command and waits for its answer.
    fn command(&mut self, needed: u64, command: (u8, u8), data: &[u8]) -> Result<(), Error> {
        if self.shared.core.features() & needed == 0 {
            return Err(Error::Unsupported);
        }
        let ring = Arc::clone(&self.ring);
        let ticket = {
            let mut state = ring.state.lock();
            state.next_ticket += 1;
            let ticket = state.next_ticket;
            state.answers.insert(ticket, None);
            ticket
        };
        let outcome = self.run(ticket, command, data);
        ring.state.lock().answers.remove(&ticket);
        outcome
    }

    fn run(&mut self, ticket: u64, command: (u8, u8), data: &[u8]) -> Result<(), Error> {
        let command = Command::new(self.ring.arena, command, data, Some(ticket))?;
        let core = &self.shared.core;
        let platform = core.platform();
        let deadline = self.timeout.map(|timeout| {
            let nanoseconds = u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX);
            platform.now_ns().saturating_add(nanoseconds)
        });
        if let Err((_, broken)) = self.ring.channel.submit(command) {
            return Err(broken.map_or(Error::TooMany, Error::Broken));
        }
        let mut waiter = self.ring.channel.waiter(core);
        loop {
            waiter.clear();
            loop {
                match self.ring.channel.poll(core) {
                    Ok(Some((command, _))) => self.ring.answered(&command),
                    Ok(None) => break,
                    Err(failed) => return Err(self.let_go(failed)),
                }
            }
            match self.ring.state.lock().answers.get(&ticket) {
                Some(None) => {}
                Some(Some(control::OK)) => return Ok(()),
                _ => return Err(Error::Refused),
            }
            if deadline.is_some_and(|deadline| platform.now_ns() >= deadline) {
                return Err(Error::TimedOut);
            }
            // One vCPU may take an answer that another waits for: a short idle looks again.
            if self.ring.channel.held() == 0 {
                continue;
            }
            if self.ring.channel.arm(1) {
                waiter.idle(self.ring.channel.idle_limit(core, deadline));
            }
        }
    }

    /// Takes the commands back from a device that is gone for good.
    fn let_go(&self, failed: Failed) -> Error {
        if let Failed::Lost(_) = failed {
            while let Some(command) = self.ring.channel.take_lost() {
                if !self.shared.core.memory_is_ours() {
                    core::mem::forget(command);
                }
            }
        }
        failed.into()
    }
}

impl<P: Platform> core::fmt::Debug for Control<P> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Control").finish_non_exhaustive()
    }
}
