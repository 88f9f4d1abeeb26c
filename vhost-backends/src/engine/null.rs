//! A disk that is not there: what a ring costs, without any I/O.

use super::sleep::Sleeper;
use super::{Engine, Finished, Geometry, Operation, Store, Token, Wake, WakeSources};
use std::io;
use std::sync::Arc;
use std::time::Duration;
use vm_memory::GuestMemoryMmap;

/// Takes every write and forgets it; reads leave the guest's buffers as they are.
#[derive(Debug)]
pub struct NullStore {
    len: u64,
}

impl NullStore {
    /// A disk of so many bytes.
    pub fn new(len: u64) -> NullStore {
        NullStore { len }
    }
}

impl Store for NullStore {
    fn geometry(&self) -> Geometry {
        Geometry::plain(self.len)
    }

    fn open_engine(
        self: Arc<Self>,
        _memory: Arc<GuestMemoryMmap>,
        wake: WakeSources<'_>,
    ) -> io::Result<Box<dyn Engine>> {
        Ok(Box::new(NullEngine(Sleeper::new(wake)?)))
    }
}

#[derive(Debug)]
struct NullEngine(Sleeper);

impl Engine for NullEngine {
    fn start(&mut self, _token: Token, _operation: Operation<'_>) -> Option<io::Result<()>> {
        Some(Ok(()))
    }

    fn submit(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn reap(&mut self, _finished: &mut Vec<Finished>) -> io::Result<Wake> {
        self.0.glance()
    }

    fn wait(&mut self, _finished: &mut Vec<Finished>) -> io::Result<Wake> {
        self.0.sleep()
    }

    fn wait_for(&mut self, _finished: &mut Vec<Finished>, limit: Duration) -> io::Result<Wake> {
        self.0.sleep_for(limit)
    }

    fn has_finished(&mut self) -> bool {
        false
    }

    fn in_flight(&self) -> usize {
        0
    }
}
