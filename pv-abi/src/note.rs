//! The ELF note in which a guest states what it needs.
//!
//! Section and segment `.note.paravane` (`PT_NOTE`), name `Paravane`, type [`TYPE`]. A host refuses
//! an image without it, or with one that asks for what it does not have, before anything runs.

use crate::assert_layout;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The note's name, with its terminating zero.
pub const NAME: &[u8; 9] = b"Paravane\0";
/// The note's type.
pub const TYPE: u32 = 1;

/// What a guest needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct GuestNote {
    /// ABI major that the guest was built for; must be equal.
    pub abi_major: u16,
    /// Lowest ABI minor that the guest can run on.
    pub abi_minor: u16,
    /// [`crate::baseline`] that the guest was compiled for.
    pub baseline: u32,
    /// [`crate::feature`] bits without which the guest cannot run.
    pub needed_features: u64,
    /// Bytes of stack wanted for each vCPU; 0 for the host's default.
    pub stack_size: u64,
}
assert_layout!(GuestNote, size 24, align 8, abi_major @ 0, abi_minor @ 2, baseline @ 4,
    needed_features @ 8, stack_size @ 16);

/// A whole note record, to be placed in the section as it is.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct NoteRecord {
    /// Bytes in `name` without padding.
    pub name_size: u32,
    /// Bytes in `note`.
    pub desc_size: u32,
    /// [`TYPE`].
    pub kind: u32,
    /// [`NAME`], padded to a multiple of four.
    pub name: [u8; 12],
    /// The descriptor.
    pub note: GuestNote,
}
assert_layout!(NoteRecord, size 48, align 8, name_size @ 0, desc_size @ 4, kind @ 8, name @ 12,
    note @ 24);

impl NoteRecord {
    /// A record for a guest compiled against this version of the ABI.
    pub const fn new(needed_features: u64, stack_size: u64) -> Self {
        NoteRecord {
            name_size: NAME.len() as u32,
            desc_size: size_of::<GuestNote>() as u32,
            kind: TYPE,
            name: *b"Paravane\0\0\0\0",
            note: GuestNote {
                abi_major: crate::ABI_MAJOR,
                abi_minor: crate::ABI_MINOR,
                baseline: crate::baseline::X86_64_V2,
                needed_features,
                stack_size,
            },
        }
    }
}
