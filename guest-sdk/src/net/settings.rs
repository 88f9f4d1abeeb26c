//! What a card was told and said yes to: what one that comes back has to hear again.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec::Vec;
use pv_abi::virtio::net::control;

/// Commands of which the last one counts, in the order in which a device that comes back hears them.
const LAST: [(u8, u8); 7] = [
    control::MQ_VQ_PAIRS_SET,
    control::RX_PROMISC,
    control::RX_ALLMULTI,
    control::MAC_ADDR_SET,
    control::MAC_TABLE_SET,
    control::NOTF_COAL_TX_SET,
    control::NOTF_COAL_RX_SET,
];

/// What the device was told, and is told again: "off" as much as "on", for a device may begin with
/// either.
#[derive(Debug, Default)]
pub(super) struct Settings {
    /// What went with the last of each of [`LAST`].
    values: [Option<Vec<u8>>; LAST.len()],
    /// Little-endian, as they are sent.
    pub(super) vlans: BTreeSet<[u8; 2]>,
    /// By index, as it is sent: what single queues were told since all of their kind were.
    queues: BTreeMap<[u8; 2], Vec<u8>>,
}

impl Settings {
    /// The device has done this.
    pub(super) fn done(&mut self, command: (u8, u8), data: &[u8]) {
        let slot = LAST.iter().position(|&setting| setting == command);
        if let Some(value) = slot.and_then(|slot| self.values.get_mut(slot)) {
            *value = Some(data.to_vec());
        }
        match (command, data.first_chunk::<2>()) {
            (control::NOTF_COAL_TX_SET, _) => self.queues.retain(|&[low, _], _| low % 2 == 0),
            (control::NOTF_COAL_RX_SET, _) => self.queues.retain(|&[low, _], _| low % 2 == 1),
            (control::NOTF_COAL_VQ_SET, Some(queue)) => {
                self.queues.insert(*queue, data.to_vec());
            }
            (control::VLAN_ADD, Some(vlan)) => _ = self.vlans.insert(*vlan),
            (control::VLAN_DEL, Some(vlan)) => _ = self.vlans.remove(vlan),
            _ => {}
        }
    }

    /// All of it, to be told again.
    pub(super) fn commands(&self) -> Vec<((u8, u8), Vec<u8>)> {
        let values = LAST.iter().zip(&self.values);
        let values = values.filter_map(|(&command, value)| Some((command, value.clone()?)));
        let vlans = self.vlans.iter();
        let vlans = vlans.map(|vlan| (control::VLAN_ADD, vlan.to_vec()));
        let queues = self.queues.values();
        let queues = queues.map(|data| (control::NOTF_COAL_VQ_SET, data.clone()));
        values.chain(vlans).chain(queues).collect()
    }
}
