//! Guest images: an ELF file comes in, checked segments and a note go out.
//!
//! Nothing of the file is believed before it has been checked against the ABI's map. An image that
//! cannot run here is refused before anything is built, with a sentence that says what to do.

#[cfg(test)]
pub(crate) mod tests;

use crate::limits::{MAX_IMAGE_LEN, MAX_PROGRAM_HEADERS, MAX_SEGMENTS, MAX_STACK};
use elf::ElfBytes;
use elf::abi::{EM_X86_64, ET_EXEC, PF_R, PF_W, PF_X, PT_DYNAMIC, PT_INTERP, PT_LOAD, PT_NOTE};
use elf::endian::LittleEndian;
use elf::note::Note;
use pv_abi::layout::{PAGE_SIZE, RAM_BASE, RAM_LOW_END};
use pv_abi::note::GuestNote;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use zerocopy::FromBytes;

/// Why an image was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The file cannot be read.
    #[error("cannot read the guest image {path}")]
    Io {
        /// The file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// A folder, a device or a pipe.
    #[error("{path} is not a regular file; give the guest's ELF file")]
    NotAFile {
        /// What was to be read.
        path: String,
    },
    /// Larger than this library loads.
    #[error("the image has {len} bytes; at most {MAX_IMAGE_LEN} are loaded")]
    TooLarge {
        /// Bytes in the file.
        len: usize,
    },
    /// Not an ELF file, or one that is cut or damaged.
    #[error("not a valid ELF file, or a damaged one: {reason}; build the guest again")]
    Malformed {
        /// What is wrong.
        reason: String,
    },
    /// An ELF file of another kind.
    #[error("{what}; build the guest as a static, non-PIE x86-64 executable (guest-build does)")]
    WrongKind {
        /// What it is.
        what: &'static str,
    },
    /// No loadable segment.
    #[error("the image has no loadable segment")]
    Empty,
    /// More program headers or segments than any linker makes.
    #[error("the image has {count} {what}; at most {limit} are accepted")]
    TooMany {
        /// What there are too many of.
        what: &'static str,
        /// How many.
        count: usize,
        /// The limit.
        limit: usize,
    },
    /// A segment that lies outside the file or the map.
    #[error("segment {index} at {vaddr:#x}: {reason}")]
    BadSegment {
        /// Its index among the program headers.
        index: usize,
        /// Its address.
        vaddr: u64,
        /// What is wrong.
        reason: &'static str,
    },
    /// The entry point is not in an executable segment.
    #[error("the entry point {entry:#x} is not in an executable segment")]
    BadEntry {
        /// The address.
        entry: u64,
    },
    /// No note, so this was not built with the guest SDK.
    #[error("the image has no Paravane note; build it with guest-sdk's `entry!` macro")]
    NoNote,
    /// A note that is not one.
    #[error("the Paravane note is damaged: {reason}; build the guest again")]
    BadNote {
        /// What is wrong.
        reason: &'static str,
    },
    /// Built for another version of the ABI.
    #[error(
        "the guest was built for ABI {major}.{minor}, this host has {}.{}; rebuild the guest with \
         the guest-sdk of this release, or run it on the release that it was built for",
        pv_abi::ABI_MAJOR,
        pv_abi::ABI_MINOR
    )]
    Abi {
        /// The image's major.
        major: u16,
        /// The image's minor.
        minor: u16,
    },
    /// Compiled for a CPU that this host is not.
    #[error("the guest was compiled for baseline {wanted}, this host offers {offered}; rebuild it")]
    Baseline {
        /// What the image asks for.
        wanted: u32,
        /// What there is.
        offered: u32,
    },
    /// Asks for features that this host does not have.
    #[error("the guest needs features {missing:#x}, which this host does not offer")]
    Features {
        /// The bits that are missing.
        missing: u64,
    },
}

/// What a segment's pages may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read only.
    Read,
    /// Read and write.
    ReadWrite,
    /// Read and execute.
    ReadExecute,
}

/// One loadable segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First byte; a multiple of the page size.
    pub gpa: u64,
    /// Bytes in memory, rounded up to whole pages.
    pub len: u64,
    /// Where in the first page the file's bytes begin.
    pub lead: u64,
    /// Range of the file that is loaded.
    pub file: std::ops::Range<usize>,
    /// What its pages may be used for.
    pub access: Access,
}

