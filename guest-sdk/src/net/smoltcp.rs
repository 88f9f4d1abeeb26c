//! A queue pair as the device of a `smoltcp` interface.

use super::stack::{Inbound, Outbound, Port};
use super::{Error, Nic, Receiver, Transmitter};
use crate::limits::MAX_FRAME;
use crate::platform::Platform;
use core::num::NonZeroUsize;
use pv_abi::virtio::net::feature;
use smoltcp::phy::{
    Checksum, ChecksumCapabilities, Device, DeviceCapabilities, Medium, PacketMeta, RxToken,
    SegmentationCapabilities, TxToken,
};
use smoltcp::time::Instant;

/// Bytes of an Ethernet header.
const ETHERNET: usize = 14;

/// A queue pair as `smoltcp` wants it.
///
/// TCP and UDP checksums are never verified by the stack, since the device or this adapter has done
/// it, and are left to the device on the way out where it takes them. TCP segments of up to 64 KiB
/// go out in one piece where the device cuts them.
pub struct SmolDevice<P: Platform> {
    port: Port<P>,
}

impl<P: Platform> SmolDevice<P> {
    /// Over both halves of a pair, on the vCPU that they were opened for.
    pub fn new(receiver: Receiver<P>, transmitter: Transmitter<P>) -> Self {
        SmolDevice {
            port: Port::new(receiver, transmitter),
        }
    }

    /// The card.
    pub fn nic(&self) -> Nic<P> {
        self.port.nic()
    }

    /// The halves.
    pub fn halves(&mut self) -> (&mut Receiver<P>, &mut Transmitter<P>) {
        (
            &mut self.port.inbound.receiver,
            &mut self.port.outbound.transmitter,
        )
    }

    /// Whether the doorbell is rung at [`flush`](Self::flush) only, once for all frames of a poll of
    /// the interface, rather than for each frame.
    pub fn set_batching(&mut self, batching: bool) {
        self.port.outbound.batching = batching;
    }

    /// Shows the device what was sent since the last time.
    pub fn flush(&mut self) {
        self.port.outbound.transmitter.kick();
    }

    /// Asks for an event at the next frame; whether the vCPU may idle now. `false`: poll again.
    #[must_use = "the answer says whether sleeping loses a frame"]
    pub fn arm(&mut self) -> bool {
        let outbound = &mut self.port.outbound;
        // A full queue is waited for as well.
        let room = outbound.has_room() || outbound.transmitter.arm();
        self.port.inbound.receiver.arm() && room
    }

    /// Why there are no frames, if that is because of an error: the stack has no words for it.
    pub fn error(&self) -> Option<Error> {
        self.port.error()
    }

    /// Frames that were dropped: those that came with a wrong checksum, and those that were not sent.
    pub fn dropped(&self) -> (u64, u64) {
        (self.port.inbound.bad_checksums, self.port.outbound.unsent)
    }
}

impl<P: Platform> Device for SmolDevice<P> {
    type RxToken<'a> = SmolRx<'a, P>;
    type TxToken<'a> = SmolTx<'a, P>;

    fn receive(&mut self, _now: Instant) -> Option<(SmolRx<'_, P>, SmolTx<'_, P>)> {
        let Port { inbound, outbound } = &mut self.port;
        // A frame may be answered at once; without room for that, it waits in its queue.
        if !outbound.has_room() || !inbound.next() {
            return None;
        }
        Some((SmolRx(inbound), SmolTx::new(outbound)))
    }

    fn transmit(&mut self, _now: Instant) -> Option<SmolTx<'_, P>> {
        let outbound = &mut self.port.outbound;
        outbound.has_room().then(|| SmolTx::new(outbound))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let nic = self.port.nic();
        let features = nic.features();
        let mut checksum = ChecksumCapabilities::default();
        let done = match features & feature::CSUM {
            0 => Checksum::Tx,
            _ => Checksum::None,
        };
        checksum.tcp = done;
        checksum.udp = done;
        // IP's lengths have 16 bits.
        let most = NonZeroUsize::new((ETHERNET + usize::from(u16::MAX)).min(MAX_FRAME));
        let mut segmentation = SegmentationCapabilities::default();
        segmentation.tcpv4 = most.filter(|_| features & feature::HOST_TSO4 != 0);
        segmentation.tcpv6 = most.filter(|_| features & feature::HOST_TSO6 != 0);
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = ETHERNET + usize::from(nic.link().mtu);
        capabilities.checksum = checksum;
        capabilities.segmentation = segmentation;
        capabilities
    }
}

/// A frame that came.
pub struct SmolRx<'a, P: Platform>(&'a mut Inbound<P>);

impl<P: Platform> RxToken for SmolRx<'_, P> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, take: F) -> R {
        take(&self.0.scratch)
    }
}

/// Room for a frame to send.
pub struct SmolTx<'a, P: Platform> {
    outbound: &'a mut Outbound<P>,
    cut: Option<u16>,
}

impl<'a, P: Platform> SmolTx<'a, P> {
    fn new(outbound: &'a mut Outbound<P>) -> Self {
        SmolTx {
            outbound,
            cut: None,
        }
    }
}

impl<P: Platform> TxToken for SmolTx<'_, P> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, fill: F) -> R {
        self.outbound.send(len, self.cut, fill)
    }

    fn set_meta(&mut self, meta: PacketMeta) {
        self.cut = meta.segmentation_offload_size.map(Into::into);
    }
}

impl<P: Platform> core::fmt::Debug for SmolDevice<P> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("SmolDevice")
            .field("nic", &self.nic())
            .finish_non_exhaustive()
    }
}

impl<P: Platform> core::fmt::Debug for SmolRx<'_, P> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("SmolRx").finish_non_exhaustive()
    }
}

impl<P: Platform> core::fmt::Debug for SmolTx<'_, P> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("SmolTx").finish_non_exhaustive()
    }
}
