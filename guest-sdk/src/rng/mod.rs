//! The entropy source (virtio 1.3 §5.4): one queue, whose buffers the device fills.

use crate::device::{
    Buffer, Channel, Core, Error, KNOWN_TO_ALL, OpenError, Ring, Wakers, agree_to_all,
};
use crate::limits::RNG_BUFFER;
use crate::platform::{DmaBuf, Platform};
use alloc::sync::Arc;
use alloc::vec;
use core::task::Poll;
use pv_abi::device::kind;

/// Entries of the queue: one request at a time, and the least that a ring may have is two.
const QUEUE_SIZE: u16 = 2;

/// An entropy source. Belongs to the vCPU that opened it.
pub struct Rng<P: Platform> {
    core: Core<P>,
    channel: Arc<Channel<Buffer>>,
    /// The buffer, while the device does not have it.
    idle: Option<DmaBuf>,
    wakers: Wakers,
}

impl<P: Platform> Rng<P> {
    /// Opens an entropy source: the one of this name, or the first.
    ///
    /// # Errors
    ///
    /// [`OpenError`].
    pub fn open(platform: &'static P, name: Option<&str>) -> Result<Self, OpenError> {
        let (info, arena) = Core::find(platform, kind::RNG, name)?;
        let vcpu = platform.vcpu_index();
        let channel = Arc::new(Channel::new(&info, 0, arena, QUEUE_SIZE, vcpu, 0)?);
        let buf = arena.alloc(RNG_BUFFER)?;
        let rings = vec![Arc::clone(&channel) as Arc<dyn Ring>];
        let core = Core::bring_up(platform, info, KNOWN_TO_ALL, agree_to_all(), rings)?;
        Ok(Rng {
            core,
            channel,
            idle: Some(buf),
            wakers: Wakers::default(),
        })
    }

    /// The device's event.
    pub fn event(&self) -> u32 {
        self.channel.event()
    }

    /// All of its events: bytes that were given, and that the device went or came.
    pub fn events(&self) -> [u32; 2] {
        [self.channel.event(), self.core.info().config_event()]
    }

    /// What wakes the futures of this device, for executors that do not poll again at its
    /// [`events`](Self::events) by themselves.
    pub fn wakers(&self) -> Wakers {
        self.wakers.clone()
    }

    /// Fills `out`; waits for as long as the device needs.
    ///
    /// # Errors
    ///
    /// [`Error`]; what is in `out` then is not to be used.
    pub fn fill(&mut self, out: &mut [u8]) -> Result<(), Error> {
        let mut filled = 0;
        while filled < out.len() {
            self.request(out.len() - filled);
            let Some((buffer, written)) = self.channel.next(&self.core)? else {
                return Err(Error::Empty);
            };
            filled += self.take(buffer, written, &mut out[filled..])?;
        }
        Ok(())
    }

    /// Takes what the device has given, asks for more, and never waits; returns the bytes taken.
    ///
    /// # Errors
    ///
    /// As [`fill`](Self::fill).
    pub fn try_fill(&mut self, out: &mut [u8]) -> Result<usize, Error> {
        if out.is_empty() {
            return Ok(0);
        }
        self.request(out.len());
        match self.channel.poll(&self.core)? {
            Some((buffer, written)) => self.take(buffer, written, out),
            None => Ok(0),
        }
    }

    /// [`fill`](Self::fill) as a future, for any executor ([how](Wakers)).
    ///
    /// # Errors
    ///
    /// As [`fill`](Self::fill).
    pub async fn fill_async(&mut self, out: &mut [u8]) -> Result<(), Error> {
        let mut filled = 0;
        core::future::poll_fn(|context| {
            while filled < out.len() {
                let taken = self.try_fill(&mut out[filled..])?;
                filled += taken;
                if taken == 0 {
                    self.wakers.register(context.waker());
                    if self.channel.arm(1) {
                        return Poll::Pending;
                    }
                }
            }
            Poll::Ready(Ok(()))
        })
        .await
    }

    /// Hands the buffer to the device, if it is not there already.
    fn request(&mut self, wanted: usize) {
        let Some(buf) = self.idle.take() else { return };
        let buffer = Buffer {
            len: wanted.min(buf.len()),
            buf,
            writable: true,
        };
        if let Err((refused, _)) = self.channel.submit(buffer) {
            // A broken queue; the next poll says so.
            self.idle = Some(refused.buf);
        }
    }

    fn take(&mut self, buffer: Buffer, written: u32, out: &mut [u8]) -> Result<usize, Error> {
        let take = (written as usize).min(out.len());
        buffer.buf.read(0, &mut out[..take]);
        // What was random once must not be read again, by whoever.
        buffer.buf.zero();
        self.idle = Some(buffer.buf);
        if take == 0 {
            Err(Error::Empty)
        } else {
            Ok(take)
        }
    }
}

impl<P: Platform> core::fmt::Debug for Rng<P> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Rng").finish_non_exhaustive()
    }
}
