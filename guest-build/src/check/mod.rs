//! The checks on a finished guest: segments, note, entry point, instructions.
//!
//! In comes an ELF, out goes a [`CheckReport`] or the first refusal. The instruction check walks
//! every byte that will be executable, function by function. It catches accidents (a crate that
//! asks `CPUID`, a compiler flag too many), not malice: code can jump into the middle of an
//! instruction, and it is the accel that contains a hostile guest.

mod banned;
mod code;
mod image;

#[cfg(test)]
mod tests;

pub use banned::{Ban, classify};

use crate::CheckError;
use elf::ElfBytes;
use elf::endian::LittleEndian;

pub(crate) type Elf<'data> = ElfBytes<'data, LittleEndian>;

/// What a caller excuses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckOptions {
    /// Functions whose name, raw or demangled, starts with one of these may contain anything.
    ///
    /// Only as far as the symbol's size: an assembly label without a `.size` excuses nothing. For
    /// guests that test what the host does with hostile code; nothing else.
    pub allow_banned: Vec<String>,
}

/// What was checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckReport {
    /// Functions disassembled.
    pub functions: usize,
    /// Instructions decoded.
    pub instructions: usize,
    /// Banned instructions that the caller excused.
    pub excused: usize,
    /// The entry point.
    pub entry: u64,
    /// Bytes from the first to the last loaded one, `.bss` included.
    pub memory: u64,
    /// The guest's note.
    pub note: pv_abi::note::GuestNote,
}

/// Checks a guest ELF.
///
/// # Errors
///
/// The first refusal; banned instructions are collected, so that one run names them all.
pub fn check(bytes: &[u8], options: &CheckOptions) -> Result<CheckReport, CheckError> {
    let file = Elf::minimal_parse(bytes)?;
    let layout = image::check(&file)?;
    let note = image::note(&file)?;
    let code = code::check(&file, &layout, options)?;
    Ok(CheckReport {
        functions: code.functions,
        instructions: code.instructions,
        excused: code.excused,
        entry: file.ehdr.e_entry,
        memory: layout.memory,
        note,
    })
}
