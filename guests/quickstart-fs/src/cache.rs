//! Chunks of the disk in memory.
//!
//! File system code asks for a sector at a time; the disk is good at large requests. So the cache
//! deals in chunks, and when a chunk is asked for and the one before it is here, somebody reads
//! from front to back: the next ones are then started, and are in flight while this one is used.

use crate::disk::Disk;
use crate::limits::{CACHED_CHUNKS, CHUNK, READ_AHEAD, SECTOR};
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::fmt;

/// Sectors in a chunk.
const CHUNK_SECTORS: u64 = (CHUNK / SECTOR) as u64;

/// A disk behind a cache. What is written stays here until [`flush`](Cache::flush).
#[derive(Debug)]
pub struct Cache<D: Disk> {
    disk: D,
    slots: Vec<Slot>,
    /// Slots that are being read, oldest first.
    in_flight: VecDeque<usize>,
    /// Where the last sector was found.
    last: usize,
    clock: u64,
}

#[derive(Debug)]
struct Slot {
    chunk: u64,
    data: Vec<u8>,
    state: State,
    used: u64,
    dirty: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Empty,
    InFlight,
    /// Read ahead and not asked for yet.
    Ahead,
    Ready,
}

/// Why a sector could not be had.
#[derive(Debug)]
pub enum CacheError<E> {
    /// It is past the end of the disk.
    PastEnd {
        /// The sector.
        sector: u64,
    },
    /// The disk failed.
    Disk {
        /// First sector of the request that failed.
        sector: u64,
        /// What the disk says.
        source: E,
    },
}

impl<E: fmt::Display> fmt::Display for CacheError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CacheError::PastEnd { sector } => write!(f, "sector {sector} is past the disk's end"),
            CacheError::Disk { sector, source } => write!(f, "disk at sector {sector}: {source}"),
        }
    }
}

impl<E: core::error::Error + 'static> core::error::Error for CacheError<E> {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        match self {
            CacheError::PastEnd { .. } => None,
            CacheError::Disk { source, .. } => Some(source),
        }
    }
}

impl<D: Disk> Cache<D> {
    /// An empty cache in front of `disk`.
    pub fn new(disk: D) -> Self {
        Cache {
            disk,
            slots: Vec::new(),
            in_flight: VecDeque::new(),
            last: 0,
            clock: 0,
        }
    }

    /// Sectors on the disk.
    pub fn sectors(&self) -> u64 {
        self.disk.sectors()
    }

    /// The disk.
    pub fn disk(&self) -> &D {
        &self.disk
    }

    /// The disk again; what was not flushed is lost.
    ///
    /// Reads that are still in flight are waited for, and their data dropped.
    pub fn into_disk(mut self) -> D {
        while !self.in_flight.is_empty() {
            // Nobody asked for it: an error here is nobody's either.
            let _ = self.finish_oldest();
        }
        self.disk
    }

    /// Copies out of the sector that holds byte `offset` of the disk, up to that sector's chunk's
    /// end; returns how many bytes that was.
    pub fn read(&mut self, offset: u64, into: &mut [u8]) -> Result<usize, CacheError<D::Error>> {
        let slot = self.find(offset / SECTOR as u64)?;
        let within = (offset % CHUNK as u64) as usize;
        let from = self.slots[slot].data.get(within..).unwrap_or_default();
        let length = from.len().min(into.len());
        into[..length].copy_from_slice(&from[..length]);
        Ok(length)
    }

    /// Copies in at byte `offset` of the disk, up to the chunk's end; returns how many bytes that
    /// was.
    pub fn write(&mut self, offset: u64, from: &[u8]) -> Result<usize, CacheError<D::Error>> {
        let slot = self.find(offset / SECTOR as u64)?;
        let within = (offset % CHUNK as u64) as usize;
        let into = self.slots[slot].data.get_mut(within..).unwrap_or_default();
        let length = into.len().min(from.len());
        into[..length].copy_from_slice(&from[..length]);
        self.slots[slot].dirty = true;
        Ok(length)
    }

    /// Writes back what was changed and makes it stable.
    pub fn flush(&mut self) -> Result<(), CacheError<D::Error>> {
        let mut dirty: Vec<usize> = (0..self.slots.len())
            .filter(|slot| self.slots[*slot].dirty)
            .collect();
        dirty.sort_by_key(|slot| self.slots[*slot].chunk);
        for slot in dirty {
            self.write_back(slot)?;
        }
        self.disk
            .flush()
            .map_err(|source| CacheError::Disk { sector: 0, source })
    }

