//! Builds the guest that must be refused, with the real toolchain, and looks at the refusal.

use guest_build::{BuildError, CheckError, CheckOptions, GuestBuild, GuestWorkspace, check};
use std::path::{Path, PathBuf};

fn guests() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../guests")
}

fn banned() -> GuestBuild {
    GuestBuild::new(guests())
        .package("banned")
        .target_dir(Path::new(env!("CARGO_TARGET_TMPDIR")).join("guests"))
}

/// Offsets in a 64-bit ELF header, and in an entry of its program header table.
mod offset {
    pub(super) const TYPE: usize = 16;
    pub(super) const MACHINE: usize = 18;
    pub(super) const ENTRY: usize = 24;
    pub(super) const PHDRS: usize = 64;
    pub(super) const PHDR_LEN: usize = 56;
    pub(super) const PHDR_FLAGS: usize = 4;
    pub(super) const PHDR_VADDR: usize = 16;
    pub(super) const SYMBOL_LEN: usize = 24;
    pub(super) const SYMBOL_SIZE: usize = 16;
}

#[test]
fn a_guest_that_asks_the_cpu_is_refused_by_name() {
    let error = banned().build().unwrap_err();
    let BuildError::Refused { source, path, .. } = &error else {
        panic!("built, or failed for another reason: {error}");
    };
    let CheckError::Banned(findings) = source else {
        panic!("refused for another reason: {source}");
    };
    assert_eq!(findings.len(), 1, "{source}");
    assert_eq!(findings[0].symbol, "banned::sniff_the_cpu");
    assert_eq!(findings[0].instruction, "cpuid");
    assert_eq!(findings[0].bytes, [0x0f, 0xa2]);
    assert!(error.to_string().ends_with(" is refused"), "{error}");
    let said = source.to_string();
    assert!(said.contains("`cpuid` at 0x100"), "{said}");
    assert!(said.contains("`banned::sniff_the_cpu`"), "{said}");

    excused_by_the_caller(path);
    let good = std::fs::read(path).unwrap();
    broken_copies(&good);
    excuses_end_with_the_symbol(&good);
}

/// Bytes that the excused symbol does not cover are nobody's, and checked.
fn excuses_end_with_the_symbol(good: &[u8]) {
    let options = CheckOptions {
        allow_banned: vec!["banned::sniff_the_cpu".into()],
    };
    for size in [0u64, 1] {
        let mut short = good.to_vec();
        let at = size_of_symbol(good, "sniff_the_cpu");
        short[at..at + 8].copy_from_slice(&size.to_le_bytes());
        let error = check(&short, &options).unwrap_err();
        let CheckError::Banned(findings) = &error else {
            panic!("refused for another reason: {error}");
        };
        let cpuid = findings.iter().find(|f| f.instruction == "cpuid");
        assert_eq!(cpuid.unwrap().symbol, "<no symbol>", "{error}");
    }
}

/// Where in the file the size of the symbol with this in its name is.
fn size_of_symbol(bytes: &[u8], name: &str) -> usize {
    let file = elf::ElfBytes::<elf::endian::LittleEndian>::minimal_parse(bytes).unwrap();
    let (symbols, names) = file.symbol_table().unwrap().unwrap();
    let named = |symbol: &elf::symbol::Symbol| {
        let found = names.get(symbol.st_name as usize);
        found.is_ok_and(|found| found.contains(name))
    };
    let index = symbols.iter().position(|symbol| named(&symbol)).unwrap();
    let table = file.section_header_by_name(".symtab").unwrap().unwrap();
    table.sh_offset as usize + index * offset::SYMBOL_LEN + offset::SYMBOL_SIZE
}

/// The same guest passes once its function is excused, by its demangled name; any other name does
/// not help.
fn excused_by_the_caller(path: &Path) {
    let elf = banned().allow_banned("banned::sniff").build().unwrap();
    assert_eq!(elf.report.excused, 1);
    assert_eq!(elf.path, path);
    assert!(elf.report.functions >= 2);
    assert_eq!(elf.report.note.abi_major, pv_abi::ABI_MAJOR);
    let named = |end: &str| elf.sources.iter().any(|source| source.ends_with(end));
    for end in [
        "banned/src/main.rs",
        "banned/Cargo.toml",
        "pv-abi/src/note.rs",
        "Cargo.lock",
    ] {
        assert!(named(end), "{end} is not among {:?}", elf.sources);
    }
    for other in ["sniff", "", "banned::sniff_the_cpux"] {
        let error = banned().allow_banned(other).build().unwrap_err();
        assert!(matches!(error, BuildError::Refused { .. }), "{other}");
    }
}

