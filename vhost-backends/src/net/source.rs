//! A receive queue's thread, for ports that have a descriptor to read from.
//!
//! Frames go from the kernel right into the guest's buffers; what does not fit there goes into a
//! buffer of our own first, so that nothing is ever cut.

use super::Link;
use super::capture::Direction;
use super::frame::{ETHERNET_LEN, Frame};
use super::limits::{MAX_BATCH, MAX_FRAME_LEN, MIN_FRAME_LEN};
use super::offload::{Scratch, complete};
use super::port::{Port, Received};
use super::receive::{Inlet, RxQueue, is_plain};
use super::stats::{Drop, Tally};
use super::worker::{self, Wake};
use crate::ring::DeviceRing;
use crate::session::quota::PEER_LINES;
use crate::session::{QueueSetup, QueueStop, QueueWorker};
use pv_abi::virtio::net::{Header, gso, header_flag};
use std::io;
use std::sync::Arc;
use std::time::Duration;
use vm_memory::{GuestMemoryMmap, VolatileSlice};
use zerocopy::IntoBytes;

/// Room for a frame that is not a large one.
const SMALL: usize = 2048;
/// Frames for which there is room for large ones after one has come.
const LARGE_FOR: u32 = 64;

/// Between looks at a port that is away.
const AWHILE: Duration = Duration::from_millis(200);

/// Starts a receive queue that reads from its port.
pub(super) fn spawn(
    inlet: Arc<Inlet>,
    link: Arc<Link>,
    port: Arc<dyn Port>,
    pair: u16,
    setup: QueueSetup,
) -> io::Result<Box<dyn QueueWorker>> {
    let readable = Arc::clone(&port);
    worker::spawn(
        format!("net-rx-{pair}"),
        setup,
        readable.source(pair),
        move |setup, wake| {
            let (err, first) = (Arc::clone(&setup.err), setup.ring.save());
            let memory = Arc::clone(setup.ring.memory());
            inlet.open(pair, setup);
            let mut room = Room::default();
            while !wake.stop.is_set() {
                let turn = turn(&inlet, &link, &*port, pair, &memory, &mut room);
                if let Err(error) = turn.and_then(|next| rest(next, &link, &wake)) {
                    if PEER_LINES.may_say() {
                        tracing::error!(%error, "receive queue stopped");
                    }
                    err.signal();
                    break;
                }
            }
            inlet.close(pair).unwrap_or(QueueStop {
                ring: first,
                retired: None,
            })
        },
    )
}

/// What to do after a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Again,
    WaitForPort,
    WaitForBuffers,
    WaitAWhile,
}

fn turn(
    inlet: &Inlet,
    link: &Link,
    port: &dyn Port,
    pair: u16,
    memory: &GuestMemoryMmap,
    room: &mut Room,
) -> io::Result<Next> {
    let Some(mut guard) = inlet.lock(pair) else {
        return Ok(Next::WaitForPort);
    };
    let Some(queue) = guard.as_mut() else {
        return Ok(Next::WaitForPort);
    };
    let mut reader = Reader {
        queue,
        memory,
        room,
        tally: Tally::default(),
        link,
        starved: false,
    };
    let received = port.receive(pair, &mut reader)?;
    let Reader { tally, starved, .. } = reader;
    queue.publish();
    link.stats.received(&tally);
    Ok(match received {
        _ if starved && queue.arm() => Next::Again,
        Received::Away => Next::WaitAWhile,
        _ if starved => Next::WaitForBuffers,
        Received::More => Next::Again,
        Received::Drained => Next::WaitForPort,
    })
}

fn rest(next: Next, link: &Link, wake: &Wake) -> io::Result<()> {
    match next {
        Next::Again => return Ok(()),
        Next::WaitForPort => wake.for_port(None)?,
        Next::WaitForBuffers => wake.for_kick(None)?,
        Next::WaitAWhile => wake.for_kick(Some(AWHILE))?,
    }
    link.stats.woke();
    Ok(())
}

/// Where what does not fit the guest's buffers goes, and how much is likely to.
#[derive(Debug, Default)]
struct Room {
    overflow: Vec<u8>,
    scratch: Scratch,
    /// Frames until small ones are expected again.
    large: u32,
}

/// What a port read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Came {
    /// Bytes of the frame, without the virtio header.
    pub len: usize,
    /// A VLAN tag, protocol and value, that the frame was parted from.
    pub tag: Option<[u8; 4]>,
}

/// Takes a port's frames into a guest's buffers.
#[derive(Debug)]
pub struct Reader<'q> {
    queue: &'q mut RxQueue,
    memory: &'q GuestMemoryMmap,
    room: &'q mut Room,
    tally: Tally,
    link: &'q Link,
    starved: bool,
}

