//! 4 KiB random reads, many in flight, waited for in batches.

use crate::Failure;
use crate::protocol::{Command, Outcome};
use crate::ticks;
use alloc::vec::Vec;
use core::time::Duration;
use guest_sdk::block::{self, BlockQueue, Request, Token};
use guest_sdk::flat::Flat;
use guest_sdk::platform::{DmaBuf, Platform};

/// Bytes in one read.
const BLOCK: usize = 4096;
/// Sectors in one read.
const SECTORS: u64 = (BLOCK / 512) as u64;
/// A device that answers nothing for so long is broken.
const LIMIT: Duration = Duration::from_secs(20);

/// A disk, and the buffers that are not in flight.
pub(crate) struct Reader {
    queue: BlockQueue<Flat>,
    spare: Vec<DmaBuf>,
    flying: Vec<(Token, u64)>,
    seed: u64,
}

impl Reader {
    pub(crate) fn open(platform: &'static Flat) -> Result<Reader, Failure> {
        Ok(Reader {
            queue: block::open(platform, None).map_err(Failure::Open)?,
            spare: Vec::new(),
            flying: Vec::new(),
            seed: 0x9e37_79b9_7f4a_7c15,
        })
    }

    /// A block of the disk, by xorshift.
    fn pick(&mut self) -> u64 {
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        self.seed % (self.queue.capacity() / SECTORS).max(1)
    }

    /// Reads for as long as the command says; all of it has completed when this returns.
    pub(crate) fn run(
        &mut self,
        platform: &Flat,
        command: &Command,
    ) -> Result<Outcome, block::Error> {
        let depth = usize::from(command.depth).max(1);
        let batch = usize::from(command.batch).clamp(1, depth);
        let spin_ns = u64::from(command.spin_us) * 1000;
        let end = platform.now_ns() + u64::from(command.count) * 1_000_000;
        let mut outcome = Outcome::default();
        let start = ticks();
        let mut over = false;
        loop {
            while !over && self.flying.len() < depth {
                self.submit()?;
            }
            if self.flying.is_empty() {
                break;
            }
            self.queue.kick();
            let mut got = 0;
            if spin_ns != 0 {
                let until = platform.now_ns() + spin_ns;
                loop {
                    got += self.reap(&mut outcome)?;
                    if got >= batch.min(self.flying.len() + got) || platform.now_ns() >= until {
                        break;
                    }
                    core::hint::spin_loop();
                }
            }
            if got == 0 {
                self.queue
                    .wait_for(batch.min(self.flying.len()), Some(LIMIT))?;
                if self.reap(&mut outcome)? == 0 {
                    return Err(block::Error::TimedOut);
                }
            }
            over = platform.now_ns() >= end;
        }
        outcome.ticks = ticks() - start;
        Ok(outcome)
    }

    fn submit(&mut self) -> Result<(), block::Error> {
        let buf = match self.spare.pop() {
            Some(buf) => buf,
            None => self.queue.alloc(BLOCK)?,
        };
        let place = self.pick();
        let sector = place * SECTORS;
        let token = self
            .queue
            .submit(Request::Read { sector, buf })
            .map_err(|refused| refused.error)?;
        self.flying.push((token, place));
        Ok(())
    }

    /// Takes what has completed.
    fn reap(&mut self, outcome: &mut Outcome) -> Result<usize, block::Error> {
        let mut got = 0;
        while let Some(done) = self.queue.poll()? {
            done.result?;
            got += 1;
            outcome.done += 1;
            let at = self
                .flying
                .iter()
                .position(|(token, _)| *token == done.token);
            let place = at.map(|at| self.flying.swap_remove(at).1);
            // Every block of the disk begins with its own number.
            let mut head = [0; 8];
            if let Some(buf) = done.buf {
                buf.read(0, &mut head);
                self.spare.push(buf);
            }
            if place != Some(u64::from_le_bytes(head)) {
                outcome.wrong += 1;
            }
        }
        Ok(got)
    }
}
