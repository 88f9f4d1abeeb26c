//! Calls that the guest makes, counted from the embedder's range.

/// The guest serves: the number of files, and their bytes.
pub const READY_CALL: u32 = 0;
/// The guest has measured: bytes, nanoseconds, and whether it sent (1) or received (0).
pub const MEASURED_CALL: u32 = 1;

/// The port that the guest serves on.
pub const HTTP_PORT: u16 = 80;
/// The port that is measured on.
pub const MEASURE_PORT: u16 = 5001;
