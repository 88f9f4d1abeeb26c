//! The network card (virtio 1.3 §5.1), served over vhost-user.
//!
//! Configuration space is put together here, because what is in it is partly the embedder's (the
//! address, the MTU), partly the VMM's ([`LinkStatus`]), and partly the backend's, which may have
//! none to show (QEMU's network backends never need one).

use super::Offer;
use super::vhost_user::{DeviceConfig, Model, Served};
use crate::limits::{MAX_MTU, MIN_MTU};
use pv_abi::device::kind;
use pv_abi::limits::MAX_QUEUES;
use pv_abi::virtio::net::{Config, feature, status};
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::mem::offset_of;
use zerocopy::{FromBytes, IntoBytes};

/// A network card and the vhost-user backend that serves it.
pub type NetConfig = DeviceConfig<Net>;

/// Lengths that backends answer: all of it, and up to the MTU.
const CONFIG_LENS: [usize; 2] = [size_of::<Config>(), offset_of!(Config, speed)];
/// What needs a control queue.
const OF_CONTROL: u64 = feature::CTRL_GUEST_OFFLOADS
    | feature::CTRL_RX
    | feature::CTRL_VLAN
    | feature::CTRL_RX_EXTRA
    | feature::GUEST_ANNOUNCE
    | feature::CTRL_MAC_ADDR
    | feature::VQ_NOTF_COAL
    | feature::NOTF_COAL
    | OF_PAIRS
    | feature::HASH_REPORT;
/// What needs a backend that knows the card's address.
const OF_FILTERS: u64 = feature::CTRL_RX | feature::CTRL_RX_EXTRA;
/// What needs several pairs of queues.
const OF_PAIRS: u64 = feature::MQ | feature::RSS;
/// What needs fields that only a backend can fill in.
const OF_BACKEND_CONFIG: u64 = feature::RSS | feature::HASH_REPORT | SPEED_DUPLEX;
/// `speed` and `duplex` are valid.
const SPEED_DUPLEX: u64 = 1 << 63;
/// A stand-in for another card, which nothing here would bring about.
const STANDBY: u64 = 1 << 62;

/// What a network card has of its own.
#[derive(Clone, Debug)]
pub struct Net {
    pairs: u16,
    mac: Option<[u8; 6]>,
    /// The address where nobody else gives one: the same for the life of the VM.
    fallback: [u8; 6],
    mtu: Option<u16>,
}

impl Default for Net {
    fn default() -> Net {
        let [a, b, c, d, e, ..] = RandomState::new().hash_one(0).to_ne_bytes();
        Net {
            pairs: 1,
            mac: None,
            // Locally administered, and not a group.
            fallback: [0x02, a, b, c, d, e],
            mtu: None,
        }
    }
}

impl NetConfig {
    /// Pairs of queues, 1 to 15; 1 if none is given. The backend must have as many.
    ///
    /// Beside them the card has a control queue, for backends that serve one.
    pub fn queue_pairs(mut self, pairs: u16) -> NetConfig {
        self.model.pairs = pairs;
        self
    }

    /// The card's address. Without one it is the backend's, or a random one.
    ///
    /// Give the backend the same (`pv-netd --mac`): one that knows of another, or of none, cannot
    /// filter for this card, and receive filters are not offered then.
    pub fn mac(mut self, mac: [u8; 6]) -> NetConfig {
        self.model.mac = Some(mac);
        self
    }

    /// Most bytes in a packet without its Ethernet header, 68 to 65535; told to guest and backend.
    /// Without one it is what the backend says, if it says so.
    pub fn mtu(mut self, mtu: u16) -> NetConfig {
        self.model.mtu = Some(mtu);
        self
    }
}

impl Model for Net {
    fn kind(&self) -> u32 {
        kind::NET
    }

    fn queues(&self) -> u16 {
        // Pairs out of range are refused by this number; it must not wrap.
        self.pairs.saturating_mul(2).saturating_add(1)
    }

