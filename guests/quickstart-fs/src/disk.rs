//! The disk, as the file system work needs it.

use core::error::Error;

/// A disk that can have several reads in flight.
///
/// Reads are finished in the order in which they were started. Callers start no more than
/// [`READ_AHEAD`](crate::limits::READ_AHEAD) before they finish one, each of at most
/// [`CHUNK`](crate::limits::CHUNK) bytes and a whole number of sectors.
pub trait Disk {
    /// What can go wrong.
    type Error: Error + 'static;

    /// Sectors on the disk.
    fn sectors(&self) -> u64;

    /// Starts a read of `length` bytes. The device need not see it before the next
    /// [`kick`](Disk::kick) or [`finish_read`](Disk::finish_read), so that a batch costs one doorbell.
    fn start_read(&mut self, sector: u64, length: usize) -> Result<(), Self::Error>;

    /// Shows the device every read that was started.
    fn kick(&mut self);

    /// Waits for the oldest read that was started. `into` is as long as that read.
    ///
    /// The read is over whatever this returns.
    fn finish_read(&mut self, into: &mut [u8]) -> Result<(), Self::Error>;

    /// Writes, and waits until the device has taken it.
    fn write(&mut self, sector: u64, from: &[u8]) -> Result<(), Self::Error>;

    /// Waits until everything written is on stable storage.
    fn flush(&mut self) -> Result<(), Self::Error>;
}
