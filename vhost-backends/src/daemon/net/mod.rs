//! `pv-netd`: network devices for any VMM, behind sockets.

mod cli;
mod peer;
mod report;

use super::{Denied, Fleet, Follow, Member, Sockets};
use crate::limit;
use crate::net::{Mac, NetDevice, NetOptions};
use crate::session::{ConnectionEvent, SessionEnd};
use cli::{Cli, OnePort, PortLimits};
use peer::{Switches, default_mac};
use report::PortReport;
use std::ffi::OsString;
use std::process::ExitCode;
use std::sync::Arc;

/// Runs `pv-netd` with this command line, the program's name first. Takes the calling thread, the
/// process's panic hook, the signals that end it, and confines the process for good.
///
/// A program that embeds this calls it as early as possible, while it has one thread.
pub fn pv_netd_main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli: Cli = match super::parse(args) {
        Ok(cli) => cli,
        Err(code) => return code,
    };
    let features = ["tap", "switch", "stream", "interface", "loopback"];
    let capabilities = serde_json::json!({ "type": "net", "features": features });
    super::start("pv-netd", &cli.operation, &capabilities, || {
        let ports = cli.ports()?;
        super::serve(&cli.operation, |sockets| Ports::open(ports, sockets))
    })
}

/// A port that is served.
struct Served {
    name: String,
    mac: Mac,
    device: Arc<NetDevice>,
}

/// All ports of a daemon.
struct Ports(Vec<Served>);

impl Ports {
    /// Opens the ports, each with its socket. The error is a sentence.
    fn open(ports: Vec<(String, OnePort)>, sockets: &mut Sockets) -> Result<Ports, String> {
        sockets.name_devices(ports.iter().map(|(name, _)| name.clone()));
        let mut switches = Switches::default();
        let mut served = Vec::new();
        let several = ports.len() > 1;
        for (name, port) in ports {
            let mac = port.mac.unwrap_or_else(|| default_mac(&name, &port));
            let peer = switches.open_peer(&port, mac, sockets)?;
            let mut options = NetOptions::with_mac(mac).pairs(port.queue_pairs);
            (options.mtu, options.config) = (port.mtu, port.config);
            options.sealed_memory = several && !port.unsealed_memory;
            let device = Arc::new(NetDevice::new(peer, options));
            device.limiter().set(port.limits()?);
            sockets.open(port.socket, &name)?;
            served.push(Served { name, mac, device });
        }
        Ok(Ports(served))
    }

    fn reports(&self) -> Vec<PortReport> {
        let report = |port: &Served| PortReport {
            port: port.name.clone(),
            mac: port.mac.to_string(),
            link: if port.device.link_is_up() {
                "up"
            } else {
                "down"
            },
            limits: port.device.limiter().get().into(),
            snapshot: port.device.stats().snapshot(),
        };
        self.0.iter().map(report).collect()
    }
}

impl Fleet for Ports {
    const DEVICES: &'static str = "ports";

    fn members(&self) -> Vec<Member> {
        let member = |port: &Served| {
            let device = Arc::clone(&port.device);
            Member {
                name: port.name.clone(),
                device: device.clone(),
                watch: Arc::new(move |event| match event {
                    ConnectionEvent::Connected => device.stats().connected(),
                    ConnectionEvent::Ended(end) => {
                        device.stats().disconnected(end == SessionEnd::Broken);
                    }
                }),
            }
        };
        self.0.iter().map(member).collect()
    }

    fn prometheus(&self) -> String {
        report::prometheus(&self.reports())
    }

    fn json(&self) -> String {
        report::json(&self.reports())
    }

    fn put(&self, name: &str, what: &str, body: &str) -> Result<String, Denied> {
        let port = self.0.iter().find(|port| port.name == name);
        let port = port.ok_or(Denied::NotFound("no port has this name"))?;
        // The guest hears of it when its VMM does; one that does not listen finds out by itself.
        let told = |result: std::io::Result<()>| match result {
            Ok(()) => "done".to_owned(),
            Err(error) => format!("done, but the guest could not be told: {error}"),
        };
        let said = match (what, body.trim()) {
            ("limits", body) => {
                let limits = limit::from_json::<PortLimits>(body)
                    .and_then(PortLimits::check)
                    .map_err(Denied::Bad)?;
                port.device.limiter().set(limits);
                "done".into()
            }
            ("link", "up") => told(port.device.set_link(true)),
            ("link", "down") => told(port.device.set_link(false)),
            ("link", _) => return Err(Denied::Bad("a link is up or down".into())),
            ("announce", "") => told(port.device.announce()),
            ("announce", _) => return Err(Denied::Bad("this request has no body".into())),
            _ => return Err(Denied::NotFound(self.requests())),
        };
        tracing::info!(port = name, what, body, "changed");
        Ok(said)
    }

    fn follow(&self, name: &str, what: &str) -> Option<Follow<'_>> {
        let port = self.0.iter().find(|port| port.name == name)?;
        let capture = move |client| port.device.capture(client, &port.name);
        (what == "capture").then(|| Box::new(capture) as Follow<'_>)
    }

    fn requests(&self) -> &'static str {
        "GET /metrics, GET /stats, PUT /ports/NAME/limits, PUT /ports/NAME/link, \
         PUT /ports/NAME/announce, GET /ports/NAME/capture"
    }
}
