//! The host's side: device states, a device half of the split ring, and a disk.
#![allow(unsafe_code)]
// UNSAFETY: plays the peer that writes shared memory.

use super::net::Card;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU16, Ordering, fence};
use pv_abi::call::number;
use pv_abi::device::{DeviceEntry, DeviceSetup, DeviceState, QueueSetup, kind};
use pv_abi::limits::MAX_CONFIG;
use pv_abi::status::Status;
use pv_abi::virtio::{Desc, block, desc_flag, feature, split};
use std::vec::Vec;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

/// What `fill_scratch` returns; only compared.
pub(super) const SCRATCH_ADDRESS: u64 = pv_abi::layout::VCPU_PAGES_BASE + 2048;
const SECTOR: usize = 512;

/// The device half of one split ring, with access to everything a peer can reach.
pub(crate) struct ModelQueue {
    memory: NonNull<u8>,
    len: usize,
    desc: u64,
    avail: u64,
    used: u64,
    pub(crate) size: u16,
    pub(crate) next_avail: u16,
    pub(crate) next_used: u16,
    pub(crate) event_idx: bool,
}

/// A chain as the device sees it: head, readable and writable pieces.
pub(crate) struct Chain {
    pub(crate) head: u16,
    pub(crate) readable: Vec<(u64, u32)>,
    pub(crate) writable: Vec<(u64, u32)>,
}

impl ModelQueue {
    pub(crate) fn new(
        memory: NonNull<u8>,
        len: usize,
        (desc, avail, used): (u64, u64, u64),
        size: u16,
    ) -> Self {
        ModelQueue {
            memory,
            len,
            desc,
            avail,
            used,
            size,
            next_avail: 0,
            next_used: 0,
            event_idx: true,
        }
    }

    fn at(&self, gpa: u64, len: usize) -> *mut u8 {
        let offset = gpa.checked_sub(super::ARENA_GPA).expect("inside the arena") as usize;
        assert!(offset + len <= self.len, "inside the arena");
        // SAFETY: in bounds.
        unsafe { self.memory.as_ptr().add(offset) }
    }

    pub(crate) fn read(&self, gpa: u64, len: usize) -> Vec<u8> {
        let from = self.at(gpa, len);
        // SAFETY: in bounds.
        (0..len)
            .map(|i| unsafe { from.add(i).read_volatile() })
            .collect()
    }

    pub(crate) fn write(&self, gpa: u64, data: &[u8]) {
        let to = self.at(gpa, data.len());
        for (i, &byte) in data.iter().enumerate() {
            // SAFETY: in bounds.
            unsafe { to.add(i).write_volatile(byte) }
        }
    }

    fn word(&self, gpa: u64) -> &AtomicU16 {
        // SAFETY: in bounds, aligned by the ring's layout.
        unsafe { AtomicU16::from_ptr(self.at(gpa, 2).cast()) }
    }

    pub(crate) fn avail_index(&self) -> u16 {
        self.word(self.avail + 2).load(Ordering::Acquire)
    }

    /// The next chain, with every rule of the specification checked on it.
    pub(crate) fn pop(&mut self) -> Option<Chain> {
        if self.avail_index() == self.next_avail {
            return None;
        }
        let slot = u64::from(self.next_avail % self.size);
        let head = self.word(self.avail + 4 + 2 * slot).load(Ordering::Relaxed);
        self.next_avail = self.next_avail.wrapping_add(1);
        let mut chain = Chain {
            head,
            readable: Vec::new(),
            writable: Vec::new(),
        };
        let (mut table, mut entries, mut index) = (self.desc, self.size, head);
        for _ in 0..=self.size {
            assert!(index < entries, "descriptor inside its table");
            let bytes = self.read(table + 16 * u64::from(index), 16);
            let desc = Desc::read_from_bytes(&bytes).expect("sixteen bytes");
            if desc.flags & desc_flag::INDIRECT != 0 {
                assert_eq!(table, self.desc, "no indirect in indirect");
                assert_eq!(desc.flags, desc_flag::INDIRECT);
                (table, entries, index) = (desc.addr, (desc.len / 16) as u16, 0);
                continue;
            }
            if desc.flags & desc_flag::WRITE != 0 {
                chain.writable.push((desc.addr, desc.len));
            } else {
                assert!(chain.writable.is_empty(), "readable ones come first");
                chain.readable.push((desc.addr, desc.len));
            }
            if desc.flags & desc_flag::NEXT == 0 {
                return Some(chain);
            }
            index = desc.next;
        }
        panic!("a loop in a chain");
    }

