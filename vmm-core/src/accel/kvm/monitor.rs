//! The monitor: GDT, IDT, TSSs, exception stubs and their stacks, all with U=0.
//!
//! An exception at CPL 3 enters a stub at CPL 0 on a stack of the monitor; the stub makes the frame
//! uniform (vector and error code pushed), saves RAX and RDX, and writes to [`PORT_FAULT`]. The VMM
//! then reads the frame and never goes back in.
//!
//! | offset | what |
//! |---|---|
//! | 0 | IDT, 32 gates |
//! | 0x1000 | stubs |
//! | 0x4000 + 0x2000 × vCPU | GDT, TSS with I/O bitmap; then a page of stacks |

use super::{PORT_CALL, PORT_FAULT};
use crate::memory::Region;
use pv_abi::layout::{MONITOR_BASE, PAGE_SIZE, VMM_BASE};
use std::io;

const IDT: u64 = MONITOR_BASE;
/// The one monitor page that holds code.
pub(super) const STUBS: u64 = MONITOR_BASE + 0x1000;
const VCPU_BLOCKS: u64 = MONITOR_BASE + 0x4000;
const VCPU_BLOCK: u64 = 2 * PAGE_SIZE;
const TSS_OFFSET: u64 = 0x100;
const VECTORS: u8 = 32;
const STUB_SIZE: u64 = 16;
/// Bytes of a 64-bit TSS without its I/O bitmap.
const TSS_SIZE: usize = 104;
/// Bitmap bytes: up to the last port that is open, and the byte of ones that must follow.
const BITMAP_LEN: usize = (PORT_FAULT as usize) / 8 + 1;

/// Selectors; the flat profile's user ones have RPL 3.
pub(crate) const KERNEL_CS: u16 = 0x08;
pub(crate) const USER_SS: u16 = 0x2b;
pub(crate) const USER_CS: u16 = 0x33;
pub(crate) const TSS: u16 = 0x40;

/// Where one vCPU's tables and stacks lie.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Block(u64);

impl Block {
    pub(crate) fn of(vcpu: u32) -> Block {
        Block(VCPU_BLOCKS + u64::from(vcpu) * VCPU_BLOCK)
    }
    pub(crate) fn gdt(self) -> (u64, u16) {
        (self.0, 0x4f)
    }
    pub(crate) fn idt(self) -> (u64, u16) {
        (IDT, u16::from(VECTORS) * 16 - 1)
    }
    pub(crate) fn tss(self) -> (u64, u32) {
        (self.0 + TSS_OFFSET, (TSS_SIZE + BITMAP_LEN) as u32 - 1)
    }
    /// Top of the stack for exceptions from CPL 3.
    fn rsp0(self) -> u64 {
        self.0 + VCPU_BLOCK
    }
    /// Top of the stack for double faults.
    fn ist1(self) -> u64 {
        self.0 + VCPU_BLOCK - PAGE_SIZE / 2
    }
}

/// Bytes of monitor for so many vCPUs.
pub(super) fn len(vcpus: u32) -> u64 {
    VCPU_BLOCKS - MONITOR_BASE + u64::from(vcpus) * VCPU_BLOCK
}

/// Whether the CPU pushes an error code for this vector.
fn has_error_code(vector: u8) -> bool {
    matches!(vector, 8 | 10..=14 | 17 | 21 | 29 | 30)
}

/// Writes the monitor for so many vCPUs.
pub(super) fn build(vmm: &Region, vcpus: u32) -> io::Result<()> {
    let mut idt = Vec::new();
    let mut stubs = vec![0xcc; (u64::from(VECTORS) * STUB_SIZE) as usize];
    let common = STUBS + u64::from(VECTORS) * STUB_SIZE;
    for vector in 0..VECTORS {
        let at = u64::from(vector) * STUB_SIZE;
        idt.extend_from_slice(&interrupt_gate(vector, STUBS + at));
        let mut code = Vec::new();
        if !has_error_code(vector) {
            code.extend_from_slice(&[0x6a, 0x00]); // push 0
        }
        code.extend_from_slice(&[0x6a, vector]); // push vector
        code.push(0xe9); // jmp common
        let next = STUBS + at + code.len() as u64 + 4;
        code.extend_from_slice(&((common - next) as u32).to_le_bytes());
        let at = at as usize;
        if let Some(room) = stubs.get_mut(at..at + code.len()) {
            room.copy_from_slice(&code);
        }
    }
    let [lo, hi] = PORT_FAULT.to_le_bytes();
    stubs.extend_from_slice(&[
        0x50, // push rax
        0x52, // push rdx
        0x66, 0xba, lo, hi, // mov dx, PORT_FAULT
        0xb0, 0x00, // mov al, 0
        0xee, // out dx, al
        0xf4, // hlt
        0xeb, 0xfd, // jmp to the hlt
    ]);
    vmm.write_bytes(IDT - VMM_BASE, &idt)?;
    vmm.write_bytes(STUBS - VMM_BASE, &stubs)?;
    for vcpu in 0..vcpus {
        let block = Block::of(vcpu);
        vmm.write_bytes(block.0 - VMM_BASE, &gdt(block))?;
        vmm.write_bytes(block.tss().0 - VMM_BASE, &tss(block))?;
    }
    Ok(())
}

