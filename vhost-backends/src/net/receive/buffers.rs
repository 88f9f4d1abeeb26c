//! Receive buffers that were taken from the ring and not used yet, in order.

use crate::ring::OwnedChain;

/// A receive buffer, taken from the ring.
#[derive(Debug)]
pub(super) struct Buffer {
    pub(super) chain: OwnedChain,
    pub(super) room: usize,
}

/// A queue of them that keeps its places: chains are filled where they stay, and never moved.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    /// None, or a power of two.
    places: Vec<Buffer>,
    first: usize,
    len: usize,
}

impl Buffers {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) fn front(&self) -> Option<&Buffer> {
        self.get(0)
    }

    /// The one behind so many others.
    #[inline]
    pub(super) fn get(&self, index: usize) -> Option<&Buffer> {
        let place = self.first.wrapping_add(index) & self.places.len().wrapping_sub(1);
        self.places.get(place).filter(|_| index < self.len)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Buffer> {
        (0..self.len).filter_map(|index| self.get(index))
    }

    /// The place behind the last one, where there is something old. What is put there is in the
    /// queue once [`push`](Buffers::push) is called.
    #[inline]
    pub(super) fn free_place(&mut self) -> Option<&mut Buffer> {
        if self.len == self.places.len() {
            self.grow();
        }
        let place = (self.first + self.len) & self.places.len().wrapping_sub(1);
        self.places.get_mut(place)
    }

    #[inline]
    pub(super) fn push(&mut self) {
        self.len += 1;
    }

    /// The first one was used.
    #[inline]
    pub(super) fn drop_front(&mut self) {
        if self.len > 0 {
            self.first = self.first.wrapping_add(1) & self.places.len().wrapping_sub(1);
            self.len -= 1;
        }
    }

    #[cold]
    fn grow(&mut self) {
        self.places.rotate_left(self.first);
        self.first = 0;
        let more = self.places.len().max(1);
        self.places.extend((0..more).map(|_| Buffer {
            chain: OwnedChain::empty(),
            room: 0,
        }));
    }

    /// All that are left, in order.
    pub(super) fn into_chains(mut self) -> impl DoubleEndedIterator<Item = OwnedChain> {
        self.places.rotate_left(self.first);
        self.places.truncate(self.len);
        self.places.into_iter().map(|buffer| buffer.chain)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_come_out_as_they_went_in() {
        let mut buffers = Buffers::default();
        assert!(buffers.front().is_none());
        let (mut next, mut expected) = (0, 0);
        // More in than out, so that it grows with its first place anywhere.
        for round in 0..40 {
            for _ in 0..round % 7 {
                buffers.free_place().unwrap().room = next;
                buffers.push();
                next += 1;
            }
            for _ in 0..round % 5 {
                if let Some(buffer) = buffers.front() {
                    assert_eq!(buffer.room, expected);
                    expected += 1;
                }
                buffers.drop_front();
            }
            let rooms: Vec<usize> = buffers.iter().map(|buffer| buffer.room).collect();
            assert_eq!(rooms, (expected..next).collect::<Vec<_>>());
            assert_eq!(
                (buffers.len(), buffers.is_empty()),
                (next - expected, next == expected)
            );
            assert!(buffers.get(next - expected).is_none());
        }
        assert_eq!(buffers.into_chains().count(), next - expected);
    }
}
