//! The embedder's own calls: a registry of typed handlers.

use crate::memory::GuestMemory;
use pv_abi::call::number::EMBEDDER;
use pv_abi::limits::MAX_EMBEDDER_CALLS;
use pv_abi::status::Status;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// A handler of one call number.
pub(crate) type Handler = Arc<dyn Fn(Call) + Send + Sync>;

/// A refusal of a call: the status that the guest gets, and a value of the embedder's choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The status.
    pub status: Status,
    /// Travels in the frame's `value`.
    pub code: u64,
}

impl Refusal {
    /// The embedder's own reason: status `Refused`, with this code.
    pub fn code(code: u64) -> Refusal {
        Refusal {
            status: Status::Refused,
            code,
        }
    }
}

impl From<Status> for Refusal {
    fn from(status: Status) -> Refusal {
        Refusal { status, code: 0 }
    }
}

/// One call in the embedder's range, waiting for its answer.
///
/// The vCPU that made it waits. Answer with [`Call::finish`], now or later, from any thread; a call
/// that is dropped without an answer is answered with `HostError`.
pub struct Call {
    vcpu: u32,
    index: u32,
    args: [u64; 6],
    memory: Arc<GuestMemory>,
    reply: Option<Arc<Reply>>,
}

impl fmt::Debug for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Call")
            .field("vcpu", &self.vcpu)
            .field("index", &self.index)
            .field("args", &self.args)
            .finish_non_exhaustive()
    }
}

impl Call {
    /// The vCPU that made the call.
    pub fn vcpu(&self) -> u32 {
        self.vcpu
    }

    /// The call's index in the embedder's range.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// The six arguments, as the guest gave them. Nothing about them has been checked.
    pub fn args(&self) -> [u64; 6] {
        self.args
    }

    /// Copies bytes out of an arena or the control region.
    ///
    /// # Errors
    /// `BadAddress` if any of them lies elsewhere.
    pub fn read(&self, gpa: u64, buffer: &mut [u8]) -> Result<(), Status> {
        let len = u64::try_from(buffer.len()).map_err(|_| Status::BadLength)?;
        let (region, offset) = self
            .memory
            .shared(gpa, len, None)
            .ok_or(Status::BadAddress)?;
        region
            .read_bytes(offset, buffer)
            .map_err(|_| Status::BadAddress)
    }

    /// Copies bytes into an arena or the control region.
    ///
    /// # Errors
    /// `BadAddress` if any of them lies elsewhere.
    pub fn write(&self, gpa: u64, bytes: &[u8]) -> Result<(), Status> {
        let len = u64::try_from(bytes.len()).map_err(|_| Status::BadLength)?;
        let (region, offset) = self
            .memory
            .shared(gpa, len, None)
            .ok_or(Status::BadAddress)?;
        region
            .write_bytes(offset, bytes)
            .map_err(|_| Status::BadAddress)
    }

    /// Copies a structure out of an arena or the control region, once.
    ///
    /// # Errors
    /// `BadAddress` if any of it lies elsewhere.
    pub fn read_struct<T: FromBytes + IntoBytes>(&self, gpa: u64) -> Result<T, Status> {
        let mut value = T::new_zeroed();
        self.read(gpa, value.as_mut_bytes())?;
        Ok(value)
    }

    /// Copies a structure into an arena or the control region.
    ///
    /// # Errors
    /// `BadAddress` if any of it lies elsewhere.
    pub fn write_struct<T: IntoBytes + Immutable>(
        &self,
        gpa: u64,
        value: &T,
    ) -> Result<(), Status> {
        self.write(gpa, value.as_bytes())
    }

    /// Answers the call; the vCPU goes on.
    pub fn finish(mut self, result: Result<u64, Refusal>) {
        if let Some(reply) = self.reply.take() {
            reply.set(result);
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        if let Some(reply) = self.reply.take() {
            reply.set(Err(Status::HostError.into()));
        }
    }
}

/// Where an answer arrives.
#[derive(Debug, Default)]
pub(crate) struct Reply {
    result: Mutex<Option<Result<u64, Refusal>>>,
    arrived: Condvar,
}

impl Reply {
    fn set(&self, result: Result<u64, Refusal>) {
        *self.result.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
        self.arrived.notify_all();
    }

    fn take(&self) -> Option<Result<u64, Refusal>> {
        self.result
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }

    /// Waits for the answer, looking every `turn` whether it is still wanted.
    fn wait(&self, turn: Duration, wanted: &dyn Fn() -> bool) -> Option<Result<u64, Refusal>> {
        let mut result = self.result.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(result) = result.take() {
                return Some(result);
            }
            if !wanted() {
                return None;
            }
            result = self
                .arrived
                .wait_timeout(result, turn)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

/// A call index that cannot be registered.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// Past the end of the range.
    #[error("call index {0} is past the end of the range; use 0 to {last}", last = MAX_EMBEDDER_CALLS - 1)]
    OutOfRange(u32),
    /// Registered already.
    #[error("call index {0} has a handler already")]
    Taken(u32),
}

/// Handlers by call index.
#[derive(Clone, Default)]
pub(crate) struct Registry(BTreeMap<u32, Handler>);

impl Registry {
    pub(crate) fn add(&mut self, index: u32, handler: Handler) -> Result<(), RegistryError> {
        if index >= MAX_EMBEDDER_CALLS {
            return Err(RegistryError::OutOfRange(index));
        }
        if self.0.contains_key(&index) {
            return Err(RegistryError::Taken(index));
        }
        self.0.insert(index, handler);
        Ok(())
    }

    pub(crate) fn numbers(&self) -> impl Iterator<Item = u32> {
        self.0.keys().map(|index| EMBEDDER + index)
    }

    /// Makes the call and waits for its answer.
    ///
    /// `defer` is told when the answer does not come at once, `wanted` is asked now and then whether
    /// it still matters.
    pub(crate) fn call(
        &self,
        (vcpu, index): (u32, u32),
        args: [u64; 6],
        memory: &Arc<GuestMemory>,
        defer: &dyn Fn(),
        wanted: &dyn Fn() -> bool,
    ) -> Result<u64, Refusal> {
        let handler = self.0.get(&index).ok_or(Status::UnknownCall)?;
        let reply = Arc::new(Reply::default());
        let memory = Arc::clone(memory);
        handler(Call {
            vcpu,
            index,
            args,
            memory,
            reply: Some(Arc::clone(&reply)),
        });
        if let Some(result) = reply.take() {
            return result;
        }
        defer();
        let turn = Duration::from_millis(50);
        reply
            .wait(turn, wanted)
            .unwrap_or(Err(Status::HostError.into()))
    }
}
