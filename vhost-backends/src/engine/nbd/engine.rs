//! Requests and simple replies on one connection at a time (the NBD protocol, "Transmission").

use super::NbdStore;
use super::redial::try_once;
use crate::engine::sleep::Sleeper;
use crate::engine::transfer::{Direction, Transfer, chain_error};
use crate::engine::{Engine, Finished, Operation, Token, Wake, WakeSources, started};
use crate::limits::{MAX_IN_FLIGHT, NBD_REDIAL_MILLIS, NBD_SILENCE_SECS, NBD_STOP_SECS};
use crate::session::quota::PEER_LINES;
use std::collections::VecDeque;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EventSet;

const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
const REQUEST_LEN: usize = 28;
const REPLY_LEN: usize = 16;
const READ: u16 = 0;
const WRITE: u16 = 1;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const WRITE_ZEROES: u16 = 6;
/// Write zeroes without giving space back.
const FLAG_NO_HOLE: u16 = 1 << 1;
/// The protocol's error numbers.
const ENOSPC: u32 = 28;
const EPERM: u32 = 1;
/// The server is about to go, and did not do it.
const ESHUTDOWN: u32 = 108;

#[derive(Debug, Default)]
struct Slot {
    busy: bool,
    command: u16,
    flags: u16,
    /// Of commands without data.
    range: (u64, u32),
    /// When it was begun, among the others.
    number: u64,
    /// What is left of a read or write.
    transfer: Transfer,
    /// All of it, where it may have to be done again.
    whole: Transfer,
    /// Bytes of it that are under way.
    piece: u64,
    /// The request is out in full, so that a reply may come.
    sent: bool,
}

/// What is being received.
#[derive(Debug)]
enum Receiving {
    Reply([u8; REPLY_LEN], usize),
    Data(Token),
}

const NOTHING_YET: Receiving = Receiving::Reply([0; REPLY_LEN], 0);

/// Requests that are being sent: heads, and the data that follows the last of them.
#[derive(Debug, Default)]
struct Sending {
    heads: Vec<u8>,
    done: usize,
    /// The write whose data follows, and how much of it is left.
    data: Option<(Token, u64)>,
    tokens: Vec<Token>,
    /// How many of them are out in full.
    out: usize,
}

#[derive(Debug)]
pub(super) struct NbdEngine {
    store: Arc<NbdStore>,
    memory: Arc<GuestMemoryMmap>,
    /// `None` while there is none.
    stream: Option<UnixStream>,
    /// Since when nothing was heard of the server, whatever connections there were.
    lost: Option<Instant>,
    /// A request has waited for it as long as it may.
    given_up: bool,
    /// When to dial again.
    next_try: Instant,
    /// Since when nobody waits for what is in flight.
    abandoned: Option<Instant>,
    begun: u64,
    sleeper: Sleeper,
    slots: Vec<Slot>,
    queued: VecDeque<Token>,
    sending: Sending,
    receiving: Receiving,
    wants_out: bool,
    in_flight: usize,
    last_heard: Instant,
    /// What failed with the connection.
    failed: Vec<Finished>,
}

impl NbdEngine {
    pub(super) fn new(
        store: Arc<NbdStore>,
        memory: Arc<GuestMemoryMmap>,
        wake: WakeSources<'_>,
    ) -> io::Result<NbdEngine> {
        let stream = store.take();
        let sleeper = Sleeper::new(wake)?;
        if let Some(stream) = &stream {
            sleeper.watch(stream.as_fd(), EventSet::IN)?;
        }
        Ok(NbdEngine {
            lost: stream.is_none().then(Instant::now),
            given_up: false,
            next_try: Instant::now(),
            abandoned: None,
            begun: 0,
            store,
            memory,
            stream,
            sleeper,
            slots: std::iter::repeat_with(Slot::default)
                .take(MAX_IN_FLIGHT)
                .collect(),
            queued: VecDeque::with_capacity(MAX_IN_FLIGHT),
            sending: Sending::default(),
            receiving: NOTHING_YET,
            wants_out: false,
            in_flight: 0,
            last_heard: Instant::now(),
            failed: Vec::new(),
        })
    }

