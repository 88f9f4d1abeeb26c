//! The network card (virtio 1.3 §5.1).
//!
//! [`open`] gives one queue pair on this vCPU, which is what most guests want; [`Nic::open`] gives as
//! many as the device has, each half to be moved to the vCPU that it was made for, and the control
//! queue. In go [`Packet`]s, out come [`Frame`]s, both in buffers of the arena that nobody copies;
//! what the other side may leave undone of checksums and segmentation stands in [`Offload`] and on
//! the frame. Both halves can be polled, waited for, and awaited on any executor.
//!
//! With the features `smoltcp` and `embassy`, `SmolDevice` and `EmbassyDevice` are a pair as those
//! network stacks want it.
//!
//! A backend that dies does not show ([how](crate::device)): buffers are posted again, packets in
//! flight are given to the next one (so a packet may be sent twice, as on any network), and the card
//! is told again what it was told by [`Control`]. What shows, as an error, is a device that stays
//! away for too long ([`Error::DeviceLost`]) and one that breaks a rule ([`Error::Broken`]).
//!
//! | file | what |
//! |---|---|
//! | `header` | [`Offload`], [`Checksum`], [`Segmentation`]: the 12 bytes before a frame |
//! | `receive`, `transmit` | the two halves of a pair |
//! | `control`, `settings` | what the card receives, and what it is told, once and again |
//! | `coalesce` | fewer calls of the device, each for more packets |
//! | `config` | link, MTU, address; which features go together |
//! | `stack`, `smoltcp`, `embassy` | a pair for network stacks that want slices |

mod coalesce;
mod config;
mod control;
#[cfg(feature = "embassy")]
mod embassy;
mod error;
mod header;
mod receive;
mod settings;
#[cfg(feature = "smoltcp")]
mod smoltcp;
#[cfg(any(feature = "smoltcp", feature = "embassy"))]
mod stack;
#[cfg(test)]
mod tests;
mod transmit;

pub use coalesce::Coalescing;
pub use config::Link;
pub use control::Control;
#[cfg(feature = "embassy")]
pub use embassy::EmbassyDevice;
pub use error::{Error, SendError, SendErrorKind};
pub use header::{Checksum, Cut, Offload, PartialChecksum, Segmentation};
pub use receive::{Frame, ReceiveStats, Receiver};
#[cfg(feature = "smoltcp")]
pub use smoltcp::SmolDevice;
pub use transmit::{Packet, Transmitter};

use crate::device::{Agree, Channel, Core, Lost, OpenError, Ring, Segments, Submission};
use crate::limits::{
    CONTROL_QUEUE_SIZE, MAX_FRAME, MIN_RECEIVE_BUFFER, NET_QUEUE_SIZE, RECEIVE_BUFFER,
};
use crate::platform::{Arena, DeviceInfo, OutOfArena, Platform};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use config::Shared;
use control::ControlRing;
use core::time::Duration;
use header::HEADER_LEN;
use pv_abi::device::kind;
use pv_abi::virtio::feature;
use pv_abi::virtio::net::feature as net_feature;

/// Features that the driver has a use for.
const KNOWN: u64 = feature::VERSION_1
    | feature::EVENT_IDX
    | feature::INDIRECT_DESC
    | net_feature::CSUM
    | net_feature::GUEST_CSUM
    | net_feature::MTU
    | net_feature::MAC
    | net_feature::GUEST_TSO4
    | net_feature::GUEST_TSO6
    | net_feature::GUEST_ECN
    | net_feature::GUEST_USO4
    | net_feature::GUEST_USO6
    | net_feature::HOST_TSO4
    | net_feature::HOST_TSO6
    | net_feature::HOST_ECN
    | net_feature::HOST_USO
    | net_feature::MRG_RXBUF
    | net_feature::STATUS
    | net_feature::CTRL_VQ
    | net_feature::CTRL_RX
    | net_feature::CTRL_VLAN
    | net_feature::CTRL_MAC_ADDR
    | net_feature::GUEST_ANNOUNCE
    | net_feature::VQ_NOTF_COAL
    | net_feature::NOTF_COAL
    | net_feature::MQ;

