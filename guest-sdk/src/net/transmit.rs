//! Frames that go out: packets in buffers of the arena, owned by the device until it has sent them.

use super::config::Shared;
use super::header::{HEADER_LEN, Offload};
use super::{Error, Nic, SendError, SendErrorKind};
use crate::device::{Channel, Failed, Looking, Segments, Submission, wait};
use crate::limits::MAX_FRAME;
use crate::platform::{DmaBuf, Platform};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::task::{Context, Poll};
use core::time::Duration;
use zerocopy::IntoBytes;

/// Bytes of a packet's buffer: a usual frame with its header.
const SMALL_PACKET: usize = 2048;
/// Larger ones are multiples of this.
const LARGE_STEP: usize = 16 << 10;

/// A frame to send, with room for the header before it. Zero-copy: the device reads it where it is.
#[derive(Debug)]
pub struct Packet {
    buf: DmaBuf,
    len: usize,
}

impl Packet {
    /// Over a buffer that has room for a header and `len` bytes.
    pub(super) fn new(buf: DmaBuf, len: usize) -> Self {
        let len = len.min(buf.len().saturating_sub(HEADER_LEN));
        Packet { buf, len }
    }

    /// Bytes of the frame.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the frame has no bytes; such a one is not sent.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Most bytes that the frame can have.
    pub fn capacity(&self) -> usize {
        self.buf.len() - HEADER_LEN
    }

    /// Makes the frame so long, at most its [`capacity`](Self::capacity).
    pub fn set_len(&mut self, len: usize) {
        self.len = len.min(self.capacity());
    }

    /// Copies `data` into the frame at `offset`.
    ///
    /// # Panics
    ///
    /// If it does not fit into the [`capacity`](Self::capacity): a bug of the caller.
    #[track_caller]
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        self.buf.write(HEADER_LEN + offset, data);
    }

    /// Copies bytes at `offset` out of the frame.
    ///
    /// # Panics
    ///
    /// If `out` runs past the [`capacity`](Self::capacity): a bug of the caller.
    #[track_caller]
    pub fn read(&self, offset: usize, out: &mut [u8]) {
        self.buf.read(HEADER_LEN + offset, out);
    }
}

/// A packet on its way.
#[derive(Debug)]
pub(super) struct Outgoing {
    packet: Packet,
    offload: Offload,
}

impl Submission for Outgoing {
    fn prepare(&mut self, segments: &mut Segments) {
        // Written again for each generation: a peer may have changed it.
        let header = self.offload.header();
        self.packet.buf.write(0, header.as_bytes());
        // At most `MAX_FRAME` and the header.
        let len = (HEADER_LEN + self.packet.len) as u32;
        segments.push(self.packet.buf.gpa(), len, false);
    }
}

/// The sending half of a queue pair. Belongs to the vCPU that it was set up for: that one is woken.
pub struct Transmitter<P: Platform> {
    pub(super) shared: Arc<Shared<P>>,
    channel: Arc<Channel<Outgoing>>,
    /// Packets that were sent, to be used again.
    spare: Vec<Packet>,
    size: u16,
    looking: Looking,
    sent: u64,
}

impl<P: Platform> Transmitter<P> {
    pub(super) fn new(shared: Arc<Shared<P>>, channel: Arc<Channel<Outgoing>>, size: u16) -> Self {
        Transmitter {
            shared,
            channel,
            spare: Vec::new(),
            size,
            looking: Looking::new(),
            sent: 0,
        }
    }

    /// The card.
    pub fn nic(&self) -> Nic<P> {
        Nic::from_shared(&self.shared)
    }

    /// The queue's index in the device.
    pub fn index(&self) -> u16 {
        self.channel.index()
    }

    /// The queue's event, which is pending when room was asked for and is there.
    pub fn event(&self) -> u32 {
        self.channel.event()
    }

    /// Packets that the device has not sent yet.
    pub fn in_flight(&self) -> usize {
        usize::from(self.channel.held())
    }

    /// Packets that the device has sent.
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// An empty packet with room for a frame of `capacity` bytes: one that was sent before, or a new
    /// one.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfArena`].
    pub fn packet(&mut self, capacity: usize) -> Result<Packet, Error> {
        // Two sizes of steps, so that packets are used again rather than many sizes kept.
        let room = (capacity.min(MAX_FRAME) + HEADER_LEN).next_multiple_of(SMALL_PACKET);
        let room = if room > SMALL_PACKET {
            room.next_multiple_of(LARGE_STEP)
        } else {
            room
        };
        if let Some(packet) = self.take_spare(room) {
            return Ok(packet);
        }
        if let Ok(buf) = self.shared.arena.alloc(room) {
            return Ok(Packet::new(buf, 0));
        }
        // Perhaps it is packets of ours that fill it. What the poll fails with, the next one says.
        let _later = self.poll().is_err();
        if let Some(packet) = self.take_spare(room) {
            return Ok(packet);
        }
        self.spare.clear();
        Ok(Packet::new(self.shared.arena.alloc(room)?, 0))
    }

    fn take_spare(&mut self, room: usize) -> Option<Packet> {
        let fits = |packet: &Packet| packet.buf.len() == room;
        let place = self.spare.iter().rposition(fits)?;
        let mut packet = self.spare.swap_remove(place);
        packet.set_len(0);
        Some(packet)
    }