/// A checked guest image.
#[derive(Clone, Debug)]
pub struct Image {
    bytes: Arc<[u8]>,
    segments: Vec<Segment>,
    entry: u64,
    note: GuestNote,
}

impl Image {
    /// Reads and checks an ELF file.
    ///
    /// # Errors
    /// Every way in which it can be unfit has its own [`ImageError`].
    pub fn open(path: impl AsRef<Path>) -> Result<Image, ImageError> {
        let path = path.as_ref();
        let io = |source| ImageError::Io {
            path: path.display().to_string(),
            source,
        };
        let check = |found: std::fs::Metadata| {
            let len = usize::try_from(found.len()).unwrap_or(usize::MAX);
            if !found.is_file() {
                let path = path.display().to_string();
                return Err(ImageError::NotAFile { path });
            }
            if len > MAX_IMAGE_LEN {
                return Err(ImageError::TooLarge { len });
            }
            Ok(len)
        };
        // Before it is opened, which some devices take for a command; and again, for it may be
        // another one by then. Without O_NONBLOCK the opening of a pipe waits for its writer.
        check(std::fs::metadata(path).map_err(io)?)?;
        let mut options = File::options();
        let options = options.read(true).custom_flags(libc::O_NONBLOCK);
        let file = options.open(path).map_err(io)?;
        let len = check(file.metadata().map_err(io)?)?;
        let mut bytes = Vec::with_capacity(len + 1);
        // The length is a hint: files grow, and those in /proc have none. One byte more than there
        // may be tells them apart from those that fit; `from_bytes` looks at the sum.
        file.take(MAX_IMAGE_LEN as u64 + 1)
            .read_to_end(&mut bytes)
            .map_err(io)?;
        Image::from_bytes(bytes)
    }

    /// Checks an ELF file that is in memory.
    ///
    /// # Errors
    /// Every way in which it can be unfit has its own [`ImageError`].
    pub fn from_bytes(bytes: impl Into<Arc<[u8]>>) -> Result<Image, ImageError> {
        let bytes = bytes.into();
        if bytes.len() > MAX_IMAGE_LEN {
            return Err(ImageError::TooLarge { len: bytes.len() });
        }
        let file = ElfBytes::<LittleEndian>::minimal_parse(&bytes).map_err(malformed)?;
        if file.ehdr.class != elf::file::Class::ELF64 {
            return Err(ImageError::WrongKind {
                what: "a 32-bit ELF file",
            });
        }
        if file.ehdr.e_machine != EM_X86_64 {
            return Err(ImageError::WrongKind {
                what: "an ELF file for another architecture",
            });
        }
        if file.ehdr.e_type != ET_EXEC {
            return Err(ImageError::WrongKind {
                what: "an ELF file that is not an executable",
            });
        }
        let headers = file.segments().ok_or(ImageError::Empty)?;
        if headers.len() > MAX_PROGRAM_HEADERS {
            return Err(ImageError::TooMany {
                what: "program headers",
                count: headers.len(),
                limit: MAX_PROGRAM_HEADERS,
            });
        }
        let mut segments = Vec::new();
        let mut note = None;
        for (index, header) in headers.iter().enumerate() {
            match header.p_type {
                PT_LOAD if header.p_memsz > 0 => {
                    segments.push(segment(index, &header, bytes.len())?)
                }
                PT_INTERP | PT_DYNAMIC => {
                    return Err(ImageError::WrongKind {
                        what: "a dynamically linked ELF file",
                    });
                }
                PT_NOTE if note.is_none() => {
                    for found in file.segment_data_as_notes(&header).map_err(malformed)? {
                        if let Note::Unknown(any) = found
                            && any.name.strip_suffix(b"\0").unwrap_or(any.name)
                                == b"Paravane".as_slice()
                            && any.n_type == u64::from(pv_abi::note::TYPE)
                        {
                            note = Some(parse_note(any.desc)?);
                            break;
                        }
                    }
                }
                _ => {}
            }
        }
        check_segments(&segments)?;
        let entry = file.ehdr.e_entry;
        let in_text = |s: &Segment| {
            s.access == Access::ReadExecute && entry.checked_sub(s.gpa).is_some_and(|o| o < s.len)
        };
        if !segments.iter().any(in_text) {
            return Err(ImageError::BadEntry { entry });
        }
        let note = note.ok_or(ImageError::NoNote)?;
        check_note(&note)?;
        Ok(Image {
            segments,
            entry,
            note,
            bytes,
        })
    }

