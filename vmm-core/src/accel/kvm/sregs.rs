//! The start state of a flat vCPU, and the checks that hardware would make on it.

use super::monitor::{Block, TSS, USER_CS, USER_SS};
use super::paging::ROOT;
use kvm_bindings::{kvm_segment, kvm_sregs};
use pv_abi::layout::vcpu_page;

const CR0_PE: u64 = 1 << 0;
const CR0_MP: u64 = 1 << 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_WP: u64 = 1 << 16;
const CR0_AM: u64 = 1 << 18;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXMMEXCPT: u64 = 1 << 10;
const CR4_FSGSBASE: u64 = 1 << 16;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const EFER_NXE: u64 = 1 << 11;

/// Where `SYSCALL` lands on hosts that ignore `EFER.SCE` = 0: canonical, and never mapped.
pub(crate) const SYSCALL_SENTINEL: u64 = 0x7fff_f000_0000;

/// Segment type of a 64-bit TSS that is available, and of one that is busy.
const TSS_AVAILABLE: u8 = 9;
const TSS_BUSY: u8 = 11;

/// Segment, control and base registers of vCPU `index` at its first instruction.
///
/// `host` is what `KVM_GET_SREGS` returned, for the fields that are the host's. `amd` says that the
/// CPU is AMD's or of its line: Intel refuses to enter a guest whose TR is not busy (SDM vol. 3
/// §27.3.1.2), AMD looks at the TSS's size only (APM vol. 2 §15.5.1) and keeps the busy flag out of
/// TR, and QEMU's emulation of it closes every port while the flag is there.
pub(crate) fn flat_sregs(host: kvm_sregs, index: u32, amd: bool) -> kvm_sregs {
    let block = Block::of(index);
    let code = kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: USER_CS,
        type_: 0xb,
        present: 1,
        dpl: 3,
        db: 0,
        s: 1,
        l: 1,
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    };
    let data = kvm_segment {
        selector: USER_SS,
        type_: 3,
        db: 1,
        l: 0,
        ..code
    };
    let (tss_base, tss_limit) = block.tss();
    let (gdt_base, gdt_limit) = block.gdt();
    let (idt_base, idt_limit) = block.idt();
    let mut sregs = host;
    sregs.cs = code;
    sregs.ss = data;
    sregs.ds = data;
    sregs.es = data;
    sregs.fs = data;
    sregs.gs = kvm_segment {
        base: vcpu_page(index),
        ..data
    };
    sregs.tr = kvm_segment {
        base: tss_base,
        limit: tss_limit,
        selector: TSS,
        type_: if amd { TSS_AVAILABLE } else { TSS_BUSY },
        dpl: 0,
        s: 0,
        l: 0,
        g: 0,
        ..code
    };
    sregs.ldt = kvm_segment {
        unusable: 1,
        type_: 2,
        ..Default::default()
    };
    sregs.gdt.base = gdt_base;
    sregs.gdt.limit = gdt_limit;
    sregs.idt.base = idt_base;
    sregs.idt.limit = idt_limit;
    sregs.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_AM | CR0_PG;
    sregs.cr2 = 0;
    sregs.cr3 = ROOT;
    sregs.cr4 = CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT | CR4_FSGSBASE;
    sregs.efer = EFER_LME | EFER_LMA | EFER_NXE;
    sregs.interrupt_bitmap = [0; 4];
    sregs
}

