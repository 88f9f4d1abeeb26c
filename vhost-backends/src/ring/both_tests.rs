//! One test body for split and packed rings: a well-behaved driver, a device that gives chains back
//! in any order, restarts in between, and what both may see of each other.

use super::inflight::{PackedLog, SplitLog};
use super::*;
use crate::session::Notifier;
use proptest::prelude::*;
use pv_abi::virtio::desc_flag::{INDIRECT, NEXT, WRITE};
use pv_abi::virtio::split::need_event;
use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use vm_memory::{Bytes, GuestMemoryMmap};

const DESC: u64 = 0x1_0000;
const AVAIL: u64 = 0x2_0000;
const USED: u64 = 0x3_0000;
const TABLE: u64 = 0x4_0000;
const DATA: u64 = 0x10_0000;
const SIZE: u16 = 16;
const PAGES: u64 = 0x200;

/// The driver's half, of either format, with `EVENT_IDX`.
struct Driver {
    mem: Arc<GuestMemoryMmap>,
    packed: bool,
    /// Packed: the next slot and its lap's wrap counter. Split: the running index.
    avail: u16,
    avail_wrap: bool,
    used: u16,
    used_wrap: bool,
    /// Slots that a chain takes, by id; split: the descriptors.
    owns: Vec<Vec<u16>>,
    free: Vec<u16>,
    free_ids: Vec<u16>,
}