    pub(crate) fn write_elem(&self, position: u16, id: u32, len: u32) {
        let at = self.used + 4 + 8 * u64::from(position % self.size);
        self.write(at, &id.to_le_bytes());
        self.write(at + 4, &len.to_le_bytes());
    }

    pub(crate) fn write_used_index(&self, index: u16) {
        self.word(self.used + 2).store(index, Ordering::Release);
    }

    /// Completes a chain; whether the driver wants to hear of it.
    pub(crate) fn complete(&mut self, head: u16, len: u32) -> bool {
        self.write_elem(self.next_used, head.into(), len);
        let old = self.next_used;
        self.next_used = old.wrapping_add(1);
        self.write_used_index(self.next_used);
        self.wants_signal(old)
    }

    /// Completes chains together.
    pub(crate) fn complete_group(&mut self, elems: &[(u16, u32)]) -> bool {
        let old = self.next_used;
        for &(head, len) in elems {
            self.write_elem(self.next_used, head.into(), len);
            self.next_used = self.next_used.wrapping_add(1);
        }
        self.write_used_index(self.next_used);
        self.wants_signal(old)
    }

    fn wants_signal(&self, old: u16) -> bool {
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = self
                .word(self.avail + 4 + 2 * u64::from(self.size))
                .load(Ordering::Relaxed);
            split::need_event(event, self.next_used, old)
        } else {
            self.word(self.avail).load(Ordering::Relaxed) & 1 == 0
        }
    }

    /// Before it sleeps the device asks for a kick; whether there is something after all.
    pub(crate) fn arm(&self) -> bool {
        if self.event_idx {
            self.word(self.used + 4 + 8 * u64::from(self.size))
                .store(self.next_avail, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        self.avail_index() != self.next_avail
    }
}

/// The host: one block device whose backend can die at any point of its work.
pub(crate) struct Host {
    entry: NonNull<DeviceEntry>,
    memory: NonNull<u8>,
    len: usize,
    pub(crate) disk: Vec<u8>,
    state: DeviceState,
    pub(crate) generation: u32,
    pub(crate) offered: u64,
    pub(super) features: u64,
    config_vcpu: u32,
    queues: Vec<(ModelQueue, u32)>,
    pub(crate) kicked: bool,
    /// Steps of work until the backend dies, each time it comes up anew.
    pub(crate) lives: Vec<u64>,
    fuel: Option<u64>,
    /// Runs that pass before a dead backend is replaced; `None` for never.
    pub(crate) absence: Option<u32>,
    away: u32,
    /// `Again` answers before each activation succeeds.
    pub(crate) agains: u32,
    agains_left: u32,
    /// `DEVICE_RESET` answers `Again`: a backend that nobody can make let go.
    pub(crate) holds_on: bool,
    /// Makes the order of completion differ from that of submission.
    pub(crate) shuffle: u64,
    /// Requests executed, in order, as (kind, sector).
    pub(crate) executed: Vec<(u32, u64)>,
    pub(crate) activations: u32,
    pub(crate) signals: u64,
    /// Answers every request with this status instead of doing it.
    pub(crate) answer: Option<u8>,
    kind: u32,
    pub(crate) input: Vec<u8>,
    pub(crate) output: Vec<u8>,
    /// Most bytes of input in one buffer.
    pub(crate) give: usize,
    /// Leaves the status byte, and all of a request that is no data, out of the length.
    pub(crate) counts_data_only: bool,
    /// Leaves so many bytes out of it beside that.
    pub(crate) counts_less: u32,
    pub(crate) card: Card,
}

// SAFETY: pointers to leaked memory.
unsafe impl Send for Host {}

impl Host {
    pub(super) fn empty_entry() -> DeviceEntry {
        DeviceEntry::new_zeroed()
    }

    pub(super) fn new(
        entry: NonNull<DeviceEntry>,
        memory: NonNull<u8>,
        len: usize,
        sectors: u64,
        queues: u16,
    ) -> Self {
        let mut host = Host {
            entry,
            memory,
            len,
            disk: std::vec![0; sectors as usize * SECTOR],
            state: DeviceState::Negotiated,
            generation: 0,
            offered: feature::VERSION_1
                | feature::EVENT_IDX
                | feature::INDIRECT_DESC
                | block::feature::FLUSH
                | block::feature::DISCARD
                | block::feature::WRITE_ZEROES,
            features: 0,
            config_vcpu: 0,
            queues: Vec::new(),
            kicked: false,
            lives: Vec::new(),
            fuel: None,
            absence: Some(0),
            away: 0,
            agains: 0,
            agains_left: 0,
            holds_on: false,
            shuffle: 0,
            executed: Vec::new(),
            activations: 0,
            signals: 0,
            answer: None,
            kind: kind::BLOCK,
            input: Vec::new(),
            output: Vec::new(),
            give: usize::MAX,
            counts_data_only: false,
            counts_less: 0,
            card: Card::default(),
        };
        let mut first = Self::empty_entry();
        first.kind = kind::BLOCK;
        first.event_base = 3;
        first.queue_count = queues;
        first.max_queue_size = 256;
        first.name[..4].copy_from_slice(b"disk");
        // SAFETY: leaked and aligned; the guest's side does not run yet.
        unsafe { entry.write(first) };
        host.set_capacity(sectors);
        host.show();
        host
    }

    pub(crate) fn set_capacity(&mut self, sectors: u64) {
        let config = block::Config {
            capacity: sectors,
            max_discard_sectors: 64,
            max_write_zeroes_sectors: 64,
            ..Default::default()
        };
        self.disk.resize(sectors as usize * SECTOR, 0);
        let mut bytes = [0; MAX_CONFIG];
        bytes[..size_of::<block::Config>()].copy_from_slice(config.as_bytes());
        self.write_config(bytes, size_of::<block::Config>());
    }

    pub(super) fn write_config(&mut self, bytes: [u8; MAX_CONFIG], len: usize) {
        let entry = self.entry.as_ptr();
        // SAFETY: leaked, aligned; volatile, the guest's side reads it.
        unsafe {
            let seq = (&raw const (*entry).config_seq).read_volatile();
            (&raw mut (*entry).config_seq).write_volatile(seq + 1);
            fence(Ordering::Release);
            (&raw mut (*entry).config).write_volatile(bytes);
            (&raw mut (*entry).config_len).write_volatile(len as u32);
            fence(Ordering::Release);
            (&raw mut (*entry).config_seq).write_volatile(seq + 2);
        }
    }

    pub(crate) fn show(&mut self) {
        let entry = self.entry.as_ptr();
        // SAFETY: as above.
        unsafe {
            (&raw mut (*entry).features).write_volatile(self.offered);
            (&raw mut (*entry).generation).write_volatile(self.generation);
            fence(Ordering::Release);
            (&raw mut (*entry).state).write_volatile(self.state.code());
        }
    }

    pub(super) fn call(
        &mut self,
        call: u32,
        args: [u64; 6],
        scratch: &[u8],
    ) -> Result<u64, Status> {
        match call {
            number::NOP => Ok(0),
            number::DEVICE_RESET if self.holds_on => Err(Status::Again),
            number::DEVICE_RESET => {
                self.queues.clear();
                self.fuel = None;
                if self.state != DeviceState::Absent {
                    self.generation += 1;
                    self.state = if self.state == DeviceState::NeedsReset && self.absence != Some(0)
                    {
                        DeviceState::Absent
                    } else {
                        DeviceState::Negotiated
                    };
                }
                self.show();
                Ok(self.state.code().into())
            }
            number::DEVICE_ACTIVATE => {
                if self.state != DeviceState::Negotiated {
                    return Err(Status::BadState);
                }
                if self.agains_left > 0 {
                    self.agains_left -= 1;
                    return Err(Status::Again);
                }
                self.agains_left = self.agains;
                assert_eq!(args[1], SCRATCH_ADDRESS);
                self.activate(&scratch[..args[2] as usize])
            }
            _ => Err(Status::UnknownCall),
        }
    }

    fn activate(&mut self, setup: &[u8]) -> Result<u64, Status> {
        let (head, rest) = DeviceSetup::read_from_prefix(setup).map_err(|_| Status::BadLength)?;
        if head.features & !self.offered != 0 {
            return Err(Status::BadArgument);
        }
        self.features = head.features;
        self.config_vcpu = head.config_vcpu;
        for bytes in rest.chunks_exact(size_of::<QueueSetup>()) {
            let setup = QueueSetup::read_from_bytes(bytes).map_err(|_| Status::BadLength)?;
            let addresses = (setup.desc, setup.avail, setup.used);
            let mut queue = ModelQueue::new(self.memory, self.len, addresses, setup.size);
            queue.event_idx = self.features & feature::EVENT_IDX != 0;
            assert_eq!(queue.avail_index(), 0, "a ring that starts anew is empty");
            self.queues.push((queue, setup.vcpu));
        }
        assert_eq!(self.queues.len(), head.queue_count as usize);
        self.generation += 1;
        self.activations += 1;
        self.state = DeviceState::Active;
        self.fuel = self.lives.pop();
        self.show();
        Ok(self.generation.into())
    }

    /// The backend dies now.
    pub(crate) fn die(&mut self) {
        self.queues.clear();
        self.state = DeviceState::NeedsReset;
        self.generation += 1;
        self.away = self.absence.unwrap_or(u32::MAX);
        self.show();
    }

    /// Writes a used index that nothing explains.
    pub(crate) fn forge_used_index(&mut self, index: u16) {
        self.kicked = false;
        for (queue, _) in &self.queues {
            queue.write_used_index(index);
        }
    }

    /// One step of work; whether the backend survived it.
    pub(super) fn burn(&mut self) -> bool {
        match &mut self.fuel {
            Some(0) => {
                self.die();
                false
            }
            Some(fuel) => {
                *fuel -= 1;
                true
            }
            None => true,
        }
    }

    fn config_event(&self) -> (u32, u32) {
        // SAFETY: leaked; written once.
        let (base, count) = unsafe {
            let entry = self.entry.as_ptr();
            (
                (&raw const (*entry).event_base).read_volatile(),
                (&raw const (*entry).queue_count).read_volatile(),
            )
        };
        (self.config_vcpu, base + u32::from(count))
    }

    /// Does what there is to do; the events that fire, as (vCPU, event).
    pub(crate) fn run(&mut self) -> Vec<(u32, u32)> {
        let mut events = Vec::new();
        if self.state == DeviceState::Absent && self.absence.is_some() {
            if self.away == 0 {
                self.state = DeviceState::Negotiated;
                self.show();
                events.push(self.config_event());
            } else {
                self.away -= 1;
            }
            return events;
        }
        if self.state != DeviceState::Active || !core::mem::take(&mut self.kicked) {
            return events;
        }
        let mut queues = core::mem::take(&mut self.queues);
        if self.kind == kind::NET {
            match self.serve_card(&mut queues) {
                Some(fired) => {
                    self.queues = queues;
                    events = fired;
                }
                None => events.push(self.config_event()),
            }
            return events;
        }
        'dead: for (index, (queue, vcpu)) in queues.iter_mut().enumerate() {
            loop {
                let mut chains = Vec::new();
                // A console keeps the buffers for input until there is some.
                let hungry = self.kind == kind::CONSOLE && index == 0;
                while !(hungry && self.input.len() <= chains.len().saturating_mul(self.give)) {
                    let Some(chain) = queue.pop() else { break };
                    chains.push(chain);
                }
                while !chains.is_empty() {
                    self.shuffle = self.shuffle.wrapping_mul(6364136223846793005);
                    let pick = (self.shuffle >> 33) as usize % chains.len();
                    let chain = chains.remove(pick);
                    if !self.burn() {
                        break 'dead;
                    }
                    let written = self.execute(queue, &chain);
                    if !self.burn() {
                        break 'dead;
                    }
                    let signal = queue.complete(chain.head, written);
                    if !self.burn() {
                        break 'dead;
                    }
                    if signal {
                        self.signals += 1;
                        events.push((*vcpu, 3 + index as u32));
                    }
                }
                if (hungry && self.input.is_empty()) || !queue.arm() {
                    break;
                }
            }
        }
        if self.state == DeviceState::Active {
            self.queues = queues;
        } else {
            events.push(self.config_event());
        }
        events
    }

    /// Makes it another kind of device: a console that shows in `output` what it is sent and gives
    /// out `input`, or an entropy source that gives out `input` again and again.
    pub(crate) fn become_kind(&mut self, kind: u32) {
        self.kind = kind;
        let entry = self.entry.as_ptr();
        // SAFETY: leaked and aligned.
        unsafe { (&raw mut (*entry).kind).write_volatile(kind) };
    }

    fn execute(&mut self, queue: &ModelQueue, chain: &Chain) -> u32 {
        if self.kind != kind::BLOCK {
            let mut written = 0;
            for &(at, len) in &chain.readable {
                self.output.extend(queue.read(at, len as usize));
            }
            for &(at, len) in &chain.writable {
                let take = self.input.len().min(len as usize).min(self.give);
                queue.write(at, &self.input[..take]);
                self.input.drain(..take);
                written += take as u32;
            }
            return written;
        }
        let (at, len) = chain.readable[0];
        assert_eq!(len, 16);
        let header = block::RequestHeader::read_from_bytes(&queue.read(at, 16)).expect("a header");
        self.executed.push((header.kind, header.sector));
        let start = header.sector as usize * SECTOR;
        let (status_at, status_len) = *chain.writable.last().expect("a status byte");
        assert_eq!(status_len, 1);
        let mut written = 1;
        let mut status = block::status::OK;
        match (self.answer, header.kind) {
            (Some(answer), _) => status = answer,
            (None, block::request::IN) => {
                let (at, len) = chain.writable[0];
                match self.disk.get(start..start + len as usize) {
                    Some(data) => {
                        queue.write(at, data);
                        written += len;
                    }
                    None => status = block::status::IOERR,
                }
            }
            (None, block::request::OUT) => {
                let (at, len) = chain.readable[1];
                let data = queue.read(at, len as usize);
                match self.disk.get_mut(start..start + len as usize) {
                    Some(place) => place.copy_from_slice(&data),
                    None => status = block::status::IOERR,
                }
            }
            (None, block::request::FLUSH) => {}
            (None, block::request::GET_ID) => {
                queue.write(chain.writable[0].0, b"model disk\0\0\0\0\0\0\0\0\0\0");
                written += 20;
            }
            (None, block::request::DISCARD | block::request::WRITE_ZEROES) => {
                let (at, len) = chain.readable[1];
                let range = block::RangeSegment::read_from_bytes(&queue.read(at, len as usize))
                    .expect("a range");
                let start = range.sector as usize * SECTOR;
                self.disk[start..start + range.count as usize * SECTOR].fill(0);
            }
            _ => status = block::status::UNSUPP,
        }
        queue.write(status_at, &[status]);
        if self.counts_data_only {
            written -= 1;
        }
        written.saturating_sub(self.counts_less)
    }
}
