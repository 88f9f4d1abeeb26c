//! What the device offers, and its configuration space (virtio 1.3 §5.1.3, §5.1.4).

use super::frame::Mac;
use super::limits::{MAX_QUEUE_PAIRS, MAX_RSS_KEY, MAX_RSS_TABLE};
use super::rss::HASH_TYPES;
use pv_abi::virtio::feature as ring;
use pv_abi::virtio::net::{Config, feature, status};
use zerocopy::IntoBytes;

/// When configuration space is offered to a frontend (the protocol feature `CONFIG`).
///
/// QEMU 7.1 to 8.0 crashes when a network backend offers it, and QEMU of any version keeps this
/// device's configuration itself. What tells it from others is when it says `SET_OWNER`: after it
/// has asked for protocol features, where everybody else begins with it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum OfferConfig {
    /// To frontends that began with `SET_OWNER`.
    #[default]
    Auto,
    /// To all.
    On,
    /// To none.
    Off,
}

/// How a network device shows itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetOptions {
    /// The guest's address.
    pub mac: Mac,
    /// Most bytes in a packet without its Ethernet header, if the driver is to be told.
    pub mtu: Option<u16>,
    /// Pairs of queues, 1 to [`MAX_QUEUE_PAIRS`].
    pub queue_pairs: u16,
    /// Whether frontends can read the configuration.
    pub config: OfferConfig,
    /// Whether only memory is taken that the frontend cannot cut off (`F_SEAL_SHRINK`): where
    /// other frontends depend on this process.
    pub sealed_memory: bool,
}

impl NetOptions {
    /// One pair of queues, and no MTU.
    pub fn with_mac(mac: Mac) -> NetOptions {
        NetOptions {
            mac,
            mtu: None,
            queue_pairs: 1,
            config: OfferConfig::Auto,
            sealed_memory: false,
        }
    }

    /// With as many pairs, brought into range.
    pub fn pairs(mut self, pairs: u16) -> NetOptions {
        self.queue_pairs = pairs.clamp(1, MAX_QUEUE_PAIRS);
        self
    }
}

pub(super) fn features(options: &NetOptions) -> u64 {
    let mut features = ring::VERSION_1
        | ring::EVENT_IDX
        | ring::INDIRECT_DESC
        | ring::IN_ORDER
        | feature::CSUM
        | feature::GUEST_CSUM
        | feature::CTRL_GUEST_OFFLOADS
        | feature::MAC
        | feature::GUEST_TSO4
        | feature::GUEST_TSO6
        | feature::GUEST_ECN
        | feature::HOST_TSO4
        | feature::HOST_TSO6
        | feature::HOST_ECN
        | feature::GUEST_USO4
        | feature::GUEST_USO6
        | feature::HOST_USO
        | feature::MRG_RXBUF
        | feature::STATUS
        | feature::CTRL_VQ
        | feature::CTRL_RX
        | feature::CTRL_RX_EXTRA
        | feature::CTRL_VLAN
        | feature::CTRL_MAC_ADDR
        | feature::GUEST_ANNOUNCE
        | feature::NOTF_COAL
        | feature::VQ_NOTF_COAL
        | feature::HASH_REPORT;
    if options.mtu.is_some() {
        features |= feature::MTU;
    }
    if options.queue_pairs > 1 {
        features |= feature::MQ;
    }
    features
}

/// Configuration space at one moment.
pub(super) fn space(options: &NetOptions, mac: Mac, up: bool, announce: bool) -> Vec<u8> {
    let link = if up { status::LINK_UP } else { 0 };
    let announce = if announce { status::ANNOUNCE } else { 0 };
    let config = Config {
        mac: mac.0,
        status: (link | announce).to_le(),
        max_virtqueue_pairs: options.queue_pairs.to_le(),
        mtu: options.mtu.unwrap_or(0).to_le(),
        speed: u32::MAX,
        duplex: u8::MAX,
        // Both fit their fields.
        rss_max_key_size: MAX_RSS_KEY as u8,
        rss_max_indirection_table_length: (MAX_RSS_TABLE as u16).to_le(),
        supported_hash_types: HASH_TYPES.to_le(),
    };
    config.as_bytes().to_vec()
}