    fn config_lens(&self) -> &'static [usize] {
        &CONFIG_LENS
    }

    fn check(&self) -> Result<(), (&'static str, u64, u64, u64)> {
        let most = (MAX_QUEUES - 1) / 2;
        if !(1..=most).contains(&u32::from(self.pairs)) {
            let what = "the number of queue pairs";
            return Err((what, self.pairs.into(), 1, most.into()));
        }
        let group = self.mac.is_some_and(|[first, ..]| first & 1 != 0);
        if group {
            return Err(("the group bit of the address", 1, 0, 0));
        }
        match self.mtu {
            Some(mtu) if !(MIN_MTU..=MAX_MTU).contains(&mtu) => {
                Err(("the MTU", mtu.into(), MIN_MTU.into(), MAX_MTU.into()))
            }
            _ => Ok(()),
        }
    }

    fn offer(&self, served: &Served) -> io::Result<Offer> {
        let mut features = served.features & !STANDBY;
        if features & feature::CTRL_VQ == 0 {
            features &= !OF_CONTROL;
        }
        if self.pairs == 1 {
            // The control queue is the third then, whatever the backend could do.
            features &= !OF_PAIRS;
        }
        if served.config.is_none() {
            features &= !OF_BACKEND_CONFIG;
        }
        served.need_queues(2 * self.pairs + u16::from(features & feature::CTRL_VQ != 0))?;
        let mut config = Config::default();
        if let Some(bytes) = &served.config {
            for (to, from) in config.as_mut_bytes().iter_mut().zip(bytes) {
                *to = *from;
            }
        }
        if features & OF_PAIRS != 0 && served.config.is_some() {
            self.same_pairs(config.max_virtqueue_pairs)?;
        }
        let backend_mac = config.mac;
        let theirs = served.features & feature::MAC != 0 && served.config.is_some();
        config.mac = match self.mac {
            Some(mac) => mac,
            None if theirs => config.mac,
            None => self.fallback,
        };
        if !theirs || config.mac != backend_mac {
            // It would let through what is for the address that it knows of.
            features &= !OF_FILTERS;
        }
        let says_status = served.features & feature::STATUS != 0 && served.config.is_some();
        if !says_status {
            config.status = status::LINK_UP;
        }
        if !says_status || !served.tells {
            // Nobody would ask the guest, or nobody hear that it is done.
            features &= !feature::GUEST_ANNOUNCE;
        }
        config.max_virtqueue_pairs = self.pairs;
        match self.mtu {
            Some(mtu) => {
                config.mtu = mtu;
                features |= feature::MTU;
            }
            None if served.config.is_none() => features &= !feature::MTU,
            None => {}
        }
        Ok(Offer {
            features: features | feature::MAC | feature::STATUS,
            config: config.as_bytes().to_vec(),
        })
    }

    fn mtu(&self) -> Option<u16> {
        self.mtu
    }
}

impl Net {
    /// The place of the control queue follows from the number of pairs, so both must mean the same.
    fn same_pairs(&self, backend: u16) -> io::Result<()> {
        if backend == self.pairs {
            return Ok(());
        }
        Err(io::Error::other(format!(
            "the backend has {backend} pairs of queues and the card {}; give both the same number",
            self.pairs
        )))
    }
}

/// What the VMM has to say about a card's link, beside the backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LinkStatus {
    /// The embedder has not taken it down.
    pub(crate) up: bool,
    /// The card is somewhere else than it was, behind a new backend or on a new host, and the network
    /// has not been told. Who tells it is the backend, and the guest when the backend asks it to: the
    /// bit `ANNOUNCE` is the backend's, which hears when the guest is done.
    pub(crate) moved: bool,
}

impl LinkStatus {
    pub(crate) const NEW: LinkStatus = LinkStatus {
        up: true,
        moved: false,
    };

    /// Puts it into a configuration space.
    pub(crate) fn apply(self, space: &mut [u8]) {
        let Ok((config, _)) = Config::mut_from_prefix(space) else {
            return;
        };
        if !self.up {
            config.status &= !status::LINK_UP;
        }
    }
}

/// The address in a configuration space.
pub(crate) fn mac(space: &[u8]) -> Option<[u8; 6]> {
    Some(Config::read_from_prefix(space).ok()?.0.mac)
}