/// A 64-bit interrupt gate (SDM vol. 3 §7.14.1).
fn interrupt_gate(vector: u8, target: u64) -> [u8; 16] {
    // INT3 is an ordinary trap for the guest; the others are not the guest's to raise.
    let dpl = if vector == 3 { 3 } else { 0 };
    let ist = u64::from(vector == 8);
    let low = (target & 0xffff)
        | u64::from(KERNEL_CS) << 16
        | ist << 32
        | (0x8e | dpl << 5) << 40
        | (target >> 16 & 0xffff) << 48;
    let mut gate = [0; 16];
    gate[..8].copy_from_slice(&low.to_le_bytes());
    gate[8..].copy_from_slice(&(target >> 32).to_le_bytes());
    gate
}

fn gdt(block: Block) -> Vec<u8> {
    let (base, limit) = block.tss();
    let tss_low = u64::from(limit & 0xffff)
        | (base & 0xff_ffff) << 16
        | 0x8b << 40
        | (u64::from(limit) >> 16 & 0xf) << 48
        | (base >> 24 & 0xff) << 56;
    let entries = [
        0,
        0x00af_9b00_0000_ffff, // 0x08: ring 0 code, 64-bit
        0x00cf_9300_0000_ffff, // 0x10: ring 0 data
        0,
        0,
        0x00cf_f300_0000_ffff, // 0x28: ring 3 data
        0x00af_fb00_0000_ffff, // 0x30: ring 3 code, 64-bit
        0,
        tss_low, // 0x40
        base >> 32,
    ];
    entries.iter().flat_map(|e: &u64| e.to_le_bytes()).collect()
}

/// A 64-bit TSS (SDM vol. 3 §9.7) whose bitmap opens the gate's ports and no other.
fn tss(block: Block) -> Vec<u8> {
    let mut tss = vec![0u8; TSS_SIZE];
    tss[4..12].copy_from_slice(&block.rsp0().to_le_bytes());
    tss[36..44].copy_from_slice(&block.ist1().to_le_bytes());
    tss[102..104].copy_from_slice(&(TSS_SIZE as u16).to_le_bytes());
    tss.extend((0..BITMAP_LEN as u16).map(|byte| {
        let open = PORT_CALL / 8..PORT_FAULT / 8;
        if open.contains(&byte) { 0x00 } else { 0xff }
    }));
    tss
}

/// What the CPU and a stub left on a monitor stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TrapFrame {
    pub(super) rdx: u64,
    pub(super) rax: u64,
    pub(super) vector: u64,
    pub(super) error: u64,
    pub(super) rip: u64,
    pub(super) rflags: u64,
    pub(super) rsp: u64,
}

/// Reads the frame that RSP points at, if it is one of this vCPU's two stacks.
pub(super) fn trap_frame(vmm: &Region, vcpu: u32, rsp: u64) -> io::Result<Option<TrapFrame>> {
    let block = Block::of(vcpu);
    const FRAME: u64 = 9 * 8;
    if rsp != block.rsp0() - FRAME && rsp != block.ist1() - FRAME {
        return Ok(None);
    }
    let words: [u64; 9] = vmm.read(rsp - VMM_BASE)?;
    let [rdx, rax, vector, error, rip, _cs, rflags, rsp, _ss] = words;
    Ok(Some(TrapFrame {
        rdx,
        rax,
        vector,
        error,
        rip,
        rflags,
        rsp,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bitmap_opens_the_gate_ports_only() {
        let tss = tss(Block::of(0));
        let bitmap = &tss[TSS_SIZE..];
        for port in 0..=u16::MAX {
            let open = bitmap
                .get(port as usize / 8)
                .is_some_and(|b| b >> (port % 8) & 1 == 0);
            assert_eq!(open, (PORT_CALL..PORT_FAULT).contains(&port), "{port:#x}");
        }
        assert_eq!(bitmap.last(), Some(&0xff));
        assert_eq!(Block::of(0).tss().1 as usize + 1, tss.len());
    }

    #[test]
    fn blocks_stay_inside_the_monitor() {
        assert!(len(pv_abi::limits::MAX_VCPUS) <= pv_abi::layout::MONITOR_LEN);
        assert!(TSS_OFFSET as usize + TSS_SIZE + BITMAP_LEN < PAGE_SIZE as usize);
    }
}
