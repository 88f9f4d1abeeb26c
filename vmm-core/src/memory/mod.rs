//! Guest memory: the VMM region, private RAM and arenas.
//!
//! | part | backing | who maps it |
//! |---|---|---|
//! | VMM region | anonymous on kvm, memfd on process | VMM; the child sees gate and control only |
//! | private RAM | anonymous on kvm, memfd on process | VMM and the guest |
//! | arena | a sealed memfd of its own | VMM, the guest, and that arena's one backend |
//!
//! A descriptor grants the whole file, so an arena's memfd holds that arena and nothing else. All
//! mappings are kept out of children that the embedder forks (`MADV_DONTFORK`).

pub(crate) mod map;
mod region;
mod room;

pub use region::HugePages;
pub(crate) use region::{Backing, Region, keep_private};
pub(crate) use room::left as room_left;

use crate::limits::{MAX_MEMORY, MIN_MEMORY};
use pv_abi::layout::{
    ARENA_BASE, ARENA_STRIDE, RAM_BASE, RAM_HIGH_BASE, RAM_LOW_END, VCPU_PAGES_BASE, VMM_BASE,
    VMM_LEN,
};
use std::io;
use std::sync::Arc;

/// Where private RAM comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum MemoryKind {
    /// Anonymous on kvm, with transparent huge pages asked for; a memfd on process.
    #[default]
    Anonymous,
    /// A memfd on every accel.
    Forkable,
}

/// What was asked for and what was achieved for private RAM.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct MemoryReport {
    /// Bytes of private RAM.
    pub private: u64,
    /// Bytes of private RAM that are resident now.
    pub resident: u64,
    /// Huge pages, as the host kernel reports them.
    pub huge: HugePages,
    /// Bytes of all arenas.
    pub arenas: u64,
}

/// An arena and its guest-physical address.
#[derive(Clone, Debug)]
pub(crate) struct Arena {
    pub(crate) gpa: u64,
    pub(crate) region: Arc<Region>,
}

/// All memory of one VM.
#[derive(Debug)]
pub(crate) struct GuestMemory {
    pub(crate) vmm: Region,
    pub(crate) ram_low: Region,
    pub(crate) ram_high: Option<Region>,
    pub(crate) arenas: Vec<Arena>,
}

/// How memory is to be made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MemoryPlan {
    pub(crate) private: u64,
    pub(crate) shared_private: bool,
    pub(crate) shared_vmm: bool,
    pub(crate) huge_pages: bool,
    pub(crate) prefault: bool,
    /// First byte of RAM from which huge pages are asked for: what lies below is touched sparsely.
    pub(crate) huge_from: u64,
}

impl GuestMemory {
    pub(crate) fn new(plan: &MemoryPlan, arena_lens: &[u64]) -> io::Result<GuestMemory> {
        debug_assert!((MIN_MEMORY..=MAX_MEMORY).contains(&plan.private));
        let low_len = plan.private.min(RAM_LOW_END - RAM_BASE);
        let high_len = plan.private - low_len;
        let kind = |shared, name| {
            if shared {
                Backing::Memfd(name)
            } else {
                Backing::Anonymous
            }
        };
        let vmm = Region::new(VMM_LEN, kind(plan.shared_vmm, "pv-control"))?;
        let ram_low = Region::new(low_len, kind(plan.shared_private, "pv-ram"))?;
        let ram_high = (high_len > 0)
            .then(|| Region::new(high_len, kind(plan.shared_private, "pv-ram-high")))
            .transpose()?;
        if plan.huge_pages {
            ram_low.ask_huge(plan.huge_from.saturating_sub(RAM_BASE));
            if let Some(high) = &ram_high {
                high.ask_huge(0);
            }
        }
        if plan.prefault {
            ram_low.prefault()?;
            ram_high.as_ref().map_or(Ok(()), Region::prefault)?;
        }
        let arenas = arena_lens
            .iter()
            .zip((ARENA_BASE..).step_by(ARENA_STRIDE as usize))
            .map(|(len, gpa)| {
                let region = Arc::new(Region::new(*len, Backing::Arena("pv-arena"))?);
                Ok(Arena { gpa, region })
            })
            .collect::<io::Result<Vec<_>>>()?;
        Ok(GuestMemory {
            vmm,
            ram_low,
            ram_high,
            arenas,
        })
    }

