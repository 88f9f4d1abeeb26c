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

/// The embedder's call that the guest makes first; without arguments.
///
/// This and [`REPORT_CALL`] are numbers within the embedder's range.
pub const STARTED_CALL: u32 = 0;
/// The embedder's call with a [`Report`], once the manifest is flushed.
pub const REPORT_CALL: u32 = 1;

/// What the guest reports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Files hashed.
    pub files: u64,
    /// Folders entered, the root left out.
    pub folders: u64,
    /// Bytes of the files.
    pub bytes: u64,
    /// Nanoseconds from opening the disk to the flushed manifest.
    pub total_ns: u64,
    /// Nanoseconds from the first to the last file.
    pub hash_ns: u64,
    /// Block requests made.
    pub requests: u64,
}

impl Report {
    /// As the call's arguments.
    pub const fn to_args(self) -> [u64; 6] {
        [
            self.files,
            self.folders,
            self.bytes,
            self.total_ns,
            self.hash_ns,
            self.requests,
        ]
    }

    /// From the call's arguments.
    pub const fn from_args(args: [u64; 6]) -> Self {
        let [files, folders, bytes, total_ns, hash_ns, requests] = args;
        Report {
            files,
            folders,
            bytes,
            total_ns,
            hash_ns,
            requests,
        }
    }
}

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
