//! Files of memory: made for the frontend, mapped, and how firm the frontend's are.
#![allow(unsafe_code)]
// UNSAFETY: memfd_create and seals have no safe wrapper among the dependencies.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use vm_memory::FileOffset;
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder, MmapRegionError};

/// Whether a file can never become shorter. Files that cannot be sealed can.
pub(super) fn keeps_its_length(file: &File) -> bool {
    // SAFETY: F_GET_SEALS takes no pointer.
    let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
    seals >= 0 && seals & libc::F_SEAL_SHRINK != 0
}

/// Maps `len` bytes at `offset` of a file, to be read and written by its other users too.
///
/// Huge pages are reserved here or the mapping fails: one that the host turns out not to have is
/// SIGBUS for whoever touches it first. For other files nothing depends on a reservation.
pub(crate) fn map(file: File, offset: u64, len: usize) -> Result<MmapRegion, MmapRegionError> {
    MmapRegionBuilder::new(len)
        .with_file_offset(FileOffset::new(file, offset))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_SHARED)
        .build()
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
