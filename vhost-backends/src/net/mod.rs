//! The network device (virtio 1.3 §5.1).
//!
//! | file | in | out |
//! |---|---|---|
//! | `transmit` | chains of a transmit queue | batches of checked frames, to a port |
//! | `receive` | frames, from anywhere | used receive buffers, and a signal for each batch |
//! | `source` | a port's readable descriptor | frames, read right into receive buffers |
//! | `announce` | wishes, and the driver's word | the bit `ANNOUNCE`, and word of it |
//! | `capture` | frames as they pass | a pcapng file |
//! | `coalesce` | calls to the driver | fewer of them, where it wants that |
//! | `control` | commands | filters, offloads, queue pairs |
//! | `frame`, `offload` | a frame and what its receiver takes | frames that it takes |
//! | `port` | batches of frames | a tap, a switch, a socket, an interface, or the same guest |
//!
//! A frame is copied once at most between two guests, by the thread that serves its sender's
//! queue; between a guest and a tap the kernel copies, and nobody else.

mod announce;
mod capture;
mod coalesce;
mod config;
mod control;
mod filter;
mod frame;
pub mod limits;
mod offload;
pub mod port;
mod receive;
mod rss;
mod source;
mod stats;
mod steering;
#[cfg(test)]
mod tests;
mod transmit;
mod worker;

pub use config::{NetOptions, OfferConfig};
pub use frame::{Frame, Mac};
pub use offload::Offloads;
pub use receive::Inlet;
pub use source::{Came, Reader};
pub use stats::{Drop, NetSnapshot, NetStats};

use crate::limit::Limiter;
use crate::ring::{DeviceRing, Retire};
use crate::session::quota::PEER_LINES;
use crate::session::{
    ConfigRefused, Device, FrontendLink, Notifier, QueueSetup, QueueStop, QueueWorker,
};
use announce::Announcement;
use capture::Capture;
use coalesce::Coalescing;
use filter::Filter;
use port::Port;
use pv_abi::virtio::feature as ring;
use pv_abi::virtio::net::{Header, LEGACY_HEADER_LEN, feature};
use rss::Hashing;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use steering::Steering;
use vhost::vhost_user::VhostUserProtocolFeatures;

/// A network device on any port. Serves any number of sessions, one after the other.
#[derive(Debug)]
pub struct NetDevice {
    options: NetOptions,
    port: Arc<dyn Port>,
    link: Arc<Link>,
    inlet: Arc<Inlet>,
}

/// What the queues of a device share.
#[derive(Debug)]
pub(crate) struct Link {
    options: NetOptions,
    up: AtomicBool,
    announcement: Announcement,
    frontend: Mutex<Option<Arc<FrontendLink>>>,
    filter: RwLock<Arc<Filter>>,
    /// Receive offloads that the driver wants now, of those that it negotiated.
    guest_offloads: AtomicU64,
    /// Pairs of queues that the driver uses.
    active_pairs: AtomicU16,
    /// Pairs whose receive queue is open, one bit each.
    open_pairs: AtomicU16,
    steering: Steering,
    hashing: RwLock<Option<Arc<Hashing>>>,
    capture: Capture,
    coalescing: Coalescing,
    pub(crate) limiter: Limiter,
    pub(crate) stats: NetStats,
}

// Ordering: Relaxed for all of these. Each stands for itself, and a frame that meets a change may
// be treated by the old or by the new value.
impl Link {
    fn is_up(&self) -> bool {
        self.up.load(Ordering::Relaxed)
    }

