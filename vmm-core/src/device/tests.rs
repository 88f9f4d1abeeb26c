//! The slot of a network card, with a backend that only remembers.

use super::*;
use crate::memory::Region;
use pv_abi::layout::ARENA_BASE;
use pv_abi::virtio::net::feature::GUEST_ANNOUNCE;
use pv_abi::virtio::net::{Config, status};
use std::sync::mpsc;
use std::time::Duration;
use zerocopy::{FromBytes, IntoBytes};

const MAC: [u8; 6] = [2, 3, 4, 5, 6, 7];
const PATIENCE: Duration = Duration::from_secs(60);

/// What a card's backend was told, and the status that it shows.
#[derive(Default)]
struct Said {
    announced: Vec<[u8; 6]>,
    status: u16,
    /// Where its configuration is asked for: it says so, and answers when it is told to.
    slow: Option<(mpsc::Sender<()>, mpsc::Receiver<()>)>,
}

struct Card(Arc<Mutex<Said>>);

fn config(status: u16) -> Vec<u8> {
    let config = Config {
        mac: MAC,
        status,
        ..Config::default()
    };
    config.as_bytes().to_vec()
}

fn offer(status: u16) -> Offer {
    Offer {
        features: GUEST_ANNOUNCE,
        config: config(status),
    }
}

impl Backend for Card {
    fn activate(&mut self, _: &Setup, _: &DeviceIo) -> io::Result<()> {
        Ok(())
    }
    fn reset(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn config_write(&mut self, _: u32, _: &[u8]) -> Result<(), Status> {
        Err(Status::NotSupported)
    }
    fn offer(&mut self) -> io::Result<Option<Offer>> {
        let slow = self.0.lock().unwrap().slow.take();
        if let Some((asked, answer)) = slow {
            asked.send(()).unwrap();
            let _ = answer.recv_timeout(PATIENCE);
        }
        Ok(Some(offer(self.0.lock().unwrap().status)))
    }
    fn announce(&mut self, mac: [u8; 6]) -> io::Result<()> {
        self.0.lock().unwrap().announced.push(mac);
        Ok(())
    }
}

struct Fixture {
    slot: Slot,
    said: Arc<Mutex<Said>>,
}

fn slot(kind: u32) -> Fixture {
    let memory = Arc::new(GuestMemory::plain(crate::limits::MIN_MEMORY, &[]));
    let info = DeviceInfo {
        index: 0,
        kind,
        name: "card".into(),
        arena: 0,
        event_base: 0,
        queue_count: 3,
        max_queue_size: 64,
    };
    let region = Arc::new(Region::new(2 << 20, crate::memory::Backing::Anonymous).unwrap());
    let io = DeviceIo {
        arena: Arena {
            gpa: ARENA_BASE,
            region,
        },
        events: Arc::new(EventTable::new(&[3], 1).unwrap()),
        event_base: 0,
    };
    let slot = Slot::new(info, io, memory, Arc::new(Counters::new([])));
    slot.publish_initial().unwrap();
    Fixture {
        slot,
        said: Arc::default(),
    }
}

impl Fixture {
    fn ready(&self) {
        let card = Box::new(Card(Arc::clone(&self.said)));
        self.slot
            .backend_ready(card, offer(status::LINK_UP))
            .unwrap();
    }

    fn activate(&self, features: u64) {
        let setup = Setup {
            features,
            config_vcpu: 0,
            queues: Vec::new(),
        };
        self.slot.activate(setup, &|_, _, _| Ok(())).unwrap();
    }

    /// The status that the guest sees.
    fn status(&self) -> u16 {
        let entry: DeviceEntry = self.slot.memory.vmm.read(self.slot.offset()).unwrap();
        Config::read_from_prefix(&entry.config).unwrap().0.status
    }

