//! Frames that arrive: buffers of the arena, filled by the device, owned by the caller until he gives
//! them back.

use super::config::Shared;
use super::header::{self, Checksum, HEADER_LEN, Segmentation};
use super::transmit::Packet;
use super::{Error, Nic};
use crate::device::{Channel, Failed, Looking, Segments, Submission, wait};
use crate::limits::{MAX_DROPS, MAX_FRAME, MIN_FRAME};
use crate::platform::{DmaBuf, Platform};
use crate::virtqueue::Broken;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::task::{Context, Poll};
use core::time::Duration;
use pv_abi::virtio::net::{Header, feature};
use zerocopy::FromBytes;

/// A buffer that the device may fill.
#[derive(Debug)]
pub(super) struct Posted(DmaBuf);

impl Submission for Posted {
    fn prepare(&mut self, segments: &mut Segments) {
        // At most `MAX_FRAME` and its header.
        segments.push(self.0.gpa(), self.0.len() as u32, true);
    }
}

/// A piece of a frame, in one buffer.
#[derive(Debug)]
struct Part {
    buf: DmaBuf,
    /// Where in the buffer its bytes begin.
    start: usize,
    len: usize,
}

/// A received frame, in the buffers that the device wrote it to.
///
/// The peer may change the bytes for as long as it lives, so they are copied out; what was copied
/// does not change any more. Give it back with [`Receiver::recycle`]; one that is dropped is
/// replaced by a new buffer.
#[derive(Debug)]
pub struct Frame {
    first: Part,
    /// Further buffers, where the frame did not fit in one.
    rest: Vec<Part>,
    len: usize,
    checksum: Checksum,
    segmentation: Option<Segmentation>,
}

impl Frame {
    /// Bytes of the frame: at least an Ethernet header, at most [`MAX_FRAME`].
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Buffers that it lies in.
    pub fn buffers(&self) -> usize {
        1 + self.rest.len()
    }

    /// What is known of its checksum.
    pub fn checksum(&self) -> Checksum {
        self.checksum
    }

    /// How it would have been cut, had it gone over a wire.
    pub fn segmentation(&self) -> Option<Segmentation> {
        self.segmentation
    }

    /// Copies bytes from `offset` on; how many that were: fewer than `out` holds at the end.
    pub fn read(&self, offset: usize, out: &mut [u8]) -> usize {
        let mut skip = offset;
        let mut done = 0;
        for part in core::iter::once(&self.first).chain(&self.rest) {
            if skip >= part.len {
                skip -= part.len;
                continue;
            }
            let take = (part.len - skip).min(out.len() - done);
            part.buf
                .read(part.start + skip, &mut out[done..done + take]);
            done += take;
            skip = 0;
            if done == out.len() {
                break;
            }
        }
        done
    }

    /// The pieces without a copy, for peers that are trusted: their buffers, and where in each the
    /// frame's bytes are. [`DmaBuf::as_slice_trusting_peer`] says what trust means.
    pub fn pieces(&self) -> impl Iterator<Item = (&DmaBuf, core::ops::Range<usize>)> {
        core::iter::once(&self.first)
            .chain(&self.rest)
            .map(|part| (&part.buf, part.start..part.start + part.len))
    }

    /// The same bytes as a packet to send, without a copy; the frame again if it lies in several
    /// buffers.
    ///
    /// # Errors
    ///
    /// The frame.
    pub fn into_packet(self) -> Result<Packet, Frame> {
        if self.rest.is_empty() {
            Ok(Packet::new(self.first.buf, self.len))
        } else {
            Err(self)
        }
    }
}

/// What was dropped by a receiver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReceiveStats {
    /// Frames that were delivered.
    pub frames: u64,
    /// Frames shorter than an Ethernet header.
    pub runts: u64,
    /// Frames longer than [`MAX_FRAME`], which any neighbour may have sent.
    pub giants: u64,
    /// Frames whose header cannot be true: a checksum outside of the frame, an offload that was not
    /// agreed on.
    pub bad_headers: u64,
}

/// The receiving half of a queue pair. Belongs to the vCPU that it was set up for: that one is woken.
pub struct Receiver<P: Platform> {
    pub(super) shared: Arc<Shared<P>>,
    channel: Arc<Channel<Posted>>,
    /// Buffers that the device does not have.
    spare: Vec<DmaBuf>,
    group: Vec<(Posted, u32)>,
    buffer_len: usize,
    size: u16,
    stats: ReceiveStats,
    looking: Looking,
}

