//! Plain system calls, for hosts that refuse io_uring.

use super::transfer::{Transfer, chain_error};
use super::{Engine, Finished, Operation, RawFile, Token, Wake, WakeSources};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

const KICK: u64 = 0;
const STOP: u64 = 1;

/// Everything is over when `start` returns.
#[derive(Debug)]
pub struct SyncEngine {
    file: Arc<RawFile>,
    memory: Arc<GuestMemoryMmap>,
    transfer: Transfer,
    epoll: Epoll,
}

impl SyncEngine {
    /// An engine on `file`.
    pub fn new(
        file: Arc<RawFile>,
        memory: Arc<GuestMemoryMmap>,
        wake: WakeSources<'_>,
    ) -> io::Result<SyncEngine> {
        let epoll = Epoll::new()?;
        // Edge-triggered, so that the kick need not be drained: a read could block on a peer.
        let kick = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, KICK);
        epoll.ctl(ControlOperation::Add, wake.kick.as_raw_fd(), kick)?;
        let stop = EpollEvent::new(EventSet::IN, STOP);
        epoll.ctl(ControlOperation::Add, wake.stop.as_raw_fd(), stop)?;
        Ok(SyncEngine {
            file,
            memory,
            transfer: Transfer::default(),
            epoll,
        })
    }

    fn sleep(&self, timeout_ms: i32) -> io::Result<Wake> {
        let mut events = [EpollEvent::default(); 2];
        let count = match self.epoll.wait(timeout_ms, &mut events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            result => result?,
        };
        let stop = events.iter().take(count).any(|e| e.data() == STOP);
        Ok(Wake { stop })
    }
}

impl Engine for SyncEngine {
    fn start(&mut self, _token: Token, operation: Operation<'_>) -> Option<io::Result<()>> {
        Some(match operation {
            Operation::Flush => self.file.flush(),
            Operation::Discard { offset, len } => self.file.discard(offset, len),
            Operation::WriteZeroes { offset, len, unmap } => {
                self.file.write_zeroes(offset, len, unmap)
            }
            Operation::Read { .. } | Operation::Write { .. } => {
                match self.transfer.prepare(&self.memory, operation) {
                    Err(error) => Err(chain_error(error)),
                    Ok(_) if self.transfer.is_aligned(self.file.align()) => {
                        self.transfer.run(self.file.main())
                    }
                    Ok(_) => self.transfer.run(self.file.cached()),
                }
            }
        })
    }

    fn submit(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn reap(&mut self, _finished: &mut Vec<Finished>) -> io::Result<Wake> {
        self.sleep(0)
    }

    fn wait(&mut self, _finished: &mut Vec<Finished>) -> io::Result<Wake> {
        self.sleep(-1)
    }

    fn wait_for(&mut self, _finished: &mut Vec<Finished>, limit: Duration) -> io::Result<Wake> {
        // Rounded up, so that a wait does not end before its time.
        let ms = limit.as_nanos().div_ceil(1_000_000);
        self.sleep(i32::try_from(ms).unwrap_or(i32::MAX))
    }

    fn has_finished(&mut self) -> bool {
        false
    }

    fn in_flight(&self) -> usize {
        0
    }
}