    fn filter(&self) -> Arc<Filter> {
        Arc::clone(&self.filter.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn change_filter<T>(&self, change: impl FnOnce(&mut Filter) -> T) -> T {
        let mut filter = self.filter.write().unwrap_or_else(PoisonError::into_inner);
        change(Arc::make_mut(&mut filter))
    }

    fn guest_offloads(&self, negotiated: u64) -> u64 {
        negotiated & self.guest_offloads.load(Ordering::Relaxed)
    }

    fn active_pairs(&self) -> u16 {
        self.active_pairs.load(Ordering::Relaxed)
    }

    fn hashing(&self) -> Option<Arc<Hashing>> {
        let hashing = self.hashing.read().unwrap_or_else(PoisonError::into_inner);
        hashing.clone()
    }

    fn set_hashing(&self, hashing: Option<Hashing>) {
        let mut now = self.hashing.write().unwrap_or_else(PoisonError::into_inner);
        *now = hashing.map(Arc::new);
    }

    fn set_active_pairs(&self, pairs: u16, port: &dyn Port) {
        if self.active_pairs.swap(pairs, Ordering::Relaxed) != pairs {
            port.set_pairs(pairs);
        }
    }

    /// A receive queue is opened or closed. Where nobody can say how many pairs are in use, these
    /// are.
    fn receives(&self, pair: u16, open: bool, features: u64, port: &dyn Port) {
        // Pairs are few.
        let bit = 1u16.checked_shl(pair.into()).unwrap_or(0);
        let now = if open {
            self.open_pairs.fetch_or(bit, Ordering::Relaxed) | bit
        } else {
            self.open_pairs.fetch_and(!bit, Ordering::Relaxed) & !bit
        };
        let last = u16::try_from(u16::BITS - now.leading_zeros()).unwrap_or(1);
        match features & (feature::CTRL_VQ | feature::MQ) {
            0 => self.set_active_pairs(1, port),
            feature::MQ => self.set_active_pairs(last.max(1), port),
            _ => {}
        }
    }

    /// As after a reset.
    fn reset(&self, port: &dyn Port) {
        self.change_filter(|filter| *filter = Filter::open(self.options.mac));
        self.guest_offloads.store(u64::MAX, Ordering::Relaxed);
        self.set_hashing(None);
        self.coalescing.reset();
        self.announcement.set_able(false);
        self.set_active_pairs(1, port);
    }

    fn frontend(&self) -> MutexGuard<'_, Option<Arc<FrontendLink>>> {
        self.frontend.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the frontend that configuration space is another, and waits until it has heard that.
    fn tell(&self) -> io::Result<()> {
        let frontend = self.frontend().clone();
        match frontend {
            Some(frontend) => frontend.config_changed(),
            // One that comes later reads the configuration then.
            None => Ok(()),
        }
    }

    /// So many packets of a queue are done: its driver is called, if it wants that, now or later.
    fn call(&self, queue: u16, packets: usize, wanted: bool, call: &Arc<Notifier>) {
        if self.coalescing.done(queue, packets, wanted, call) {
            self.stats.called();
        }
    }

    fn ring_retired(&self, reason: &Retire) {
        self.stats.retired();
        // A driver can reset and break its ring again, as often as it likes.
        if PEER_LINES.may_say() {
            tracing::warn!(%reason, "ring retired");
        }
    }
}

/// What a queue of this index is for (virtio 1.3 §5.1.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Receive(u16),
    Transmit(u16),
    Control,
}

impl NetDevice {
    /// A device on this port.
    pub fn new(port: Arc<dyn Port>, options: NetOptions) -> NetDevice {
        let options = options.pairs(options.queue_pairs.min(port.max_pairs()));
        let link = Arc::new(Link {
            options,
            up: AtomicBool::new(true),
            announcement: Announcement::default(),
            frontend: Mutex::default(),
            filter: RwLock::new(Arc::new(Filter::open(options.mac))),
            guest_offloads: AtomicU64::new(u64::MAX),
            active_pairs: AtomicU16::new(1),
            open_pairs: AtomicU16::new(0),
            steering: Steering::default(),
            hashing: RwLock::default(),
            capture: Capture::default(),
            coalescing: Coalescing::new(2 * options.queue_pairs),
            limiter: Limiter::default(),
            stats: NetStats::default(),
        });
        let inlet = Arc::new(Inlet::new(Arc::clone(&link), options.queue_pairs));
        port.attach(&inlet, options.mac);
        NetDevice {
            options,
            port,
            link,
            inlet,
        }
    }

    /// The counters.
    pub fn stats(&self) -> &NetStats {
        &self.link.stats
    }

    /// Limits on what the guest sends, to be changed at any time.
    pub fn limiter(&self) -> &Limiter {
        &self.link.limiter
    }