impl Driver {
    fn new(packed: bool) -> Driver {
        let ranges = [(GuestAddress(0x1_0000), (PAGES * 0x1000) as usize)];
        Driver {
            mem: Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap()),
            packed,
            avail: 0,
            avail_wrap: true,
            used: 0,
            used_wrap: true,
            owns: vec![Vec::new(); usize::from(SIZE)],
            free: (0..SIZE).collect(),
            free_ids: (0..SIZE).collect(),
        }
    }

    fn config(&self) -> RingConfig {
        RingConfig {
            size: SIZE,
            desc: GuestAddress(DESC),
            avail: GuestAddress(AVAIL),
            used: GuestAddress(USED),
            event_idx: true,
            indirect: true,
            in_order: false,
        }
    }

    fn put<T: vm_memory::ByteValued>(&self, addr: u64, value: T) {
        self.mem.write_obj(value, GuestAddress(addr)).unwrap();
    }

    fn get<T: vm_memory::ByteValued>(&self, addr: u64) -> T {
        self.mem.read_obj(GuestAddress(addr)).unwrap()
    }

    fn desc(&self, at: u64, (addr, len): (u64, u32), low: u16, high: u16) {
        self.put(at, addr);
        self.put(at + 8, len);
        self.put(at + 12, low);
        self.put(at + 14, high);
    }

    /// Offers a chain of buffers (address, length, flags); its id, and whether the device asked
    /// for a kick. `None`: there is no room.
    fn offer(&mut self, buffers: &[(u64, u32, u16)], indirect: bool) -> Option<(u16, bool)> {
        let needs = if indirect { 1 } else { buffers.len() };
        if buffers.is_empty() || self.free.len() < needs || self.free_ids.is_empty() {
            return None;
        }
        let mine: Vec<u16> = self.free.drain(self.free.len() - needs..).collect();
        let id = if self.packed {
            self.free_ids.pop()?
        } else {
            mine[0]
        };
        let table = TABLE + 0x1000 * u64::from(id);
        if indirect {
            for (i, (addr, len, flags)) in (0u16..).zip(buffers) {
                let more = usize::from(i) + 1 < buffers.len();
                let at = table + 16 * u64::from(i);
                if self.packed {
                    self.desc(at, (*addr, *len), 0, *flags);
                } else {
                    self.desc(at, (*addr, *len), flags | u16::from(more), i + 1);
                }
            }
        }
        let whole = [(table, 16 * buffers.len() as u32, INDIRECT)];
        let chain = if indirect { &whole[..] } else { buffers };
        let old = self.avail;
        if self.packed {
            let mut slots = Vec::new();
            for (i, (addr, len, flags)) in chain.iter().enumerate() {
                let more = if i + 1 < chain.len() { NEXT } else { 0 };
                let lap = if self.avail_wrap { 1 << 7 } else { 1 << 15 };
                let at = DESC + 16 * u64::from(self.avail);
                slots.push((at + 14, flags | more | lap));
                self.put(at, *addr);
                self.put(at + 8, *len);
                self.put(at + 12, id);
                self.avail += 1;
                if self.avail == SIZE {
                    (self.avail, self.avail_wrap) = (0, !self.avail_wrap);
                }
            }
            for (at, flags) in slots.into_iter().rev() {
                self.put(at, flags);
            }
        } else {
            for (i, (addr, len, flags)) in chain.iter().enumerate() {
                let next = mine.get(i + 1).copied();
                let more = if next.is_some() { NEXT } else { 0 };
                let at = DESC + 16 * u64::from(mine[i]);
                self.desc(at, (*addr, *len), flags | more, next.unwrap_or(0));
            }
            self.put(AVAIL + 4 + 2 * u64::from(old % SIZE), id);
            self.avail = old.wrapping_add(1);
            self.put(AVAIL + 2, self.avail);
        }
        let moved = chain.len() as u16;
        self.owns[usize::from(id)] = mine;
        Some((id, self.wants_kick(moved)))
    }

    /// As Linux decides it.
    fn wants_kick(&self, moved: u16) -> bool {
        if !self.packed {
            let event = self.get::<u16>(USED + 4 + 8 * u64::from(SIZE));
            return need_event(event, self.avail, self.avail.wrapping_sub(1));
        }
        match self.get::<u16>(USED + 2) {
            0 => true,
            1 => false,
            _ => {
                let event = self.get::<u16>(USED);
                let lap = (event >> 15 == 1) == self.avail_wrap;
                let index = (event & 0x7fff).wrapping_sub(if lap { 0 } else { SIZE });
                need_event(index, self.avail, self.avail.wrapping_sub(moved))
            }
        }
    }

    /// Asks to be called for the next completion.
    fn want_call(&self) {
        if self.packed {
            self.put(AVAIL, self.used | u16::from(self.used_wrap) << 15);
            self.put(AVAIL + 2, 2u16);
        } else {
            self.put(AVAIL + 4 + 2 * u64::from(SIZE), self.used);
        }
    }

    fn reap(&mut self) -> Vec<(u16, u32)> {
        let mut done = Vec::new();
        loop {
            let (id, len) = if self.packed {
                let at = DESC + 16 * u64::from(self.used);
                let flags: u16 = self.get(at + 14);
                let lap = [flags & 1 << 7 != 0, flags & 1 << 15 != 0];
                if lap != [self.used_wrap; 2] {
                    return done;
                }
                let (id, len): (u16, u32) = (self.get(at + 12), self.get(at + 8));
                assert_eq!(flags & WRITE != 0, len > 0);
                self.used += self.owns[usize::from(id)].len() as u16;
                if self.used >= SIZE {
                    (self.used, self.used_wrap) = (self.used - SIZE, !self.used_wrap);
                }
                self.free_ids.push(id);
                (id, len)
            } else {
                if self.get::<u16>(USED + 2) == self.used {
                    return done;
                }
                let at = USED + 4 + 8 * u64::from(self.used % SIZE);
                self.used = self.used.wrapping_add(1);
                (self.get::<u32>(at) as u16, self.get(at + 4))
            };
            self.free.append(&mut self.owns[usize::from(id)]);
            done.push((id, len));
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    /// Lengths of readable, then of writable buffers.
    Offer(Vec<u32>, Vec<u32>, bool),
    Pop,
    /// Complete so many of those in flight, from the n-th on.
    Complete(usize, usize, u32),
    Arm,
    WantCall,
    /// The device is gone at once; another one goes on.
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    let lens = || prop::collection::vec(1..5000u32, 0..3);
    prop_oneof![
        6 => (lens(), lens(), any::<bool>()).prop_map(|(r, w, i)| Step::Offer(r, w, i)),
        6 => Just(Step::Pop),
        4 => (any::<usize>(), 1..5usize, 0..9u32).prop_map(|(n, c, w)| Step::Complete(n, c, w)),
        2 => Just(Step::Arm),
        1 => Just(Step::WantCall),
        1 => Just(Step::Restart),
    ]
}

fn sparse(len: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(len).unwrap();
    file
}

fn log_of(file: &File) -> Arc<InflightLog> {
    let (file, len) = (file.try_clone().unwrap(), InflightLog::len_for(1, SIZE));
    Arc::new(InflightLog::map(file, 0, len, 1, SIZE).unwrap())
}

/// What a case has beside the rings.
struct Logs {
    inflight: Option<File>,
    dirty: Option<(File, Arc<DirtyLog>)>,
}

impl Logs {
    fn new(inflight: bool, dirty: bool) -> Logs {
        Logs {
            inflight: inflight.then(|| sparse(InflightLog::len_for(1, SIZE))),
            dirty: dirty.then(|| {
                let file = sparse(0x1000);
                let map = DirtyLog::map(file.try_clone().unwrap(), 0, 0x1000).unwrap();
                (file, Arc::new(map))
            }),
        }
    }

    fn start(&self, driver: &Driver, base: u32) -> Ring {
        let mut setup = RingSetup::new(driver.config(), driver.packed, driver.mem.clone());
        setup.base = base;
        setup.inflight = (self.inflight.as_ref()).and_then(|file| log_of(file).queue(0));
        setup.dirty = self
            .dirty
            .as_ref()
            .map(|(_, log)| RingDirty::new(log.clone(), Arc::<Notifier>::default(), Some(USED)));
        setup.start().unwrap()
    }

    /// The dirty log, cleared.
    fn sync(&self) -> Option<Vec<u8>> {
        let (file, _) = self.dirty.as_ref()?;
        let mut bits = vec![0; 0x1000];
        file.read_exact_at(&mut bits, 0).unwrap();
        file.write_all_at(&[0; 0x1000], 0).unwrap();
        Some(bits)
    }
}

fn is_marked(bits: &[u8], addr: u64) -> bool {
    let page = addr / 0x1000;
    bits[(page / 8) as usize] >> (page % 8) & 1 == 1
}

#[test]
fn a_wish_for_a_kick_can_be_taken_back() {
    for packed in [false, true] {
        let mut driver = Driver::new(packed);
        let mut ring = Logs::new(false, false).start(&driver, 0);
        let serve = |driver: &mut Driver, ring: &mut Ring| {
            let head = ring.pop().unwrap().unwrap().head();
            ring.complete(&[Completion { head, written: 0 }]);
            assert_eq!(driver.reap(), [(head, 0)]);
            assert!(!ring.arm());
        };
        assert!(!ring.arm());
        // Three laps, and so every index as the event.
        for round in 0..3 * SIZE {
            ring.disarm();
            let (_, kick) = driver.offer(&[(DATA, 16, 0)], false).unwrap();
            assert!(!kick, "{packed} {round}");
            assert!(ring.arm(), "what came meanwhile is found before a sleep");
            serve(&mut driver, &mut ring);
            let (_, kick) = driver.offer(&[(DATA, 16, 0)], false).unwrap();
            assert!(kick, "{packed} {round}");
            serve(&mut driver, &mut ring);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, ..ProptestConfig::default() })]

    #[test]
    fn both_formats_agree_with_a_model(
        packed in any::<bool>(),
        inflight in any::<bool>(),
        dirty in any::<bool>(),
        steps in prop::collection::vec(step(), 1..200),
    ) {
        let logs = Logs::new(inflight, dirty);
        let mut driver = Driver::new(packed);
        let mut ring = logs.start(&driver, 0);
        // Ids with what they hold, in the order in which they are to come out.
        let mut offered: VecDeque<(u16, u64, u64)> = VecDeque::new();
        let mut flying: Vec<(u16, u64, u64, Vec<Segment>)> = Vec::new();
        // The device sleeps; the next chain needs a kick.
        let mut asleep = false;
        let mut wants_call = false;
        let mut first_answer = true;
        for step in steps {
            match step {
                Step::Offer(readable, writable, indirect) => {
                    let lens = readable.iter().map(|len| (*len, 0))
                        .chain(writable.iter().map(|len| (*len, WRITE)));
                    let buffers: Vec<_> = (0u64..).zip(lens)
                        .map(|(i, (len, flags))| (DATA + 0x2000 * i, len, flags))
                        .collect();
                    let Some((id, kick)) = driver.offer(&buffers, indirect) else { continue };
                    prop_assert!(kick || !asleep, "a lost kick");
                    asleep &= !kick;
                    let sum = |lens: &[u32]| lens.iter().map(|n| u64::from(*n)).sum();
                    offered.push_back((id, sum(&readable), sum(&writable)));
                }
                Step::Pop => {
                    prop_assert_eq!(ring.has_more(), !offered.is_empty());
                    match (ring.pop().unwrap(), offered.pop_front()) {
                        (Some(chain), Some((id, r, w))) => {
                            prop_assert_eq!(chain.head(), id);
                            prop_assert_eq!((chain.readable_len(), chain.writable_len()), (r, w));
                            flying.push((id, r, w, chain.writable().to_vec()));
                            asleep = false;
                        }
                        (None, None) => {}
                        other => prop_assert!(false, "{:?}", other),
                    }
                }
                Step::Complete(from, count, written) => {
                    if flying.is_empty() {
                        continue;
                    }
                    let from = from % flying.len();
                    let till = (from + count).min(flying.len());
                    let batch: Vec<_> = flying.drain(from..till).rev().collect();
                    let done: Vec<_> = batch.iter()
                        .map(|(id, ..)| Completion { head: *id, written })
                        .collect();
                    logs.sync();
                    let at = if packed { DESC + 16 * u64::from(driver.used) } else { USED };
                    ring.complete(&done);
                    if let Some(bits) = logs.sync() {
                        prop_assert!(is_marked(&bits, at));
                        for segment in batch.iter().flat_map(|(.., segments)| segments) {
                            prop_assert!(is_marked(&bits, segment.addr.0));
                            prop_assert!(is_marked(&bits, segment.addr.0 + u64::from(segment.len) - 1));
                        }
                        prop_assert!(!is_marked(&bits, AVAIL));
                        prop_assert!(!is_marked(&bits, DATA + 0xf000));
                    }
                    let signal = ring.should_signal();
                    prop_assert!(signal || !(wants_call || first_answer), "a lost call");
                    (wants_call, first_answer) = (false, false);
                    let back: Vec<_> = done.iter().map(|d| (d.head, d.written)).collect();
                    prop_assert_eq!(driver.reap(), back);
                }
                Step::Arm => {
                    logs.sync();
                    let more = ring.arm();
                    prop_assert_eq!(more, !offered.is_empty());
                    asleep = !more;
                    if let Some(bits) = logs.sync() {
                        prop_assert!(is_marked(&bits, USED));
                    }
                }
                Step::WantCall => {
                    driver.want_call();
                    wants_call = true;
                }
                Step::Restart => {
                    let state = ring.save();
                    drop(ring);
                    let base = if inflight {
                        // What a frontend says that has forgotten.
                        if packed { 0x8000_8000 } else { u32::from(state.next_used) }
                    } else if flying.is_empty() {
                        if packed { state.to_packed_base() } else { u32::from(state.next_avail) }
                    } else {
                        // Without a log there is no way; a device drains first.
                        return Ok(());
                    };
                    ring = logs.start(&driver, base);
                    for (id, r, w, _) in flying.drain(..).rev() {
                        offered.push_front((id, r, w));
                    }
                    (asleep, first_answer) = (false, true);
                    prop_assert_eq!(ring.in_flight(), 0);
                }
            }
            prop_assert_eq!(ring.in_flight(), flying.len());
            prop_assert_eq!(ring.retired(), None);
        }
    }

    /// Whatever a frontend writes into the log, a ring starts or says that it cannot.
    #[test]
    fn any_log_is_bounded(
        packed in any::<bool>(),
        taken in 0..12usize,
        done in 0..12usize,
        noise in prop::collection::vec((0..600usize, any::<u8>()), 0..6),
        base in any::<u32>(),
    ) {
        let logs = Logs::new(true, false);
        let mut driver = Driver::new(packed);
        let mut ring = logs.start(&driver, 0);
        let mut ids = Vec::new();
        for _ in 0..taken {
            driver.offer(&[(DATA, 16, 0), (DATA, 16, WRITE)], true);
            ids.push(ring.pop().unwrap().unwrap().head());
        }
        for id in ids.iter().take(done) {
            ring.complete(&[Completion { head: *id, written: 16 }]);
        }
        let file = logs.inflight.as_ref().unwrap();
        for (at, byte) in noise {
            file.write_all_at(&[byte], at as u64).unwrap();
        }
        let part = || log_of(file).queue(0).unwrap();
        let bounded = if packed {
            let opened = PackedLog::open(part(), SIZE, (0, true), |_| base & 1 == 0);
            opened.map(|(_, old)| old.map_or(0, |old| old.chains.iter().map(|c| c.1.len()).sum()))
        } else {
            SplitLog::open(part(), SIZE, base as u16)
                .map(|(_, heads)| heads.map_or(0, |heads| heads.len()))
        };
        prop_assert!(bounded.unwrap_or(0) <= usize::from(SIZE));
        let mut setup = RingSetup::new(driver.config(), packed, driver.mem.clone());
        setup.inflight = Some(part());
        setup.base = base & 0x800f_800f;
        if let Ok(mut ring) = setup.start() {
            let mut popped = 0;
            while let Ok(Some(chain)) = ring.pop() {
                popped += 1;
                prop_assert!(popped <= 2 * usize::from(SIZE));
                ring.complete(&[Completion { head: chain.head(), written: 0 }]);
            }
        }
    }
}
