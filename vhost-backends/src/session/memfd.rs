//! Files of memory: made for the frontend, mapped, and how firm the frontend's are.
#![allow(unsafe_code)]
// UNSAFETY: memfd_create and seals have no safe wrapper among the dependencies.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use vm_memory::FileOffset;
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder};

/// Whether a file can never become shorter. Files that cannot be sealed can.
pub(super) fn keeps_its_length(file: &File) -> bool {
    // SAFETY: F_GET_SEALS takes no pointer.
    let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
    seals >= 0 && seals & libc::F_SEAL_SHRINK != 0
}

/// Maps `len` bytes at `offset` of a file, to be read and written by its other users too.
///
/// Huge pages are reserved here or the mapping fails: one that the host turns out not to have is
/// SIGBUS for whoever touches it first. For other files nothing depends on a reservation. A part of a
/// huge page is refused: it could not be unmapped again.
pub(crate) fn map(file: File, offset: u64, len: usize) -> io::Result<MmapRegion> {
    if let Some(page) = huge_page(&file)? {
        let whole = |bytes: u64| bytes.is_multiple_of(page);
        if !whole(offset) || !u64::try_from(len).is_ok_and(whole) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{len:#x} bytes at {offset:#x} of its file are no huge pages of {page:#x}"),
            ));
        }
    }
    MmapRegionBuilder::new(len)
        .with_file_offset(FileOffset::new(file, offset))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_SHARED)
        .build()
        .map_err(io::Error::other)
}

/// Bytes of a file's pages, if they are huge ones.
fn huge_page(file: &File) -> io::Result<Option<u64>> {
    // SAFETY: all-zero is a valid statfs.
    let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open, and `stat` is valid for writes.
    match unsafe { libc::fstatfs(file.as_raw_fd(), &mut stat) } {
        0 if stat.f_type == libc::HUGETLBFS_MAGIC => Ok(u64::try_from(stat.f_bsize).ok()),
        0 => Ok(None),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A file of `len` zero bytes that nobody can make shorter or longer.
pub(super) fn sealed(name: &CStr, len: u64) -> io::Result<OwnedFd> {
    // SAFETY: the name is a C string and outlives the call.
    let fd =
        unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and nothing else owns it.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len)?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: F_ADD_SEALS takes no pointer.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_a_huge_page_is_not_mapped() {
        let flags = libc::MFD_CLOEXEC | libc::MFD_HUGETLB | libc::MFD_HUGE_2MB;
        // SAFETY: the name is a C string and outlives the call.
        let fd = unsafe { libc::memfd_create(c"huge".as_ptr(), flags) };
        if fd < 0 {
            return println!("SKIPPED: no files of huge pages");
        }
        // SAFETY: the descriptor was just made and nothing else owns it.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(4 << 20).unwrap();
        for (offset, len, whole) in [
            (0, 2 << 20, true),
            (0, (2 << 20) + 0x1000, false),
            (0x1000, 2 << 20, false),
        ] {
            // One of whole pages is mapped where the host has any.
            let mapped = map(file.try_clone().unwrap(), offset, len);
            let refused = mapped.is_err_and(|error| error.to_string().contains("no huge pages"));
            assert_eq!(refused, !whole, "{len:#x} at {offset:#x}");
        }
    }
}
