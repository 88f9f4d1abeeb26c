//! One encoding or more for each class of ban, and the neighbours that must pass.

use super::{Ban, classify};
use crate::{CheckError, CheckOptions, check};
use iced_x86::{Decoder, DecoderOptions};

fn verdict(bytes: &[u8]) -> Option<Ban> {
    let mut decoder = Decoder::new(64, bytes, DecoderOptions::NONE);
    let instruction = decoder.decode();
    assert_eq!(
        decoder.position(),
        bytes.len(),
        "{bytes:02x?} is one instruction"
    );
    classify(&instruction)
}

#[test]
fn every_class_is_refused() {
    let cases: &[(&str, &[u8], Ban)] = &[
        ("hlt", &[0xf4], Ban::Privileged),
        ("cli", &[0xfa], Ban::Privileged),
        ("sti", &[0xfb], Ban::Privileged),
        ("in al, dx", &[0xec], Ban::Privileged),
        ("in eax, 0x10", &[0xe5, 0x10], Ban::Privileged),
        ("out dx, eax", &[0xef], Ban::Privileged),
        ("rep insb", &[0xf3, 0x6c], Ban::Privileged),
        ("outsd", &[0x6f], Ban::Privileged),
        ("lgdt", &[0x0f, 0x01, 0x10], Ban::Privileged),
        ("lidt", &[0x0f, 0x01, 0x18], Ban::Privileged),
        ("ltr ax", &[0x0f, 0x00, 0xd8], Ban::Privileged),
        ("lmsw ax", &[0x0f, 0x01, 0xf0], Ban::Privileged),
        ("clts", &[0x0f, 0x06], Ban::Privileged),
        ("invlpg", &[0x0f, 0x01, 0x38], Ban::Privileged),
        ("invd", &[0x0f, 0x08], Ban::Privileged),
        ("wbinvd", &[0x0f, 0x09], Ban::Privileged),
        ("mov cr3, rax", &[0x0f, 0x22, 0xd8], Ban::Privileged),
        ("mov rax, cr0", &[0x0f, 0x20, 0xc0], Ban::Privileged),
        ("mov dr7, rax", &[0x0f, 0x23, 0xf8], Ban::Privileged),
        ("rdmsr", &[0x0f, 0x32], Ban::Privileged),
        ("wrmsr", &[0x0f, 0x30], Ban::Privileged),
        ("xsetbv", &[0x0f, 0x01, 0xd1], Ban::Privileged),
        ("int 0x80", &[0xcd, 0x80], Ban::SoftwareInterrupt),
        ("int 3 (long)", &[0xcd, 0x03], Ban::SoftwareInterrupt),
        ("int1", &[0xf1], Ban::SoftwareInterrupt),
        ("syscall", &[0x0f, 0x05], Ban::SystemCall),
        ("sysenter", &[0x0f, 0x34], Ban::SystemCall),
        ("sysretq", &[0x48, 0x0f, 0x07], Ban::SystemCall),
        ("sysexit", &[0x0f, 0x35], Ban::SystemCall),
        ("vmcall", &[0x0f, 0x01, 0xc1], Ban::HypervisorCall),
        ("vmmcall", &[0x0f, 0x01, 0xd9], Ban::HypervisorCall),
        ("vmfunc", &[0x0f, 0x01, 0xd4], Ban::HypervisorCall),
        ("enclu", &[0x0f, 0x01, 0xd7], Ban::HypervisorCall),
        ("cpuid", &[0x0f, 0xa2], Ban::AsksTheCpu),
        ("xgetbv", &[0x0f, 0x01, 0xd0], Ban::AsksTheCpu),
        ("rdpmc", &[0x0f, 0x33], Ban::PerformanceCounter),
        ("wrgsbase rax", &[0xf3, 0x48, 0x0f, 0xae, 0xd8], Ban::GsBase),
        ("swapgs", &[0x0f, 0x01, 0xf8], Ban::GsBase),
        ("iretq", &[0x48, 0xcf], Ban::Segment),
        ("retf", &[0xcb], Ban::Segment),
        ("mov ds, ax", &[0x8e, 0xd8], Ban::Segment),
        ("pop fs", &[0x0f, 0xa1], Ban::Segment),
        ("call far [rax]", &[0xff, 0x18], Ban::Segment),
        ("jmp far [rax]", &[0xff, 0x28], Ban::Segment),
        ("sgdt", &[0x0f, 0x01, 0x00], Ban::SystemTable),
        ("sidt", &[0x0f, 0x01, 0x08], Ban::SystemTable),
        ("smsw eax", &[0x0f, 0x01, 0xe0], Ban::SystemTable),
        ("sldt eax", &[0x0f, 0x00, 0xc0], Ban::SystemTable),
        ("str eax", &[0x0f, 0x00, 0xc8], Ban::SystemTable),
        ("lar eax, cx", &[0x0f, 0x02, 0xc1], Ban::SystemTable),
        ("lsl eax, cx", &[0x0f, 0x03, 0xc1], Ban::SystemTable),
        (
            "lsl rax, [rcx]",
            &[0x48, 0x0f, 0x03, 0x01],
            Ban::SystemTable,
        ),
        ("verr ax", &[0x0f, 0x00, 0xe0], Ban::SystemTable),
        ("verw ax", &[0x0f, 0x00, 0xe8], Ban::SystemTable),
        ("verw [rax]", &[0x0f, 0x00, 0x28], Ban::SystemTable),
        ("femms", &[0x0f, 0x0e], Ban::BeyondBaseline),
        (
            "pfadd mm0, mm1",
            &[0x0f, 0x0f, 0xc1, 0x9e],
            Ban::BeyondBaseline,
        ),
        (
            "vmovaps ymm0, ymm1",
            &[0xc5, 0xfc, 0x28, 0xc1],
            Ban::BeyondBaseline,
        ),
        (
            "vpxor xmm0, xmm0, xmm0",
            &[0xc5, 0xf9, 0xef, 0xc0],
            Ban::BeyondBaseline,
        ),
        (
            "vmovaps zmm0, zmm1",
            &[0x62, 0xf1, 0x7c, 0x48, 0x28, 0xc1],
            Ban::BeyondBaseline,
        ),
        (
            "andn eax, eax, eax",
            &[0xc4, 0xe2, 0x78, 0xf2, 0xc0],
            Ban::BeyondBaseline,
        ),
        (
            "lzcnt eax, eax",
            &[0xf3, 0x0f, 0xbd, 0xc0],
            Ban::BeyondBaseline,
        ),
        (
            "aesenc xmm0, xmm1",
            &[0x66, 0x0f, 0x38, 0xdc, 0xc1],
            Ban::BeyondBaseline,
        ),
        (
            "sha256rnds2",
            &[0x0f, 0x38, 0xcb, 0xc1],
            Ban::BeyondBaseline,
        ),
        ("rdrand eax", &[0x0f, 0xc7, 0xf0], Ban::BeyondBaseline),
        ("rdseed eax", &[0x0f, 0xc7, 0xf8], Ban::BeyondBaseline),
        ("rdpkru", &[0x0f, 0x01, 0xee], Ban::BeyondBaseline),
        ("xsave", &[0x0f, 0xae, 0x20], Ban::BeyondBaseline),
        ("xbegin", &[0xc7, 0xf8, 0, 0, 0, 0], Ban::BeyondBaseline),
        ("into (not in 64-bit mode)", &[0xce], Ban::NotCode),
    ];
    for (name, bytes, ban) in cases {
        assert_eq!(verdict(bytes), Some(*ban), "{name}");
    }
}

