//! Header, segments and note: what the loader will ask, asked at build time.

use super::Elf;
use crate::CheckError;
use elf::abi;
use elf::note::Note;
use pv_abi::layout::{PAGE_SIZE, RAM_BASE, RAM_LOW_END};
use pv_abi::note::{GuestNote, NAME, TYPE};
use zerocopy::FromBytes;

/// An executable segment.
#[derive(Clone, Copy, Debug)]
pub(super) struct Executable<'data> {
    pub(super) address: u64,
    pub(super) bytes: &'data [u8],
}

/// The parts of the image that the instruction check needs.
#[derive(Debug)]
pub(super) struct Layout<'data> {
    pub(super) executable: Vec<Executable<'data>>,
    pub(super) memory: u64,
}

/// Checks header and segments.
pub(super) fn check<'data>(file: &Elf<'data>) -> Result<Layout<'data>, CheckError> {
    let header = &file.ehdr;
    if header.class != elf::file::Class::ELF64 || header.e_machine != abi::EM_X86_64 {
        return Err(CheckError::NotAGuest("not 64-bit x86"));
    }
    if header.e_type != abi::ET_EXEC {
        return Err(CheckError::NotAGuest("not of type EXEC"));
    }
    let segments = file
        .segments()
        .ok_or(CheckError::NotAGuest("no program headers"))?;
    let mut layout = Layout {
        executable: Vec::new(),
        memory: 0,
    };
    let mut low = u64::MAX;
    // End of the last page that a segment has taken so far.
    let mut taken = 0u64;
    let mut high = 0;
    for (index, segment) in segments.iter().enumerate() {
        let refuse = |problem| CheckError::Segment {
            index,
            address: segment.p_vaddr,
            problem,
        };
        match segment.p_type {
            abi::PT_LOAD => {}
            abi::PT_INTERP | abi::PT_DYNAMIC => {
                return Err(refuse("asks for a dynamic linker"));
            }
            abi::PT_TLS => return Err(refuse("is thread-local storage, which nobody sets up")),
            _ => continue,
        }
        if segment.p_memsz == 0 {
            continue;
        }
        let (write, execute) = (abi::PF_W, abi::PF_X);
        if segment.p_flags & write != 0 && segment.p_flags & execute != 0 {
            return Err(refuse("is writable and executable"));
        }
        if !segment.p_vaddr.is_multiple_of(PAGE_SIZE) {
            return Err(refuse("does not start on a page"));
        }
        if segment.p_filesz > segment.p_memsz {
            return Err(refuse("has more bytes in the file than in memory"));
        }
        let end = segment
            .p_vaddr
            .checked_add(segment.p_memsz)
            .filter(|end| segment.p_vaddr >= RAM_BASE && *end <= RAM_LOW_END)
            .ok_or_else(|| refuse("lies outside the guest's RAM"))?;
        if segment.p_vaddr < taken {
            return Err(refuse(
                "shares a page with the one before it, or is out of order",
            ));
        }
        taken = end.next_multiple_of(PAGE_SIZE);
        low = low.min(segment.p_vaddr);
        high = high.max(end);
        if segment.p_flags & execute != 0 {
            layout.executable.push(Executable {
                address: segment.p_vaddr,
                bytes: file.segment_data(&segment)?,
            });
        }
    }
    if layout.executable.is_empty() {
        return Err(CheckError::NotAGuest("nothing in it is executable"));
    }
    layout.memory = high.saturating_sub(low);
    Ok(layout)
}

/// Finds and checks the Paravane note.
pub(super) fn note(file: &Elf<'_>) -> Result<GuestNote, CheckError> {
    let segments = file
        .segments()
        .ok_or(CheckError::NotAGuest("no program headers"))?;
    // The name of a note is compared with its terminating zero taken off.
    let name = &NAME[..NAME.len() - 1];
    for segment in segments.iter().filter(|s| s.p_type == abi::PT_NOTE) {
        for note in file.segment_data_as_notes(&segment)? {
            let Note::Unknown(any) = note else { continue };
            let named = any.name.strip_suffix(b"\0").unwrap_or(any.name) == name;
            if !named || any.n_type != u64::from(TYPE) {
                continue;
            }
            let note = GuestNote::read_from_bytes(any.desc)
                .map_err(|_| CheckError::Note("of the wrong size"))?;
            if note.abi_major != pv_abi::ABI_MAJOR {
                return Err(CheckError::Note("for another major version of the ABI"));
            }
            if note.baseline != pv_abi::baseline::X86_64_V2 {
                return Err(CheckError::Note("for another CPU baseline"));
            }
            return Ok(note);
        }
    }
    Err(CheckError::Note("missing"))
}