/// How a queue pair is set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PairConfig {
    /// The vCPU that will use it and wait for it.
    pub vcpu: u32,
    /// Entries of each of its queues, a power of two; lowered to what the device allows.
    pub size: u16,
}

/// How a card is set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NicConfig<'a> {
    /// Queue pairs, at most as many as the device has.
    pub pairs: &'a [PairConfig],
    /// Bytes of each receive buffer, the header included. A device that cannot merge buffers gets
    /// ones that hold a whole packet of its MTU, if that is more.
    pub buffer_len: usize,
    /// Features that are not to be used although the device has them, in the bits of
    /// [`pv_abi::virtio::net::feature`].
    pub without: u64,
}

/// A card that was opened.
pub struct Opened<P: Platform> {
    /// The card itself.
    pub nic: Nic<P>,
    /// One pair for each that was asked for.
    pub pairs: Vec<(Receiver<P>, Transmitter<P>)>,
    /// The control queue, if the device has one.
    pub control: Option<Control<P>>,
}

/// A network card; a handle that is cheap to clone. Frames go through its queues.
pub struct Nic<P: Platform> {
    shared: Arc<Shared<P>>,
}

/// Opens a network card with one queue pair, for the vCPU that runs this.
///
/// `name` is the embedder's name for the device; the first network card if `None`.
///
/// # Errors
///
/// [`OpenError`]; waits for a device that is not there yet, for a few seconds.
pub fn open<P: Platform>(
    platform: &'static P,
    name: Option<&str>,
) -> Result<(Receiver<P>, Transmitter<P>), OpenError> {
    let pair = PairConfig {
        vcpu: platform.vcpu_index(),
        size: NET_QUEUE_SIZE,
    };
    let config = NicConfig {
        pairs: &[pair],
        buffer_len: RECEIVE_BUFFER,
        without: 0,
    };
    let mut opened = Nic::open(platform, name, &config)?;
    opened.pairs.pop().ok_or(OpenError::BadQueues)
}

/// The requests of a queue that the device has and nobody asked for: none.
enum Never {}

impl Submission for Never {
    fn prepare(&mut self, _segments: &mut Segments) {
        match *self {}
    }
}

/// Entries of a queue that nobody uses: the least that a ring may have.
const UNUSED_SIZE: u16 = 2;

impl<P: Platform> Nic<P> {
    /// Opens a network card with these queue pairs.
    ///
    /// The vCPU of the first one also gets the control queue's events and those of the
    /// configuration.
    ///
    /// # Errors
    ///
    /// [`OpenError`]; waits for a device that is not there yet, for a few seconds.
    pub fn open(
        platform: &'static P,
        name: Option<&str>,
        config: &NicConfig<'_>,
    ) -> Result<Opened<P>, OpenError> {
        let (found, arena) = Core::find(platform, kind::NET, name)?;
        let (info, space) = Core::wait_for_offer(platform, &found)?;
        let wanted = u16::try_from(config.pairs.len()).map_err(|_| OpenError::BadQueues)?;
        let plan = Plan::new(&info, &config::config(&space), config, wanted)?;
        let mut rings: Vec<Arc<dyn Ring>> = Vec::new();
        let mut halves = Vec::with_capacity(config.pairs.len());
        for pair in config.pairs {
            let size = pair.size.min(info.max_queue_size);
            if !size.is_power_of_two() || size < 2 || pair.vcpu >= platform.vcpu_count() {
                return Err(OpenError::BadQueues);
            }
            let index = rings.len() as u16;
            let receive = Arc::new(Channel::new(&info, index, arena, size, pair.vcpu, 0)?);
            let transmit = Arc::new(Channel::new(&info, index + 1, arena, size, pair.vcpu, 0)?);
            rings.push(Arc::clone(&receive) as _);
            rings.push(Arc::clone(&transmit) as _);
            halves.push((receive, transmit, size));
        }
        let vcpu = config.pairs.first().map_or(0, |pair| pair.vcpu);
        let control = plan.control(&info, arena, vcpu, wanted, &mut rings)?;
        let core = Core::bring_up(platform, info, plan.features, plan.agree(), rings)?;
        let shared = Arc::new(Shared::new(core, arena, control.clone(), wanted));
        let mut pairs = Vec::with_capacity(halves.len());
        for (receive, transmit, size) in halves {
            let receiver = Receiver::new(Arc::clone(&shared), receive, size, plan.buffer_len);
            let receiver = receiver.map_err(|error| match error {
                Error::OutOfArena(error) => OpenError::OutOfArena(error),
                Error::DeviceLost(lost) => OpenError::Device(lost),
                _ => OpenError::Device(Lost::Changed),
            })?;
            pairs.push((
                receiver,
                Transmitter::new(Arc::clone(&shared), transmit, size),
            ));
        }
        Ok(Opened {
            nic: Nic::from_shared(&shared),
            pairs,
            control: control.map(|ring| Control::new(Arc::clone(&shared), ring)),
        })
    }