    /// Whether there was a configuration event since the last look.
    fn told(&self) -> bool {
        self.slot.io.events.call(3).unwrap().read().is_ok()
    }
}

#[test]
fn a_link_goes_down_and_up_and_the_guest_is_told_once() {
    let card = slot(kind::NET);
    card.ready();
    card.activate(0);
    let _ = card.told();
    assert_eq!(card.status(), status::LINK_UP);
    for (up, seen) in [(false, 0), (true, status::LINK_UP)] {
        assert!(card.slot.set_link(up).unwrap());
        assert_eq!(card.status(), seen);
        assert!(card.told());
        assert!(card.slot.set_link(up).unwrap());
        assert!(!card.told(), "told of nothing");
    }
    // What the embedder wants outlives the backend.
    card.slot.set_link(false).unwrap();
    card.slot.backend_lost(true).unwrap();
    card.ready();
    assert_eq!(card.status() & status::LINK_UP, 0);
}

#[test]
fn a_change_that_the_backend_tells_of_reaches_the_guest() {
    let card = slot(kind::NET);
    card.slot.refresh().unwrap();
    card.ready();
    card.activate(0);
    let _ = card.told();
    card.slot.refresh().unwrap();
    assert_eq!((card.status(), card.told()), (0, true));
    card.slot.refresh().unwrap();
    assert!(!card.told(), "nothing changed");
    card.said.lock().unwrap().status = status::LINK_UP;
    card.slot.set_link(false).unwrap();
    card.slot.refresh().unwrap();
    assert_eq!(card.status(), 0, "up where both say so");
}

#[test]
fn nobody_waits_for_a_backend_that_shows_its_configuration_slowly() {
    let card = slot(kind::NET);
    card.ready();
    card.activate(0);
    let (asked, was_asked) = mpsc::channel();
    let (answer, answered) = mpsc::channel();
    card.said.lock().unwrap().slow = Some((asked, answered));
    std::thread::scope(|scope| {
        let slot = &card.slot;
        let reading = scope.spawn(|| slot.refresh().unwrap());
        was_asked.recv_timeout(PATIENCE).unwrap();
        assert_eq!(slot.state(), DeviceState::Active);
        slot.set_link(false).unwrap();
        assert!(!slot.refresh().unwrap(), "one is asking already");
        // A reset talks to the backend, and waits for its turn.
        let reset = scope.spawn(|| slot.reset().unwrap());
        assert!(!reading.is_finished() && !reset.is_finished());
        answer.send(()).unwrap();
        assert!(reading.join().unwrap());
        assert_eq!(reset.join().unwrap(), DeviceState::Negotiated);
    });
    assert!(card.slot.refresh().unwrap());
    assert_eq!(card.status(), 0);
}

#[test]
fn after_a_loss_the_backend_is_told_to_announce_the_card_once() {
    let card = slot(kind::NET);
    let announced = || std::mem::take(&mut card.said.lock().unwrap().announced);
    card.ready();
    card.activate(GUEST_ANNOUNCE);
    assert!(announced().is_empty(), "a new card is not announced");
    for features in [GUEST_ANNOUNCE, 0, GUEST_ANNOUNCE] {
        card.slot.backend_lost(true).unwrap();
        card.ready();
        card.slot.reset().unwrap();
        assert!(announced().is_empty(), "it carries nothing yet");
        card.activate(features);
        assert_eq!(announced(), [MAC]);
        // A reset by the guest moves nothing.
        card.slot.reset().unwrap();
        card.activate(features);
        assert!(announced().is_empty());
    }
    // Twice lost before it was of use: once told.
    for _ in 0..2 {
        card.slot.backend_lost(true).unwrap();
        card.ready();
    }
    card.slot.reset().unwrap();
    card.activate(0);
    assert_eq!(announced(), [MAC]);
}

#[test]
fn what_asks_the_guest_to_announce_itself_is_the_backends_until_it_is_over() {
    let card = slot(kind::NET);
    card.ready();
    card.activate(GUEST_ANNOUNCE);
    let asked = status::LINK_UP | status::ANNOUNCE;
    for status in [asked, status::LINK_UP, asked] {
        let _ = card.told();
        card.said.lock().unwrap().status = status;
        assert!(card.slot.refresh().unwrap());
        assert_eq!((card.status(), card.told()), (status, true));
    }
    // A guest that starts anew has not done it.
    card.slot.reset().unwrap();
    card.activate(GUEST_ANNOUNCE);
    assert_eq!(card.status(), asked);
}

#[test]
fn only_network_cards_have_a_link() {
    let disk = slot(kind::BLOCK);
    disk.ready();
    assert!(!disk.slot.set_link(false).unwrap());
    assert_eq!(disk.status(), status::LINK_UP);
}
