//! The console (virtio 1.3 §5.3): one queue in, one queue out, bytes without structure.

use crate::device::{
    Buffer, Channel, Core, Error, KNOWN_TO_ALL, OpenError, Ring, Wakers, agree_to_all,
};
use crate::limits::{CONSOLE_BUFFER, CONSOLE_BUFFERS};
use crate::platform::{DmaBuf, Platform};
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::fmt;
use core::task::{Context, Poll};
use pv_abi::device::kind;

#[cfg(test)]
mod tests;

/// Indices of the queues.
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;

/// A console. Belongs to the vCPU that opened it.
pub struct Console<P: Platform> {
    core: Core<P>,
    receive: Arc<Channel<Buffer>>,
    transmit: Arc<Channel<Buffer>>,
    /// Transmit buffers that the device does not have.
    idle: Vec<DmaBuf>,
    /// Input that was received and not yet read: the buffer, its bytes, and how many were read.
    input: Option<(DmaBuf, usize, usize)>,
    wakers: Wakers,
}

impl<P: Platform> Console<P> {
    /// Opens a console: the one of this name, or the first.
    ///
    /// # Errors
    ///
    /// [`OpenError`].
    pub fn open(platform: &'static P, name: Option<&str>) -> Result<Self, OpenError> {
        let (info, arena) = Core::find(platform, kind::CONSOLE, name)?;
        let vcpu = platform.vcpu_index();
        let size = CONSOLE_BUFFERS.min(info.max_queue_size);
        let channel = |index| Channel::new(&info, index, arena, size, vcpu, 0).map(Arc::new);
        let (receive, transmit) = (channel(RECEIVE)?, channel(TRANSMIT)?);
        let buffers = |_| arena.alloc(CONSOLE_BUFFER);
        let idle = (0..size).map(buffers).collect::<Result<_, _>>()?;
        for index in 0..size {
            let buf = buffers(index)?;
            // The ring has as many entries as there are buffers.
            let _full = receive.submit(input_buffer(buf)).is_err();
        }
        let rings = vec![
            Arc::clone(&receive) as Arc<dyn Ring>,
            Arc::clone(&transmit) as Arc<dyn Ring>,
        ];
        let core = Core::bring_up(platform, info, KNOWN_TO_ALL, agree_to_all(), rings)?;
        Ok(Console {
            core,
            receive,
            transmit,
            idle,
            input: None,
            wakers: Wakers::default(),
        })
    }

    /// The event that says that there is input.
    pub fn event(&self) -> u32 {
        self.receive.event()
    }

    /// All of its events: input, room for output, and that the device went or came.
    pub fn events(&self) -> [u32; 3] {
        [
            self.receive.event(),
            self.transmit.event(),
            self.core.info().config_event(),
        ]
    }

    /// What wakes the futures of this console, for executors that do not poll again at its
    /// [`events`](Self::events) by themselves.
    pub fn wakers(&self) -> Wakers {
        self.wakers.clone()
    }

    /// Writes all of `data`; waits only for room.
    ///
    /// # Errors
    ///
    /// [`Error`]; some of `data` may have been written then.
    pub fn write(&mut self, data: &[u8]) -> Result<(), Error> {
        for piece in data.chunks(CONSOLE_BUFFER) {
            let buf = self.transmit_buffer()?;
            self.transmit_piece(buf, piece)?;
        }
        self.transmit.kick(&self.core);
        Ok(())
    }

