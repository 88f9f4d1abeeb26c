//! Handing a connection to another process.
//!
//! A session stops between two messages, or in the middle of one whose rest has not come: what
//! there is of it goes along. It leaves as the messages that bring a new one into its state, so that whoever takes it up
//! checks them as it checks a frontend's. Its queues are drained first and stay stopped until it
//! is known who goes on.
//!
//! | state of a [`PausePoint`] | means | leaves by |
//! |---|---|---|
//! | running | the server serves | `pause`: wanted |
//! | wanted | it is to stop where it need not wait for its frontend | the server: parked; `resume`: running |
//! | parked | it waits, and its state can be taken | `resume`: running; `leave`: left |
//! | left | another process serves | never |
//! | over | the server has ended by itself | never |

use super::memory::MemoryTable;
use super::request::parse;
use super::socket::{Begun, Channel, Message};
use super::vring::Vring;
use super::wire::{ConfigHead, Header, SingleRegion, VERSION, VringState};
use super::{Refusal, Session};
use crate::readiness::Event;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use vhost::vhost_user::message::FrontendReq;
use zerocopy::IntoBytes;

/// A connection between two processes.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) stream: UnixStream,
    /// What brings a new session to where this one was.
    pub(crate) messages: Vec<Message>,
    /// Configuration space, as the frontend knows it.
    pub(crate) config: Vec<u8>,
    /// What has come of its next message.
    pub(crate) begun: Begun,
}

/// What a server waits with; an error where its state could not be gathered.
pub(crate) type Parked = io::Result<Option<Connection>>;

/// Where a server stops for a moment, and hears whether it goes on.
#[derive(Debug)]
pub(crate) struct PausePoint {
    event: Event,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
enum State {
    Running,
    Wanted,
    /// `None` once its state was taken.
    Parked(Option<Parked>),
    Left,
    Over,
}

impl PausePoint {
    pub(crate) fn new() -> io::Result<PausePoint> {
        Ok(PausePoint {
            event: Event::new()?,
            state: Mutex::new(State::Running),
            changed: Condvar::new(),
        })
    }

    /// Asks the server to stop, if it still serves.
    pub(crate) fn pause(&self) {
        let mut state = self.state();
        if matches!(*state, State::Running) {
            *state = State::Wanted;
            self.event.set();
        }
    }

