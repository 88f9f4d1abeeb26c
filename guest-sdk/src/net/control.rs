//! The control queue: what the card receives, and what it is told (virtio 1.3 §5.1.6.5).
//!
//! What the device said yes to is remembered, and a device that comes back is told all of it again
//! before anything else, by [`ControlRing::attach`]. Its answers are taken by whoever polls a queue of
//! the card next. A command that was given up counts as well once the device says yes to it; a device
//! that comes back does not hear of it.

use super::config::Shared;
use super::settings::Settings;
use super::{Error, Nic};
use crate::device::{Channel, Core, Failed, Ring, Segments, Submission};
use crate::limits::{CONTROL_TIMEOUT, LOSS_POLL, MAX_FILTER, MAX_VLANS};
use crate::platform::{Arena, DmaBuf, OutOfArena, Platform};
use crate::sync::SpinLock;
use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU16, Ordering};
use core::time::Duration;
use pv_abi::device::QueueSetup;
use pv_abi::virtio::net::{control, feature};

/// The answer before the device has written one.
const UNANSWERED: u8 = 0xff;

/// Bytes of the longest result, what a queue coalesces.
const MAX_RESULT: usize = 8;

/// Highest VLAN number (IEEE 802.1Q: 4095 is reserved).
const MAX_VLAN: u16 = 4094;

/// A command on its way.
#[derive(Debug)]
pub(super) struct Command {
    bytes: Vec<u8>,
    /// The bytes and, behind them, the answer and the result.
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
        result: usize,
    ) -> Result<Self, OutOfArena> {
        let mut bytes = Vec::with_capacity(2 + data.len());
        bytes.extend_from_slice(&[command.0, command.1]);
        bytes.extend_from_slice(data);
        Ok(Command {
            buf: arena.alloc(bytes.len() + 1 + result)?,
            bytes,
            ticket,
        })
    }

    fn answer(&self) -> Answer {
        let mut code = [UNANSWERED];
        self.buf.read(self.bytes.len(), &mut code);
        let [code] = code;
        let mut result = [0; MAX_RESULT];
        let at = self.bytes.len() + 1;
        let len = self.buf.len().saturating_sub(at).min(MAX_RESULT);
        self.buf.read(at, &mut result[..len]);
        Answer { code, result }
    }
}

/// What the device has said to a command.
#[derive(Clone, Copy, Debug)]
struct Answer {
    code: u8,
    /// What it gives beside, zero where it gives nothing.
    result: [u8; MAX_RESULT],
}

