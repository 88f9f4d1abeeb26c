//! The cache against a model, on a disk that counts and fails.

use proptest::prelude::*;
use quickstart_fs::cache::{Cache, CacheError};
use quickstart_fs::disk::Disk;
use quickstart_fs::limits::{CACHED_CHUNKS, CHUNK, READ_AHEAD, SECTOR};
use std::cell::Cell;
use std::collections::VecDeque;
use std::io;
use std::rc::Rc;

#[derive(Debug, Default)]
struct Counters {
    most_in_flight: Cell<usize>,
    reads: Cell<usize>,
    flushes: Cell<usize>,
    fail_reads: Cell<bool>,
}

#[derive(Debug)]
struct Ram {
    bytes: Vec<u8>,
    in_flight: VecDeque<(usize, usize)>,
    counters: Rc<Counters>,
}

impl Ram {
    fn new(sectors: usize) -> (Self, Rc<Counters>) {
        let counters = Rc::new(Counters::default());
        let ram = Ram {
            bytes: (0..sectors * SECTOR).map(|i| (i / SECTOR) as u8).collect(),
            in_flight: VecDeque::new(),
            counters: Rc::clone(&counters),
        };
        (ram, counters)
    }
}

impl Disk for Ram {
    type Error = io::Error;

    fn sectors(&self) -> u64 {
        (self.bytes.len() / SECTOR) as u64
    }

    fn start_read(&mut self, sector: u64, length: usize) -> io::Result<()> {
        assert!(length > 0 && length <= CHUNK && length.is_multiple_of(SECTOR));
        let start = sector as usize * SECTOR;
        assert!(start + length <= self.bytes.len());
        self.in_flight.push_back((start, length));
        let most = self.counters.most_in_flight.get().max(self.in_flight.len());
        self.counters.most_in_flight.set(most);
        self.counters.reads.set(self.counters.reads.get() + 1);
        Ok(())
    }

    fn kick(&mut self) {}

    fn finish_read(&mut self, into: &mut [u8]) -> io::Result<()> {
        let (start, length) = self.in_flight.pop_front().unwrap();
        assert_eq!(into.len(), length);
        if self.counters.fail_reads.get() {
            return Err(io::Error::other("told to fail"));
        }
        into.copy_from_slice(&self.bytes[start..start + length]);
        Ok(())
    }

    fn write(&mut self, sector: u64, from: &[u8]) -> io::Result<()> {
        let start = sector as usize * SECTOR;
        self.bytes[start..start + from.len()].copy_from_slice(from);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.counters.flushes.set(self.counters.flushes.get() + 1);
        Ok(())
    }
}

fn read_sector(cache: &mut Cache<Ram>, sector: usize) -> Result<u8, CacheError<io::Error>> {
    let mut bytes = [0; SECTOR];
    assert_eq!(cache.read((sector * SECTOR) as u64, &mut bytes)?, SECTOR);
    Ok(bytes[0])
}

const SECTORS_PER_CHUNK: usize = CHUNK / SECTOR;

#[test]
fn reading_forward_keeps_several_in_flight() {
    let sectors = SECTORS_PER_CHUNK * 3 * CACHED_CHUNKS + 7;
    let (ram, counters) = Ram::new(sectors);
    let mut cache = Cache::new(ram);
    for sector in 0..sectors {
        assert_eq!(read_sector(&mut cache, sector).unwrap(), sector as u8);
    }
    assert_eq!(counters.most_in_flight.get(), READ_AHEAD);
    assert_eq!(counters.reads.get(), sectors.div_ceil(SECTORS_PER_CHUNK));
}

#[test]
fn reading_here_and_there_reads_no_more_than_asked() {
    let (ram, counters) = Ram::new(SECTORS_PER_CHUNK * 100);
    let mut cache = Cache::new(ram);
    for step in 0..50 {
        let sector = (step * 37 % 50) * 2 * SECTORS_PER_CHUNK;
        assert_eq!(read_sector(&mut cache, sector).unwrap(), sector as u8);
    }
    assert_eq!(counters.reads.get(), 50);
    assert_eq!(counters.most_in_flight.get(), 1);
}

#[test]
fn the_end_of_the_disk_is_an_error() {
    let (ram, _) = Ram::new(3);
    let mut cache = Cache::new(ram);
    read_sector(&mut cache, 2).unwrap();
    let error = read_sector(&mut cache, 3).unwrap_err();
    assert!(matches!(error, CacheError::PastEnd { sector: 3 }));
    let (ram, _) = Ram::new(0);
    let error = read_sector(&mut Cache::new(ram), 0).unwrap_err();
    assert!(matches!(error, CacheError::PastEnd { sector: 0 }));
}

#[test]
fn a_failed_read_is_tried_again() {
    let (ram, counters) = Ram::new(SECTORS_PER_CHUNK * 20);
    let mut cache = Cache::new(ram);
    read_sector(&mut cache, 0).unwrap();
    counters.fail_reads.set(true);
    for _ in 0..20 {
        let error = read_sector(&mut cache, SECTORS_PER_CHUNK).unwrap_err();
        assert!(matches!(error, CacheError::Disk { .. }));
    }
    counters.fail_reads.set(false);
    // What was in flight when it failed is drained, one error at most for each.
    let answers = (0..=READ_AHEAD).map(|_| read_sector(&mut cache, SECTORS_PER_CHUNK));
    assert!(answers.filter_map(Result::ok).count() > 0);
    for sector in 0..SECTORS_PER_CHUNK * 20 {
        assert_eq!(read_sector(&mut cache, sector).unwrap(), sector as u8);
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 64,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// Any mix of reads, writes and flushes: the cache shows what a plain array shows, and after
    /// the flush the disk does too.
    #[test]
    fn agrees_with_an_array(
        steps in proptest::collection::vec((0u8..8, 0usize..SECTORS_PER_CHUNK * 160, any::<u8>()), 1..300),
    ) {
        let (ram, counters) = Ram::new(SECTORS_PER_CHUNK * 160);
        let mut model: Vec<u8> = (0..SECTORS_PER_CHUNK * 160).map(|s| s as u8).collect();
        let mut cache = Cache::new(ram);
        for (kind, sector, value) in steps {
            match kind {
                0 => cache.flush().unwrap(),
                1..=3 => {
                    let written = cache.write((sector * SECTOR) as u64, &[value; SECTOR]).unwrap();
                    prop_assert_eq!(written, SECTOR);
                    model[sector] = value;
                }
                _ => prop_assert_eq!(read_sector(&mut cache, sector).unwrap(), model[sector]),
            }
        }
        prop_assert!(counters.most_in_flight.get() <= READ_AHEAD);
        cache.flush().unwrap();
        let ram = cache.into_disk();
        prop_assert!(ram.bytes.chunks(SECTOR).map(|s| s[0]).eq(model));
        prop_assert!(counters.flushes.get() > 0);
    }
}