impl Reader<'_> {
    /// Frames that a port should read before it lets others have a turn.
    pub const BATCH: usize = MAX_BATCH;

    /// Reads one frame right into the guest's buffers. `read` is given room for the virtio
    /// header, views of the guest's memory, and room for what does not fit these, to be filled in
    /// this order; it says what came. `false`: the guest has no buffer, and nothing was read.
    pub fn read(
        &mut self,
        read: impl FnOnce(&mut [u8], &[VolatileSlice<'_, ()>], &mut [u8]) -> io::Result<Came>,
    ) -> io::Result<bool> {
        let want = if self.room.large > 0 {
            MAX_FRAME_LEN
        } else {
            SMALL
        };
        let mut views = Vec::new();
        if !self.queue.views(want, self.memory, &mut views) {
            self.starved = true;
            return Ok(false);
        }
        let Room {
            overflow,
            scratch,
            large,
        } = &mut *self.room;
        // One more, to see that a frame is too long.
        overflow.resize(MAX_FRAME_LEN + 1, 0);
        let room: usize = views.iter().map(VolatileSlice::len).sum();
        let mut head = Header::default();
        let Came { len, tag } = read(head.as_mut_bytes(), &views, overflow)?;
        *large = if len > room && len > SMALL {
            LARGE_FOR
        } else {
            large.saturating_sub(1)
        };
        head.num_buffers = 0;
        if !self.link.is_up() {
            self.tally.drop(Drop::LinkDown);
            return Ok(true);
        }
        if let Some(tag) = tag {
            let more = len.saturating_sub(room);
            views.push(VolatileSlice::from(
                overflow.get_mut(..more).unwrap_or_default(),
            ));
            let mut whole = Vec::new();
            Frame::new(head, shorten(&mut views, len), len).copy_to(&mut whole);
            self.deliver_tagged(head, whole, tag);
            return Ok(true);
        }
        let filter = self.queue.filter();
        let offloads = self.queue.offloads();
        if !offloads.checksum {
            head.flags &= !header_flag::DATA_VALID;
        }
        let mut hash = None;
        let looked_at =
            self.link.capture.is_on() || self.queue.reports() || self.queue.may_be_over_mtu(len);
        if !filter.promiscuous || !is_plain(&head) || looked_at {
            let more = len.saturating_sub(room);
            views.push(VolatileSlice::from(
                overflow.get_mut(..more).unwrap_or_default(),
            ));
            let pieces = shorten(&mut views, len);
            let frame = Frame::new(head, pieces, len);
            if !filter.takes(&frame) {
                self.tally.drop(Drop::Filtered);
                return Ok(true);
            }
            if !offloads.take(&frame) {
                let (queue, tally) = (&mut *self.queue, &mut self.tally);
                if !complete(&frame, scratch, &mut |plain| queue.deliver(plain, tally)) {
                    tally.drop(Drop::BadHeader);
                }
                return Ok(true);
            }
            if self.queue.is_over_mtu(&frame) {
                self.tally.drop(Drop::Length);
                return Ok(true);
            }
            if self.link.capture.is_on() {
                self.link.capture.frame(&frame, Direction::ToGuest);
            }
            hash = self.queue.report(&frame);
        }
        let rest = overflow.get_mut(..).unwrap_or_default();
        self.queue
            .commit((head, hash), (len, room), rest, &mut self.tally);
        Ok(true)
    }

    /// Puts a tag where it was, behind the addresses, and gives the guest the frame.
    fn deliver_tagged(&mut self, mut header: Header, mut bytes: Vec<u8>, tag: [u8; 4]) {
        let at = bytes.len().min(ETHERNET_LEN - 2);
        bytes.splice(at..at, tag);
        if header.flags & header_flag::NEEDS_CSUM != 0 {
            header.csum_start = header.csum_start.saturating_add(4);
        }
        if header.gso_type != gso::NONE {
            header.hdr_len = header.hdr_len.saturating_add(4);
        }
        let len = bytes.len();
        if !(MIN_FRAME_LEN..=MAX_FRAME_LEN).contains(&len) {
            return self.tally.drop(Drop::Length);
        }
        let pieces = [VolatileSlice::from(bytes.as_mut_slice())];
        self.deliver(&Frame::new(header, &pieces, len));
    }

    /// Gives the guest a frame that was read already. Dropped if there is no buffer.
    pub fn deliver(&mut self, frame: &Frame<'_>) {
        if !self.link.is_up() {
            self.tally.drop(Drop::LinkDown);
        } else if !self.queue.filter().takes(frame) {
            self.tally.drop(Drop::Filtered);
        } else {
            self.queue.deliver(frame, &mut self.tally);
        }
    }

    /// Whether the guest has a receive buffer. Otherwise the port is asked again when it has.
    pub fn has_buffer(&mut self) -> bool {
        self.starved = !self.queue.views(0, self.memory, &mut Vec::new());
        !self.starved
    }

    /// Counts frames that came to nothing.
    pub fn drop(&mut self, reason: Drop) {
        self.tally.drop(reason);
    }
}

/// The first `len` bytes of these views.
fn shorten<'v, 's>(
    views: &'v mut Vec<VolatileSlice<'s, ()>>,
    len: usize,
) -> &'v [VolatileSlice<'s, ()>] {
    let mut left = len;
    views.retain_mut(|view| {
        if let Ok(part) = view.subslice(0, left.min(view.len())) {
            *view = part;
        }
        left -= view.len().min(left);
        !view.is_empty()
    });
    views
}
