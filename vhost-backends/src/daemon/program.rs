//! A daemon's outside: its log, its exit code, and what it prints instead of serving.
//!
//! Nobody need read what it prints: output to a pipe without a reader is lost, and nothing else. What
//! cannot be written otherwise is an error of what is printed instead of serving.

use super::options::Operation;
use crate::sandbox::{Outcome, Sandbox, probe_all};
use clap::Parser;
use std::ffi::OsString;
use std::fmt;
use std::io::{self, Write};
use std::process::ExitCode;

/// A command line, or the exit code of a program that has printed why there is none.
pub(crate) fn parse<C: Parser>(args: impl IntoIterator<Item = OsString>) -> Result<C, ExitCode> {
    C::try_parse_from(args).map_err(|error| {
        if error.use_stderr() {
            let name = C::command();
            let said = sentence(&error);
            let _ = writeln!(io::stderr(), "{}: {said}; try --help", name.get_name());
        } else {
            // Help and version are no errors, and go to standard output.
            if let Err(sentence) = written(error.print()) {
                let _ = writeln!(io::stderr(), "{}: {sentence}", C::command().get_name());
                return ExitCode::FAILURE;
            }
        }
        ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
    })
}

/// What is wrong with a command line, without the usage and the tips: one line.
pub(super) fn sentence(error: &clap::Error) -> String {
    let shown = error.to_string();
    let first = shown.split("\n\n").next().unwrap_or_default();
    let words: Vec<_> = first.split_whitespace().collect();
    words.join(" ").trim_start_matches("error: ").to_owned()
}

/// Does what the command line says: prints and ends, or serves until the end.
pub(crate) fn start(
    name: &'static str,
    operation: &Operation,
    capabilities: &serde_json::Value,
    serve: impl FnOnce() -> Result<(), String>,
) -> ExitCode {
    let level = if operation.verbose {
        tracing::Level::INFO
    } else {
        tracing::Level::WARN
    };
    // An embedding program may have a subscriber already; then that one is used.
    let _ = tracing_subscriber::fmt()
        .with_writer(io::stderr)
        .with_max_level(level)
        .without_time()
        // It would report what standard error does not take on standard error.
        .log_internal_errors(false)
        .try_init();
    // The default hook may read debug information, for which there are no paths in the sandbox.
    std::panic::set_hook(Box::new(|info| tracing::error!("bug: {info}")));
    let outcome = if operation.print_capabilities {
        print(format_args!("{capabilities}"))
    } else if operation.self_test {
        self_test(operation.sandbox())
    } else {
        serve()
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(sentence) => {
            let _ = writeln!(io::stderr(), "{name}: {sentence}");
            ExitCode::FAILURE
        }
    }
}

/// The error is a sentence.
fn print(line: fmt::Arguments<'_>) -> Result<(), String> {
    written(writeln!(io::stdout(), "{line}"))
}

fn written(result: io::Result<()>) -> Result<(), String> {
    match result.and_then(|()| io::stdout().flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(format!("cannot write to standard output: {error}"))
        }
        _ => Ok(()),
    }
}

fn self_test(sandbox: Sandbox) -> Result<(), String> {
    let outcomes =
        probe_all(sandbox).map_err(|error| format!("cannot start a process: {error}"))?;
    let mut open = 0;
    for (probe, outcome) in outcomes {
        print(format_args!("{:<12} {outcome}", probe.name))?;
        open += usize::from(matches!(outcome, Outcome::Allowed | Outcome::NotEntered));
    }
    match open {
        0 => Ok(()),
        _ => Err(format!("{open} of these calls were not refused")),
    }
}
