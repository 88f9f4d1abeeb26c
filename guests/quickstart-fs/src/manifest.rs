//! The manifest that the guest writes, and its report to the host.
//!
//! The manifest has the form that `sha256sum --check` reads: a digest in hexadecimal, two spaces,
//! a path from the volume's root, in the order in which the guest met the files.

use alloc::string::String;
use core::fmt::Write;

/// The manifest's name, in the root of the volume.
pub const NAME: &str = "SHA256.TXT";

/// Bytes of a digest.
pub const DIGEST: usize = 32;

/// The embedder's call in which the guest reports: files, folders, bytes of files, nanoseconds
/// from mounting to the flushed manifest, nanoseconds of these spent on hashing the files, and read
/// requests.
///
/// It is this number in the embedder's range.
pub const REPORT_CALL: u32 = 0;

/// Appends one line.
pub fn push_line(text: &mut String, digest: &[u8; DIGEST], path: &str) {
    for byte in digest {
        // Writing to a String does not fail.
        let _ = write!(text, "{byte:02x}");
    }
    text.push_str("  ");
    text.push_str(path);
    text.push('\n');
}

/// One line, taken apart; `None` when it is not of the manifest's form.
pub fn parse_line(line: &str) -> Option<([u8; DIGEST], &str)> {
    let (hexadecimal, path) = line.split_once("  ")?;
    let nibbles = hexadecimal.as_bytes();
    if nibbles.len() != 2 * DIGEST || path.is_empty() {
        return None;
    }
    let mut digest = [0; DIGEST];
    for (byte, pair) in digest.iter_mut().zip(nibbles.chunks_exact(2)) {
        *byte = nibble(pair[0])? << 4 | nibble(pair[1])?;
    }
    Some((digest, path))
}

fn nibble(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    }
}