impl Submission for Command {
    fn prepare(&mut self, segments: &mut Segments) {
        // Written again for each generation: a peer may have changed it.
        self.buf.write(0, &self.bytes);
        self.buf.write(self.bytes.len(), &[UNANSWERED]);
        let rest = self.buf.len() - self.bytes.len();
        self.buf
            .write(self.bytes.len() + 1, &[0; MAX_RESULT][..rest - 1]);
        // At most two tables of `MAX_FILTER` addresses.
        let len = self.bytes.len() as u32;
        segments.push(self.buf.gpa(), len, false);
        // And `MAX_RESULT` behind the answer.
        segments.push(self.buf.gpa() + u64::from(len), rest as u32, true);
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
    answers: BTreeMap<u64, Option<Answer>>,
}

impl ControlRing {
    pub(super) fn new(
        channel: Channel<Command>,
        arena: &'static Arena,
        pairs: Option<u16>,
    ) -> Self {
        let mut settings = Settings::default();
        if let Some(pairs) = pairs {
            settings.done(control::MQ_VQ_PAIRS_SET, &pairs.to_le_bytes());
        }
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
                let mut state = self.state.lock();
                if let (control::OK, [class, number, data @ ..]) = (answer.code, &command.bytes[..])
                {
                    state.settings.done((*class, *number), data);
                }
                // Nobody waits for one that was given up; what it did is done all the same.
                if let Some(place) = state.answers.get_mut(&ticket) {
                    *place = Some(answer);
                }
            }
            None => {
                let less = |count: u16| count.checked_sub(1);
                // Ordering: Relaxed, as in `is_replaying`; one of an older generation counts for none.
                let _none_left =
                    self.replaying
                        .fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
                if answer.code != control::OK {
                    let name = command.bytes.get(..2).unwrap_or_default();
                    log::warn!("network card: it came back and refuses command {name:?}");
                }
            }
        }
    }

    /// Puts what was set in front of what waits; the device is told it first.
    fn replay(&self) {
        // What the last one had answered when it went was done, and is to be done again.
        while let Some(command) = self.channel.take_reaped() {
            self.answered(&command);
        }
        let (commands, waiting) = {
            let state = self.state.lock();
            let waiting: Vec<u64> = state.answers.keys().copied().collect();
            (state.settings.commands(), waiting)
        };
        let mut list = Vec::with_capacity(commands.len());
        for (command, data) in commands {
            match Command::new(self.arena, command, &data, None, 0) {
                Ok(command) => list.push(command),
                Err(error) => log::error!("network card: cannot tell it what was set: {error}"),
            }
        }
        let count = u16::try_from(list.len()).unwrap_or(u16::MAX);
        // Ordering: Relaxed, as in `is_replaying`.
        self.replaying.store(count, Ordering::Relaxed);
        let is_waited_for = |ticket| waiting.contains(&ticket);
        let keep = |old: &Command| old.ticket.is_some_and(is_waited_for);
        self.channel.go_first(keep, list);
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
///
/// A command that ends with [`Error::TimedOut`] may be done all the same, for as long as the device
/// that has it is there. If it is, it counts like any other: a device that comes back is told of it.
/// If it is not, no later device hears of it.
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

    /// How long a command may take. Unless set: as long as the device may stay away, and
    /// [`CONTROL_TIMEOUT`] for the answer.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = Some(timeout);
    }

    /// Receives every frame, whomever it is for.
    ///
    /// # Errors
    ///
    /// [`Error`]; what is set stays as it was, but see [`Control`] for `TimedOut`.
    pub fn set_promiscuous(&mut self, on: bool) -> Result<(), Error> {
        self.command(feature::CTRL_RX, control::RX_PROMISC, &[on.into()])
    }

    /// Receives every multicast frame.
    ///
    /// # Errors
    ///
    /// As [`set_promiscuous`](Self::set_promiscuous).
    pub fn set_all_multicast(&mut self, on: bool) -> Result<(), Error> {
        self.command(feature::CTRL_RX, control::RX_ALLMULTI, &[on.into()])
    }

    /// Gives the card another address.
    ///
    /// # Errors
    ///
    /// As [`set_promiscuous`](Self::set_promiscuous).
    pub fn set_mac(&mut self, mac: [u8; 6]) -> Result<(), Error> {
        self.command(feature::CTRL_MAC_ADDR, control::MAC_ADDR_SET, &mac)
    }

    /// Receives frames for these addresses beside the card's own, and no others: every frame no
    /// longer, every multicast frame if [`set_all_multicast`](Self::set_all_multicast) says so.
    ///
    /// # Errors
    ///
    /// When the second of the two commands fails, the addresses are set, and what the card received
    /// before it still does. As [`set_promiscuous`](Self::set_promiscuous); `TooMany` for more than
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
        // Many a device begins with every frame. In this order none is lost in between.
        self.set_promiscuous(false)
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
            vlans.len() >= MAX_VLANS && !vlans.contains(&vlan.to_le_bytes())
        };
        if full || vlan > MAX_VLAN {
            return Err(Error::TooMany);
        }
        self.command(feature::CTRL_VLAN, control::VLAN_ADD, &vlan.to_le_bytes())
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
        self.command(feature::CTRL_VLAN, control::VLAN_DEL, &vlan.to_le_bytes())
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
        self.command(feature::MQ, control::MQ_VQ_PAIRS_SET, &pairs.to_le_bytes())
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
    pub(super) fn command(
        &mut self,
        needed: u64,
        command: (u8, u8),
        data: &[u8],
    ) -> Result<(), Error> {
        self.ask::<0>(needed, command, data).map(|_| ())
    }

    /// Sends a command and waits for its answer, and the `N` bytes behind that.
    pub(super) fn ask<const N: usize>(
        &mut self,
        needed: u64,
        command: (u8, u8),
        data: &[u8],
    ) -> Result<[u8; N], Error> {
        const { assert!(N <= MAX_RESULT) };
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
        let sent = Command::new(ring.arena, command, data, Some(ticket), N);
        let outcome = match sent {
            Ok(command) => self.run(ticket, command),
            Err(error) => Err(error.into()),
        };
        ring.state.lock().answers.remove(&ticket);
        let mut result = [0; N];
        result.copy_from_slice(&outcome?[..N]);
        Ok(result)
    }

    fn run(&mut self, ticket: u64, command: Command) -> Result<[u8; MAX_RESULT], Error> {
        let mut unsent = Some(command);
        let core = &self.shared.core;
        let platform = core.platform();
        let timeout = match self.timeout {
            Some(timeout) => nanoseconds(timeout),
            // One that stays away is lost before this is over.
            None => core
                .loss_timeout()
                .saturating_add(nanoseconds(CONTROL_TIMEOUT)),
        };
        let deadline = platform.now_ns().saturating_add(timeout);
        let mut waiter = self.ring.channel.waiter(core);
        loop {
            waiter.clear();
            if let Some(command) = unsent.take() {
                match self.ring.channel.submit(command) {
                    Ok(()) => {}
                    Err((_, Some(broken))) => return Err(Error::Broken(broken)),
                    // Full of commands that were given up and are not answered.
                    Err((command, None)) => unsent = Some(command),
                }
            }
            loop {
                match self.ring.channel.poll(core) {
                    Ok(Some((command, _))) => self.ring.answered(&command),
                    Ok(None) => break,
                    Err(failed) => return Err(self.let_go(failed)),
                }
            }
            match self.ring.state.lock().answers.get(&ticket) {
                Some(None) => {}
                Some(Some(answer)) if answer.code == control::OK => return Ok(answer.result),
                _ => return Err(Error::Refused),
            }
            if platform.now_ns() >= deadline {
                return Err(Error::TimedOut);
            }
            // One vCPU may take an answer that another waits for, and the event with it: a short idle
            // looks again.
            if self.ring.channel.held() == 0 {
                continue;
            }
            if self.ring.channel.arm(1) {
                let look = platform.now_ns().saturating_add(nanoseconds(LOSS_POLL));
                let until = Some(deadline.min(look));
                waiter.idle(self.ring.channel.idle_limit(core, until));
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

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

impl<P: Platform> core::fmt::Debug for Control<P> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Control").finish_non_exhaustive()
    }
}
