//! The control queue (virtio 1.3 §5.1.6.5): a thread that carries out commands.

use super::coalesce::Wish;
use super::limits::{MAX_BATCH, MAX_CHANGE_BURST, MAX_CHANGE_RATE, MAX_CONTROL_BYTES};
use super::port::Port;
use super::rss::Hashing;
use super::worker::{self, Wake};
use super::{Link, Offloads};
use crate::limit::{Limiter, Limits};
use crate::ring::{Completion, DeviceRing, OwnedChain, Ring};
use crate::session::quota::PEER_LINES;
use crate::session::{QueueSetup, QueueStop, QueueWorker};
use pv_abi::virtio::net::{control, feature};
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Starts the control queue.
pub(super) fn spawn(
    link: Arc<Link>,
    port: Arc<dyn Port>,
    setup: QueueSetup,
) -> io::Result<Box<dyn QueueWorker>> {
    if setup.features & feature::CTRL_VLAN != 0 {
        link.change_filter(super::Filter::filter_vlans);
    }
    // Before the frontend hears that the queue is served.
    let announces = setup.features & feature::GUEST_ANNOUNCE != 0;
    link.announcement.set_able(announces);
    worker::spawn("net-control".into(), setup, None, move |setup, wake| {
        let (call, err) = (setup.call, setup.err);
        let mut ring = setup.ring;
        let commands = Commands {
            link,
            port,
            features: setup.features,
            changes: Limiter::new(Limits {
                iops: MAX_CHANGE_RATE,
                iops_burst: MAX_CHANGE_BURST,
                ..Limits::default()
            }),
        };
        let mut retired = false;
        while !wake.stop.is_set() {
            let hold = commands.changes.delay();
            if commands.turn(&mut ring) {
                if ring.should_signal() {
                    call.signal();
                }
                continue;
            }
            if let Some(reason) = ring.retired()
                && !std::mem::replace(&mut retired, true)
            {
                commands.link.ring_retired(&reason);
                err.signal();
            }
            if let Err(error) = rest(&mut ring, &wake, hold) {
                if PEER_LINES.may_say() {
                    tracing::error!(%error, "control queue stopped");
                }
                err.signal();
                break;
            }
        }
        commands.link.announcement.set_able(false);
        QueueStop {
            ring: ring.save(),
            retired: ring.retired(),
        }
    })
}

fn rest(ring: &mut Ring, wake: &Wake, hold: Option<Duration>) -> io::Result<()> {
    if hold.is_none() && ring.arm() {
        return Ok(());
    }
    wake.for_kick(hold)
}

struct Commands {
    link: Arc<Link>,
    port: Arc<dyn Port>,
    features: u64,
    /// Changes that the host's network hears of.
    changes: Limiter,
}

impl Commands {
    /// Carries out what is there. Whether there was anything.
    fn turn(&self, ring: &mut Ring) -> bool {
        let memory = Arc::clone(ring.memory());
        let mut done = Vec::new();
        while done.len() < MAX_BATCH && self.changes.delay().is_none() {
            let Ok(Some(chain)) = ring.pop() else { break };
            let outcome = read(&chain, &memory).and_then(|bytes| {
                self.carry_out(&bytes)?;
                let result = self.result(&bytes);
                // Behind the answer.
                let fits = result.is_empty() || chain.write_at(&memory, 1, &result).is_ok();
                fits.then_some(result.len())
            });
            self.link.stats.command(outcome.is_some());
            let (answer, result) = match outcome {
                Some(len) => (control::OK, len),
                None => (control::ERR, 0),
            };
            // The answer is the first byte that the device writes; there may be nowhere to put it.
            let written = chain.write_at(&memory, 0, &[answer]).is_ok();
            done.push(Completion {
                head: chain.head(),
                // A few bytes.
                written: u32::from(written) + result as u32,
            });
        }
        ring.complete(&done);
        !done.is_empty()
    }

    fn has(&self, bit: u64) -> Option<()> {
        (self.features & bit != 0).then_some(())
    }

