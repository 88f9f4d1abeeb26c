//! The guest's page tables: four levels, identity, W^X, from the address map.
//!
//! Leaves that are the guest's have U=1; the monitor's have U=0. Whatever is not in the map is not
//! present. Large pages are used wherever address, length and backing allow.

use crate::image::Access;
use crate::memory::Region;
use crate::memory::map::AddressMap;
use pv_abi::layout::{
    LARGE_PAGE_SIZE, MONITOR_BASE, PAGE_SIZE, PAGE_TABLES_BASE, PAGE_TABLES_LEN, VMM_BASE,
};
use std::collections::HashMap;
use std::io;
use zerocopy::IntoBytes;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
/// Set in advance, so that no walker ever has to write to the tables.
const ACCESSED_DIRTY: u64 = 1 << 5 | 1 << 6;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
const ENTRIES: u64 = 512;

/// Builds tables in host memory and writes them out once.
struct Tables {
    /// Tables by (level, address of the first byte they cover); values are indices.
    index: HashMap<(u32, u64), usize>,
    tables: Vec<[u64; 512]>,
    /// The table that was written to last, and what it covers: neighbours share it.
    last: Option<((u32, u64), usize)>,
}

/// Guest-physical address of the root table, once [`build`] has run.
pub(super) const ROOT: u64 = PAGE_TABLES_BASE;

/// Writes the page tables for this map into the VMM region.
///
/// `stub_page` is the monitor page that holds code; the monitor's other pages are data.
pub(super) fn build(
    vmm: &Region,
    map: &AddressMap,
    monitor_len: u64,
    stub_page: u64,
) -> io::Result<()> {
    let mut tables = Tables {
        index: HashMap::new(),
        tables: vec![[0; 512]],
        last: None,
    };
    tables.index.insert((4, 0), 0);
    for page in (MONITOR_BASE..MONITOR_BASE + monitor_len).step_by(PAGE_SIZE as usize) {
        let flags = if page == stub_page {
            PRESENT
        } else {
            PRESENT | WRITABLE | NO_EXECUTE
        };
        tables.map(page, 1, flags | ACCESSED_DIRTY);
    }
    for mapping in &map.mappings {
        let flags = PRESENT
            | USER
            | ACCESSED_DIRTY
            | match mapping.access {
                Access::Read => NO_EXECUTE,
                Access::ReadWrite => WRITABLE | NO_EXECUTE,
                Access::ReadExecute => 0,
            };
        let end = mapping.gpa + mapping.len;
        let mut at = mapping.gpa;
        while at < end {
            if at.is_multiple_of(LARGE_PAGE_SIZE) && end - at >= LARGE_PAGE_SIZE {
                tables.map(at, 2, flags | LARGE);
                at += LARGE_PAGE_SIZE;
            } else {
                tables.map(at, 1, flags);
                at += PAGE_SIZE;
            }
        }
    }
    let bytes = tables.tables.as_bytes();
    if bytes.len() as u64 > PAGE_TABLES_LEN {
        return Err(io::Error::other(
            "the address map needs more page tables than there is room",
        ));
    }
    vmm.populate(PAGE_TABLES_BASE - VMM_BASE, bytes.len() as u64);
    vmm.write_bytes(PAGE_TABLES_BASE - VMM_BASE, bytes)
}

impl Tables {
    /// Sets the leaf at `level` (1: 4 KiB, 2: 2 MiB) for this address.
    fn map(&mut self, gpa: u64, level: u32, flags: u64) {
        let key = (level, gpa & !(span(level + 1) - 1));
        let table = match self.last {
            Some((covers, table)) if covers == key => table,
            _ => self.find(gpa, level),
        };
        self.last = Some((key, table));
        if let Some(entry) = self
            .tables
            .get_mut(table)
            .and_then(|t| t.get_mut(slot(gpa, level)))
        {
            *entry = gpa | flags;
        }
    }

    /// The table at `level` for this address, made with those above it where they are missing.
    fn find(&mut self, gpa: u64, level: u32) -> usize {
        let mut table = 0usize;
        for upper in (level + 1..=4).rev() {
            let slot = slot(gpa, upper);
            let child_key = (upper - 1, gpa & !(span(upper) - 1));
            let next = match self.index.get(&child_key) {
                Some(next) => *next,
                None => {
                    let next = self.tables.len();
                    self.tables.push([0; 512]);
                    self.index.insert(child_key, next);
                    let address = PAGE_TABLES_BASE + next as u64 * PAGE_SIZE;
                    if let Some(entry) = self.tables.get_mut(table).and_then(|t| t.get_mut(slot)) {
                        *entry = address | PRESENT | WRITABLE | USER | 1 << 5;
                    }
                    next
                }
            };
            table = next;
        }
        table
    }
}

/// Bytes that one entry of a table at this level covers.
fn span(level: u32) -> u64 {
    PAGE_SIZE << (9 * (level - 1))
}

/// Index of the entry for this address in a table at this level.
fn slot(gpa: u64, level: u32) -> usize {
    ((gpa / span(level)) % ENTRIES) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::Image;
    use crate::memory::Backing;
    use pv_abi::layout::VMM_LEN;

    /// Walks the tables as the CPU does.
    fn walk(vmm: &Region, gpa: u64) -> Option<u64> {
        let mut table = ROOT;
        for level in (1..=4).rev() {
            let at = table - VMM_BASE + slot(gpa, level) as u64 * 8;
            let entry: u64 = vmm.read(at).unwrap();
            if entry & PRESENT == 0 {
                return None;
            }
            if level == 1 || entry & LARGE != 0 {
                let base = entry & 0x000f_ffff_ffff_f000 & !(span(level) - 1);
                assert_eq!(base + gpa % span(level), gpa, "identity");
                return Some(entry);
            }
            table = entry & 0x000f_ffff_ffff_f000;
        }
        None
    }

    #[test]
    fn every_mapping_is_there_and_nothing_else() {
        let image = Image::from_bytes(crate::image::tests::sample()).unwrap();
        let map = AddressMap::new(&image, 2, 5 << 30, &[4 << 20, 2 << 20]).unwrap();
        let vmm = Region::new(VMM_LEN, Backing::Anonymous).unwrap();
        build(&vmm, &map, 0x8000, MONITOR_BASE + 0x1000).unwrap();
        for mapping in &map.mappings {
            for gpa in [mapping.gpa, mapping.gpa + mapping.len - 1] {
                let entry = walk(&vmm, gpa).expect("mapped");
                assert_ne!(entry & USER, 0);
                assert_eq!(entry & WRITABLE != 0, mapping.access == Access::ReadWrite);
                assert_eq!(
                    entry & NO_EXECUTE == 0,
                    mapping.access == Access::ReadExecute
                );
            }
            let covered = |gpa| {
                map.mappings
                    .iter()
                    .any(|m| (m.gpa..m.gpa + m.len).contains(&gpa))
            };
            for gpa in [mapping.gpa.wrapping_sub(1), mapping.gpa + mapping.len] {
                assert_eq!(walk(&vmm, gpa).is_some(), covered(gpa), "{gpa:#x}");
            }
        }
        let stub = walk(&vmm, MONITOR_BASE + 0x1000).unwrap();
        assert_eq!(stub & (USER | WRITABLE | NO_EXECUTE), 0);
        assert_eq!(walk(&vmm, MONITOR_BASE).unwrap() & USER, 0);
        assert!(walk(&vmm, 0).is_none() && walk(&vmm, PAGE_TABLES_BASE).is_none());
    }
}
