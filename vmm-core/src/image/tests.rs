//! Well-formed images are taken; every way of being unfit has its reason.

use super::*;
use pv_abi::note::NoteRecord;
use zerocopy::IntoBytes;

const EHDR: usize = 64;
const PHDR: usize = 56;

/// A minimal image: header, two program headers, a note, and one page of text.
pub(crate) fn sample() -> Vec<u8> {
    let note_at = EHDR + 2 * PHDR;
    let text_at = 4096;
    let mut file = vec![0u8; text_at + 16];
    let put = |file: &mut Vec<u8>, at: usize, bytes: &[u8]| {
        file[at..at + bytes.len()].copy_from_slice(bytes);
    };
    put(&mut file, 0, b"\x7fELF\x02\x01\x01");
    put(&mut file, 16, &2u16.to_le_bytes());
    put(&mut file, 18, &62u16.to_le_bytes());
    put(&mut file, 20, &1u32.to_le_bytes());
    put(&mut file, 24, &RAM_BASE.to_le_bytes());
    put(&mut file, 32, &(EHDR as u64).to_le_bytes());
    put(&mut file, 52, &(EHDR as u16).to_le_bytes());
    put(&mut file, 54, &(PHDR as u16).to_le_bytes());
    put(&mut file, 56, &2u16.to_le_bytes());
    put(&mut file, 58, &64u16.to_le_bytes());
    let mut header = |index: usize, kind: u32, flags: u32, fields: [u64; 6]| {
        let at = EHDR + index * PHDR;
        put(&mut file, at, &kind.to_le_bytes());
        put(&mut file, at + 4, &flags.to_le_bytes());
        for (i, field) in fields.iter().enumerate() {
            put(&mut file, at + 8 + 8 * i, &field.to_le_bytes());
        }
    };
    header(
        0,
        PT_LOAD,
        PF_R | PF_X,
        [text_at as u64, RAM_BASE, RAM_BASE, 16, 16, 4096],
    );
    let note_len = size_of::<NoteRecord>() as u64;
    header(
        1,
        PT_NOTE,
        PF_R,
        [note_at as u64, 0, 0, note_len, note_len, 4],
    );
    put(&mut file, note_at, NoteRecord::new(0, 0).as_bytes());
    file
}

fn with(at: usize, bytes: &[u8]) -> Result<Image, ImageError> {
    let mut file = sample();
    file[at..at + bytes.len()].copy_from_slice(bytes);
    Image::from_bytes(file)
}

#[test]
fn sample_is_accepted() {
    let image = Image::from_bytes(sample()).unwrap();
    assert_eq!(image.entry(), RAM_BASE);
    assert_eq!(image.segments().len(), 1);
    assert_eq!(image.end(), RAM_BASE + 4096);
    assert_eq!(image.segments()[0].access, Access::ReadExecute);
}

#[test]
fn every_cut_is_refused_with_a_reason() {
    let file = sample();
    for len in 0..file.len() {
        let error = Image::from_bytes(&file[..len]).expect_err("a cut file was accepted");
        assert!(!error.to_string().is_empty());
    }
}

#[test]
fn every_damaged_header_byte_is_refused_or_harmless() {
    let file = sample();
    for at in 0..EHDR + 2 * PHDR + size_of::<NoteRecord>() {
        for value in [0x00, 0x01, 0x7f, 0x80, 0xff] {
            let mut damaged = file.clone();
            damaged[at] = value;
            if let Ok(image) = Image::from_bytes(damaged) {
                assert!(image.end() <= RAM_LOW_END);
                assert!(image.segments().iter().all(|s| s.file.end <= file.len()));
            }
        }
    }
}