    /// The slot that holds this sector, read if need be.
    fn find(&mut self, sector: u64) -> Result<usize, CacheError<D::Error>> {
        if sector >= self.disk.sectors() {
            return Err(CacheError::PastEnd { sector });
        }
        let chunk = sector / CHUNK_SECTORS;
        self.clock += 1;
        let hit = |slot: &Slot| slot.chunk == chunk && slot.state == State::Ready;
        if self.slots.get(self.last).is_some_and(hit) {
            self.slots[self.last].used = self.clock;
            return Ok(self.last);
        }
        let slot = match self.lookup(chunk) {
            Some(slot) if self.slots[slot].state == State::Ready => slot,
            Some(slot) => {
                // Before others are started: they take the slot that was not used for longest.
                self.slots[slot].used = self.clock;
                self.read_ahead(chunk)?;
                self.wait_for(slot)?;
                slot
            }
            None => {
                let sequential = chunk
                    .checked_sub(1)
                    .is_some_and(|c| self.lookup(c).is_some());
                let slot = self.start(chunk)?;
                if sequential {
                    self.read_ahead(chunk)?;
                }
                self.wait_for(slot)?;
                slot
            }
        };
        let found = &mut self.slots[slot];
        found.state = State::Ready;
        found.used = self.clock;
        self.last = slot;
        Ok(slot)
    }

    fn lookup(&self, chunk: u64) -> Option<usize> {
        let here = |slot: &Slot| slot.chunk == chunk && slot.state != State::Empty;
        self.slots.iter().position(here)
    }

    /// Starts reads of the chunks after `chunk`, as far as the limits go, in batches: a doorbell for
    /// each would cost more than it gains.
    fn read_ahead(&mut self, chunk: u64) -> Result<(), CacheError<D::Error>> {
        if self.in_flight.len() > READ_AHEAD / 2 {
            return Ok(());
        }
        let end = self.disk.sectors().div_ceil(CHUNK_SECTORS);
        for next in (chunk + 1..end).take(READ_AHEAD - 1) {
            if self.in_flight.len() >= READ_AHEAD {
                break;
            }
            if self.lookup(next).is_none() {
                self.start(next)?;
            }
        }
        self.disk.kick();
        Ok(())
    }

    fn start(&mut self, chunk: u64) -> Result<usize, CacheError<D::Error>> {
        if self.in_flight.len() >= READ_AHEAD {
            self.finish_oldest()?;
        }
        let slot = self.vacate()?;
        let sector = chunk * CHUNK_SECTORS;
        let length = (self.disk.sectors() - sector).min(CHUNK_SECTORS) as usize * SECTOR;
        let started = self.disk.start_read(sector, length);
        started.map_err(|source| CacheError::Disk { sector, source })?;
        let entry = &mut self.slots[slot];
        entry.data.resize(length, 0);
        entry.chunk = chunk;
        entry.state = State::InFlight;
        entry.used = self.clock;
        self.in_flight.push_back(slot);
        Ok(slot)
    }

    fn wait_for(&mut self, slot: usize) -> Result<(), CacheError<D::Error>> {
        while self.slots[slot].state == State::InFlight {
            self.finish_oldest()?;
        }
        Ok(())
    }

    fn finish_oldest(&mut self) -> Result<(), CacheError<D::Error>> {
        let Some(slot) = self.in_flight.pop_front() else {
            return Ok(());
        };
        let entry = &mut self.slots[slot];
        // On an error the slot is free again, and a later look tries anew.
        entry.state = State::Empty;
        let finished = self.disk.finish_read(&mut entry.data);
        finished.map_err(|source| CacheError::Disk {
            sector: entry.chunk * CHUNK_SECTORS,
            source,
        })?;
        entry.state = State::Ahead;
        Ok(())
    }

    /// A slot that may be filled: a new one, or the one that was not used for longest.
    fn vacate(&mut self) -> Result<usize, CacheError<D::Error>> {
        if let Some(slot) = self.slots.iter().position(|s| s.state == State::Empty) {
            return Ok(slot);
        }
        if self.slots.len() < CACHED_CHUNKS {
            self.slots.push(Slot {
                chunk: 0,
                data: Vec::new(),
                state: State::Empty,
                used: 0,
                dirty: false,
            });
            return Ok(self.slots.len() - 1);
        }
        // There are more slots than reads in flight, so there is a least one.
        let idle = (0..self.slots.len()).filter(|s| self.slots[*s].state != State::InFlight);
        let slot = idle.min_by_key(|slot| self.slots[*slot].used).unwrap_or(0);
        self.write_back(slot)?;
        self.slots[slot].state = State::Empty;
        Ok(slot)
    }

    fn write_back(&mut self, slot: usize) -> Result<(), CacheError<D::Error>> {
        let entry = &mut self.slots[slot];
        if entry.dirty {
            let sector = entry.chunk * CHUNK_SECTORS;
            let written = self.disk.write(sector, &entry.data);
            written.map_err(|source| CacheError::Disk { sector, source })?;
            entry.dirty = false;
        }
        Ok(())
    }
}

const _: () = assert!(CACHED_CHUNKS > READ_AHEAD && CHUNK.is_multiple_of(SECTOR));