    /// Waits until the device has taken everything that was written.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub fn flush(&mut self) -> Result<(), Error> {
        while let Some((buffer, _)) = self.transmit.next(&self.core)? {
            self.idle.push(buffer.buf);
        }
        Ok(())
    }

    /// Reads what has arrived, and never waits; 0 if nothing has.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub fn try_read(&mut self, out: &mut [u8]) -> Result<usize, Error> {
        if self.input.is_none()
            && let Some((buffer, written)) = self.receive.poll(&self.core)?
        {
            self.receive(buffer, written);
        }
        Ok(self.take_input(out))
    }

    /// Reads at least one byte; waits for it. 0 only if `out` is empty.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub fn read(&mut self, out: &mut [u8]) -> Result<usize, Error> {
        if out.is_empty() {
            return Ok(0);
        }
        loop {
            let read = self.try_read(out)?;
            if read != 0 {
                return Ok(read);
            }
            if let Some((buffer, written)) = self.receive.next(&self.core)? {
                self.receive(buffer, written);
            }
        }
    }

    /// [`read`](Self::read) as a future, for any executor ([how](Wakers)).
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub async fn read_async(&mut self, out: &mut [u8]) -> Result<usize, Error> {
        core::future::poll_fn(|context| {
            loop {
                match self.try_read(out) {
                    Ok(0) if !out.is_empty() => {}
                    outcome => return Poll::Ready(outcome),
                }
                self.wakers.register(context.waker());
                if self.receive.arm(1) {
                    return Poll::Pending;
                }
            }
        })
        .await
    }

    /// [`write`](Self::write) as a future, for any executor ([how](Wakers)). Dropped before it is
    /// ready, some of `data` may have been written.
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write).
    pub async fn write_async(&mut self, data: &[u8]) -> Result<(), Error> {
        for piece in data.chunks(CONSOLE_BUFFER) {
            let buf = core::future::poll_fn(|context| self.poll_buffer(context)).await?;
            self.transmit_piece(buf, piece)?;
        }
        self.transmit.kick(&self.core);
        Ok(())
    }

    /// [`flush`](Self::flush) as a future, for any executor ([how](Wakers)).
    ///
    /// # Errors
    ///
    /// As [`flush`](Self::flush).
    pub async fn flush_async(&mut self) -> Result<(), Error> {
        core::future::poll_fn(|context| {
            loop {
                while let Some((buffer, _)) = self.transmit.poll(&self.core)? {
                    self.idle.push(buffer.buf);
                }
                if self.transmit.held() == 0 {
                    return Poll::Ready(Ok(()));
                }
                self.wakers.register(context.waker());
                if self.transmit.arm(self.transmit.held()) {
                    return Poll::Pending;
                }
            }
        })
        .await
    }

    /// A buffer for output, if there is one now.
    fn try_transmit_buffer(&mut self) -> Result<Option<DmaBuf>, Error> {
        match self.transmit.poll(&self.core)? {
            Some((buffer, _)) => Ok(Some(buffer.buf)),
            None => Ok(self.idle.pop()),
        }
    }

    fn transmit_buffer(&mut self) -> Result<DmaBuf, Error> {
        loop {
            if let Some(buf) = self.try_transmit_buffer()? {
                return Ok(buf);
            }
            if let Some((buffer, _)) = self.transmit.next(&self.core)? {
                return Ok(buffer.buf);
            }
        }
    }

    fn poll_buffer(&mut self, context: &mut Context<'_>) -> Poll<Result<DmaBuf, Error>> {
        loop {
            if let Some(buf) = self.try_transmit_buffer()? {
                return Poll::Ready(Ok(buf));
            }
            self.wakers.register(context.waker());
            if self.transmit.arm(1) {
                return Poll::Pending;
            }
        }
    }

    /// Hands the device one piece, which fits in a buffer.
    fn transmit_piece(&mut self, mut buf: DmaBuf, piece: &[u8]) -> Result<(), Error> {
        buf.write(0, piece);
        let buffer = Buffer {
            buf,
            len: piece.len(),
            writable: false,
        };
        self.transmit.submit(buffer).map_err(|(refused, broken)| {
            self.idle.push(refused.buf);
            broken.map_or(Error::Empty, Error::Broken)
        })
    }

    fn receive(&mut self, buffer: Buffer, written: u32) {
        self.input = Some((buffer.buf, (written as usize).min(CONSOLE_BUFFER), 0));
        if written == 0 {
            self.take_input(&mut []);
        }
    }

    /// Takes from the input buffer; one that is empty goes back to the device.
    fn take_input(&mut self, out: &mut [u8]) -> usize {
        let Some((buf, len, read)) = &mut self.input else {
            return 0;
        };
        let take = out.len().min(*len - *read);
        buf.read(*read, &mut out[..take]);
        *read += take;
        if *read == *len
            && let Some((buf, ..)) = self.input.take()
        {
            // One buffer came out, so there is room for one; a broken queue shows at the next poll.
            let _broken = self.receive.submit(input_buffer(buf)).is_err();
            self.receive.kick(&self.core);
        }
        take
    }
}

impl<P: Platform> fmt::Write for Console<P> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.write(text.as_bytes()).map_err(|_| fmt::Error)
    }
}

impl<P: Platform> fmt::Debug for Console<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Console").finish_non_exhaustive()
    }
}

fn input_buffer(buf: DmaBuf) -> Buffer {
    Buffer {
        len: buf.len(),
        buf,
        writable: true,
    }
}
