//! The network: a card, a smoltcp interface on it, and waiting for both.

use crate::Failure;
use core::time::Duration;
use guest_sdk::flat::{Boot, Flat};
use guest_sdk::limits::LOSS_POLL;
use guest_sdk::net::{self, SmolDevice};
use guest_sdk::platform::{Platform, Waiter};
use smoltcp::iface::{Config, Interface, PollResult, SocketSet};
use smoltcp::socket::tcp;
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, IpCidr, Ipv4Address, Ipv4Cidr};

/// A card with an address.
pub(crate) struct Network {
    platform: &'static Flat,
    device: SmolDevice<Flat>,
    interface: Interface,
    events: [u32; 3],
}

impl Network {
    /// Opens the first network card; its address is the command line's `ip`, its way out `gateway`.
    pub(crate) fn open(boot: &Boot) -> Result<Self, Failure> {
        let platform = boot.platform();
        let (receiver, transmitter) = net::open(platform, None)?;
        let nic = receiver.nic();
        let events = [receiver.event(), transmitter.event(), nic.config_event()];
        let mut device = SmolDevice::new(receiver, transmitter);
        device.set_batching(true);
        let mut config = Config::new(EthernetAddress(nic.mac()).into());
        config.random_seed = platform.wall_time().as_nanos() as u64;
        let mut interface = Interface::new(config, &mut device, now(platform));
        let own = boot.argument("ip").unwrap_or("10.0.2.15/24");
        let own: Ipv4Cidr = own
            .parse()
            .map_err(|()| "ip= is no address such as 10.0.2.15/24")?;
        interface.update_ip_addrs(|addresses| {
            // There is room for two.
            let _full = addresses.push(IpCidr::Ipv4(own)).is_err();
        });
        if let Some(gateway) = boot.argument("gateway") {
            let gateway: Ipv4Address = gateway.parse().map_err(|_| "gateway= is no address")?;
            let routes = interface.routes_mut();
            let added = routes.add_default_ipv4_route(gateway);
            added.map_err(|_| "there is no room for a route")?;
        }
        Ok(Network {
            platform,
            device,
            interface,
            events,
        })
    }

    pub(crate) fn interface(&mut self) -> &mut Interface {
        &mut self.interface
    }

    /// Nanoseconds since the VM was built.
    pub(crate) fn now_ns(&self) -> u64 {
        self.platform.now_ns()
    }

    /// Runs `work` on the sockets again and again, and idles whenever there is nothing to do, until it
    /// is done. `work` tells whether it changed anything.
    ///
    /// # Errors
    ///
    /// What `work` fails with, and the card's errors.
    pub(crate) fn run<T>(
        &mut self,
        sockets: &mut SocketSet<'_>,
        mut work: impl FnMut(&mut SocketSet<'_>, u64) -> Result<Turn<T>, Failure>,
    ) -> Result<T, Failure> {
        let mut waiter = Waiter::new(self.platform, &self.events);
        loop {
            waiter.clear();
            let polled = self.poll(sockets);
            match work(sockets, self.platform.now_ns())? {
                Turn::Done(value) => {
                    self.poll(sockets);
                    return Ok(value);
                }
                Turn::Busy => continue,
                Turn::Idle if polled == PollResult::SocketStateChanged => continue,
                Turn::Idle => {}
            }
            if let Some(error) = self.device.error() {
                return Err(error.into());
            }
            let delay = self.interface.poll_delay(now(self.platform), sockets);
            let limit = delay.map_or(LOSS_POLL, |delay| {
                LOSS_POLL.min(Duration::from_micros(delay.total_micros()))
            });
            if !limit.is_zero() && self.device.arm() {
                waiter.idle(Some(limit));
            }
        }
    }

    fn poll(&mut self, sockets: &mut SocketSet<'_>) -> PollResult {
        let now = now(self.platform);
        let polled = self.interface.poll(now, &mut self.device, sockets);
        self.device.flush();
        polled
    }
}

/// Closes once the peer has everything; whether it did.
///
/// A FIN that comes with bytes may cost them: smoltcp 0.14 takes the FIN of a segment whose last bytes
/// did not fit into its window, and never asks for them again.
pub(crate) fn close(socket: &mut tcp::Socket<'_>) -> bool {
    let done = socket.send_queue() == 0;
    if done {
        socket.close();
    }
    done
}

/// What came of a turn.
pub(crate) enum Turn<T> {
    /// Nothing to do for now.
    Idle,
    /// Something was done, and more may be possible at once.
    Busy,
    /// All is done.
    Done(T),
}

fn now(platform: &Flat) -> Instant {
    Instant::from_micros((platform.now_ns() / 1000) as i64)
}
