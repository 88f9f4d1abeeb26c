//! Reports of ports: Prometheus text and JSON.

use super::cli::PortLimits;
use crate::net::NetSnapshot;
use serde::Serialize;
use std::fmt::Write;

/// One port in a report.
#[derive(Debug, Serialize)]
pub(super) struct PortReport {
    pub(super) port: String,
    pub(super) mac: String,
    pub(super) link: &'static str,
    pub(super) limits: PortLimits,
    #[serde(flatten)]
    pub(super) snapshot: NetSnapshot,
}

/// All ports as JSON.
pub(super) fn json(ports: &[PortReport]) -> String {
    serde_json::json!({ "ports": ports }).to_string()
}

/// Takes a number out of a report.
type Value = fn(&PortReport) -> u64;

/// All ports as Prometheus text.
pub(super) fn prometheus(ports: &[PortReport]) -> String {
    let mut out = String::new();
    let single: [(&str, &str, Value); 13] = [
        ("link_up", "gauge", |port| u64::from(port.link == "up")),
        ("connected", "gauge", |port| {
            u64::from(port.snapshot.connected)
        }),
        ("sent_frames_total", "counter", |port| {
            port.snapshot.sent_frames
        }),
        ("sent_bytes_total", "counter", |port| {
            port.snapshot.sent_bytes
        }),
        ("received_frames_total", "counter", |port| {
            port.snapshot.received_frames
        }),
        ("received_bytes_total", "counter", |port| {
            port.snapshot.received_bytes
        }),
        ("commands_total", "counter", |port| port.snapshot.commands),
        ("refused_commands_total", "counter", |port| {
            port.snapshot.refused_commands
        }),
        ("calls_total", "counter", |port| port.snapshot.calls),
        ("wakes_total", "counter", |port| port.snapshot.wakes),
        ("retired_rings_total", "counter", |port| {
            port.snapshot.retired_rings
        }),
        ("connections_total", "counter", |port| {
            port.snapshot.connections
        }),
        ("broken_connections_total", "counter", |port| {
            port.snapshot.broken
        }),
    ];
    // Writing to a string does not fail.
    for (name, kind, value) in single {
        let _ = writeln!(out, "# TYPE pv_net_{name} {kind}");
        for port in ports {
            let _ = writeln!(
                out,
                "pv_net_{name}{{port=\"{}\"}} {}",
                port.port,
                value(port)
            );
        }
    }
    let _ = writeln!(out, "# TYPE pv_net_drops_total counter");
    for port in ports {
        for (reason, count) in &port.snapshot.drops {
            let name = &port.port;
            let _ = writeln!(
                out,
                "pv_net_drops_total{{port=\"{name}\",reason=\"{reason}\"}} {count}"
            );
        }
    }
    out
}
