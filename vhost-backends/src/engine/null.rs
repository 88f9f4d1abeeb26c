//! A disk that is not there: what a ring costs, without any I/O.

use super::inline::Inline;
use super::sleep::Sleeper;
use super::{Engine, Geometry, Operation, Store, WakeSources};
use std::io;
use std::sync::Arc;
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

impl Inline for NullEngine {
    fn run(&mut self, _operation: Operation<'_>) -> io::Result<()> {
        Ok(())
    }

    fn sleeper(&mut self) -> io::Result<&mut Sleeper> {
        Ok(&mut self.0)
    }
}