/// The guest-state checks of SDM vol. 3 §27.3.1 that apply to a 64-bit guest at CPL 3.
///
/// Returns each rule that is broken. Checked against what is set here; not yet run on Intel.
#[cfg(test)]
fn guest_state_errors(sregs: &kvm_sregs, rflags: u64, rip: u64) -> Vec<&'static str> {
    let mut errors = Vec::new();
    let mut rule = |holds: bool, text| {
        if !holds {
            errors.push(text);
        }
    };
    let canonical = |a: u64| ((a << 16) as i64 >> 16) as u64 == a;
    // §27.3.1.1 control registers.
    rule(sregs.cr0 & CR0_NE != 0, "CR0.NE is fixed to 1");
    rule(
        sregs.cr0 & (CR0_PE | CR0_PG) == CR0_PE | CR0_PG,
        "CR0.PE and PG",
    );
    rule(sregs.cr4 & 1 << 13 == 0, "CR4.VMXE is the host's to set");
    rule(sregs.cr4 & CR4_PAE != 0, "IA-32e mode guest needs CR4.PAE");
    rule(sregs.cr4 & 1 << 17 == 0, "PCIDE off");
    rule(sregs.cr3 >> 52 == 0, "CR3 within the physical width");
    rule(
        sregs.efer & EFER_LMA != 0,
        "EFER.LMA follows IA-32e mode guest",
    );
    rule(
        sregs.efer & EFER_LME != 0,
        "EFER.LMA equals LME when PG is set",
    );
    // §27.3.1.2 segments, no virtual-8086.
    let (cs, ss, tr) = (&sregs.cs, &sregs.ss, &sregs.tr);
    rule(cs.selector & 3 == ss.selector & 3, "SS.RPL equals CS.RPL");
    rule(tr.selector & 4 == 0, "TR.TI is 0");
    rule(
        canonical(tr.base) && canonical(sregs.fs.base),
        "TR, FS base canonical",
    );
    rule(canonical(sregs.gs.base), "GS base canonical");
    rule(cs.base >> 32 == 0, "CS base below 2^32");
    for s in [ss, &sregs.ds, &sregs.es] {
        rule(
            s.unusable != 0 || s.base >> 32 == 0,
            "SS, DS, ES base below 2^32",
        );
    }
    rule(
        matches!(cs.type_, 9 | 11 | 13 | 15),
        "CS type is accessed code",
    );
    rule(
        matches!(ss.type_, 3 | 7),
        "SS type is accessed read/write data",
    );
    for s in [&sregs.ds, &sregs.es, &sregs.fs, &sregs.gs] {
        rule(s.unusable != 0 || s.type_ & 1 == 1, "DS..GS accessed");
        rule(
            s.unusable != 0 || s.type_ & 8 == 0 || s.type_ & 2 == 2,
            "code must be readable",
        );
    }
    for s in [cs, ss, &sregs.ds, &sregs.es, &sregs.fs, &sregs.gs] {
        rule(s.s == 1 && s.present == 1, "S and P");
        let low_ok = s.limit & 0xfff == 0xfff || s.g == 0;
        let high_ok = s.limit >> 20 == 0 || s.g == 1;
        rule(low_ok && high_ok, "limit agrees with G");
    }
    rule(
        matches!(cs.type_, 9 | 11) && cs.dpl == ss.dpl,
        "non-conforming CS.DPL equals SS.DPL",
    );
    rule(ss.dpl == (ss.selector & 3) as u8, "SS.DPL equals SS.RPL");
    rule(!(cs.l == 1 && cs.db == 1), "L and D are not both set");
    rule(
        tr.type_ == TSS_BUSY && tr.s == 0 && tr.present == 1 && tr.unusable == 0,
        "TR is a busy TSS",
    );
    rule(tr.limit >> 20 == 0 || tr.g == 1, "TR limit agrees with G");
    rule(sregs.ldt.unusable == 1, "LDTR is unusable");
    // §27.3.1.3 descriptor tables.
    rule(
        canonical(sregs.gdt.base) && canonical(sregs.idt.base),
        "GDTR, IDTR base canonical",
    );
    // §27.3.1.4 RIP, RFLAGS.
    rule(canonical(rip), "RIP canonical");
    rule(
        rflags & 2 == 2 && rflags & 1 << 17 == 0,
        "RFLAGS reserved bit, VM",
    );
    rule(
        rflags & 0xffff_ffff_ffc0_8028 == 0,
        "RFLAGS reserved zeroes",
    );
    errors
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn start_state_passes_the_hardware_checks() {
        for index in [0, 1, 63] {
            let sregs = flat_sregs(kvm_sregs::default(), index, false);
            let errors = guest_state_errors(&sregs, 2, pv_abi::layout::RAM_BASE);
            assert!(errors.is_empty(), "{errors:?}");
            assert_eq!(sregs.cs.dpl, 3);
            assert_eq!(sregs.ss.dpl, 3, "AMD takes CPL from SS");
            let amd = flat_sregs(kvm_sregs::default(), index, true);
            let errors = guest_state_errors(&amd, 2, pv_abi::layout::RAM_BASE);
            assert_eq!(errors, ["TR is a busy TSS"], "AMD's differs in that only");
            assert_eq!(amd.tr.type_, TSS_AVAILABLE);
        }
    }

    #[test]
    fn the_checks_can_fail() {
        let good = flat_sregs(kvm_sregs::default(), 0, false);
        let mut bad = good;
        bad.ss.dpl = 0;
        assert!(!guest_state_errors(&bad, 2, 0).is_empty());
        let mut bad = good;
        bad.tr.type_ = TSS_AVAILABLE;
        assert!(!guest_state_errors(&bad, 2, 0).is_empty());
        assert!(!guest_state_errors(&good, 0, 0).is_empty());
        assert!(!guest_state_errors(&good, 2, 1 << 63).is_empty());
    }
}
