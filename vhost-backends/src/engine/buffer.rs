//! Buffers of our own that O_DIRECT takes.

/// Alignment that O_DIRECT takes on every file system and disk of a PC.
pub(super) const SAFE_ALIGN: usize = 4096;

/// Zeroed bytes at an aligned address that stays the same.
#[derive(Debug)]
pub(super) struct AlignedBuffer {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBuffer {
    pub(super) fn new(len: usize) -> AlignedBuffer {
        let bytes = vec![0; len + SAFE_ALIGN];
        let address = bytes.as_ptr() as usize;
        AlignedBuffer {
            start: address.next_multiple_of(SAFE_ALIGN) - address,
            bytes,
            len,
        }
    }

    pub(super) fn get(&self) -> &[u8] {
        let end = self.start + self.len;
        self.bytes.get(self.start..end).unwrap_or_default()
    }

    pub(super) fn get_mut(&mut self) -> &mut [u8] {
        let end = self.start + self.len;
        self.bytes.get_mut(self.start..end).unwrap_or_default()
    }
}