    fn from_shared(shared: &Arc<Shared<P>>) -> Self {
        Nic {
            shared: Arc::clone(shared),
        }
    }

    /// Link, address and MTU, as the configuration says now.
    pub fn link(&self) -> Link {
        self.shared.link()
    }

    /// The card's address.
    pub fn mac(&self) -> [u8; 6] {
        self.link().mac
    }

    /// Virtio features in force.
    pub fn features(&self) -> u64 {
        self.shared.core.features()
    }

    /// Queue pairs that were opened.
    pub fn pairs(&self) -> u16 {
        self.shared.pairs
    }

    /// The generation of the device that is in use; moves when a backend was replaced.
    pub fn generation(&self) -> Option<u32> {
        self.shared.core.generation()
    }

    /// The event that says that the configuration changed: the link went up or down.
    pub fn config_event(&self) -> u32 {
        self.shared.core.info().config_event()
    }

    /// Whether the configuration changed since the last call, on any handle.
    pub fn take_config_change(&self) -> bool {
        self.shared.core.take_config_change()
    }

    /// Wakes every task that waits for something of this card, to look again.
    ///
    /// For executors that do not poll again at the card's events by themselves: call it when one of
    /// them is pending.
    pub fn process(&self) {
        self.shared.wakers.wake();
    }

    /// Says where the card is now, where the device has asked for it ([`Link::announce`]): sends a
    /// reverse ARP request, as every switch on the way learns from, and acknowledges. The device then
    /// asks no more, which shows a moment later, with an event of the configuration.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub fn announce(
        &self,
        transmitter: &mut Transmitter<P>,
        control: &mut Control<P>,
    ) -> Result<(), Error> {
        let mac = self.mac();
        // RFC 903: who am I, from me, to all; padded to the least length on a wire.
        let mut frame = [0; 60];
        frame[..6].fill(0xff);
        frame[6..12].copy_from_slice(&mac);
        frame[12..22].copy_from_slice(&[0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
        frame[22..28].copy_from_slice(&mac);
        frame[32..38].copy_from_slice(&mac);
        transmitter.send(&frame, Offload::default())?;
        control.acknowledge_announce()
    }

    /// How long the device may stay away before its queues fail; a minute unless set.
    pub fn set_loss_timeout(&self, timeout: Duration) {
        let nanoseconds = u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX);
        self.shared.core.set_loss_timeout(nanoseconds);
    }

    /// Starts the device anew and gives it every buffer again; heals a broken queue.
    pub fn reset(&self) {
        self.shared.core.reset();
    }
}