    /// The region and offset of `len` bytes that a call may name: vCPU pages, or an arena.
    ///
    /// `arena` limits it to that arena; `None` allows every arena.
    pub(crate) fn shared(&self, gpa: u64, len: u64, arena: Option<u32>) -> Option<(&Region, u64)> {
        let vcpus = (VCPU_PAGES_BASE, pv_abi::layout::VCPU_PAGES_LEN);
        if let Some(offset) = inside(gpa, len, vcpus) {
            return Some((&self.vmm, VCPU_PAGES_BASE - VMM_BASE + offset));
        }
        let wanted = |(i, _): &(usize, &Arena)| arena.is_none_or(|a| u32::try_from(*i) == Ok(a));
        self.arenas
            .iter()
            .enumerate()
            .filter(wanted)
            .find_map(|(_, arena)| {
                let offset = inside(gpa, len, (arena.gpa, arena.region.len()))?;
                Some((&*arena.region, offset))
            })
    }

    /// The region and offset of `len` bytes of private RAM; for loading, checkpoints and reports.
    pub(crate) fn private(&self, gpa: u64, len: u64) -> Option<(&Region, u64)> {
        if let Some(offset) = inside(gpa, len, (RAM_BASE, self.ram_low.len())) {
            return Some((&self.ram_low, offset));
        }
        let high = self.ram_high.as_ref()?;
        inside(gpa, len, (RAM_HIGH_BASE, high.len())).map(|offset| (high, offset))
    }

    /// `mapped`: it is, in this process.
    pub(crate) fn report(&self, mapped: bool) -> MemoryReport {
        let ram = [Some(&self.ram_low), self.ram_high.as_ref()];
        let mut report = MemoryReport {
            private: 0,
            resident: 0,
            huge: HugePages::default(),
            arenas: self.arenas.iter().map(|a| a.region.len()).sum(),
        };
        for region in ram.into_iter().flatten() {
            report.private += region.len();
            if !mapped {
                continue;
            }
            let usage = region.usage();
            report.resident += usage.resident;
            report.huge.asked |= usage.huge.asked;
            report.huge.bytes += usage.huge.bytes;
        }
        report
    }
}

fn inside(gpa: u64, len: u64, (base, size): (u64, u64)) -> Option<u64> {
    let offset = gpa.checked_sub(base)?;
    (offset.checked_add(len)? <= size).then_some(offset)
}

#[cfg(test)]
impl GuestMemory {
    /// Memory with nothing shared and nothing special, for a test.
    pub(crate) fn plain(private: u64, arena_lens: &[u64]) -> GuestMemory {
        let plan = MemoryPlan {
            private,
            shared_private: false,
            shared_vmm: false,
            huge_pages: false,
            prefault: false,
            huge_from: RAM_BASE,
        };
        GuestMemory::new(&plan, arena_lens).unwrap()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pv_abi::layout::CONTROL_RO_BASE;

    fn memory() -> GuestMemory {
        GuestMemory::plain(8 << 20, &[2 << 20, 4 << 20])
    }

    #[test]
    fn calls_reach_control_and_arenas_only() {
        let memory = memory();
        let (second, len) = (ARENA_BASE + ARENA_STRIDE, 4u64 << 20);
        assert!(memory.shared(VCPU_PAGES_BASE, 4096, None).is_some());
        assert!(memory.shared(second, len, None).is_some());
        assert!(memory.shared(second, len, Some(1)).is_some());
        assert!(memory.shared(second, len, Some(0)).is_none());
        assert!(memory.shared(second, len + 1, None).is_none());
        assert!(memory.shared(second - 1, 2, None).is_none());
        assert!(memory.shared(RAM_BASE, 1, None).is_none());
        assert!(memory.shared(CONTROL_RO_BASE, 1, None).is_none());
        assert!(memory.shared(u64::MAX, 2, None).is_none());
        assert!(memory.private(RAM_BASE, 8 << 20).is_some());
        assert!(memory.private(RAM_BASE, (8 << 20) + 1).is_none());
        assert!(memory.private(RAM_HIGH_BASE, 1).is_none());
    }

    #[test]
    fn arenas_are_sealed_and_alone_in_their_file() {
        let memory = memory();
        let file = memory.arenas[0].region.file().unwrap();
        assert_eq!(file.metadata().unwrap().len(), 2 << 20);
        assert!(file.set_len(4096).is_err());
        assert!(file.set_len(64 << 20).is_err());
    }
}
