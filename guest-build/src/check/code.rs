//! The instruction check: every executable byte, function by function.

use super::banned::classify;
use super::image::Layout;
use super::{CheckOptions, Elf};
use crate::{CheckError, Finding};
use elf::abi;
use iced_x86::{Decoder, DecoderOptions, Instruction};
use std::collections::BTreeMap;

/// x86-64 code.
const BITNESS: u32 = 64;

/// Name of bytes that no symbol covers.
const NO_SYMBOL: &str = "<no symbol>";

pub(super) struct Walk {
    pub(super) functions: usize,
    pub(super) instructions: usize,
    pub(super) excused: usize,
}

/// All names of one address.
#[derive(Debug, Default)]
struct Function {
    names: Vec<String>,
    is_function: bool,
    size: u64,
}

impl Function {
    /// Whether every name is excused: code that two functions share is only as excused as both.
    fn excused(&self, options: &CheckOptions) -> bool {
        let allowed = |name: &String| {
            let readable = demangle(name);
            options.allow_banned.iter().any(|prefix| {
                !prefix.is_empty() && (name.starts_with(prefix) || readable.starts_with(prefix))
            })
        };
        !self.is_nameless() && self.names.iter().all(allowed)
    }

    fn is_nameless(&self) -> bool {
        self.names.is_empty()
    }

    fn readable(&self) -> String {
        self.names
            .first()
            .map_or_else(|| NO_SYMBOL.to_owned(), |name| demangle(name))
    }
}

fn demangle(name: &str) -> String {
    format!("{:#}", rustc_demangle::demangle(name))
}

/// Disassembles every executable segment and collects what is banned.
pub(super) fn check(
    file: &Elf<'_>,
    layout: &Layout<'_>,
    options: &CheckOptions,
) -> Result<Walk, CheckError> {
    let functions = functions(file, layout)?;
    let mut walk = Walk {
        functions: 0,
        instructions: 0,
        excused: 0,
    };
    let mut findings = Vec::new();
    let nameless = Function::default();
    for segment in &layout.executable {
        let end = segment.address + segment.bytes.len() as u64;
        let mut starts: Vec<(u64, &Function)> = functions
            .range(segment.address..end)
            .map(|(address, function)| (*address, function))
            .collect();
        if starts
            .first()
            .is_none_or(|(first, _)| *first > segment.address)
        {
            starts.insert(0, (segment.address, &nameless));
        }
        for (i, (start, function)) in starts.iter().enumerate() {
            let stop = starts.get(i + 1).map_or(end, |(next, _)| *next);
            let offset = (start - segment.address) as usize;
            let length = (stop - start) as usize;
            let Some(bytes) = segment.bytes.get(offset..offset + length) else {
                continue;
            };
            walk.functions += 1;
            if !function.excused(options) {
                findings.extend(banned_in(function, *start, bytes, &mut walk.instructions));
                continue;
            }
            // The excuse reaches as far as the symbol says, not to wherever the next one begins.
            let reach = function.size.min(length as u64);
            let (own, rest) = bytes.split_at(reach as usize);
            walk.excused += banned_in(function, *start, own, &mut walk.instructions).len();
            let after = banned_in(&nameless, start + reach, rest, &mut walk.instructions);
            findings.extend(after);
        }
    }
    if findings.is_empty() {
        Ok(walk)
    } else {
        Err(CheckError::Banned(findings))
    }
}

fn banned_in(
    function: &Function,
    start: u64,
    bytes: &[u8],
    instructions: &mut usize,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    let zeroes = bytes
        .iter()
        .rposition(|b| *b != 0)
        .map_or(0, |last| last + 1);
    let mut decoder = Decoder::with_ip(BITNESS, bytes, start, DecoderOptions::NONE);
    let mut instruction = Instruction::default();
    while decoder.can_decode() {
        let at = decoder.position();
        decoder.decode_out(&mut instruction);
        let raw = bytes.get(at..decoder.position()).unwrap_or_default();
        // Linkers fill the space between functions; zeroes there are not code, and not reached.
        let past_end = function.is_nameless() || (function.size != 0 && at as u64 >= function.size);
        if past_end && at >= zeroes {
            break;
        }
        *instructions += 1;
        if let Some(ban) = classify(&instruction) {
            findings.push(Finding {
                symbol: function.readable(),
                address: start + at as u64,
                instruction: format!("{:?}", instruction.mnemonic()).to_lowercase(),
                bytes: raw.to_vec(),
                ban,
            });
        }
    }
    findings
}

/// Every address in executable memory at which a function starts.
///
/// Labels of assembly code without a type count where no typed function covers them.
fn functions(file: &Elf<'_>, layout: &Layout<'_>) -> Result<BTreeMap<u64, Function>, CheckError> {
    let (symbols, names) = file.symbol_table()?.ok_or(CheckError::Stripped)?;
    let mut functions: BTreeMap<u64, Function> = BTreeMap::new();
    let mut labels: Vec<(u64, String)> = Vec::new();
    let mut start_found = false;
    for symbol in symbols.iter() {
        let executable = layout.executable.iter().any(|segment| {
            symbol.st_value >= segment.address
                && symbol.st_value - segment.address < segment.bytes.len() as u64
        });
        if symbol.is_undefined() || !executable {
            continue;
        }
        let name = names.get(symbol.st_name as usize)?;
        if name.is_empty() {
            continue;
        }
        start_found |= name == "_start" && symbol.st_value == file.ehdr.e_entry;
        match symbol.st_symtype() {
            abi::STT_FUNC => {
                let function = functions.entry(symbol.st_value).or_default();
                function.is_function = true;
                function.size = function.size.max(symbol.st_size);
                function.names.push(name.to_owned());
            }
            abi::STT_NOTYPE if symbol.st_shndx != abi::SHN_ABS => {
                labels.push((symbol.st_value, name.to_owned()));
            }
            _ => {}
        }
    }
    if !start_found {
        return Err(CheckError::NoStart);
    }
    for (address, name) in labels {
        let covered = functions
            .range(..=address)
            .next_back()
            .is_some_and(|(start, f)| {
                f.is_function && (*start == address || address - start < f.size)
            });
        if !covered {
            functions.entry(address).or_default().names.push(name);
        }
    }
    Ok(functions)
}
