//! Every bound, with its reason.

/// Bytes of the largest ELF file that is read for a check: what `vmm-core` loads at most.
pub(crate) const MAX_ELF_LEN: u64 = 512 << 20;