    /// Whether the link is up.
    pub fn link_is_up(&self) -> bool {
        self.link.is_up()
    }

    /// Brings the link up or down, and tells the guest. While it is down, frames are dropped. Not
    /// to be called from a thread that serves the session's own messages.
    pub fn set_link(&self, up: bool) -> io::Result<()> {
        self.link.up.store(up, Ordering::Relaxed);
        self.link.tell()
    }

    /// Asks the guest to announce itself, as after it was moved.
    pub fn announce(&self) -> io::Result<()> {
        self.link.announcement.want();
        self.link.tell()
    }

    /// Writes what the guest sends and gets to `client`, as pcapng, until it hangs up or another
    /// one comes. What it does not read in time is left out.
    pub fn capture(&self, client: UnixStream, name: &str) -> io::Result<()> {
        self.link.capture.start(client, name)
    }

    fn open_receive(&self, pair: u16, setup: QueueSetup) -> io::Result<Box<dyn QueueWorker>> {
        if self.port.source(pair).is_some() {
            return source::spawn(
                Arc::clone(&self.inlet),
                Arc::clone(&self.link),
                Arc::clone(&self.port),
                pair,
                setup,
            );
        }
        let first = QueueStop {
            ring: setup.ring.save(),
            retired: None,
        };
        self.inlet.open(pair, setup);
        Ok(Box::new(Pushed {
            inlet: Arc::clone(&self.inlet),
            pair,
            first,
        }))
    }

    fn role(&self, index: u16, features: u64) -> Role {
        // Without MQ there is one pair, whatever the device could do.
        let pairs = if features & (feature::MQ | feature::RSS) != 0 {
            self.options.queue_pairs
        } else {
            1
        };
        match index {
            index if index == 2 * pairs && features & feature::CTRL_VQ != 0 => Role::Control,
            index if index % 2 == 0 => Role::Receive(index / 2),
            index => Role::Transmit(index / 2),
        }
    }
}

impl Device for NetDevice {
    fn needs_sealed_memory(&self) -> bool {
        self.options.sealed_memory
    }

    fn queue_count(&self) -> u16 {
        2 * self.options.queue_pairs + 1
    }

    fn features(&self) -> u64 {
        // Where a port reads for each queue, it has spread the frames already.
        let spreads = self.options.queue_pairs > 1 && self.port.source(0).is_none();
        config::features(&self.options) | if spreads { feature::RSS } else { 0 }
    }

    fn config(&self) -> Vec<u8> {
        let mac = self.link.filter().mac;
        let announce = self.link.announcement.is_wanted();
        config::space(&self.options, mac, self.link.is_up(), announce)
    }

    fn protocol_features(
        &self,
        served: VhostUserProtocolFeatures,
        owned: bool,
    ) -> VhostUserProtocolFeatures {
        let offer = match self.options.config {
            OfferConfig::Auto => owned,
            OfferConfig::On => true,
            OfferConfig::Off => false,
        };
        let mut features = served;
        features.set(VhostUserProtocolFeatures::CONFIG, offer);
        // Frames that are lost with this process are lost, as on any network; and under the log,
        // the buffers of one frame would be given back one by one.
        features.remove(VhostUserProtocolFeatures::INFLIGHT_SHMFD);
        features | VhostUserProtocolFeatures::MTU | VhostUserProtocolFeatures::RARP
    }

    fn write_config(&self, _offset: u32, _data: &[u8]) -> Result<(), ConfigRefused> {
        // The address was writable before virtio 1.0, and has a command since.
        Err(ConfigRefused)
    }

    fn set_mtu(&self, mtu: u64) -> bool {
        // What the frontend tells its guest; nothing here depends on it.
        (68..=65_535).contains(&mtu)
    }

    fn announce_guest(&self, mac: [u8; 6]) -> bool {
        // Who can knows more to say than this address: its VLANs, and what it is called on them.
        self.link.moved();
        let refused = if !self.link.is_up() {
            Some(Drop::LinkDown)
        } else {
            (self.link.limiter.delay()).map(|_| Drop::Limited)
        };
        if let Some(reason) = refused {
            self.link.stats.drop(reason, 1);
            return true;
        }
        // The frontend has moved its guest: the network is to learn where it is now.
        let frame = port::reverse_arp(mac);
        let mut bytes = frame;
        let len = bytes.len();
        self.link.limiter.charge(len as u64);
        let pieces = [vm_memory::VolatileSlice::from(&mut bytes[..])];
        self.port
            .send(0, &[Frame::new(Header::default(), &pieces, len)]);
        true
    }

