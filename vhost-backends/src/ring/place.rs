//! Where the parts of a ring may lie.

use super::{RingError, RingPart};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// A part of a ring lies in one region and is aligned for guest and host alike.
pub(super) fn check_part(
    mem: &GuestMemoryMmap,
    part: RingPart,
    addr: GuestAddress,
    align: u64,
    len: u64,
) -> Result<(), RingError> {
    let misaligned = RingError::Misaligned { part, addr: addr.0 };
    let outside = RingError::OutsideMemory { part, addr: addr.0 };
    if !addr.0.is_multiple_of(align) {
        return Err(misaligned);
    }
    let region = mem.find_region(addr).ok_or(outside)?;
    let end = addr.0.checked_add(len - 1).ok_or(outside)?;
    if end > region.last_addr().0 {
        return Err(outside);
    }
    // An odd region base makes aligned guest addresses misaligned here.
    let host = GuestMemoryBackend::get_host_address(mem, addr).map_err(|_| outside)?;
    if (host as usize as u64).is_multiple_of(align) {
        Ok(())
    } else {
        Err(misaligned)
    }
}
