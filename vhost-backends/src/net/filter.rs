//! Which frames a guest wants (virtio 1.3 §5.1.6.5.1, §5.1.6.5.2, §5.1.6.5.3).

use super::frame::{Frame, Mac};
use super::limits::MAX_FILTER_ADDRESSES;

/// The receive filter. At first everything is let through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Filter {
    pub(super) promiscuous: bool,
    pub(super) all_multicast: bool,
    pub(super) all_unicast: bool,
    pub(super) no_multicast: bool,
    pub(super) no_unicast: bool,
    pub(super) no_broadcast: bool,
    pub(super) mac: Mac,
    unicast: Addresses,
    multicast: Addresses,
    /// One bit for each VLAN; `None` as long as the driver does not filter them.
    vlans: Option<Box<[u64; 64]>>,
}

impl Filter {
    pub(super) fn open(mac: Mac) -> Filter {
        Filter {
            promiscuous: true,
            all_multicast: false,
            all_unicast: false,
            no_multicast: false,
            no_unicast: false,
            no_broadcast: false,
            mac,
            unicast: Addresses::default(),
            multicast: Addresses::default(),
            vlans: None,
        }
    }

    /// Whether the guest wants this frame.
    pub(super) fn takes(&self, frame: &Frame<'_>) -> bool {
        self.promiscuous || self.wants(frame.destination(), frame.vlan())
    }

    fn wants(&self, to: Mac, vlan: Option<u16>) -> bool {
        if let (Some(vlans), Some(id)) = (&self.vlans, vlan) {
            let word = vlans.get(usize::from(id / 64)).copied().unwrap_or(0);
            if word >> (id % 64) & 1 == 0 {
                return false;
            }
        }
        if to.is_broadcast() {
            !self.no_broadcast
        } else if to.is_group() {
            !self.no_multicast && (self.all_multicast || self.multicast.has(to))
        } else {
            !self.no_unicast && (self.all_unicast || to == self.mac || self.unicast.has(to))
        }
    }

    /// Filters VLANs from here on: none is wanted until it is added.
    pub(super) fn filter_vlans(&mut self) {
        self.vlans.get_or_insert_with(|| Box::new([0; 64]));
    }

    /// Whether there is such a VLAN.
    pub(super) fn set_vlan(&mut self, id: u16, wanted: bool) -> bool {
        let vlans = self.vlans.get_or_insert_with(|| Box::new([0; 64]));
        let Some(word) = vlans.get_mut(usize::from(id / 64)) else {
            return false;
        };
        let bit = 1 << (id % 64);
        if wanted {
            *word |= bit;
        } else {
            *word &= !bit;
        }
        true
    }

    /// Exchanges both tables of addresses.
    pub(super) fn set_tables(&mut self, unicast: &[u8], multicast: &[u8]) {
        self.unicast = Addresses::parse(unicast);
        self.multicast = Addresses::parse(multicast);
    }
}

/// A table of addresses; one that is too long lets all through, as drivers expect.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Addresses {
    list: Vec<Mac>,
    overflow: bool,
}

impl Addresses {
    fn parse(bytes: &[u8]) -> Addresses {
        let (macs, _) = bytes.as_chunks::<6>();
        if macs.len() > MAX_FILTER_ADDRESSES {
            return Addresses {
                list: Vec::new(),
                overflow: true,
            };
        }
        Addresses {
            list: macs.iter().map(|mac| Mac(*mac)).collect(),
            overflow: false,
        }
    }

    fn has(&self, mac: Mac) -> bool {
        self.overflow || self.list.contains(&mac)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: Mac = Mac([2, 0, 0, 0, 0, 1]);
    const OTHER: Mac = Mac([2, 0, 0, 0, 0, 2]);
    const GROUP: Mac = Mac([3, 0, 0, 0, 0, 3]);
    const ALL: Mac = Mac([0xff; 6]);

    fn closed() -> Filter {
        Filter {
            promiscuous: false,
            ..Filter::open(OURS)
        }
    }

    #[test]
    fn by_address() {
        let mut filter = closed();
        let wants = |filter: &Filter, mac| filter.wants(mac, None);
        assert!(wants(&filter, OURS) && wants(&filter, ALL));
        assert!(!wants(&filter, OTHER) && !wants(&filter, GROUP));
        filter.set_tables(&OTHER.0, &GROUP.0);
        assert!(wants(&filter, OTHER) && wants(&filter, GROUP));
        filter.set_tables(&[], &[]);
        assert!(!wants(&filter, OTHER) && !wants(&filter, GROUP));
        filter.all_multicast = true;
        filter.all_unicast = true;
        assert!(wants(&filter, OTHER) && wants(&filter, GROUP));
        filter.no_unicast = true;
        filter.no_multicast = true;
        filter.no_broadcast = true;
        for mac in [OURS, OTHER, GROUP, ALL] {
            assert!(!wants(&filter, mac));
        }
    }

    #[test]
    fn a_table_that_is_too_long_lets_all_through() {
        let mut filter = closed();
        let table = OURS.0.repeat(MAX_FILTER_ADDRESSES + 1);
        filter.set_tables(&table, &[]);
        assert!(filter.wants(OTHER, None));
        assert!(!filter.wants(GROUP, None), "the other table is empty");
        filter.set_tables(&table[6..], &table);
        assert!(!filter.wants(OTHER, None));
        assert!(filter.wants(GROUP, None));
    }

    #[test]
    fn by_vlan() {
        let mut filter = closed();
        assert!(filter.wants(OURS, Some(7)), "not filtered yet");
        filter.filter_vlans();
        assert!(!filter.wants(OURS, Some(7)) && filter.wants(OURS, None));
        assert!(filter.set_vlan(7, true) && filter.set_vlan(4095, true));
        assert!(filter.wants(OURS, Some(7)) && filter.wants(OURS, Some(4095)));
        assert!(filter.set_vlan(7, false));
        assert!(!filter.wants(OURS, Some(7)));
        assert!(!filter.set_vlan(4096, true), "there is no such VLAN");
    }
}