    /// The file, as it was given.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The loadable segments, in ascending order of addresses, at least a page apart or adjacent.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Address of the first instruction.
    pub fn entry(&self) -> u64 {
        self.entry
    }

    /// What the guest needs.
    pub fn note(&self) -> &GuestNote {
        &self.note
    }

    /// First byte past the last segment.
    pub fn end(&self) -> u64 {
        self.segments.last().map_or(RAM_BASE, |s| s.gpa + s.len)
    }
}

fn malformed(error: elf::ParseError) -> ImageError {
    ImageError::Malformed {
        reason: error.to_string(),
    }
}

fn segment(
    index: usize,
    header: &elf::segment::ProgramHeader,
    file_len: usize,
) -> Result<Segment, ImageError> {
    let vaddr = header.p_vaddr;
    let bad = |reason| ImageError::BadSegment {
        index,
        vaddr,
        reason,
    };
    if header.p_filesz > header.p_memsz {
        return Err(bad("more bytes in the file than in memory"));
    }
    let start = usize::try_from(header.p_offset).map_err(|_| bad("outside the file"))?;
    let count = usize::try_from(header.p_filesz).map_err(|_| bad("outside the file"))?;
    let end = start.checked_add(count).filter(|end| *end <= file_len);
    let end = end.ok_or_else(|| bad("outside the file; the file is cut"))?;
    let top = vaddr
        .checked_add(header.p_memsz)
        .filter(|top| *top <= RAM_LOW_END);
    let top = top.ok_or_else(|| bad("ends past the low part of private RAM"))?;
    if vaddr < RAM_BASE {
        return Err(bad(
            "begins below private RAM; link the image at 16 MiB or above",
        ));
    }
    let access = match (
        header.p_flags & PF_R,
        header.p_flags & PF_W,
        header.p_flags & PF_X,
    ) {
        (0, ..) => return Err(bad("is not readable")),
        (_, 0, 0) => Access::Read,
        (_, _, 0) => Access::ReadWrite,
        (_, 0, _) => Access::ReadExecute,
        _ => return Err(bad("is writable and executable at once")),
    };
    let gpa = vaddr & !(PAGE_SIZE - 1);
    let len = top.next_multiple_of(PAGE_SIZE) - gpa;
    Ok(Segment {
        gpa,
        len,
        lead: vaddr - gpa,
        file: start..end,
        access,
    })
}

fn check_segments(segments: &[Segment]) -> Result<(), ImageError> {
    if segments.is_empty() {
        return Err(ImageError::Empty);
    }
    if segments.len() > MAX_SEGMENTS {
        return Err(ImageError::TooMany {
            what: "loadable segments",
            count: segments.len(),
            limit: MAX_SEGMENTS,
        });
    }
    for (index, pair) in segments.windows(2).enumerate() {
        if let [a, b] = pair
            && a.gpa + a.len > b.gpa
        {
            return Err(ImageError::BadSegment {
                index: index + 1,
                vaddr: b.gpa,
                reason: "shares a page with the one before it, or is out of order",
            });
        }
    }
    Ok(())
}

fn parse_note(desc: &[u8]) -> Result<GuestNote, ImageError> {
    GuestNote::read_from_bytes(desc).map_err(|_| ImageError::BadNote {
        reason: "wrong size",
    })
}

fn check_note(note: &GuestNote) -> Result<(), ImageError> {
    if note.abi_major != pv_abi::ABI_MAJOR || note.abi_minor > pv_abi::ABI_MINOR {
        return Err(ImageError::Abi {
            major: note.abi_major,
            minor: note.abi_minor,
        });
    }
    let offered = pv_abi::baseline::X86_64_V2;
    if note.baseline != offered {
        return Err(ImageError::Baseline {
            wanted: note.baseline,
            offered,
        });
    }
    let missing = note.needed_features & !pv_abi::feature::ALL;
    if missing != 0 {
        return Err(ImageError::Features { missing });
    }
    if note.stack_size > MAX_STACK {
        return Err(ImageError::BadNote {
            reason: "asks for more than 64 MiB of stack",
        });
    }
    Ok(())
}