    fn start_inner(&mut self, token: Token, operation: Operation<'_>) -> io::Result<bool> {
        if self.stream.is_none() && self.in_flight == 0 && !self.given_up {
            // Nobody has waited for it so far.
            self.lost = Some(Instant::now());
        }
        if self.stream.is_none() && !self.come_back()? && !self.may_wait() {
            return Err(io::ErrorKind::NotConnected.into());
        }
        let export = self.store.export;
        let slot = self
            .slots
            .get_mut(usize::from(token))
            .filter(|slot| !slot.busy)
            .ok_or(io::ErrorKind::InvalidInput)?;
        let range = |offset, len| {
            u32::try_from(len)
                .map(|len| (offset, len))
                .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
        };
        slot.flags = 0;
        slot.range = (0, 0);
        slot.command = match operation {
            Operation::Flush if !export.flush => return Ok(true),
            Operation::Flush => FLUSH,
            // A hint.
            Operation::Discard { .. } if !export.trim => return Ok(true),
            Operation::Discard { offset, len } => {
                slot.range = range(offset, len)?;
                TRIM
            }
            Operation::WriteZeroes { .. } if !export.write_zeroes => {
                return Err(io::ErrorKind::Unsupported.into());
            }
            Operation::WriteZeroes { offset, len, unmap } => {
                slot.range = range(offset, len)?;
                slot.flags = if unmap { 0 } else { FLAG_NO_HOLE };
                WRITE_ZEROES
            }
            Operation::SecureErase { .. } => return Err(io::ErrorKind::Unsupported.into()),
            Operation::Read { .. } | Operation::Write { .. } => {
                slot.transfer
                    .prepare(&self.memory, operation)
                    .map_err(chain_error)?;
                if slot.transfer.is_done() {
                    return Ok(true);
                }
                match slot.transfer.direction() {
                    Direction::Read => READ,
                    Direction::Write => WRITE,
                }
            }
        };
        if self.store.redial.is_some() {
            slot.whole = slot.transfer.clone();
        }
        self.begun += 1;
        slot.number = self.begun;
        slot.busy = true;
        if self.in_flight == 0 {
            // It was not silent: nothing was asked.
            self.last_heard = Instant::now();
        }
        self.in_flight += 1;
        self.queue(token);
        Ok(false)
    }

    fn queue(&mut self, token: Token) {
        if let Some(slot) = self.slots.get_mut(usize::from(token)) {
            slot.sent = false;
        }
        self.queued.push_back(token);
    }

    /// Gathers the heads of what is queued, up to and including the first that has data.
    fn gather(&mut self) {
        let most = u64::from(self.store.export.block_max);
        let sending = &mut self.sending;
        sending.heads.clear();
        sending.tokens.clear();
        (sending.done, sending.out, sending.data) = (0, 0, None);
        while let Some(token) = self.queued.pop_front() {
            let Some(slot) = self.slots.get_mut(usize::from(token)) else {
                continue;
            };
            let (offset, len) = match slot.command {
                READ | WRITE => {
                    slot.piece = slot.transfer.left().min(most);
                    // At most `block_max`.
                    (slot.transfer.offset(), slot.piece as u32)
                }
                _ => slot.range,
            };
            let heads = &mut sending.heads;
            heads.extend(REQUEST_MAGIC.to_be_bytes());
            heads.extend(slot.flags.to_be_bytes());
            heads.extend(slot.command.to_be_bytes());
            heads.extend(u64::from(token).to_be_bytes());
            heads.extend(offset.to_be_bytes());
            heads.extend(len.to_be_bytes());
            sending.tokens.push(token);
            if slot.command == WRITE {
                sending.data = Some((token, slot.piece));
                break;
            }
        }
    }