#[test]
fn neighbours_pass() {
    let cases: &[(&str, &[u8])] = &[
        ("nop", &[0x90]),
        ("long nop", &[0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00]),
        ("int3", &[0xcc]),
        ("ud2", &[0x0f, 0x0b]),
        ("pause", &[0xf3, 0x90]),
        ("endbr64", &[0xf3, 0x0f, 0x1e, 0xfa]),
        ("rdtsc", &[0x0f, 0x31]),
        ("rdtscp", &[0x0f, 0x01, 0xf9]),
        ("rep bsf (tzcnt)", &[0xf3, 0x0f, 0xbc, 0xc0]),
        ("popcnt eax, eax", &[0xf3, 0x0f, 0xb8, 0xc0]),
        ("cmpxchg16b [rax]", &[0x48, 0x0f, 0xc7, 0x08]),
        ("pshufb xmm0, xmm1", &[0x66, 0x0f, 0x38, 0x00, 0xc1]),
        ("pcmpeqq xmm0, xmm1", &[0x66, 0x0f, 0x38, 0x29, 0xc1]),
        ("crc32 eax, al", &[0xf2, 0x0f, 0x38, 0xf0, 0xc0]),
        ("mfence", &[0x0f, 0xae, 0xf0]),
        ("ldmxcsr [rax]", &[0x0f, 0xae, 0x10]),
        ("fnstcw [rax]", &[0xd9, 0x38]),
        ("fxsave [rax]", &[0x0f, 0xae, 0x00]),
        ("rep movsb", &[0xf3, 0xa4]),
        (
            "mov rax, gs:[0]",
            &[0x65, 0x48, 0x8b, 0x04, 0x25, 0, 0, 0, 0],
        ),
        ("wrfsbase rax", &[0xf3, 0x48, 0x0f, 0xae, 0xd0]),
        ("rdgsbase rax", &[0xf3, 0x48, 0x0f, 0xae, 0xc8]),
        ("mov ax, ds", &[0x66, 0x8c, 0xd8]),
        ("pushfq", &[0x9c]),
        ("popfq", &[0x9d]),
        ("cld", &[0xfc]),
        ("prefetcht0 [rax]", &[0x0f, 0x18, 0x08]),
        ("prefetch [rax]", &[0x0f, 0x0d, 0x00]),
        ("prefetchw [rax]", &[0x0f, 0x0d, 0x08]),
        ("call rax", &[0xff, 0xd0]),
        ("ret", &[0xc3]),
    ];
    for (name, bytes) in cases {
        assert_eq!(verdict(bytes), None, "{name}");
    }
}

/// Whatever the file, the check answers; it never panics.
#[test]
fn what_is_no_elf_is_refused() {
    let options = CheckOptions::default();
    for bytes in [&b""[..], b"\x7fELF", &[0; 64], &[0xff; 4096]] {
        assert!(matches!(check(bytes, &options), Err(CheckError::Elf(_))));
    }
    // This test's own executable is an ELF file, and not a guest.
    let own = std::fs::read(std::env::current_exe().unwrap()).unwrap();
    assert!(matches!(
        check(&own, &options),
        Err(CheckError::NotAGuest(_))
    ));
}
