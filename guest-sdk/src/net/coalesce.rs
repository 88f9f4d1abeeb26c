//! Fewer calls of the device, each for more packets (virtio 1.3 §5.1.6.5: notification coalescing).
//!
//! In come a number of packets and a time, out go commands. A queue that is armed
//! ([`Receiver::arm`](super::Receiver::arm), or any wait) is woken by the first of the two that is
//! reached: a busy card costs fewer wake-ups, and a frame that comes alone waits for as long as that
//! time. Whoever polls sees every frame at once all the same.

use super::{Control, Error};
use crate::platform::Platform;
use alloc::vec::Vec;
use core::time::Duration;
use pv_abi::virtio::net::{control, feature};

/// When the device calls for the packets of a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Coalescing {
    /// As soon as so many are done; zero is any number.
    pub packets: u32,
    /// This long after the first of them, in microseconds, rounded up; zero is at once, whatever
    /// their number. A device has a bound of its own (`pv-netd`: 10 ms).
    pub time: Duration,
}

/// Bytes of a [`Coalescing`] in a command and in its result.
const LEN: usize = 8;

impl Coalescing {
    fn to_bytes(self) -> [u8; LEN] {
        let micros = self.time.as_nanos().div_ceil(1000);
        let micros = u32::try_from(micros).unwrap_or(u32::MAX);
        let mut bytes = [0; LEN];
        let (packets, time) = bytes.split_at_mut(4);
        packets.copy_from_slice(&self.packets.to_le_bytes());
        time.copy_from_slice(&micros.to_le_bytes());
        bytes
    }

    fn from_bytes([a, b, c, d, e, f, g, h]: [u8; LEN]) -> Self {
        Coalescing {
            packets: u32::from_le_bytes([a, b, c, d]),
            time: Duration::from_micros(u32::from_le_bytes([e, f, g, h]).into()),
        }
    }
}

impl<P: Platform> Control<P> {
    /// Has calls for received frames put together, on every receive queue.
    ///
    /// # Errors
    ///
    /// As [`set_promiscuous`](Self::set_promiscuous).
    pub fn coalesce_received(&mut self, wish: Coalescing) -> Result<(), Error> {
        let command = control::NOTF_COAL_RX_SET;
        self.command(feature::NOTF_COAL, command, &wish.to_bytes())
    }

    /// Has calls for sent packets put together, on every transmit queue.
    ///
    /// # Errors
    ///
    /// As [`set_promiscuous`](Self::set_promiscuous).
    pub fn coalesce_sent(&mut self, wish: Coalescing) -> Result<(), Error> {
        let command = control::NOTF_COAL_TX_SET;
        self.command(feature::NOTF_COAL, command, &wish.to_bytes())
    }

    /// The same for one queue, by its index ([`Receiver::index`](super::Receiver::index),
    /// [`Transmitter::index`](super::Transmitter::index)), until all of its kind are told otherwise.
    ///
    /// # Errors
    ///
    /// As [`set_promiscuous`](Self::set_promiscuous); `TooMany` for a queue that was not opened.
    pub fn coalesce_queue(&mut self, queue: u16, wish: Coalescing) -> Result<(), Error> {
        let mut data = Vec::with_capacity(4 + LEN);
        data.extend(self.queue(queue)?);
        data.extend(wish.to_bytes());
        self.command(feature::VQ_NOTF_COAL, control::NOTF_COAL_VQ_SET, &data)
    }

    /// What the device does for one queue now.
    ///
    /// # Errors
    ///
    /// As [`coalesce_queue`](Self::coalesce_queue).
    pub fn coalescing(&mut self, queue: u16) -> Result<Coalescing, Error> {
        let data = self.queue(queue)?;
        let command = control::NOTF_COAL_VQ_GET;
        let result = self.ask::<LEN>(feature::VQ_NOTF_COAL, command, &data)?;
        Ok(Coalescing::from_bytes(result))
    }

    /// The head of a command about one queue: its index, and two reserved bytes.
    fn queue(&self, queue: u16) -> Result<[u8; 4], Error> {
        if queue / 2 >= self.nic().pairs() {
            return Err(Error::TooMany);
        }
        let [low, high] = queue.to_le_bytes();
        Ok([low, high, 0, 0])
    }
}
