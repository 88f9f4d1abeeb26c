//! The boot block, for people.

use super::platform::Flat;
use pv_abi::boot::{BootBlock, MemoryRegion, accel};

/// What the guest knows about the VM that it runs in; `main` gets one.
#[derive(Clone, Copy, Debug)]
pub struct Boot {
    block: &'static BootBlock,
    platform: &'static Flat,
}

impl Boot {
    pub(super) fn new(block: &'static BootBlock, platform: &'static Flat) -> Self {
        Boot { block, platform }
    }

    /// The platform that drivers take.
    pub fn platform(&self) -> &'static Flat {
        self.platform
    }

    /// The accel that runs this guest, for reports: `kvm`, `process` or `unknown`.
    pub fn accel(&self) -> &'static str {
        match self.block.accel {
            accel::KVM => "kvm",
            accel::PROCESS => "process",
            _ => "unknown",
        }
    }

    /// vCPUs that exist, started or not.
    pub fn vcpu_count(&self) -> u32 {
        self.block.vcpu_count
    }

    /// The features in force: [`pv_abi::feature`].
    pub fn features(&self) -> u64 {
        self.platform.features()
    }

    /// The command line; empty if it is not UTF-8.
    pub fn cmdline(&self) -> &'static str {
        let len = self.block.cmdline_len as usize;
        self.block
            .cmdline
            .get(..len)
            .and_then(|bytes| core::str::from_utf8(bytes).ok())
            .unwrap_or("")
    }

    /// The value of `key=value` on the command line, whose words are separated by spaces.
    pub fn argument(&self, key: &str) -> Option<&'static str> {
        self.cmdline()
            .split_ascii_whitespace()
            .find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
    }

    /// The memory map, in ascending order of addresses.
    pub fn memory_map(&self) -> &'static [MemoryRegion] {
        let count = self.block.memory_map_count as usize;
        self.block.memory_map.get(..count).unwrap_or(&[])
    }

    /// The boot block itself.
    pub fn block(&self) -> &'static BootBlock {
        self.block
    }
}
