//! The table at the end.

use quickstart_fs::count::Counted;
use std::fmt;
use std::io::{self, Write};
use std::time::Duration;

/// Everything that the table shows.
#[derive(Clone, Debug)]
pub struct Report {
    /// What ran the guest.
    pub accel: String,
    /// SHA-256 of the guest's ELF, in hexadecimal.
    pub guest: String,
    /// From building the VM to the guest's first call.
    pub boot: Duration,
    /// Files hashed.
    pub files: u64,
    /// Bytes of these files.
    pub bytes: u64,
    /// Time from the first to the last file.
    pub hashing: Duration,
    /// Block requests that the guest made.
    pub requests: u64,
    /// Exits to the VMM in user space.
    pub exits: u64,
    /// Doorbells rung.
    pub kicks: u64,
    /// Entries that were left out.
    pub skipped: usize,
}

impl Report {
    /// Prints the table.
    ///
    /// # Errors
    ///
    /// When standard output is full or nobody reads it.
    pub fn print(&self) -> io::Result<()> {
        let mut out = io::stdout().lock();
        write!(out, "{self}")?;
        out.flush()
    }
}

/// Says something on standard error. That nobody listens is no reason to stop.
pub fn say(line: fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// Says what clap had to say about the command line of `name`: help and version as they are, a
/// complaint as one sentence. The exit code that goes with it.
///
/// # Errors
///
/// When help or version could not be printed. A complaint that nobody hears is as good as one.
pub fn say_usage(name: &str, error: &clap::Error) -> io::Result<u8> {
    if error.use_stderr() {
        let shown = error.to_string();
        // Usage and tips come after an empty line.
        let first = shown.split("\n\n").next().unwrap_or_default();
        let words: Vec<_> = first.split_whitespace().collect();
        let words = words.join(" ");
        let words = words.trim_start_matches("error: ");
        say(format_args!("{name}: {words}; try --help"));
    } else {
        error.print().and_then(|()| io::stdout().flush())?;
    }
    Ok(u8::try_from(error.exit_code()).unwrap_or(1))
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut row = |name: &str, value: &dyn fmt::Display| writeln!(f, "  {name:<18} {value}");
        row("accel", &self.accel)?;
        row("guest ELF sha256", &self.guest)?;
        row(
            "boot time",
            &format_args!("{:.2} ms", self.boot.as_secs_f64() * 1e3),
        )?;
        row("files", &self.files)?;
        if self.skipped > 0 {
            row("left out", &self.skipped)?;
        }
        row("bytes", &self.bytes)?;
        // There is no report of a run whose check failed.
        let checked = format_args!(
            "{} and the manifest, on the host, against what was packed",
            Counted(self.files, "file")
        );
        row("checked", &checked)?;
        let rate = self.bytes as f64 / 1e6 / self.hashing.as_secs_f64();
        match rate.is_finite() {
            true => row("hashed at", &format_args!("{rate:.1} MB/s"))?,
            false => row("hashed at", &"-")?,
        }
        row("block requests", &self.requests)?;
        row("exits per request", &Ratio(self.exits, self.requests))?;
        row("kicks per request", &Ratio(self.kicks, self.requests))
    }
}

struct Ratio(u64, u64);

impl fmt::Display for Ratio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.1 {
            0 => f.write_str("-"),
            requests => {
                let ratio = self.0 as f64 / requests as f64;
                write!(f, "{ratio:.3} ({} in all)", self.0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_divided_by_zero() {
        let report = Report {
            accel: "kvm".into(),
            guest: "00".into(),
            boot: Duration::from_micros(2500),
            files: 0,
            bytes: 0,
            hashing: Duration::ZERO,
            requests: 0,
            exits: 3,
            kicks: 0,
            skipped: 2,
        };
        let text = report.to_string();
        assert!(text.contains("boot time          2.50 ms"), "{text}");
        assert!(text.contains("left out           2"), "{text}");
        assert!(
            text.contains("checked            0 files and the manifest, "),
            "{text}"
        );
        assert!(!text.contains("NaN") && !text.contains("inf"), "{text}");
    }
}
