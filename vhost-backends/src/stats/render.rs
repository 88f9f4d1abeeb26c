//! Reports as text: Prometheus exposition format 0.0.4, and JSON.

use super::{DiskReport, bound_seconds};
use std::fmt::Write;

/// All disks as JSON.
pub fn json(disks: &[DiskReport]) -> String {
    let version = env!("CARGO_PKG_VERSION");
    // Numbers, strings and lists only: this cannot fail.
    serde_json::json!({ "version": version, "disks": disks }).to_string()
}

/// All disks for Prometheus. Names of disks are plain (`pv-blkd` refuses others), so nothing needs
/// an escape.
pub fn prometheus(disks: &[DiskReport]) -> String {
    let mut out = String::new();
    let mut page = Page {
        out: &mut out,
        disks,
    };
    page.head("pv_blk_info", "gauge", "Version of the program.");
    page.line(format_args!(
        "pv_blk_info{{version=\"{}\"}} 1",
        env!("CARGO_PKG_VERSION")
    ));
    page.each("uptime_seconds", "gauge", "Age of the device.", |d| {
        d.snapshot.uptime_seconds
    });
    page.each("connected", "gauge", "A frontend is connected.", |d| {
        f64::from(u8::from(d.snapshot.connection.connected))
    });
    page.each(
        "connection_state_seconds",
        "gauge",
        "Time since a frontend is, or is not, connected.",
        |d| d.snapshot.connection.since_seconds,
    );
    page.count("connections_total", "Connections.", |d| {
        d.snapshot.connection.connections
    });
    page.count("reconnects_total", "Connections after the first.", |d| {
        d.snapshot.connection.reconnects
    });
    page.count(
        "broken_connections_total",
        "Connections that ended within a message or by an error.",
        |d| d.snapshot.connection.broken,
    );
    page.count(
        "refused_total",
        "Requests refused: malformed, out of range, not supported.",
        |d| d.refused,
    );
    page.count("retired_rings_total", "Rings that broke a rule.", |d| {
        d.retired_rings
    });
    page.count("calls_total", "Calls of the driver.", |d| d.calls);
    page.count("wakes_total", "Sleeps of queues that ended.", |d| d.wakes);
    page.operations();
    page.queues();
    page.limits();
    out
}

struct Page<'a> {
    out: &'a mut String,
    disks: &'a [DiskReport],
}

impl Page<'_> {
    fn line(&mut self, text: std::fmt::Arguments<'_>) {
        // Writing to a String does not fail.
        let _ = writeln!(self.out, "{text}");
    }

    fn head(&mut self, name: &str, kind: &str, help: &str) {
        self.line(format_args!("# HELP {name} {help}"));
        self.line(format_args!("# TYPE {name} {kind}"));
    }

    fn each(&mut self, name: &str, kind: &str, help: &str, value: fn(&DiskReport) -> f64) {
        let name = format!("pv_blk_{name}");
        self.head(&name, kind, help);
        for disk in self.disks {
            let (label, value) = (&disk.disk, value(disk));
            self.line(format_args!("{name}{{disk=\"{label}\"}} {value}"));
        }
    }

    fn count(&mut self, name: &str, help: &str, value: fn(&DiskReport) -> u64) {
        let name = format!("pv_blk_{name}");
        self.head(&name, "counter", help);
        for disk in self.disks {
            let (label, value) = (&disk.disk, value(disk));
            self.line(format_args!("{name}{{disk=\"{label}\"}} {value}"));
        }
    }

    fn operations(&mut self) {
        let name = "pv_blk_request_duration_seconds";
        let help = "Time from taken off the ring to published.";
        self.head(name, "histogram", help);
        for disk in self.disks {
            for op in &disk.snapshot.operations {
                let labels = format!("disk=\"{}\",operation=\"{}\"", disk.disk, op.name);
                let mut below = 0;
                let last = op.buckets.len().saturating_sub(1);
                for (at, count) in op.buckets.iter().enumerate() {
                    below += count;
                    let bound = match at == last {
                        true => "+Inf".to_owned(),
                        false => bound_seconds(at).to_string(),
                    };
                    self.line(format_args!(
                        "{name}_bucket{{{labels},le=\"{bound}\"}} {below}"
                    ));
                }
                self.line(format_args!("{name}_sum{{{labels}}} {}", op.seconds));
                self.line(format_args!("{name}_count{{{labels}}} {}", op.requests));
            }
        }
        let name = "pv_blk_bytes_total";
        self.head(name, "counter", "Bytes moved or changed.");
        for disk in self.disks {
            for op in &disk.snapshot.operations {
                self.line(format_args!(
                    "{name}{{disk=\"{}\",operation=\"{}\"}} {}",
                    disk.disk, op.name, op.bytes
                ));
            }
        }
        let name = "pv_blk_errors_total";
        self.head(name, "counter", "Requests that failed on the host.");
        for disk in self.disks {
            for (class, count) in &disk.snapshot.errors {
                self.line(format_args!(
                    "{name}{{disk=\"{}\",error=\"{class}\"}} {count}",
                    disk.disk
                ));
            }
        }
    }

    fn queues(&mut self) {
        type Value = fn(&super::QueueSnapshot) -> f64;
        let rows: [(&str, &str, &str, Value); 3] = [
            (
                "pv_blk_in_flight",
                "gauge",
                "Requests that the host works on.",
                |q| q.in_flight as f64,
            ),
            (
                "pv_blk_in_flight_oldest_seconds",
                "gauge",
                "Age of the oldest request in flight.",
                |q| q.oldest_seconds,
            ),
            (
                "pv_blk_held_back_seconds_total",
                "counter",
                "Time that limits held the queue back.",
                |q| q.held_seconds,
            ),
        ];
        for (name, kind, help, value) in rows {
            self.head(name, kind, help);
            for disk in self.disks {
                for (index, queue) in disk.snapshot.queues.iter().enumerate() {
                    self.line(format_args!(
                        "{name}{{disk=\"{}\",queue=\"{index}\"}} {}",
                        disk.disk,
                        value(queue)
                    ));
                }
            }
        }
    }

    fn limits(&mut self) {
        self.each(
            "limit_iops",
            "gauge",
            "Requests per second, 0 is any.",
            |d| d.limits.iops as f64,
        );
        self.each(
            "limit_bytes_per_second",
            "gauge",
            "Bytes per second, 0 is any.",
            |d| d.limits.bandwidth as f64,
        );
    }
}