    /// Sends as much as the socket takes.
    fn send(&mut self) -> io::Result<()> {
        while self.stream.is_some() {
            let sent_all = self.sending.done >= self.sending.heads.len();
            if sent_all && self.sending.data.is_none() {
                if self.queued.is_empty() {
                    return self.want_out(false);
                }
                self.gather();
            }
            let heads = self
                .sending
                .heads
                .get(self.sending.done..)
                .unwrap_or_default();
            let mut nothing = Transfer::default();
            let (transfer, limit) = match self.sending.data {
                Some((token, left)) => match self.slots.get_mut(usize::from(token)) {
                    Some(slot) => (&mut slot.transfer, left),
                    None => (&mut nothing, 0),
                },
                None => (&mut nothing, 0),
            };
            let Some(stream) = &self.stream else {
                return Ok(());
            };
            match transfer.send(stream, heads, limit) {
                Ok((head, data)) => {
                    self.sending.done += head;
                    if let Some((_, left)) = &mut self.sending.data {
                        *left -= data;
                        if *left == 0 {
                            self.sending.data = None;
                        }
                    }
                    self.mark_sent();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return self.want_out(true);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Requests whose heads are out may be answered, while the data of the last is still on its way.
    fn mark_sent(&mut self) {
        let sending = &mut self.sending;
        while (sending.out + 1) * REQUEST_LEN <= sending.done
            && let Some(&token) = sending.tokens.get(sending.out)
            && sending.data.is_none_or(|(with_data, _)| with_data != token)
        {
            if let Some(slot) = self.slots.get_mut(usize::from(token)) {
                slot.sent = true;
            }
            sending.out += 1;
        }
    }

    /// Takes a new connection if there is one, and sees to it that there will be one. Whether there
    /// is.
    fn come_back(&mut self) -> io::Result<bool> {
        if self.stream.is_some() {
            return Ok(true);
        }
        if let Some(stream) = self.store.take() {
            self.sleeper.watch(stream.as_fd(), EventSet::IN)?;
            self.stream = Some(stream);
            self.last_heard = Instant::now();
            return Ok(true);
        }
        let now = Instant::now();
        if now >= self.next_try {
            self.next_try = now + Duration::from_millis(NBD_REDIAL_MILLIS);
            try_once(&self.store);
        }
        Ok(false)
    }

    /// Whether a request may wait for a connection.
    fn may_wait(&self) -> bool {
        let (Some(redial), Some(lost)) = (&self.store.redial, self.lost) else {
            return false;
        };
        lost.elapsed() < redial.patience
    }

    fn want_out(&mut self, wanted: bool) -> io::Result<()> {
        if self.wants_out != wanted
            && let Some(stream) = &self.stream
        {
            let out = if wanted {
                EventSet::OUT
            } else {
                EventSet::empty()
            };
            self.sleeper.change(stream.as_fd(), EventSet::IN | out)?;
            self.wants_out = wanted;
        }
        Ok(())
    }

    /// Takes what has come.
    fn receive(&mut self, finished: &mut Vec<Finished>) -> io::Result<()> {
        while self.in_flight > 0 {
            let Some(stream) = &mut self.stream else {
                return Ok(());
            };
            let outcome = match &mut self.receiving {
                Receiving::Reply(bytes, have) => {
                    let rest = bytes.get_mut(*have..).unwrap_or_default();
                    stream.read(rest).inspect(|n| *have += n)
                }
                Receiving::Data(token) => match self.slots.get_mut(usize::from(*token)) {
                    Some(slot) => slot.transfer.receive(stream, slot.piece).inspect(|n| {
                        slot.piece -= *n as u64;
                    }),
                    None => Err(io::ErrorKind::InvalidData.into()),
                },
            };
            match outcome {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) => self.last_heard = Instant::now(),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            }
            match self.receiving {
                Receiving::Reply(bytes, REPLY_LEN) => self.reply(bytes, finished)?,
                Receiving::Data(token) => self.data(token, finished),
                Receiving::Reply(..) => {}
            }
        }
        Ok(())
    }

    /// A reply is there. An error of the protocol is the end of the connection.
    fn reply(&mut self, bytes: [u8; REPLY_LEN], finished: &mut Vec<Finished>) -> io::Result<()> {
        self.receiving = NOTHING_YET;
        let [m0, m1, m2, m3, e0, e1, e2, e3, cookie @ ..] = bytes;
        let broken = |what| io::Error::new(io::ErrorKind::InvalidData, what);
        if u32::from_be_bytes([m0, m1, m2, m3]) != REPLY_MAGIC {
            return Err(broken("a reply without its magic"));
        }
        let error = u32::from_be_bytes([e0, e1, e2, e3]);
        let token = Token::try_from(u64::from_be_bytes(cookie))
            .map_err(|_| broken("a reply to nothing"))?;
        let slot = self
            .slots
            .get_mut(usize::from(token))
            .filter(|slot| slot.busy && slot.sent)
            .ok_or_else(|| broken("a reply to nothing"))?;
        if error == ESHUTDOWN && self.store.redial.is_some() {
            // For the connection that follows.
            return Err(io::Error::from_raw_os_error(libc::ESHUTDOWN));
        }
        // One answer for each request.
        slot.sent = false;
        let (command, over) = (slot.command, slot.transfer.is_done());
        self.found_again();
        if error != 0 {
            let error = match error {
                ENOSPC => io::Error::from_raw_os_error(libc::ENOSPC),
                EPERM => io::Error::from_raw_os_error(libc::EROFS),
                _ => io::Error::from_raw_os_error(libc::EIO),
            };
            self.finish(token, Err(error), finished);
        } else if command == READ {
            self.receiving = Receiving::Data(token);
        } else if command == WRITE && !over {
            self.queue(token);
        } else {
            self.finish(token, Ok(()), finished);
        }
        Ok(())
    }

    fn found_again(&mut self) {
        self.given_up = false;
        if let Some(lost) = self.lost.take()
            && PEER_LINES.may_say()
        {
            tracing::warn!(after = ?lost.elapsed(), "the NBD server answers again");
        }
    }

    /// Data of a read has come, perhaps the last.
    fn data(&mut self, token: Token, finished: &mut Vec<Finished>) {
        let Some(slot) = self.slots.get_mut(usize::from(token)) else {
            return;
        };
        if slot.piece > 0 {
            return;
        }
        self.receiving = NOTHING_YET;
        if slot.transfer.is_done() {
            self.finish(token, Ok(()), finished);
        } else {
            self.queue(token);
        }
    }

    fn finish(&mut self, token: Token, result: io::Result<()>, finished: &mut Vec<Finished>) {
        if let Some(slot) = self.slots.get_mut(usize::from(token)) {
            slot.busy = false;
            self.in_flight -= 1;
            finished.push(Finished { token, result });
        }
    }

    /// Sends and receives what is possible. A connection that breaks fails what is in flight.
    fn work(&mut self, finished: &mut Vec<Finished>) {
        if self.stream.is_none() && self.in_flight > 0 {
            match self.come_back() {
                Ok(true) => {}
                Ok(false) if self.may_wait() => return,
                Ok(false) => self.fail_all(&io::ErrorKind::NotConnected.into()),
                Err(error) => self.fail_all(&error),
            }
        }
        let mut outcome = self.send().and_then(|()| self.receive(finished));
        if outcome.is_ok() && !self.queued.is_empty() {
            // Later pieces of what was received.
            outcome = self.send();
        }
        let silent = Duration::from_secs(NBD_SILENCE_SECS);
        if self.in_flight > 0 && self.last_heard.elapsed() > silent {
            outcome = Err(io::ErrorKind::TimedOut.into());
        }
        if let Err(error) = outcome {
            self.break_off(&error);
        }
        finished.append(&mut self.failed);
    }

    /// The connection is of no use any more. What was in flight on it waits for another, or fails.
    fn break_off(&mut self, why: &io::Error) {
        if let Some(stream) = self.stream.take() {
            if PEER_LINES.may_say() {
                tracing::warn!(%why, "the connection to the NBD server broke");
            }
            self.sleeper.forget(stream.as_fd());
            self.lost.get_or_insert_with(Instant::now);
        }
        (self.sending, self.receiving) = (Sending::default(), NOTHING_YET);
        self.wants_out = false;
        if self.may_wait() {
            self.begin_again();
        } else {
            self.fail_all(why);
        }
    }

    /// Everything in flight from its start, in the order in which it was begun.
    fn begin_again(&mut self) {
        let mut order = Vec::with_capacity(self.in_flight);
        for (token, slot) in (0..).zip(&mut self.slots).filter(|(_, slot)| slot.busy) {
            slot.transfer = slot.whole.clone();
            slot.sent = false;
            order.push((slot.number, token));
        }
        order.sort_unstable();
        self.queued = order.into_iter().map(|(_, token)| token).collect();
    }

    fn fail_all(&mut self, why: &io::Error) {
        self.given_up = true;
        self.queued.clear();
        let mut failed = std::mem::take(&mut self.failed);
        // MAX_IN_FLIGHT fits a token.
        for token in 0..self.slots.len() as Token {
            if self.slots.get(usize::from(token)).is_some_and(|s| s.busy) {
                self.finish(token, Err(why.kind().into()), &mut failed);
            }
        }
        self.failed = failed;
    }

    /// A server that hangs up, or speaks, while nothing is asked of it.
    fn look_at_idle(&mut self) {
        let Some(stream) = &mut self.stream else {
            return;
        };
        match stream.read(&mut [0]) {
            Ok(0) => self.break_off(&io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => self.break_off(&io::ErrorKind::InvalidData.into()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => self.break_off(&error),
        }
    }

    /// How long to sleep at most; for ever if nothing is to be looked after.
    fn longest_sleep(&self) -> Option<Duration> {
        match (self.in_flight, &self.stream) {
            (0, _) => None,
            // Wakes by itself to see how long the server has been silent.
            (_, Some(_)) => Some(Duration::from_secs(1)),
            // Or whether it is back.
            (_, None) => Some(Duration::from_millis(NBD_REDIAL_MILLIS / 4)),
        }
    }
}

impl Engine for NbdEngine {
    fn start(&mut self, token: Token, operation: Operation<'_>) -> Option<io::Result<()>> {
        started(self.start_inner(token, operation))
    }

    fn submit(&mut self) -> io::Result<()> {
        if let Err(error) = self.send() {
            self.break_off(&error);
        }
        Ok(())
    }

    fn reap(&mut self, finished: &mut Vec<Finished>) -> io::Result<Wake> {
        self.work(finished);
        self.sleeper.glance()
    }

    fn wait(&mut self, finished: &mut Vec<Finished>) -> io::Result<Wake> {
        self.work(finished);
        if !finished.is_empty() {
            return self.sleeper.look();
        }
        let wake = match self.longest_sleep() {
            Some(limit) => self.sleeper.sleep_for(limit)?,
            None => self.sleeper.sleep()?,
        };
        if self.in_flight == 0 {
            self.look_at_idle();
        }
        self.work(finished);
        Ok(wake)
    }

    fn wait_for(&mut self, finished: &mut Vec<Finished>, limit: Duration) -> io::Result<Wake> {
        self.work(finished);
        if !finished.is_empty() {
            return self.sleeper.look();
        }
        let limit = self.longest_sleep().map_or(limit, |most| most.min(limit));
        let wake = self.sleeper.sleep_for(limit)?;
        self.work(finished);
        Ok(wake)
    }

    fn has_finished(&mut self) -> bool {
        !self.failed.is_empty()
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// The server is not at work on what waits for another connection; one that says nothing is left
    /// after a moment, and is not to carry out what came over a connection that it has lost.
    fn abandon(&mut self) -> bool {
        let since = *self.abandoned.get_or_insert_with(Instant::now);
        let quiet = since.max(self.last_heard).elapsed() >= Duration::from_secs(NBD_STOP_SECS);
        if self.stream.is_some() && !quiet {
            return false;
        }
        if let Some(stream) = self.stream.take() {
            self.sleeper.forget(stream.as_fd());
        }
        self.queued.clear();
        for slot in &mut self.slots {
            slot.busy = false;
        }
        self.in_flight = 0;
        true
    }
}

impl Drop for NbdEngine {
    fn drop(&mut self) {
        if self.in_flight == 0
            && let Some(stream) = self.stream.take()
        {
            self.store.give_back(stream);
        }
    }
}