    /// `None`: unknown, not negotiated, or not what it should be.
    fn carry_out(&self, bytes: &[u8]) -> Option<()> {
        let (head, body) = bytes.split_first_chunk::<2>()?;
        let [class, command] = *head;
        match (class, command) {
            control::RX_PROMISC | control::RX_ALLMULTI => {
                self.has(feature::CTRL_RX)?;
                self.receive_mode((class, command), body)
            }
            control::RX_ALLUNI | control::RX_NOMULTI | control::RX_NOUNI | control::RX_NOBCAST => {
                self.has(feature::CTRL_RX_EXTRA)?;
                self.receive_mode((class, command), body)
            }
            control::MAC_TABLE_SET => {
                self.has(feature::CTRL_RX)?;
                let (unicast, rest) = table(body)?;
                let (multicast, rest) = table(rest)?;
                rest.is_empty().then_some(())?;
                self.link
                    .change_filter(|filter| filter.set_tables(unicast, multicast));
                Some(())
            }
            control::MAC_ADDR_SET => {
                self.has(feature::CTRL_MAC_ADDR)?;
                let mac = super::Mac(<[u8; 6]>::try_from(body).ok()?);
                (!mac.is_group()).then_some(())?;
                self.link.change_filter(|filter| filter.mac = mac);
                Some(())
            }
            control::VLAN_ADD | control::VLAN_DEL => {
                self.has(feature::CTRL_VLAN)?;
                let id = u16::from_le_bytes(<[u8; 2]>::try_from(body).ok()?);
                let wanted = (class, command) == control::VLAN_ADD;
                self.link
                    .change_filter(|filter| filter.set_vlan(id, wanted))
                    .then_some(())
            }
            control::ANNOUNCE_ACK => {
                self.has(feature::GUEST_ANNOUNCE)?;
                body.is_empty().then_some(())?;
                self.link.announced();
                Some(())
            }
            control::MQ_VQ_PAIRS_SET => {
                self.has(feature::MQ)?;
                let pairs = u16::from_le_bytes(<[u8; 2]>::try_from(body).ok()?);
                (1..=self.link.options.queue_pairs)
                    .contains(&pairs)
                    .then_some(())?;
                // Spreading by hashes ends; what is reported goes on.
                if self.link.hashing().is_some_and(|hashing| hashing.spreads()) {
                    self.link.set_hashing(None);
                }
                self.set_pairs(pairs);
                Some(())
            }
            control::MQ_RSS_CONFIG => {
                self.has(feature::RSS)?;
                let pairs = self.link.options.queue_pairs;
                let hashing = Hashing::parse_rss(body, pairs)?;
                self.set_pairs(pairs);
                self.link.set_hashing(Some(hashing));
                Some(())
            }
            control::MQ_HASH_CONFIG => {
                self.has(feature::HASH_REPORT)?;
                self.link.set_hashing(Some(Hashing::parse_report(body)?));
                Some(())
            }
            control::NOTF_COAL_TX_SET | control::NOTF_COAL_RX_SET => {
                self.has(feature::NOTF_COAL)?;
                let wish = Wish::parse(body)?;
                let first = u16::from((class, command) == control::NOTF_COAL_TX_SET);
                (0..self.link.options.queue_pairs)
                    .try_for_each(|pair| self.link.coalescing.set(2 * pair + first, wish))
            }
            control::NOTF_COAL_VQ_SET => {
                self.has(feature::VQ_NOTF_COAL)?;
                let (queue, wish) = body.split_at_checked(4)?;
                let queue = self.coalesced_queue(queue)?;
                self.link.coalescing.set(queue, Wish::parse(wish)?)
            }
            control::NOTF_COAL_VQ_GET => {
                self.has(feature::VQ_NOTF_COAL)?;
                self.coalesced_queue(body).map(drop)
            }
            control::GUEST_OFFLOADS_SET => {
                self.has(feature::CTRL_GUEST_OFFLOADS)?;
                let wanted = u64::from_le_bytes(<[u8; 8]>::try_from(body).ok()?);
                (wanted & !(self.features & GUEST_OFFLOADS) == 0).then_some(())?;
                // Ordering: Relaxed, as for all of the link.
                let before = self.link.guest_offloads.swap(wanted, Ordering::Relaxed);
                if (before ^ wanted) & self.features & GUEST_OFFLOADS != 0 {
                    self.changes.charge(0);
                    self.port
                        .set_guest_offloads(Offloads::of_guest(self.features & wanted));
                }
                Some(())
            }
            _ => None,
        }
    }

