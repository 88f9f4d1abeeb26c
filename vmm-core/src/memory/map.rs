//! What the guest sees where: one list that both accels carry out.
//!
//! kvm turns it into page tables, process into mappings; so protections are the same by
//! construction.

use crate::image::{Access, Image};
use crate::limits::DEFAULT_STACK;
use pv_abi::boot::{MemoryRegion, memory_kind};
use pv_abi::layout::{
    ARENA_BASE, ARENA_STRIDE, CONTROL_RO_BASE, CONTROL_RO_LEN, GATE_BASE, GATE_LEN, PAGE_SIZE,
    RAM_BASE, RAM_HIGH_BASE, RAM_LOW_END, VCPU_PAGES_BASE, VMM_BASE,
};

/// Which memory a mapping shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    Vmm,
    RamLow,
    RamHigh,
    Arena(usize),
}

/// One stretch of guest-physical addresses that the guest may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mapping {
    pub(crate) gpa: u64,
    pub(crate) len: u64,
    pub(crate) access: Access,
    pub(crate) source: Source,
    /// Offset in the source.
    pub(crate) offset: u64,
}

/// The guest's whole address space.
#[derive(Clone, Debug)]
pub(crate) struct AddressMap {
    pub(crate) mappings: Vec<Mapping>,
    /// Top of each vCPU's stack.
    pub(crate) stack_tops: Vec<u64>,
    /// First byte of free RAM.
    pub(crate) heap: u64,
    /// What the boot block shows of it.
    pub(crate) boot: Vec<MemoryRegion>,
}

/// The image and the stacks do not fit into private RAM.
#[derive(Debug, thiserror::Error)]
#[error(
    "private RAM of {memory} bytes is too small: the image and {vcpus} stacks need {needed}; give \
     the VM more memory or fewer vCPUs"
)]
pub(crate) struct TooSmall {
    pub(crate) memory: u64,
    pub(crate) vcpus: u32,
    pub(crate) needed: u64,
}

impl AddressMap {
    pub(crate) fn new(
        image: &Image,
        vcpus: u32,
        memory: u64,
        arenas: &[u64],
    ) -> Result<AddressMap, TooSmall> {
        let mut mappings = vec![
            vmm(GATE_BASE, GATE_LEN, Access::ReadExecute),
            vmm(CONTROL_RO_BASE, CONTROL_RO_LEN, Access::Read),
            vmm(
                VCPU_PAGES_BASE,
                u64::from(vcpus) * PAGE_SIZE,
                Access::ReadWrite,
            ),
        ];
        let mut boot = Vec::new();
        for segment in image.segments() {
            mappings.push(ram_low(segment.gpa, segment.len, segment.access));
            let flags = match segment.access {
                Access::Read => elf::abi::PF_R,
                Access::ReadWrite => elf::abi::PF_R | elf::abi::PF_W,
                Access::ReadExecute => elf::abi::PF_R | elf::abi::PF_X,
            };
            boot.push(region(segment.gpa, segment.len, memory_kind::IMAGE, flags));
        }
        let stack_len = match image.note().stack_size {
            0 => DEFAULT_STACK,
            wanted => wanted.next_multiple_of(PAGE_SIZE),
        };
        let low_len = memory.min(RAM_LOW_END - RAM_BASE);
        let low_end = RAM_BASE + low_len;
        let mut next = image.end();
        let mut stack_tops = Vec::new();
        for index in 0..vcpus {
            // The page below each stack is not mapped: an overflow faults instead of spreading.
            let bottom = next + PAGE_SIZE;
            next = bottom + stack_len;
            mappings.push(ram_low(bottom, stack_len, Access::ReadWrite));
            boot.push(region(bottom, stack_len, memory_kind::STACK, index));
            stack_tops.push(next);
        }
        let heap = next + PAGE_SIZE;
        if heap + PAGE_SIZE > low_end {
            return Err(TooSmall {
                memory,
                vcpus,
                needed: heap + PAGE_SIZE - RAM_BASE,
            });
        }
        mappings.push(ram_low(heap, low_end - heap, Access::ReadWrite));
        boot.push(region(heap, low_end - heap, memory_kind::USABLE, 0));
        if memory > low_len {
            let len = memory - low_len;
            mappings.push(Mapping {
                gpa: RAM_HIGH_BASE,
                len,
                access: Access::ReadWrite,
                source: Source::RamHigh,
                offset: 0,
            });
            boot.push(region(RAM_HIGH_BASE, len, memory_kind::USABLE, 0));
        }
        for ((index, len), gpa) in (0u32..)
            .zip(arenas)
            .zip((ARENA_BASE..).step_by(ARENA_STRIDE as usize))
        {
            mappings.push(Mapping {
                gpa,
                len: *len,
                access: Access::ReadWrite,
                source: Source::Arena(index as usize),
                offset: 0,
            });
            boot.push(region(gpa, *len, memory_kind::ARENA, index));
        }
        Ok(AddressMap {
            mappings,
            stack_tops,
            heap,
            boot,
        })
    }
}

fn vmm(gpa: u64, len: u64, access: Access) -> Mapping {
    Mapping {
        gpa,
        len,
        access,
        source: Source::Vmm,
        offset: gpa - VMM_BASE,
    }
}

fn ram_low(gpa: u64, len: u64, access: Access) -> Mapping {
    Mapping {
        gpa,
        len,
        access,
        source: Source::RamLow,
        offset: gpa - RAM_BASE,
    }
}

fn region(gpa: u64, len: u64, kind: u32, owner: u32) -> MemoryRegion {
    MemoryRegion {
        gpa,
        len,
        kind,
        owner,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pv_abi::limits::{MAX_ARENAS, MAX_MEMORY_REGIONS, MAX_VCPUS};

    fn image() -> Image {
        Image::from_bytes(crate::image::tests::sample()).unwrap()
    }

    #[test]
    fn nothing_overlaps_and_stacks_have_guards() {
        let arenas = [2 << 20, 8 << 20];
        let map = AddressMap::new(&image(), 4, 5 << 30, &arenas).unwrap();
        let mut spans: Vec<_> = map
            .mappings
            .iter()
            .map(|m| (m.gpa, m.gpa + m.len))
            .collect();
        spans.sort_unstable();
        assert!(spans.windows(2).all(|w| w[0].1 <= w[1].0));
        for top in &map.stack_tops {
            let bottom = top - DEFAULT_STACK;
            assert!(!spans.iter().any(|(a, b)| (*a..*b).contains(&(bottom - 1))));
            assert!(!spans.iter().any(|(a, b)| (*a..*b).contains(top)));
        }
        assert_eq!(
            map.boot
                .iter()
                .filter(|r| r.kind == memory_kind::USABLE)
                .count(),
            2
        );
        assert!(
            map.mappings
                .iter()
                .all(|m| m.gpa % PAGE_SIZE == 0 && m.len % PAGE_SIZE == 0)
        );
    }

    #[test]
    fn the_largest_map_fits_the_boot_block() {
        let arenas = vec![2 << 20; MAX_ARENAS as usize];
        let map = AddressMap::new(&image(), MAX_VCPUS, 8 << 30, &arenas).unwrap();
        let spare = crate::limits::MAX_SEGMENTS - 1;
        assert!(map.boot.len() + spare <= MAX_MEMORY_REGIONS);
    }

    #[test]
    fn too_small_says_how_much_is_needed() {
        let error = AddressMap::new(&image(), 64, 8 << 20, &[]).unwrap_err();
        assert!(error.needed > 8 << 20);
        assert!(AddressMap::new(&image(), 64, error.needed, &[]).is_ok());
    }
}
