//! Every refusal, as a type and a sentence that says what to do.

use crate::check::Ban;
use std::fmt;
use std::path::PathBuf;
use std::process::ExitStatus;

/// Findings printed in one message; a guest that links the wrong crate has thousands.
const FINDINGS_SHOWN: usize = 12;

/// Why a guest could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The directory holds no guest workspace.
    #[error("no guest workspace at {}: give the folder that holds the guests' Cargo.toml", dir.display())]
    NoWorkspace {
        /// Where it was looked for.
        dir: PathBuf,
    },
    /// The workspace has no such package.
    #[error(
        "the guest workspace {} has no package `{package}`: it has {}; add the package's folder \
         with a Cargo.toml and src/main.rs", dir.display(), have.join(", ")
    )]
    NoPackage {
        /// The workspace.
        dir: PathBuf,
        /// What was asked for.
        package: String,
        /// What there is.
        have: Vec<String>,
    },
    /// A package's source file does not exist.
    #[error("guest `{package}` has no {}: write it, or remove the package's folder", source_file.display())]
    NoSource {
        /// The package.
        package: String,
        /// The file that its manifest names.
        source_file: PathBuf,
    },
    /// No package was named.
    #[error("no guest package was named: call `.package(\"name\")`")]
    NothingToBuild,
    /// Cargo did not run.
    #[error("cannot run `{program}`: is the Rust toolchain on the PATH?")]
    Spawn {
        /// The program.
        program: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Cargo refused or the guest does not compile.
    #[error("building guest `{package}` failed ({status}); cargo said:\n{output}")]
    Cargo {
        /// The package, or the workspace for `cargo metadata`.
        package: String,
        /// How cargo ended.
        status: ExitStatus,
        /// The end of what it said.
        output: String,
    },
    /// Cargo answered in a form that this crate does not know.
    #[error("`cargo metadata` answered in an unknown form")]
    Metadata(#[from] serde_json::Error),
    /// A file could not be read or written.
    #[error("cannot {action} {}", path.display())]
    File {
        /// What was being done.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The guest was built and is refused.
    #[error("guest `{package}` ({}) is refused", path.display())]
    Refused {
        /// The package.
        package: String,
        /// The ELF, for a closer look.
        path: PathBuf,
        /// Why.
        #[source]
        source: CheckError,
    },
}

impl From<elf::ParseError> for CheckError {
    fn from(error: elf::ParseError) -> CheckError {
        CheckError::Elf(error)
    }
}

/// Why an ELF is refused as a guest.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckError {
    /// Not an ELF file that can be read.
    #[error("it cannot be read as an ELF file ({0}): give the executable that the build produced")]
    Elf(elf::ParseError),
    /// An ELF for something else.
    #[error("it is not a static x86-64 executable ({0}): link it with guest-build's link.ld")]
    NotAGuest(&'static str),
    /// No symbol table, so nothing can be named.
    #[error("it has no symbol table: do not strip guests before the check")]
    Stripped,
    /// No `_start`, or it is not the entry point.
    #[error(
        "it has no `_start` at its entry point: use guest-sdk's entry macro, or define `_start`"
    )]
    NoStart,
    /// The Paravane note is missing or malformed.
    #[error("its Paravane note is {0}: use guest-sdk's entry macro, which places the note")]
    Note(&'static str),
    /// A segment does not meet the loader's rules.
    #[error("segment {index} at {address:#x} {problem}: link the guest with guest-build's link.ld")]
    Segment {
        /// Index in the program header table.
        index: usize,
        /// Where it is to be loaded.
        address: u64,
        /// What is wrong.
        problem: &'static str,
    },
    /// Instructions that a guest may not execute.
    #[error("{}", Findings(.0))]
    Banned(Vec<Finding>),
}

/// One instruction that a guest may not contain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The function, demangled.
    pub symbol: String,
    /// Where the instruction lies.
    pub address: u64,
    /// Its mnemonic in lower case.
    pub instruction: String,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Why it is refused.
    pub ban: Ban,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Finding {
            symbol,
            address,
            instruction,
            ban,
            ..
        } = self;
        write!(f, "`{instruction}` at {address:#x} in `{symbol}` ({ban};")?;
        for byte in &self.bytes {
            write!(f, " {byte:02x}")?;
        }
        f.write_str(")")
    }
}

struct Findings<'a>(&'a [Finding]);

impl fmt::Display for Findings<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.0.len();
        let noun = if count == 1 {
            "instruction"
        } else {
            "instructions"
        };
        write!(f, "it contains {count} {noun} that a guest may not execute")?;
        for finding in self.0.iter().take(FINDINGS_SHOWN) {
            write!(f, "\n  {finding}")?;
        }
        if let Some(more) = count.checked_sub(FINDINGS_SHOWN).filter(|n| *n > 0) {
            write!(f, "\n  and {more} more")?;
        }
        f.write_str("\ntake the code out, or configure the crate it comes from not to ask the CPU")
    }
}