#[cfg(test)]
mod tests {
    use super::*;
    use pv_abi::virtio::feature::VERSION_1;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];

    /// A backend that has everything, in so many pairs.
    fn full(pairs: u16) -> Served {
        let config = Config {
            mac: MAC,
            status: status::LINK_UP,
            max_virtqueue_pairs: pairs,
            mtu: 1400,
            ..Config::default()
        };
        Served {
            features: VERSION_1
                | OF_CONTROL
                | feature::CTRL_VQ
                | feature::MTU
                | feature::MAC
                | feature::STATUS
                | STANDBY,
            queues: u64::from(2 * pairs + 1),
            config: Some(config.as_bytes().to_vec()),
            tells: true,
        }
    }

    fn offered(net: &Net, served: &Served) -> (u64, Config) {
        let offer = net.offer(served).unwrap();
        (
            offer.features,
            Config::read_from_bytes(&offer.config).unwrap(),
        )
    }

    #[test]
    fn what_the_backend_says_unless_the_embedder_does() {
        let (features, config) = offered(&Net::default(), &full(1));
        assert_eq!((config.mac, { config.mtu }), (MAC, 1400));
        assert_eq!(features & (OF_PAIRS | STANDBY), 0);
        assert_ne!(features & feature::GUEST_ANNOUNCE, 0);
        let own = Net {
            mac: Some([6; 6]),
            mtu: Some(9000),
            ..Net::default()
        };
        let (_, config) = offered(&own, &full(1));
        assert_eq!((config.mac, { config.mtu }), ([6; 6], 9000));
        assert_ne!(features & OF_FILTERS, 0);
        let strange = offered(&own, &full(1)).0;
        assert_eq!(strange & (OF_FILTERS | feature::CTRL_VQ), feature::CTRL_VQ);
        let mut down = full(1);
        down.config.as_mut().unwrap()[6] = 0;
        assert_eq!({ offered(&own, &down).1.status }, 0);
        // Who asks a guest to announce itself has a status, and says when that is over.
        for (lacks, tells) in [(feature::STATUS, true), (0, false)] {
            let mut served = full(1);
            served.features &= !lacks;
            served.tells = tells;
            assert_eq!(
                offered(&own, &served).0 & feature::GUEST_ANNOUNCE,
                0,
                "{tells}"
            );
        }
    }

    #[test]
    fn a_backend_without_configuration_gets_one() {
        let bare = Served {
            config: None,
            ..full(1)
        };
        let net = Net::default();
        let (features, config) = offered(&net, &bare);
        assert_eq!(config.mac, net.fallback);
        assert_eq!(net.fallback[0] & 3, 2);
        assert_eq!({ config.status }, status::LINK_UP);
        assert_eq!({ config.max_virtqueue_pairs }, 1);
        assert_eq!(
            features & (OF_BACKEND_CONFIG | OF_FILTERS | feature::MTU | feature::GUEST_ANNOUNCE),
            0
        );
        assert_ne!(features & feature::MAC, 0);
        let (again, other) = (offered(&net, &bare).1, offered(&Net::default(), &bare).1);
        assert_eq!(again, config, "not the same after a reconnect");
        assert_ne!(other.mac, config.mac, "not random");
    }

    #[test]
    fn queues_and_the_control_queue() {
        let two = Net {
            pairs: 2,
            ..Net::default()
        };
        assert_eq!(two.queues(), 5);
        assert_ne!(offered(&two, &full(2)).0 & feature::MQ, 0);
        let error = two.offer(&full(4)).unwrap_err().to_string();
        assert!(error.contains("4 pairs"), "{error}");
        let error = two.offer(&full(1)).unwrap_err().to_string();
        assert!(error.contains("serves 3 queues"), "{error}");
        // Without a control queue the pairs are enough, and what goes through it is gone.
        let mut plain = full(2);
        plain.features &= !feature::CTRL_VQ;
        plain.queues = 4;
        assert_eq!(offered(&two, &plain).0 & OF_CONTROL, 0);
        let huge = Net {
            pairs: u16::MAX,
            ..Net::default()
        };
        assert_eq!(huge.queues(), u16::MAX);
    }

    #[test]
    fn the_link_is_up_where_all_agree() {
        let space = |link: LinkStatus, status: u16| {
            let mut config = Config {
                status,
                ..Config::default()
            };
            link.apply(config.as_mut_bytes());
            config.status
        };
        let down = LinkStatus {
            up: false,
            moved: true,
        };
        assert_eq!(space(LinkStatus::NEW, status::LINK_UP), status::LINK_UP);
        assert_eq!(space(LinkStatus::NEW, 0), 0);
        assert_eq!(space(down, status::LINK_UP), 0);
        // What the backend asks for is not the link's.
        assert_eq!(
            space(down, status::LINK_UP | status::ANNOUNCE),
            status::ANNOUNCE
        );
        down.apply(&mut [0; 3]);
    }

    #[test]
    fn settings_out_of_range_are_named() {
        let with = |mtu, mac| Net {
            mtu,
            mac,
            ..Net::default()
        };
        assert!(with(Some(68), Some(MAC)).check().is_ok());
        assert!(with(Some(67), None).check().is_err());
        assert!(with(None, Some([1; 6])).check().is_err());
        for (pairs, fine) in [(0, false), (1, true), (15, true), (16, false)] {
            let net = Net {
                pairs,
                ..Net::default()
            };
            assert_eq!(net.check().is_ok(), fine, "{pairs}");
            assert!(!fine || u32::from(net.queues()) <= MAX_QUEUES);
        }
    }
}
