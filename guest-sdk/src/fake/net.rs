//! The host's side of a network card: what it is to deliver, what it was sent, what it was told, and
//! the lies that a test has it tell.

use super::Host;
use super::host::ModelQueue;
use pv_abi::limits::MAX_CONFIG;
use pv_abi::virtio::net::{Config, Header, control, feature, status};
use std::collections::VecDeque;
use std::vec::Vec;
use zerocopy::{FromBytes, IntoBytes};

/// A frame to deliver, with the lies about it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Delivery {
    pub(crate) header: Header,
    pub(crate) data: Vec<u8>,
    /// Says this many buffers instead of how many there are.
    pub(crate) buffers: Option<u16>,
    /// Says these lengths instead of what was written.
    pub(crate) lengths: Option<Vec<u32>>,
    /// Publishes only so many of its buffers.
    pub(crate) publish: Option<usize>,
}

impl Delivery {
    pub(crate) fn honest(data: &[u8]) -> Self {
        Delivery {
            data: data.to_vec(),
            ..Delivery::default()
        }
    }
}

/// What a card holds and has seen.
#[derive(Debug, Default)]
pub(crate) struct Card {
    /// Frames for each pair; one that does not fit into the buffers there are waits.
    pub(crate) inbox: VecDeque<Delivery>,
    /// Where the next frame goes.
    pub(crate) pair: usize,
    pub(crate) sent: Vec<(Header, Vec<u8>)>,
    pub(crate) commands: Vec<((u8, u8), Vec<u8>)>,
    /// Answers this command with an error.
    pub(crate) refuse: Option<(u8, u8)>,
    /// Answers every command with this.
    pub(crate) answer: Option<u8>,
    /// What a queue coalesces.
    pub(crate) result: [u8; 8],
    /// Leaves commands unanswered.
    pub(crate) mute: bool,
    /// Says that it wrote so many bytes of what it sent.
    pub(crate) sent_length: u32,
    max_pairs: u16,
}

impl Host {
    /// Makes it a network card with so many pairs, an address and a link that is up.
    pub(crate) fn become_card(&mut self, pairs: u16, features: u64) {
        self.become_kind(pv_abi::device::kind::NET);
        self.card.max_pairs = pairs;
        self.offered = pv_abi::virtio::feature::VERSION_1
            | pv_abi::virtio::feature::EVENT_IDX
            | pv_abi::virtio::feature::INDIRECT_DESC
            | feature::MAC
            | feature::STATUS
            | feature::MTU
            | features;
        self.set_card(status::LINK_UP, 1500);
        self.show();
    }

    /// Another configuration.
    pub(crate) fn set_card(&mut self, status: u16, mtu: u16) {
        let config = Config {
            mac: [0x52, 0x54, 0, 1, 2, 3],
            status,
            max_virtqueue_pairs: self.card.max_pairs,
            mtu,
            ..Default::default()
        };
        let mut bytes = [0; MAX_CONFIG];
        bytes[..size_of::<Config>()].copy_from_slice(config.as_bytes());
        self.write_config(bytes, size_of::<Config>());
    }

    /// Another number of pairs in the configuration.
    pub(crate) fn set_pairs(&mut self, pairs: u16) {
        self.card.max_pairs = pairs;
        self.set_card(status::LINK_UP, 1500);
    }

    /// Serves every queue; the events that fire. `None` if the backend died over it.
    pub(super) fn serve_card(
        &mut self,
        queues: &mut [(ModelQueue, u32)],
    ) -> Option<Vec<(u32, u32)>> {
        let mut events = Vec::new();
        let control = self.features & feature::CTRL_VQ != 0;
        let last = queues.len() - 1;
        for (index, (queue, vcpu)) in queues.iter_mut().enumerate() {
            let mut signal = false;
            if control && index == last {
                signal = self.serve_commands(queue)?;
            } else if index % 2 == 1 {
                signal = self.serve_sending(queue)?;
            } else if index == 2 * self.card.pair {
                signal = self.serve_inbox(queue)?;
            }
            if signal {
                self.signals += 1;
                events.push((*vcpu, 3 + index as u32));
            }
            // Asked for kicks again; what is there now is served at the next turn.
            if queue.arm() {
                self.kicked = true;
            }
        }
        Some(events)
    }