impl<P: Platform> Receiver<P> {
    pub(super) fn new(
        shared: Arc<Shared<P>>,
        channel: Arc<Channel<Posted>>,
        size: u16,
        buffer_len: usize,
    ) -> Result<Self, Error> {
        let mut receiver = Receiver {
            shared,
            channel,
            spare: Vec::new(),
            group: Vec::new(),
            buffer_len,
            size,
            stats: ReceiveStats::default(),
            looking: Looking::new(),
        };
        receiver.refill()?;
        receiver.channel.kick(&receiver.shared.core);
        Ok(receiver)
    }

    /// The card.
    pub fn nic(&self) -> Nic<P> {
        Nic::from_shared(&self.shared)
    }

    /// The queue's index in the device.
    pub fn index(&self) -> u16 {
        self.channel.index()
    }

    /// The queue's event, which is pending when frames have come.
    pub fn event(&self) -> u32 {
        self.channel.event()
    }

    /// What came and what was dropped.
    pub fn stats(&self) -> ReceiveStats {
        self.stats
    }

    /// Takes the next frame if there is one; never waits.
    ///
    /// # Errors
    ///
    /// [`Error::Broken`] if the device said what cannot be; [`Error::DeviceLost`]; `OutOfArena` if
    /// there is no room for a single buffer.
    pub fn poll(&mut self) -> Result<Option<Frame>, Error> {
        self.shared.look_after_control();
        for _ in 0..MAX_DROPS {
            self.refill()?;
            if !self.take_group()? {
                return Ok(None);
            }
            if let Some(frame) = self.assemble() {
                self.stats.frames += 1;
                return Ok(Some(frame));
            }
        }
        Ok(None)
    }

    /// Waits for the next frame, at most `limit`; the vCPU idles. `None` when the time is up.
    ///
    /// # Errors
    ///
    /// As [`poll`](Self::poll).
    pub fn receive(&mut self, limit: Option<Duration>) -> Result<Option<Frame>, Error> {
        let shared = Arc::clone(&self.shared);
        let channel = Arc::clone(&self.channel);
        let mut looking = self.looking;
        let mut frame = None;
        let waited = wait(&shared.core, &channel, &mut looking, limit, || {
            frame = self.poll()?;
            Ok::<_, Error>(frame.is_none().then_some(1))
        });
        self.looking = looking;
        waited.map(|()| frame)
    }