impl<P: Platform> Clone for Nic<P> {
    fn clone(&self) -> Self {
        Nic::from_shared(&self.shared)
    }
}

impl<P: Platform> core::fmt::Debug for Opened<P> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Opened")
            .field("nic", &self.nic)
            .field("pairs", &self.pairs.len())
            .finish_non_exhaustive()
    }
}

impl<P: Platform> core::fmt::Debug for Nic<P> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Nic")
            .field("name", &self.shared.core.info().name())
            .field("link", &self.link())
            .finish_non_exhaustive()
    }
}

/// What was decided before anything is allocated.
struct Plan {
    /// Features to want.
    features: u64,
    /// Index of the control queue.
    control_at: Option<u16>,
    /// Bytes of each receive buffer.
    buffer_len: usize,
    whole_frames: bool,
}

impl Plan {
    fn new(
        info: &DeviceInfo,
        space: &pv_abi::virtio::net::Config,
        config: &NicConfig<'_>,
        wanted: u16,
    ) -> Result<Self, OpenError> {
        let mut known = KNOWN & !(config.without & !feature::VERSION_1);
        if wanted == 1 {
            // With one pair the control queue is the third, whatever the device could do.
            known &= !net_feature::MQ;
        }
        let offered = known & info.features;
        let mut buffer_len = config.buffer_len.max(MIN_RECEIVE_BUFFER);
        if offered & net_feature::MRG_RXBUF == 0 {
            // Header, Ethernet header with a VLAN tag, and a packet of the MTU.
            let said = space.mtu;
            let mtu = match offered & net_feature::MTU {
                0 => config::DEFAULT_MTU,
                _ => said.max(config::DEFAULT_MTU),
            };
            buffer_len = buffer_len.max(HEADER_LEN + 18 + usize::from(mtu));
        }
        let buffer_len = buffer_len.min(HEADER_LEN + MAX_FRAME).next_multiple_of(64);
        let whole_frames = buffer_len >= HEADER_LEN + MAX_FRAME;
        let features = config::consistent(offered, whole_frames);
        let device_pairs = config::pairs(features, space);
        let queues = u32::from(device_pairs) * 2 + u32::from(features & net_feature::CTRL_VQ != 0);
        if wanted == 0 || wanted > device_pairs || queues > u32::from(info.queue_count) {
            return Err(OpenError::BadQueues);
        }
        let control_at = (features & net_feature::CTRL_VQ != 0).then_some(2 * device_pairs);
        // What is not offered now is not taken later either: queues and buffers are made for this.
        let features = features | (known & feature::VERSION_1);
        Ok(Plan {
            features,
            control_at,
            buffer_len,
            whole_frames,
        })
    }

    /// Makes the control queue, and the queues before it that nobody asked for.
    fn control(
        &self,
        info: &DeviceInfo,
        arena: &'static Arena,
        vcpu: u32,
        pairs: u16,
        rings: &mut Vec<Arc<dyn Ring>>,
    ) -> Result<Option<Arc<ControlRing>>, OutOfArena> {
        let Some(at) = self.control_at else {
            return Ok(None);
        };
        while rings.len() < usize::from(at) {
            let index = rings.len() as u16;
            let unused = Channel::<Never>::new(info, index, arena, UNUSED_SIZE, vcpu, 0)?;
            rings.push(Arc::new(unused));
        }
        let size = CONTROL_QUEUE_SIZE.min(info.max_queue_size);
        let channel = Channel::new(info, at, arena, size, vcpu, 2)?;
        let pairs = (self.features & net_feature::MQ != 0).then_some(pairs);
        let ring = Arc::new(ControlRing::new(channel, arena, pairs));
        rings.push(Arc::clone(&ring) as _);
        Ok(Some(ring))
    }

    fn agree(&self) -> Agree {
        let (control_at, whole_frames) = (self.control_at, self.whole_frames);
        Box::new(move |features, offer| config::agree(features, offer, control_at, whole_frames))
    }
}