    fn set_frontend(&self, frontend: Option<Arc<FrontendLink>>) {
        if frontend.is_none() {
            // The connection is over; the next driver starts from the beginning.
            self.link.reset(&*self.port);
        }
        *self.link.frontend() = frontend;
    }

    fn open_queue(&self, setup: QueueSetup) -> io::Result<Box<dyn QueueWorker>> {
        if setup.index == 0 {
            let features = self.link.guest_offloads(setup.features);
            self.port.set_guest_offloads(Offloads::of_guest(features));
        }
        let role = self.role(setup.index, setup.features);
        if let Role::Receive(pair) | Role::Transmit(pair) = role
            && pair >= self.options.queue_pairs
        {
            let reason = "with these features there is no such queue";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
        }
        match role {
            Role::Control => control::spawn(Arc::clone(&self.link), Arc::clone(&self.port), setup),
            Role::Transmit(pair) => {
                let (link, queue) = (Arc::clone(&self.link), setup.index);
                let port = Arc::clone(&self.port);
                let worker = transmit::spawn(Arc::clone(&link), port, pair, setup)?;
                Ok(Box::new(Sending {
                    worker,
                    link,
                    queue,
                }))
            }
            Role::Receive(pair) => {
                let open = OpenPair::new(&self.link, &self.port, pair, setup.features);
                let worker = self.open_receive(pair, setup)?;
                Ok(Box::new(Receiving { worker, open }))
            }
        }
    }

    fn reset(&self) {
        self.link.reset(&*self.port);
    }

    fn status_cleared(&self) {
        // QEMU keeps all of this itself, and those that leave it to the device mean a reset.
        self.link.reset(&*self.port);
    }
}

/// A receive queue that others deliver to.
struct Pushed {
    inlet: Arc<Inlet>,
    pair: u16,
    first: QueueStop,
}

impl QueueWorker for Pushed {
    fn stop(self: Box<Self>) -> QueueStop {
        self.inlet.close(self.pair).unwrap_or(self.first)
    }
}

/// A transmit queue that is served.
struct Sending {
    worker: Box<dyn QueueWorker>,
    link: Arc<Link>,
    queue: u16,
}

impl QueueWorker for Sending {
    fn stop(self: Box<Self>) -> QueueStop {
        let stop = self.worker.stop();
        self.link.coalescing.release(self.queue);
        stop
    }
}

/// A receive queue that is served.
struct Receiving {
    worker: Box<dyn QueueWorker>,
    open: OpenPair,
}

impl QueueWorker for Receiving {
    fn stop(self: Box<Self>) -> QueueStop {
        let Receiving { worker, open } = *self;
        let stop = worker.stop();
        open.link.coalescing.release(2 * open.pair);
        drop(open);
        stop
    }
}

/// A pair that counts as open for as long as this exists.
struct OpenPair {
    link: Arc<Link>,
    port: Arc<dyn Port>,
    pair: u16,
    features: u64,
}

impl OpenPair {
    fn new(link: &Arc<Link>, port: &Arc<dyn Port>, pair: u16, features: u64) -> OpenPair {
        link.receives(pair, true, features, &**port);
        OpenPair {
            link: Arc::clone(link),
            port: Arc::clone(port),
            pair,
            features,
        }
    }
}

impl std::ops::Drop for OpenPair {
    fn drop(&mut self) {
        self.link
            .receives(self.pair, false, self.features, &*self.port);
    }
}

/// Bytes of the header in front of each frame.
fn header_len(features: u64) -> usize {
    if features & feature::HASH_REPORT != 0 {
        size_of::<Header>() + 8
    } else if features & (ring::VERSION_1 | feature::MRG_RXBUF) != 0 {
        size_of::<Header>()
    } else {
        LEGACY_HEADER_LEN
    }
}