/// Copies of a good image with one thing broken each.
fn broken_copies(good: &[u8]) {
    let options = CheckOptions {
        allow_banned: vec!["banned::sniff_the_cpu".into()],
    };
    check(good, &options).unwrap();
    let broken = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut copy = good.to_vec();
        change(&mut copy);
        check(&copy, &options).unwrap_err()
    };
    let phdr = |index: usize, field: usize| offset::PHDRS + index * offset::PHDR_LEN + field;

    let error = broken(&|b| b[offset::TYPE] = 3);
    assert!(
        matches!(error, CheckError::NotAGuest("not of type EXEC")),
        "{error}"
    );
    let error = broken(&|b| b[offset::MACHINE] = 183);
    assert!(
        matches!(error, CheckError::NotAGuest("not 64-bit x86")),
        "{error}"
    );
    let error = broken(&|b| b[offset::ENTRY] ^= 1);
    assert!(matches!(error, CheckError::NoStart), "{error}");
    let error = broken(&|b| b[phdr(0, offset::PHDR_FLAGS)] |= 2);
    assert!(
        matches!(error, CheckError::Segment { index: 0, .. }),
        "{error}"
    );
    assert!(
        error.to_string().contains("writable and executable"),
        "{error}"
    );
    let error = broken(&|b| b[phdr(0, offset::PHDR_VADDR)] = 8);
    assert!(
        error.to_string().contains("does not start on a page"),
        "{error}"
    );
    let error = broken(&|b| b[phdr(0, offset::PHDR_VADDR) + 3] = 0);
    assert!(
        error.to_string().contains("outside the guest's RAM"),
        "{error}"
    );
    // The second segment where the first one is, and within its last page.
    let error = broken(&|b| {
        let text = b[phdr(0, offset::PHDR_VADDR)..][..8].to_vec();
        b[phdr(1, offset::PHDR_VADDR)..][..8].copy_from_slice(&text);
    });
    assert!(
        matches!(error, CheckError::Segment { index: 1, .. }),
        "{error}"
    );
    assert!(error.to_string().contains("shares a page"), "{error}");
    let name = good.windows(8).position(|w| w == b"Paravane").unwrap();
    let error = broken(&|b| b[name] = b'p');
    assert!(matches!(error, CheckError::Note("missing")), "{error}");
    // The note follows its name, padded to 12 bytes: major version first.
    let error = broken(&|b| b[name + 12] = 9);
    assert!(matches!(error, CheckError::Note(_)), "{error}");
    // Cut anywhere, it is refused and nothing panics.
    for length in (0..good.len()).step_by(97) {
        check(&good[..length], &options).unwrap_err();
    }
}

#[test]
fn missing_packages_are_named() {
    let error = GuestBuild::new(guests())
        .package("absent")
        .build()
        .unwrap_err();
    assert!(matches!(error, BuildError::NoPackage { .. }));
    let said = error.to_string();
    assert!(
        said.contains("`absent`") && said.contains("banned"),
        "{said}"
    );
    let error = GuestBuild::new(guests()).build().unwrap_err();
    assert!(matches!(error, BuildError::NothingToBuild));
}

#[test]
fn manifests_say_what_is_an_image() {
    let workspace = GuestWorkspace::open(guests()).unwrap();
    let banned = workspace.package("banned").unwrap();
    assert!(!banned.image);
    assert!(banned.source_file.is_file());
}

#[test]
fn a_missing_source_file_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let manifest = "[package]\nname = \"lost\"\nversion = \"0.1.0\"\nedition = \"2024\"\n\
                    [[bin]]\nname = \"lost\"\npath = \"src/main.rs\"\n[workspace]\n";
    std::fs::write(dir.path().join("Cargo.toml"), manifest).unwrap();
    let error = GuestBuild::new(dir.path())
        .package("lost")
        .build()
        .unwrap_err();
    assert!(matches!(error, BuildError::NoSource { .. }), "{error}");
    assert!(error.to_string().contains("src/main.rs"), "{error}");
}
