//! What a card is like, and what its handles share.

use super::control::ControlRing;
use crate::device::{Core, Offer, Wakers};
use crate::platform::{Arena, Platform};
use alloc::sync::Arc;
use pv_abi::limits::MAX_CONFIG;
use pv_abi::virtio::net::{Config, feature, status};
use zerocopy::FromBytes;

/// Bytes of an IP packet where the device does not say: Ethernet's.
pub(super) const DEFAULT_MTU: u16 = 1500;

/// What the configuration says about the card now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// Whether the link is up; always, where the device does not say.
    pub up: bool,
    /// Whether the device asks the driver to say where it is: [`Nic::announce`](super::Nic::announce).
    pub announce: bool,
    /// Bytes of the largest IP packet; 1500 where the device does not say.
    pub mtu: u16,
    /// The card's address; a locally administered one where the device gives none.
    pub mac: [u8; 6],
}

/// What the queues of one card share.
pub(crate) struct Shared<P: Platform> {
    pub(crate) core: Core<P>,
    pub(crate) arena: &'static Arena,
    pub(crate) control: Option<Arc<ControlRing>>,
    /// Queue pairs that were opened.
    pub(crate) pairs: u16,
    /// Tasks that wait for something of this card.
    pub(super) wakers: Wakers,
}

impl<P: Platform> Shared<P> {
    pub(super) fn new(
        core: Core<P>,
        arena: &'static Arena,
        control: Option<Arc<ControlRing>>,
        pairs: u16,
    ) -> Self {
        Shared {
            core,
            arena,
            control,
            pairs,
            wakers: Wakers::default(),
        }
    }

    pub(super) fn link(&self) -> Link {
        let (mut bytes, len) = self.core.config();
        bytes[len..].fill(0);
        let config = config(&bytes);
        let features = self.core.features();
        let has = |bit: u64| features & bit != 0;
        let mtu = config.mtu;
        Link {
            up: !has(feature::STATUS) || config.status & status::LINK_UP != 0,
            announce: has(feature::GUEST_ANNOUNCE) && config.status & status::ANNOUNCE != 0,
            // The least of IPv4; below, the field is as good as absent (virtio 1.3 §5.1.4.1).
            mtu: if has(feature::MTU) && mtu >= 68 {
                mtu
            } else {
                DEFAULT_MTU
            },
            mac: if has(feature::MAC) {
                config.mac
            } else {
                // Without an address of its own: the device's index makes it one of its kind here.
                [0x02, 0x50, 0x56, 0, 0, self.core.info().index as u8]
            },
        }
    }

    /// Commands that a device that came back is yet to answer are looked after by whoever polls.
    pub(super) fn look_after_control(&self) {
        if let Some(control) = &self.control
            && control.is_replaying()
        {
            control.pump(&self.core);
        }
    }
}

/// The configuration, zeroes where there is none.
pub(super) fn config(bytes: &[u8; MAX_CONFIG]) -> Config {
    Config::read_from_prefix(bytes).map_or_else(|_| Config::default(), |(config, _)| config)
}

/// Queue pairs that a device with these features has; the control queue comes after them.
pub(super) fn pairs(features: u64, config: &Config) -> u16 {
    if features & feature::MQ == 0 {
        return 1;
    }
    config.max_virtqueue_pairs.max(1)
}

/// Drops the features that need one that is not there (virtio 1.3 §5.1.3.1). `whole_frames` is
/// whether a receive buffer holds the largest frame.
pub(super) fn consistent(features: u64, whole_frames: bool) -> u64 {
    const RULES: [(u64, u64); 6] = [
        (
            feature::CTRL_VQ,
            feature::CTRL_RX
                | feature::CTRL_VLAN
                | feature::GUEST_ANNOUNCE
                | feature::MQ
                | feature::CTRL_MAC_ADDR
                | feature::VQ_NOTF_COAL
                | feature::NOTF_COAL,
        ),
        (feature::STATUS, feature::GUEST_ANNOUNCE),
        (feature::CSUM, HOST_CUTS | feature::HOST_ECN),
        (feature::GUEST_CSUM, GUEST_CUTS | feature::GUEST_ECN),
        (feature::HOST_TSO4 | feature::HOST_TSO6, feature::HOST_ECN),
        (
            feature::GUEST_TSO4 | feature::GUEST_TSO6,
            feature::GUEST_ECN,
        ),
    ];
    let mut features = features;
    if features & feature::MRG_RXBUF == 0 && !whole_frames {
        features &= !(GUEST_CUTS | feature::GUEST_ECN);
    }
    for (any_of, dependent) in RULES {
        if features & any_of == 0 {
            features &= !dependent;
        }
    }
    features
}

const HOST_CUTS: u64 = feature::HOST_TSO4 | feature::HOST_TSO6 | feature::HOST_USO;
const GUEST_CUTS: u64 =
    feature::GUEST_TSO4 | feature::GUEST_TSO6 | feature::GUEST_USO4 | feature::GUEST_USO6;

/// The features to accept, if the control queue still is where it was set up.
pub(super) fn agree(
    features: u64,
    offer: &Offer<'_>,
    control_at: Option<u16>,
    whole_frames: bool,
) -> Option<u64> {
    let features = consistent(features, whole_frames);
    let place = 2 * u32::from(pairs(features, &config(offer.config)));
    match control_at {
        Some(at) => {
            let there = features & feature::CTRL_VQ != 0 && place == u32::from(at);
            there.then_some(features)
        }
        None => Some(features & !feature::CTRL_VQ).map(|f| consistent(f, whole_frames)),
    }
    .filter(|_| offer.queues >= 2)
}
