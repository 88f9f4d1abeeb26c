//! Overlapping random writes at depth 32, verified against a model of the disk, while the host kills
//! the backend.
//!
//! Every sector written carries its number and the write's sequence number. A write W is a legal
//! final content of a sector unless another write to that sector was submitted after W completed
//! and has completed itself.

use crate::{Case, Outcome, ensure, text};
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;
use core::time::Duration;
use guest_sdk::block::{self, Request, Token};
use guest_sdk::flat::Boot;
use guest_sdk::platform::Platform;
use pv_abi::call::number;

pub const CASES: &[Case] = &[("soak.kill", kill)];

const DEPTH: usize = 32;
/// Sectors that are written; small, so that writes overlap all the time.
const SECTORS: u64 = 1024;
const MAX_LEN: u64 = 32;

/// A write that may still be what a sector holds.
#[derive(Clone, Copy)]
struct Candidate {
    sequence: u64,
    submitted: u64,
    /// Logical time of completion; `u64::MAX` while in flight.
    completed: u64,
}

struct InFlight {
    token: Token,
    sequence: u64,
    sector: u64,
    count: u64,
}

struct Model {
    sectors: Vec<Vec<Candidate>>,
    now: u64,
}

impl Model {
    fn tick(&mut self) -> u64 {
        self.now += 1;
        self.now
    }

    fn submit(&mut self, write: &InFlight) {
        let submitted = self.tick();
        for sector in write.sector..write.sector + write.count {
            let candidate = Candidate {
                sequence: write.sequence,
                submitted,
                completed: u64::MAX,
            };
            self.sectors[sector as usize].push(candidate);
        }
    }

    fn complete(&mut self, write: &InFlight) {
        let now = self.tick();
        for sector in write.sector..write.sector + write.count {
            let list = &mut self.sectors[sector as usize];
            let Some(own) = list.iter_mut().find(|c| c.sequence == write.sequence) else {
                continue;
            };
            own.completed = now;
            let submitted = own.submitted;
            list.retain(|c| c.completed >= submitted);
        }
    }

    fn allows(&self, sector: u64, sequence: u64) -> bool {
        self.sectors[sector as usize]
            .iter()
            .any(|c| c.sequence == sequence)
    }
}

/// xorshift64*
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % limit
    }
}

/// Runs until the host, asked now and then, says that it has killed enough.
fn kill(boot: &Boot) -> Outcome {
    let mut disk = block::open(boot.platform(), Some("disk")).map_err(text("open"))?;
    disk.device().set_loss_timeout(Duration::from_secs(60));
    let base = Candidate {
        sequence: 0,
        submitted: 0,
        completed: 0,
    };
    let mut model = Model {
        sectors: vec![vec![base]; SECTORS as usize],
        now: 0,
    };
    for sector in (0..SECTORS).step_by(64) {
        let stamps: Vec<u8> = (sector..sector + 64).flat_map(|s| stamp(s, 0)).collect();
        disk.write_blocking(sector, &stamps)
            .map_err(text("prepare"))?;
    }
    let mut random = Random(0x1234_5678_9abc_def1);
    let mut flying: Vec<InFlight> = Vec::new();
    let (mut sequence, mut completed, mut enough) = (0u64, 0u64, false);
    while !enough || !flying.is_empty() {
        while !enough && flying.len() < DEPTH {
            sequence += 1;
            let count = 1 + random.below(MAX_LEN);
            let sector = random.below(SECTORS - count);
            let mut buf = disk.alloc(count as usize * 512).map_err(text("alloc"))?;
            for i in 0..count {
                buf.write(i as usize * 512, &stamp(sector + i, sequence));
            }
            let submitted = disk.submit(Request::Write { sector, buf });
            let token = submitted.map_err(|e| format!("submit: {:?}", e.error))?;
            let write = InFlight {
                token,
                sequence,
                sector,
                count,
            };
            model.submit(&write);
            flying.push(write);
        }
        disk.wait_for(1, Some(Duration::from_secs(60)))
            .map_err(text("wait"))?;
        while let Some(done) = disk.poll().map_err(text("poll"))? {
            done.result.map_err(text("a write"))?;
            let found = flying.iter().position(|w| w.token == done.token);
            let index = found.ok_or("a completion for nothing")?;
            let write = flying.swap_remove(index);
            model.complete(&write);
            completed += 1;
        }
        if completed % 64 < 8 && !enough {
            let args = [completed, sequence, 0, 0, 0, 0];
            let answer = boot
                .platform()
                .call(number::EMBEDDER + 7, args)
                .map_err(text("ask"))?;
            enough = answer != 0;
        }
    }
    ensure!(
        completed == sequence,
        "{completed} completions for {sequence} writes"
    );
    let mut mismatches = 0;
    for sector in 0..SECTORS {
        let mut data = [0; 512];
        disk.read_blocking(sector, &mut data)
            .map_err(text("verify"))?;
        let word = |i: usize| u64::from_le_bytes(core::array::from_fn(|b| data[i * 8 + b]));
        let found = word(1);
        if data != stamp(sector, found) || !model.allows(sector, found) {
            mismatches += 1;
        }
    }
    ensure!(
        mismatches == 0,
        "{mismatches} sectors are wrong after {completed} writes"
    );
    let args = [completed, sequence, 1, 0, 0, 0];
    boot.platform()
        .call(number::EMBEDDER + 7, args)
        .map_err(text("report"))?;
    Ok(())
}

/// The contents of a sector: its number and the write's, over and over.
fn stamp(sector: u64, sequence: u64) -> [u8; 512] {
    let mut data = [0; 512];
    for (i, word) in data.chunks_exact_mut(8).enumerate() {
        let value = if i % 2 == 0 { sector } else { sequence };
        word.copy_from_slice(&value.to_le_bytes());
    }
    data
}