#[test]
fn kinds_that_are_not_guests() {
    assert!(matches!(
        with(16, &3u16.to_le_bytes()),
        Err(ImageError::WrongKind { .. })
    ));
    assert!(matches!(
        with(18, &183u16.to_le_bytes()),
        Err(ImageError::WrongKind { .. })
    ));
    assert!(matches!(
        with(4, &[1]),
        Err(ImageError::WrongKind { .. } | ImageError::Malformed { .. })
    ));
    assert!(matches!(
        with(EHDR, &PT_DYNAMIC.to_le_bytes()),
        Err(ImageError::WrongKind { .. })
    ));
    assert!(matches!(
        with(EHDR, &0u32.to_le_bytes()),
        Err(ImageError::Empty)
    ));
}

#[test]
fn segments_outside_the_map() {
    let flags = EHDR + 4;
    let vaddr = EHDR + 16;
    let memsz = EHDR + 40;
    let rwx = (PF_R | PF_W | PF_X).to_le_bytes();
    assert!(matches!(
        with(flags, &rwx),
        Err(ImageError::BadSegment { .. })
    ));
    for address in [
        0u64,
        4096,
        RAM_BASE - 4096,
        RAM_LOW_END,
        u64::MAX,
        u64::MAX - 4095,
    ] {
        let result = with(vaddr, &address.to_le_bytes());
        assert!(
            matches!(result, Err(ImageError::BadSegment { .. })),
            "{address:#x}"
        );
    }
    for len in [0u64, 15, RAM_LOW_END, u64::MAX] {
        assert!(with(memsz, &len.to_le_bytes()).is_err(), "{len:#x}");
    }
    let entry = (RAM_BASE + 4096).to_le_bytes();
    assert!(matches!(with(24, &entry), Err(ImageError::BadEntry { .. })));
}

#[test]
fn notes_that_do_not_match() {
    let note = EHDR + 2 * PHDR;
    assert!(matches!(
        with(note + 12, b"Someone"),
        Err(ImageError::NoNote)
    ));
    assert!(matches!(
        with(note + 24, &2u16.to_le_bytes()),
        Err(ImageError::Abi { major: 2, .. })
    ));
    assert!(matches!(
        with(note + 26, &1u16.to_le_bytes()),
        Err(ImageError::Abi { minor: 1, .. })
    ));
    let v4 = 4u32.to_le_bytes();
    assert!(matches!(
        with(note + 28, &v4),
        Err(ImageError::Baseline { wanted: 4, .. })
    ));
    let feature = (1u64 << 63).to_le_bytes();
    assert!(matches!(
        with(note + 32, &feature),
        Err(ImageError::Features { .. })
    ));
    let stack = (MAX_STACK + 1).to_le_bytes();
    assert!(matches!(
        with(note + 40, &stack),
        Err(ImageError::BadNote { .. })
    ));
    assert!(with(note + 40, &MAX_STACK.to_le_bytes()).is_ok());
}

/// Neither a device without an end nor a pipe without a writer is read.
#[test]
fn only_regular_files_are_opened() {
    let dir = std::env::temp_dir().join(format!("paravane-image-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let pipe = dir.join("pipe");
    let made = std::process::Command::new("mkfifo").arg(&pipe).status();
    assert!(made.unwrap().success());
    for path in [Path::new("/dev/zero"), &dir, &pipe] {
        let error = Image::open(path).unwrap_err();
        assert!(matches!(error, ImageError::NotAFile { .. }), "{error}");
    }
    // The bound is the library's own, whatever the length says.
    let large = dir.join("large");
    let file = File::create(&large).unwrap();
    for (len, fits) in [(MAX_IMAGE_LEN, true), (MAX_IMAGE_LEN + 1, false)] {
        file.set_len(len as u64).unwrap();
        let error = Image::open(&large).unwrap_err();
        let too_large = matches!(error, ImageError::TooLarge { .. });
        assert_eq!(too_large, !fits, "{error}");
    }
    // A file of no length that has something to say is read.
    let error = Image::open("/proc/self/status").unwrap_err();
    assert!(matches!(error, ImageError::Malformed { .. }), "{error}");
    let good = dir.join("good");
    std::fs::write(&good, sample()).unwrap();
    Image::open(&good).unwrap();
    std::fs::remove_dir_all(&dir).unwrap();
}