    /// What a command that was carried out gives beside its answer.
    fn result(&self, bytes: &[u8]) -> Vec<u8> {
        let wish = match bytes.split_first_chunk::<2>() {
            Some((&[class, command], body)) if (class, command) == control::NOTF_COAL_VQ_GET => {
                let queue = self.coalesced_queue(body);
                queue.and_then(|queue| self.link.coalescing.wish(queue))
            }
            _ => None,
        };
        wish.map_or_else(Vec::new, |wish| wish.to_bytes().to_vec())
    }

    /// A receive or transmit queue that the driver can have, by its index and reserved bytes.
    fn coalesced_queue(&self, bytes: &[u8]) -> Option<u16> {
        let [low, high, _, _] = <[u8; 4]>::try_from(bytes).ok()?;
        let queue = u16::from_le_bytes([low, high]);
        let pairs = match self.features & (feature::MQ | feature::RSS) {
            0 => 1,
            _ => self.link.options.queue_pairs,
        };
        (queue < 2 * pairs).then_some(queue)
    }

    fn set_pairs(&self, pairs: u16) {
        if pairs != self.link.active_pairs() {
            self.changes.charge(0);
            self.link.set_active_pairs(pairs, &*self.port);
        }
    }

    fn receive_mode(&self, which: (u8, u8), body: &[u8]) -> Option<()> {
        let on = match body {
            [0] => false,
            [1] => true,
            _ => return None,
        };
        self.link.change_filter(|filter| {
            let mode = match which {
                control::RX_PROMISC => &mut filter.promiscuous,
                control::RX_ALLMULTI => &mut filter.all_multicast,
                control::RX_ALLUNI => &mut filter.all_unicast,
                control::RX_NOMULTI => &mut filter.no_multicast,
                control::RX_NOUNI => &mut filter.no_unicast,
                control::RX_NOBCAST => &mut filter.no_broadcast,
                _ => return None,
            };
            *mode = on;
            Some(())
        })
    }
}

/// What a driver can switch off and on again.
pub(super) const GUEST_OFFLOADS: u64 = feature::GUEST_CSUM
    | feature::GUEST_TSO4
    | feature::GUEST_TSO6
    | feature::GUEST_ECN
    | feature::GUEST_USO4
    | feature::GUEST_USO6;

/// A whole command; `None` if it is too long to be one.
fn read(chain: &OwnedChain, memory: &vm_memory::GuestMemoryMmap) -> Option<Vec<u8>> {
    let len = chain.readable_len();
    if len > MAX_CONTROL_BYTES {
        return None;
    }
    let mut bytes = vec![0; usize::try_from(len).ok()?];
    chain.read_at(memory, 0, &mut bytes).ok()?;
    Some(bytes)
}

/// A table of addresses, and what comes after it.
fn table(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (count, rest) = bytes.split_first_chunk::<4>()?;
    let len = usize::try_from(u32::from_le_bytes(*count))
        .ok()?
        .checked_mul(6)?;
    rest.split_at_checked(len)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::{RingConfig, SplitRing};
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    #[test]
    fn a_command_at_the_limit_and_one_past_it() {
        for (len, fits) in [(MAX_CONTROL_BYTES, true), (MAX_CONTROL_BYTES + 1, false)] {
            let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
            let (avail, data) = (GuestAddress(0x1000), 0x4000u64);
            mem.write_obj(data, GuestAddress(0)).unwrap();
            mem.write_obj(len as u32, GuestAddress(8)).unwrap();
            mem.write_obj(1u16, GuestAddress(avail.0 + 2)).unwrap();
            let mem = Arc::new(mem);
            let config = RingConfig {
                size: 1,
                desc: GuestAddress(0),
                avail,
                used: GuestAddress(0x2000),
                event_idx: false,
                indirect: false,
                in_order: false,
            };
            let mut ring = SplitRing::new(config, Arc::clone(&mem)).unwrap();
            let chain = ring.pop().unwrap().unwrap();
            let command = read(&chain, &mem).map(|bytes| bytes.len() as u64);
            assert_eq!(command, fits.then_some(len));
        }
    }
}