    /// The next frame, for futures: when there is none, the waker is kept for
    /// [`Nic::process`], and the queue asks for an event.
    ///
    /// # Errors
    ///
    /// As [`poll`](Self::poll).
    pub fn poll_receive(&mut self, context: &mut Context<'_>) -> Poll<Result<Frame, Error>> {
        loop {
            match self.poll() {
                Ok(Some(frame)) => return Poll::Ready(Ok(frame)),
                Ok(None) => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
            self.shared.wakers.register(context.waker());
            if self.channel.arm(1) {
                return Poll::Pending;
            }
        }
    }

    /// The next frame as a future, for any executor that polls again at this queue's event, or when
    /// [`Nic::process`] has woken it.
    ///
    /// # Errors
    ///
    /// As [`poll`](Self::poll).
    pub async fn receive_async(&mut self) -> Result<Frame, Error> {
        core::future::poll_fn(|context| self.poll_receive(context)).await
    }

    /// Asks for an event at the next frame; whether the vCPU may idle now. `false`: poll again.
    #[must_use = "the answer says whether sleeping loses a frame"]
    pub fn arm(&mut self) -> bool {
        self.channel.arm(1)
    }

    /// Gives a frame's buffers back to the device. It sees them with the next
    /// [`poll`](Self::poll) that finds nothing, or a quarter of the ring at a time.
    pub fn recycle(&mut self, frame: Frame) {
        self.keep(frame.first.buf);
        for part in frame.rest {
            self.keep(part.buf);
        }
    }

    fn keep(&mut self, buf: DmaBuf) {
        let ours = buf.len() == self.buffer_len && core::ptr::eq(buf.arena(), self.shared.arena);
        // More than the ring holds is of no use.
        if ours && self.spare.len() < usize::from(self.size) {
            self.spare.push(buf);
        }
    }

    /// Posts buffers until the ring is full; new ones where frames were kept.
    fn refill(&mut self) -> Result<(), Error> {
        if self.shared.core.lost().is_some() {
            // The poll tells of it; buffers given to it now might never come back.
            return Ok(());
        }
        let mut missing = self.size.saturating_sub(self.channel.held());
        while missing > 0 {
            let buf = match self.spare.pop() {
                Some(buf) => buf,
                None => match self.shared.arena.alloc(self.buffer_len) {
                    Ok(buf) => buf,
                    // With buffers posted it goes on, more slowly.
                    Err(_) if missing < self.size => return Ok(()),
                    Err(error) => return Err(error.into()),
                },
            };
            if let Err((refused, _)) = self.channel.submit(Posted(buf)) {
                // A broken queue, which the poll tells of.
                self.spare.push(refused.0);
                return Ok(());
            }
            missing -= 1;
        }
        Ok(())
    }

    /// Moves the buffers of one frame to `group`, as many as its header says.
    fn take_group(&mut self) -> Result<bool, Error> {
        self.group.clear();
        let mergeable = self.shared.core.features() & feature::MRG_RXBUF != 0;
        let least = HEADER_LEN as u32;
        let count = |first: &Posted, written: u32| {
            if written < least {
                return Err(Broken::Answer {
                    len: written,
                    least,
                    most: first.0.len() as u32,
                });
            }
            Ok(if mergeable {
                read_header(&first.0).num_buffers
            } else {
                1
            })
        };
        let taken = self
            .channel
            .poll_group(&self.shared.core, count, &mut self.group);
        match taken {
            Ok(taken) => Ok(taken),
            Err(failed) => {
                // The device is done with what it completed, whatever it said about it.
                for (Posted(buf), _) in core::mem::take(&mut self.group) {
                    self.keep(buf);
                }
                if let Failed::Lost(_) = failed {
                    self.let_go();
                }
                Err(failed.into())
            }
        }
    }

    /// Takes the buffers back from a device that is gone for good.
    fn let_go(&mut self) {
        while let Some(Posted(buf)) = self.channel.take_lost() {
            if self.shared.core.memory_is_ours() {
                drop(buf);
            } else {
                // It could not be stopped and may write there until the VM ends.
                core::mem::forget(buf);
            }
        }
    }

    /// Makes a frame of the group; `None` if there is none to be made.
    fn assemble(&mut self) -> Option<Frame> {
        let mut group = core::mem::take(&mut self.group);
        let written = group.iter().map(|(_, written)| *written as usize);
        let len = written.sum::<usize>().saturating_sub(HEADER_LEN);
        let frame = self.frame(&mut group, len);
        for (Posted(buf), _) in group.drain(..) {
            self.keep(buf);
        }
        self.group = group;
        frame
    }

    /// Takes the buffers out of the group, unless the frame is dropped.
    fn frame(&mut self, group: &mut Vec<(Posted, u32)>, len: usize) -> Option<Frame> {
        if len < MIN_FRAME {
            self.stats.runts += 1;
            return None;
        }
        if len > MAX_FRAME {
            self.stats.giants += 1;
            return None;
        }
        let (first, _) = group.first()?;
        let features = self.shared.core.features();
        let Some((checksum, segmentation)) = header::parse(read_header(&first.0), len, features)
        else {
            self.stats.bad_headers += 1;
            return None;
        };
        let mut parts = group
            .drain(..)
            .enumerate()
            .map(|(index, (posted, written))| {
                let start = if index == 0 { HEADER_LEN } else { 0 };
                // The ring has checked that a buffer holds what was written to it.
                let len = (written as usize).saturating_sub(start);
                let buf = posted.0;
                Part { buf, start, len }
            });
        let first = parts.next()?;
        let rest = parts.collect();
        Some(Frame {
            first,
            rest,
            len,
            checksum,
            segmentation,
        })
    }
}

/// One copy of the header; the peer may change it afterwards.
fn read_header(buf: &DmaBuf) -> Header {
    let mut bytes = [0; HEADER_LEN];
    buf.read(0, &mut bytes);
    Header::read_from_bytes(&bytes).unwrap_or_default()
}

impl<P: Platform> core::fmt::Debug for Receiver<P> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Receiver")
            .field("index", &self.index())
            .field("stats", &self.stats)
            .finish_non_exhaustive()
    }
}