    /// Takes a packet. The device sees it at the next [`kick`](Self::kick), [`poll`](Self::poll) or
    /// wait, so that a batch costs one doorbell.
    ///
    /// # Errors
    ///
    /// [`SendError`], with the packet; `QueueFull` when [`poll`](Self::poll) must make room first.
    pub fn submit(&mut self, packet: Packet, offload: Offload) -> Result<(), SendError> {
        let features = self.shared.core.features();
        let checked = if let Some(lost) = self.shared.core.lost() {
            // Taken, it would cost its buffer where the device could not be stopped.
            Err(SendErrorKind::DeviceLost(lost))
        } else if core::ptr::eq(packet.buf.arena(), self.shared.arena) {
            offload.check(packet.len, features)
        } else {
            Err(SendErrorKind::OtherArena)
        };
        if let Err(kind) = checked {
            return Err(SendError {
                kind,
                packet,
                offload,
            });
        }
        self.channel
            .submit(Outgoing { packet, offload })
            .map_err(|(refused, broken)| SendError {
                kind: broken.map_or(SendErrorKind::QueueFull, SendErrorKind::Broken),
                packet: refused.packet,
                offload: refused.offload,
            })
    }

    /// Shows the device what was submitted.
    pub fn kick(&mut self) {
        self.channel.kick(&self.shared.core);
    }

    /// Takes back the packets that were sent, for [`packet`](Self::packet); how many. Never waits.
    ///
    /// # Errors
    ///
    /// [`Error::Broken`] if the device said what cannot be; [`Error::DeviceLost`], and then the
    /// packets in flight are gone.
    pub fn poll(&mut self) -> Result<usize, Error> {
        let mut count = 0;
        // As many as there can be; the device may send meanwhile, but not for ever.
        for _ in 0..self.size {
            match self.channel.poll(&self.shared.core) {
                Ok(None) => break,
                Ok(Some((outgoing, _))) => self.keep(outgoing.packet),
                Err(failed) => {
                    if let Failed::Lost(_) = failed {
                        self.let_go();
                    }
                    return Err(failed.into());
                }
            }
            count += 1;
        }
        self.sent += count as u64;
        Ok(count)
    }

    /// Waits until at most `left` packets are in flight, or the time is up; how many are.
    ///
    /// # Errors
    ///
    /// As [`poll`](Self::poll).
    pub fn wait_until(&mut self, left: usize, limit: Option<Duration>) -> Result<usize, Error> {
        let shared = Arc::clone(&self.shared);
        let channel = Arc::clone(&self.channel);
        let mut looking = self.looking;
        let waited = wait(&shared.core, &channel, &mut looking, limit, || {
            self.poll()?;
            let over = usize::from(channel.held()).saturating_sub(left);
            Ok::<_, Error>(u16::try_from(over).ok().filter(|&over| over != 0))
        });
        self.looking = looking;
        waited.map(|()| self.in_flight())
    }

    /// Sends a copy of `frame`, and waits only for room.
    ///
    /// # Errors
    ///
    /// [`Error`]; a frame that no device takes is [`Error::Refused`].
    pub fn send(&mut self, frame: &[u8], offload: Offload) -> Result<(), Error> {
        if frame.len() > MAX_FRAME {
            return Err(Error::Refused);
        }
        let mut packet = self.packet(frame.len())?;
        packet.set_len(frame.len());
        packet.write(0, frame);
        loop {
            match self.submit(packet, offload) {
                Ok(()) => break,
                Err(refused) if refused.kind == SendErrorKind::QueueFull => {
                    let held = self.in_flight();
                    if held == 0 {
                        return Err(Error::Refused);
                    }
                    self.wait_until(held - 1, None)?;
                    packet = refused.packet;
                }
                Err(SendError {
                    kind: SendErrorKind::Broken(broken),
                    ..
                }) => return Err(Error::Broken(broken)),
                Err(SendError {
                    kind: SendErrorKind::DeviceLost(lost),
                    ..
                }) => return Err(Error::DeviceLost(lost)),
                Err(_) => return Err(Error::Refused),
            }
        }
        self.kick();
        Ok(())
    }

    /// Whether there is room for a packet, for futures: when there is none, the waker is kept for
    /// [`Nic::process`], and the queue asks for an event.
    ///
    /// # Errors
    ///
    /// As [`poll`](Self::poll).
    pub fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Error>> {
        loop {
            if let Err(error) = self.poll() {
                return Poll::Ready(Err(error));
            }
            if self.has_room() {
                return Poll::Ready(Ok(()));
            }
            self.shared.wakers.register(context.waker());
            if self.channel.arm(1) {
                return Poll::Pending;
            }
        }
    }

    /// Sends a copy of `frame` as soon as there is room.
    ///
    /// # Errors
    ///
    /// As [`send`](Self::send).
    pub async fn send_async(&mut self, frame: &[u8], offload: Offload) -> Result<(), Error> {
        core::future::poll_fn(|context| self.poll_ready(context)).await?;
        self.send(frame, offload)
    }

    /// Whether a packet would be taken now, as far as what was taken back tells.
    pub fn has_room(&self) -> bool {
        self.channel.held() < self.size
    }

    /// Asks for an event when the device has sent a packet; whether the vCPU may idle now.
    #[must_use = "the answer says whether sleeping loses an event"]
    pub fn arm(&mut self) -> bool {
        self.channel.arm(1)
    }

    fn keep(&mut self, packet: Packet) {
        if self.spare.len() < usize::from(self.size) {
            self.spare.push(packet);
        }
    }

    /// Takes the packets back from a device that is gone for good.
    fn let_go(&mut self) {
        while let Some(outgoing) = self.channel.take_lost() {
            if !self.shared.core.memory_is_ours() {
                // It could not be stopped and may read there until the VM ends.
                core::mem::forget(outgoing);
            }
        }
    }
}

impl<P: Platform> core::fmt::Debug for Transmitter<P> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Transmitter")
            .field("index", &self.index())
            .field("in_flight", &self.in_flight())
            .finish_non_exhaustive()
    }
}
