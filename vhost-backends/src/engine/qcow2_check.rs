//! Whether a qcow2 image's fixed tables can be what they say, before anything believes them.
//!
//! Every table lies in the file, on clusters of its own. What tables of the second level say is
//! checked when it is used; this is about the ones that an allocation starts from, where a lie
//! leads in circles.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Bytes of a version 2 header.
const HEADER_LEN: usize = 72;
/// Where a version 3 header has its incompatible features.
const INCOMPATIBLE: u64 = 72;
/// The incompatible feature that says that data is in another file.
const EXTERNAL_DATA: u64 = 1 << 2;
/// Bytes of the longest table of either kind that is believed: an image of many terabytes.
const MOST_TABLE: u64 = 32 << 20;
/// The bits of a table's entry that are an offset.
const OFFSET_BITS: u64 = 0x00ff_ffff_ffff_fe00;

fn malformed(what: &'static str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("not a sound qcow2 image: {what}"),
    )
}

/// Refuses an image whose tables are not in the file, or on top of each other, or whose data is in
/// another file: that one would be neither locked nor written.
pub(super) fn check(file: &File) -> io::Result<()> {
    let mut header = [0; HEADER_LEN];
    file.read_exact_at(&mut header, 0)
        .map_err(|_| malformed("too short for a header"))?;
    let u32_at = |at: usize| u64::from(be32(&header, at));
    let u64_at = |at: usize| u32_at(at) << 32 | u32_at(at + 4);
    if header.get(..4) != Some(b"QFI\xfb") {
        return Err(malformed("no magic"));
    }
    if !(2..=3).contains(&u32_at(4)) {
        return Err(malformed("an unknown version"));
    }
    if u32_at(4) == 3 {
        let mut features = [0; 8];
        file.read_exact_at(&mut features, INCOMPATIBLE)
            .map_err(|_| malformed("too short for a header"))?;
        if u64::from_be_bytes(features) & EXTERNAL_DATA != 0 {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "qcow2 images with an external data file are not served",
            ));
        }
    }
    let bits = u32_at(20);
    if !(9..=21).contains(&bits) {
        return Err(malformed("an impossible cluster size"));
    }
    let cluster = 1u64 << bits;
    let size = u64_at(24);
    // Entries of a table of the second level map this much of the disk.
    let mapped = cluster * (cluster / 8);
    if u32_at(36) < size.div_ceil(mapped) {
        return Err(malformed("a table that is too short for the disk"));
    }
    let mut used = Used {
        cluster,
        // The last cluster may be there in part.
        end: file.metadata()?.len().next_multiple_of(cluster),
        clusters: HashSet::from([0]),
    };
    let refcounts = used.table(file, u64_at(48), u32_at(56) * cluster)?;
    if refcounts
        .first()
        .is_none_or(|entry| entry & OFFSET_BITS == 0)
    {
        return Err(malformed("no reference counts"));
    }
    let mappings = match u32_at(36) {
        0 => Vec::new(),
        entries => used.table(file, u64_at(40), entries * 8)?,
    };
    for entry in refcounts.iter().chain(&mappings) {
        let offset = entry & OFFSET_BITS;
        if offset != 0 {
            used.take(offset)?;
        }
    }
    Ok(())
}

/// Clusters that something is on.
struct Used {
    cluster: u64,
    end: u64,
    clusters: HashSet<u64>,
}

impl Used {
    fn take(&mut self, offset: u64) -> io::Result<()> {
        if !offset.is_multiple_of(self.cluster) || offset >= self.end {
            return Err(malformed("a table outside the file"));
        }
        if !self.clusters.insert(offset / self.cluster) {
            return Err(malformed("tables on top of each other"));
        }
        Ok(())
    }

    /// The entries of a table.
    fn table(&mut self, file: &File, offset: u64, len: u64) -> io::Result<Vec<u64>> {
        if len == 0 || len > MOST_TABLE {
            return Err(malformed("a table of an impossible length"));
        }
        for i in 0..len.div_ceil(self.cluster) {
            let at = offset.checked_add(i * self.cluster);
            self.take(at.ok_or_else(|| malformed("a table outside the file"))?)?;
        }
        // At most MOST_TABLE.
        let mut bytes = vec![0; len as usize];
        file.read_exact_at(&mut bytes, offset)
            .map_err(|_| malformed("a table outside the file"))?;
        let entry = |at: &[u8]| u64::from(be32(at, 0)) << 32 | u64::from(be32(at, 4));
        Ok(bytes.chunks_exact(8).map(entry).collect())
    }
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    let four = bytes.get(at..at + 4).and_then(|b| b.try_into().ok());
    u32::from_be_bytes(four.unwrap_or_default())
}
