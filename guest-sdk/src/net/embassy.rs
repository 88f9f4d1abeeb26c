//! A queue pair as the driver of an `embassy-net` stack.

use super::stack::{Inbound, Outbound, Port};
use super::{Error, Nic, Receiver, Transmitter};
use crate::platform::Platform;
use core::task::{Context, Poll};
use embassy_net_driver::{
    Capabilities, Checksum, Driver, HardwareAddress, LinkState, RxToken, TxToken,
};
use pv_abi::virtio::net::feature;

/// Bytes of an Ethernet header.
const ETHERNET: usize = 14;

/// A queue pair as `embassy-net` wants it.
///
/// The stack's task is woken by [`Nic::process`], which whoever gets the card's events calls: the
/// queues' ([`Receiver::event`], [`Transmitter::event`]) and the configuration's.
pub struct EmbassyDevice<P: Platform> {
    port: Port<P>,
}

impl<P: Platform> EmbassyDevice<P> {
    /// Over both halves of a pair, on the vCPU that they were opened for.
    pub fn new(receiver: Receiver<P>, transmitter: Transmitter<P>) -> Self {
        EmbassyDevice {
            port: Port::new(receiver, transmitter),
        }
    }

    /// The card.
    pub fn nic(&self) -> Nic<P> {
        self.port.nic()
    }

    /// Why there are no frames, if that is because of an error: the stack has no words for it.
    pub fn error(&self) -> Option<Error> {
        self.port.error()
    }
}

/// Whether there is room to send; the task is woken when there is.
fn room<P: Platform>(outbound: &mut Outbound<P>, context: &mut Context<'_>) -> bool {
    match outbound.transmitter.poll_ready(context) {
        Poll::Ready(Ok(())) => outbound.error = None,
        Poll::Ready(Err(error)) => outbound.error = Some(error),
        Poll::Pending => return false,
    }
    outbound.error.is_none()
}

impl<P: Platform> Driver for EmbassyDevice<P> {
    type RxToken<'a> = EmbassyRx<'a, P>;
    type TxToken<'a> = EmbassyTx<'a, P>;

    fn receive(
        &mut self,
        context: &mut Context<'_>,
    ) -> Option<(EmbassyRx<'_, P>, EmbassyTx<'_, P>)> {
        let Port { inbound, outbound } = &mut self.port;
        if !room(outbound, context) {
            return None;
        }
        while !inbound.next() {
            inbound.receiver.shared.wakers.register(context.waker());
            if inbound.error.is_some() || inbound.receiver.arm() {
                return None;
            }
        }
        Some((EmbassyRx(inbound), EmbassyTx(outbound)))
    }

    fn transmit(&mut self, context: &mut Context<'_>) -> Option<EmbassyTx<'_, P>> {
        let outbound = &mut self.port.outbound;
        room(outbound, context).then_some(EmbassyTx(outbound))
    }

    fn link_state(&mut self, context: &mut Context<'_>) -> LinkState {
        let receiver = &self.port.inbound.receiver;
        receiver.shared.wakers.register(context.waker());
        if receiver.nic().link().up {
            LinkState::Up
        } else {
            LinkState::Down
        }
    }

    fn capabilities(&self) -> Capabilities {
        let nic = self.port.nic();
        let done = match nic.features() & feature::CSUM {
            0 => Checksum::Tx,
            _ => Checksum::None,
        };
        let mut capabilities = Capabilities::default();
        capabilities.max_transmission_unit = ETHERNET + usize::from(nic.link().mtu);
        capabilities.checksum.tcp = done;
        capabilities.checksum.udp = done;
        capabilities
    }

    fn hardware_address(&self) -> HardwareAddress {
        HardwareAddress::Ethernet(self.port.nic().mac())
    }
}

/// A frame that came.
pub struct EmbassyRx<'a, P: Platform>(&'a mut Inbound<P>);

impl<P: Platform> RxToken for EmbassyRx<'_, P> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, take: F) -> R {
        take(&mut self.0.scratch)
    }
}

/// Room for a frame to send.
pub struct EmbassyTx<'a, P: Platform>(&'a mut Outbound<P>);

impl<P: Platform> TxToken for EmbassyTx<'_, P> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, fill: F) -> R {
        self.0.send(len, None, fill)
    }
}

impl<P: Platform> core::fmt::Debug for EmbassyDevice<P> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("EmbassyDevice")
            .field("nic", &self.nic())
            .finish_non_exhaustive()
    }
}

impl<P: Platform> core::fmt::Debug for EmbassyRx<'_, P> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("EmbassyRx").finish_non_exhaustive()
    }
}

impl<P: Platform> core::fmt::Debug for EmbassyTx<'_, P> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("EmbassyTx").finish_non_exhaustive()
    }
}