    /// Waits until it has stopped, and takes what it was at: nothing if it has ended. `None`: it
    /// did not stop in time, or was not asked to.
    pub(crate) fn take(&self, deadline: Instant) -> Option<Parked> {
        let mut state = self.state();
        loop {
            match &mut *state {
                State::Parked(parked) => return parked.take(),
                State::Over => return Some(Ok(None)),
                State::Wanted => {}
                State::Running | State::Left => return None,
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Goes on as if nothing had happened.
    pub(crate) fn resume(&self) {
        self.decide(State::Running);
    }

    /// Ends: another process serves.
    pub(crate) fn leave(&self) {
        self.decide(State::Left);
    }

    fn decide(&self, verdict: State) {
        let mut state = self.state();
        if matches!(*state, State::Wanted | State::Parked(_)) {
            self.event.clear();
            *state = verdict;
            self.changed.notify_all();
        }
    }

    /// The server has stopped and waits. Whether it goes on.
    pub(super) fn park(&self, parked: Parked) -> bool {
        let mut state = self.state();
        if matches!(*state, State::Wanted) {
            *state = State::Parked(Some(parked));
            self.changed.notify_all();
        }
        while matches!(*state, State::Parked(_)) {
            let waited = self.changed.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
        !matches!(*state, State::Left)
    }

    /// The server has ended by itself; nobody need wait for it.
    pub(crate) fn over(&self) {
        let mut state = self.state();
        if !matches!(*state, State::Left) {
            *state = State::Over;
            self.changed.notify_all();
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsFd for PausePoint {
    /// Readable while the server is to stop.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

/// Between being ready to serve and serving: whoever starts several servers says when.
#[derive(Debug)]
pub(crate) struct Gate {
    pub(crate) said: Sender<Result<(), String>>,
    pub(crate) go: Receiver<()>,
}

impl Gate {
    /// Says that all is ready, or why not, and waits. Whether to serve.
    pub(crate) fn pass(&self, ready: Result<(), String>) -> bool {
        let good = ready.is_ok();
        // Nobody to tell is as good as a no.
        self.said.send(ready).is_ok() && good && self.go.recv().is_ok()
    }

    /// Says that it serves.
    pub(crate) fn serves(&self) {
        // Who has gone on meanwhile does not need to know.
        let _ = self.said.send(Ok(()));
    }
}

impl Session<'_> {
    /// The messages that bring a new session to where this one is. Its queues are stopped.
    pub(super) fn save(&self) -> io::Result<Vec<Message>> {
        use FrontendReq as Ask;
        let mut out = Saved::default();
        if self.owned {
            out.push(Ask::SET_OWNER, Vec::new(), Vec::new());
        }
        out.words(Ask::SET_FEATURES, &[self.features]);
        out.words(Ask::SET_PROTOCOL_FEATURES, &[self.protocol_features]);
        if let Some(fd) = self.link.as_ref().and_then(|link| link.duplicate()) {
            out.with_fd(Ask::SET_BACKEND_REQ_FD, &[], fd?);
        }
        if let Some((shape, fd)) = &self.inflight_file {
            out.with_fd(Ask::SET_INFLIGHT_FD, shape.as_bytes(), fd.try_clone()?);
        }
        if let Some((base, fd)) = &self.dirty_file {
            out.with_fd(Ask::SET_LOG_BASE, base.as_bytes(), fd.try_clone()?);
        }
        if let Some(fd) = self.dirty_call.duplicate() {
            out.with_fd(Ask::SET_LOG_FD, &[], fd?);
        }
        out.memory(&self.memory)?;
        for (offset, data) in self.device.saved_config() {
            let size = u32::try_from(data.len()).unwrap_or(u32::MAX);
            let flags = 0;
            let head = ConfigHead {
                offset,
                size,
                flags,
            };
            let payload = [head.as_bytes(), &data].concat();
            out.push(Ask::SET_CONFIG, payload, Vec::new());
        }
        for vring in &self.vrings {
            out.vring(vring)?;
        }
        if self.status != 0 {
            out.words(Ask::SET_STATUS, &[u64::from(self.status)]);
        }
        Ok(out.0)
    }

    /// This session and its connection, for another process.
    pub(super) fn leave_on(&self, channel: &Channel<'_>) -> io::Result<Connection> {
        Ok(Connection {
            stream: channel.stream().try_clone()?,
            messages: self.save()?,
            config: self.device.config(),
            begun: channel.begun().try_clone()?,
        })
    }

    /// Takes up what another session saved; nothing runs until [`release`](Session::release).
    pub(super) fn restore(&mut self, messages: Vec<Message>) -> Result<(), Refusal> {
        self.held = true;
        for message in messages {
            self.handle(parse(message)?)?;
        }
        Ok(())
    }

    /// Starts every queue that is complete. One that cannot start ends the session: its frontend
    /// has been told nothing, and finds out when it connects again.
    pub(super) fn release(&mut self) -> Result<(), Refusal> {
        self.held = false;
        self.start_all().inspect_err(|_| self.end())
    }
}

/// Whether a state that is refused for this reason is the frontend's own doing, or that of the
/// moment: it loses its session, and connects again. Otherwise this daemon does not serve what the
/// other one does, and should not take its place.
pub(super) fn concerns_one_session(refusal: &Refusal) -> bool {
    match refusal {
        Refusal::BadValue(_)
        | Refusal::BadState(_)
        | Refusal::Memory(_)
        | Refusal::Ring(_)
        | Refusal::Inflight(_)
        | Refusal::DirtyLog(_)
        | Refusal::Host(_) => true,
        Refusal::NotServed(_)
        | Refusal::BadFlags(_)
        | Refusal::BadSize(_)
        | Refusal::BadFdCount(_)
        | Refusal::NoQueue(_)
        | Refusal::Features(_) => false,
    }
}

#[derive(Default)]
struct Saved(Vec<Message>);

impl Saved {
    fn push(&mut self, request: FrontendReq, payload: Vec<u8>, fds: Vec<OwnedFd>) {
        let header = Header {
            request: request.into(),
            flags: VERSION,
            // At most MAX_PAYLOAD.
            size: u32::try_from(payload.len()).unwrap_or(u32::MAX),
        };
        self.0.push(Message {
            header,
            payload,
            fds,
            fds_truncated: false,
        });
    }

    fn words(&mut self, request: FrontendReq, words: &[u64]) {
        self.push(request, words.as_bytes().to_vec(), Vec::new());
    }

    fn with_fd(&mut self, request: FrontendReq, payload: &[u8], fd: OwnedFd) {
        self.push(request, payload.to_vec(), vec![fd]);
    }

    fn memory(&mut self, table: &MemoryTable) -> io::Result<()> {
        for (region, fd) in table.regions() {
            let padding = 0;
            let single = SingleRegion { padding, region };
            self.with_fd(FrontendReq::ADD_MEM_REG, single.as_bytes(), fd?);
        }
        Ok(())
    }

    fn vring(&mut self, vring: &Vring) -> io::Result<()> {
        use FrontendReq as Ask;
        let index = u32::from(vring.index);
        let state = |num| VringState { index, num }.as_bytes().to_vec();
        if let Some(size) = vring.size {
            self.push(Ask::SET_VRING_NUM, state(u32::from(size)), Vec::new());
        }
        self.push(Ask::SET_VRING_BASE, state(vring.base), Vec::new());
        if let Some(addr) = vring.addr {
            let payload = addr.as_bytes().to_vec();
            self.push(Ask::SET_VRING_ADDR, payload, Vec::new());
        }
        let word = u64::from(index);
        for (request, notifier) in [
            (Ask::SET_VRING_CALL, &vring.call),
            (Ask::SET_VRING_ERR, &vring.err),
        ] {
            if let Some(fd) = notifier.duplicate() {
                self.with_fd(request, word.as_bytes(), fd?);
            }
        }
        if let Some(enable) = vring.enable {
            self.push(Ask::SET_VRING_ENABLE, state(u32::from(enable)), Vec::new());
        }
        // Without a kick, a retired ring stays so until the driver starts over.
        if let Some(kick) = vring.kick.as_ref().filter(|_| !vring.retired) {
            self.with_fd(Ask::SET_VRING_KICK, word.as_bytes(), kick.try_clone()?);
        }
        Ok(())
    }
}