    fn serve_sending(&mut self, queue: &mut ModelQueue) -> Option<bool> {
        let mut signal = false;
        while let Some(chain) = queue.pop() {
            self.burn_or_die()?;
            let mut bytes = Vec::new();
            for &(at, len) in &chain.readable {
                bytes.extend(queue.read(at, len as usize));
            }
            assert!(chain.writable.is_empty());
            let (header, data) = Header::read_from_prefix(&bytes).expect("a header");
            self.card.sent.push((header, data.to_vec()));
            self.burn_or_die()?;
            signal |= queue.complete(chain.head, self.card.sent_length);
        }
        Some(signal)
    }

    fn serve_commands(&mut self, queue: &mut ModelQueue) -> Option<bool> {
        let mut signal = false;
        while !self.card.mute {
            let Some(chain) = queue.pop() else { break };
            self.burn_or_die()?;
            let mut bytes = Vec::new();
            for &(at, len) in &chain.readable {
                bytes.extend(queue.read(at, len as usize));
            }
            let command = (bytes[0], bytes[1]);
            self.card.commands.push((command, bytes[2..].to_vec()));
            let refused = self.card.refuse == Some(command);
            let answer = if refused { control::ERR } else { control::OK };
            let result = match command {
                control::NOTF_COAL_VQ_GET => &self.card.result[..],
                _ => &[],
            };
            let &[(at, room)] = &chain.writable[..] else {
                panic!("one segment")
            };
            assert_eq!(room as usize, 1 + result.len(), "room for the answer");
            queue.write(at, &[self.card.answer.unwrap_or(answer)]);
            queue.write(at + 1, result);
            signal |= queue.complete(chain.head, room);
        }
        Some(signal)
    }

    fn serve_inbox(&mut self, queue: &mut ModelQueue) -> Option<bool> {
        let mut signal = false;
        while let Some(delivery) = self.card.inbox.pop_front() {
            let start = queue.next_avail;
            let mut bytes = delivery.header.as_bytes().to_vec();
            bytes.extend_from_slice(&delivery.data);
            let mut group = Vec::new();
            let mut written = 0;
            let mergeable = self.features & feature::MRG_RXBUF != 0;
            while written < bytes.len() {
                let Some(chain) = queue.pop() else { break };
                assert!(chain.readable.is_empty());
                let &[(at, room)] = &chain.writable[..] else {
                    panic!("one segment")
                };
                let take = (bytes.len() - written).min(room as usize);
                queue.write(at, &bytes[written..written + take]);
                written += take;
                group.push((chain.head, take as u32, at));
                if !mergeable {
                    break;
                }
            }
            if written < bytes.len() {
                if mergeable || group.is_empty() {
                    // Too few buffers: it waits for more.
                    queue.next_avail = start;
                    self.card.inbox.push_front(delivery);
                    break;
                }
                // A buffer that is too small: it is dropped, as a real device does.
                queue.next_avail = start;
                continue;
            }
            let count = delivery.buffers.unwrap_or(group.len() as u16);
            queue.write(group[0].2 + 10, &count.to_le_bytes());
            self.burn_or_die()?;
            let publish = delivery.publish.unwrap_or(group.len());
            let elems: Vec<_> = group
                .iter()
                .enumerate()
                .take(publish)
                .map(|(index, &(head, len, _))| {
                    let lie = delivery.lengths.as_ref().and_then(|lies| lies.get(index));
                    (head, lie.copied().unwrap_or(len))
                })
                .collect();
            signal |= queue.complete_group(&elems);
            self.burn_or_die()?;
        }
        Some(signal)
    }

    fn burn_or_die(&mut self) -> Option<()> {
        self.burn().then_some(())
    }
}
