//! A block frontend whose memory, rings and in-flight log outlive its backend. Split and packed,
//! direct and indirect chains; completions are checked as they come.
#![allow(dead_code)]

use super::raw::{NEED_REPLY, Shared, VERSION, message, pair, words};
use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

pub(crate) const TIMEOUT: Duration = Duration::from_secs(20);
pub(crate) const PACKED: u64 = 1 << 34;
pub(crate) const LOG_ALL: u64 = 1 << 26;
pub(crate) const FEATURES: u64 = 1 << 32 | 1 << 30 | 1 << 29 | 1 << 28 | 1 << 14 | 1 << 9;
pub(crate) const GUEST: u64 = 0x4000_0000;
pub(crate) const USER: u64 = 0x7f00_0000_0000;
pub(crate) const MEMORY: u64 = 0x10_0000;
pub(crate) const DESC: u64 = 0;
pub(crate) const AVAIL: u64 = 0x4000;
pub(crate) const USED: u64 = 0x8000;
const HEADERS: u64 = 0x1_0000;
pub(crate) const STATUS: u64 = 0x1_1000;
const TABLES: u64 = 0x1_2000;
pub(crate) const DATA: u64 = 0x2_0000;
/// Bytes of data in a request.
pub(crate) const BLOCK: u64 = 4096;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const FLUSH: u32 = 4;
const IO_ERROR: u8 = 1;
/// In a range of sectors to write zeroes to.
const UNMAP: u32 = 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    Read,
    Write,
    Flush,
    /// Write zeroes, and unmap if that does it.
    Zeroes,
}

impl Op {
    /// The type in a request's header.
    fn number(self) -> u32 {
        match self {
            Op::Read => 0,
            Op::Write => 1,
            Op::Flush => FLUSH,
            Op::Zeroes => 13,
        }
    }
}

/// What a frontend keeps of an in-flight log.
#[derive(Debug)]
pub(crate) struct KeptLog {
    pub(crate) file: File,
    pub(crate) size: u64,
    pub(crate) offset: u64,
}

pub(crate) struct Front {
    pub(crate) memory: Shared,
    pub(crate) size: u16,
    pub(crate) packed: bool,
    pub(crate) indirect: bool,
    pub(crate) features: u64,
    pub(crate) log: Option<KeptLog>,
    pub(crate) stream: Option<UnixStream>,
    pub(crate) kick: EventFd,
    pub(crate) call: EventFd,
    /// Split: the available index. Packed: the next descriptor.
    avail: u16,
    avail_wrap: bool,
    used: u16,
    used_wrap: bool,
    pub(crate) outstanding: Vec<bool>,
    /// Requests may end with an error; how many did.
    pub(crate) may_fail: bool,
    pub(crate) failures: usize,
    /// What `GET_VRING_BASE` said last.
    pub(crate) base: u32,
    /// `VRING_F_LOG` and the address that goes with it.
    pub(crate) ring_log: Option<u64>,
}

impl Front {
    pub(crate) fn new(size: u16, packed: bool, indirect: bool) -> Front {
        Front {
            memory: Shared::new(MEMORY),
            size,
            packed,
            indirect,
            features: FEATURES | if packed { PACKED } else { 0 },
            log: None,
            stream: None,
            kick: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
            call: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
            avail: 0,
            avail_wrap: true,
            used: 0,
            used_wrap: true,
            outstanding: vec![false; usize::from(size)],
            may_fail: false,
            failures: 0,
            base: if packed { 0x8000_8000 } else { 0 },
            ring_log: None,
        }
    }

    // ---- messages

    pub(crate) fn connect(&mut self, socket: &Path) {
        let deadline = Instant::now() + TIMEOUT;
        let stream = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(_) => assert!(Instant::now() < deadline, "nobody listens"),
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        self.take(stream);
    }

    pub(crate) fn take(&mut self, stream: UnixStream) {
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        stream.set_write_timeout(Some(TIMEOUT)).unwrap();
        self.stream = Some(stream);
    }

    pub(crate) fn send(&self, request: u32, flags: u32, payload: &[u8], fds: &[i32]) -> bool {
        let bytes = message(request, flags, payload);
        let stream = self.stream.as_ref().unwrap();
        stream.send_with_fds(&[&bytes[..]], fds).is_ok()
    }

    /// A reply and what came with it. `None`: the backend is gone.
    pub(crate) fn receive(&self, request: u32) -> Option<(Vec<u8>, Option<File>)> {
        let stream = self.stream.as_ref().unwrap();
        let mut head = [0; 12];
        let (n, file) = loop {
            match stream.recv_with_fd(&mut head) {
                Err(error) if error.errno() == libc::EINTR => {}
                received => break received.ok()?,
            }
        };
        if n != 12 {
            return None;
        }
        assert_eq!(head[..4], request.to_ne_bytes());
        let len = u32::from_ne_bytes(head[8..].try_into().unwrap());
        let mut payload = vec![0; len as usize];
        let mut stream = stream;
        stream.read_exact(&mut payload).ok()?;
        Some((payload, file))
    }

    pub(crate) fn query(&self, request: u32, payload: &[u8]) -> Option<Vec<u8>> {
        self.send(request, VERSION, payload, &[]);
        Some(self.receive(request)?.0)
    }

    /// Whether it was carried out; `None`: the backend is gone.
    pub(crate) fn set(&self, request: u32, payload: &[u8], fds: &[i32]) -> Option<bool> {
        self.send(request, VERSION | NEED_REPLY, payload, fds);
        let payload = self.receive(request)?.0;
        Some(u64::from_ne_bytes(payload.try_into().unwrap()) == 0)
    }

    pub(crate) fn set_features(&self) -> Option<()> {
        self.set(2, &words(&[self.features]), &[])?.then_some(())
    }

    /// Features, protocol features, and the in-flight log, made if there is none.
    pub(crate) fn negotiate(&mut self, with_log: bool) -> Option<()> {
        let offered = u64::from_ne_bytes(self.query(1, &[])?.try_into().unwrap());
        self.features &= offered;
        let protocol = self.query(15, &[])?;
        self.send(16, VERSION, &protocol, &[]);
        self.set_features()?;
        if !with_log {
            return Some(());
        }
        let shape = |size: u64, offset: u64| {
            let mut bytes = words(&[size, offset]);
            bytes.extend(1u16.to_ne_bytes());
            bytes.extend(self.size.to_ne_bytes());
            bytes.extend([0; 4]);
            bytes
        };
        if self.log.is_none() {
            self.send(31, VERSION, &shape(0, 0), &[]);
            let (reply, file) = self.receive(31)?;
            let word = |i: usize| u64::from_ne_bytes(reply[i * 8..][..8].try_into().unwrap());
            self.log = Some(KeptLog {
                file: file.expect("a log"),
                size: word(0),
                offset: word(1),
            });
        }
        let log = self.log.as_ref().unwrap();
        let done = self.set(32, &shape(log.size, log.offset), &[log.file.as_raw_fd()])?;
        done.then_some(())
    }

    pub(crate) fn set_addr(&self) -> Option<bool> {
        let mut addr = pair(0, u32::from(self.ring_log.is_some()));
        addr.extend(words(&[
            USER + DESC,
            USER + USED,
            USER + AVAIL,
            self.ring_log.unwrap_or(0),
        ]));
        self.set(9, &addr, &[])
    }

    pub(crate) fn set_memory(&self) -> Option<()> {
        let mut table = pair(1, 0);
        table.extend(words(&[GUEST, MEMORY, USER, 0]));
        assert!(self.set(5, &table, &[self.memory.file.as_raw_fd()])?);
        Some(())
    }

    /// Memory and the ring, from `base` on.
    pub(crate) fn start(&self, base: u32) -> Option<()> {
        self.set_memory()?;
        assert!(self.set(8, &pair(0, self.size.into()), &[])?);
        assert!(self.set(10, &pair(0, base), &[])?);
        assert!(self.set_addr()?);
        assert!(self.set(13, &words(&[0]), &[self.call.as_raw_fd()])?);
        assert!(self.set(12, &words(&[0]), &[self.kick.as_raw_fd()])?);
        assert!(self.set(18, &pair(0, 1), &[])?);
        Some(())
    }

    /// Stops the ring: drained, and where it stands. `None`: the backend is gone.
    pub(crate) fn stop(&mut self) -> Option<u32> {
        let reply = self.query(11, &pair(0, 0))?;
        self.base = u32::from_ne_bytes(reply[4..].try_into().unwrap());
        Some(self.base)
    }

    // ---- the driver

    /// Puts a request into the ring; `token` is below the ring's size, or a third of it where
    /// chains are direct.
    pub(crate) fn submit(&mut self, token: u16, op: Op, sector: u64) {
        self.submit_sectors(token, op, sector, (BLOCK / 512) as u32);
    }

    /// The same for that many sectors, at most those of a block; flushes have none.
    pub(crate) fn submit_sectors(&mut self, token: u16, op: Op, sector: u64, sectors: u32) {
        assert!(!std::mem::replace(
            &mut self.outstanding[usize::from(token)],
            true
        ));
        let t = u64::from(token);
        self.memory.put(HEADERS + 16 * t, op.number());
        self.memory.put(HEADERS + 16 * t + 8, sector);
        self.memory.put(STATUS + t, 0xffu8);
        let at = DATA + BLOCK * t;
        let data = match op {
            Op::Read => vec![(at, 512 * sectors, WRITE)],
            Op::Write => vec![(at, 512 * sectors, 0)],
            Op::Flush => vec![],
            Op::Zeroes => {
                self.memory.put(at, sector);
                self.memory.put(at + 8, sectors);
                self.memory.put(at + 12, UNMAP);
                vec![(at, 16, 0)]
            }
        };
        let chain: Vec<(u64, u32, u16)> = [(HEADERS + 16 * t, 16, 0)]
            .into_iter()
            .chain(data)
            .chain([(STATUS + t, 1, WRITE)])
            .collect();
        if self.packed {
            self.submit_packed(token, &chain);
        } else {
            self.submit_split(token, &chain);
        }
    }

    fn desc(&self, at: u64, (addr, len): (u64, u32), low: u16, high: u16) {
        self.memory.put(at, GUEST + addr);
        self.memory.put(at + 8, len);
        self.memory.put(at + 12, low);
        self.memory.put(at + 14, high);
    }

    fn submit_split(&mut self, token: u16, chain: &[(u64, u32, u16)]) {
        let (table, first) = if self.indirect {
            (TABLES + 64 * u64::from(token), 0)
        } else {
            (DESC, 3 * token)
        };
        for (i, (addr, len, flags)) in (0u16..).zip(chain) {
            let more = if usize::from(i) + 1 < chain.len() {
                NEXT
            } else {
                0
            };
            let at = table + 16 * u64::from(first + i);
            self.desc(at, (*addr, *len), flags | more, first + i + 1);
        }
        let head = if self.indirect {
            let at = DESC + 16 * u64::from(token);
            self.desc(at, (table, 16 * chain.len() as u32), INDIRECT, 0);
            token
        } else {
            first
        };
        self.memory
            .put(AVAIL + 4 + 2 * u64::from(self.avail % self.size), head);
        self.avail = self.avail.wrapping_add(1);
        self.memory.put(AVAIL + 2, self.avail);
    }

    fn submit_packed(&mut self, token: u16, chain: &[(u64, u32, u16)]) {
        let table = TABLES + 64 * u64::from(token);
        let indirect = [(table, 16 * chain.len() as u32, INDIRECT)];
        let in_ring = if self.indirect {
            for (i, (addr, len, flags)) in (0u64..).zip(chain) {
                self.desc(table + 16 * i, (*addr, *len), 0, *flags);
            }
            &indirect[..]
        } else {
            chain
        };
        let mut first = None;
        for (i, (addr, len, flags)) in in_ring.iter().enumerate() {
            let at = DESC + 16 * u64::from(self.avail);
            let more = if i + 1 < in_ring.len() { NEXT } else { 0 };
            let wrap = if self.avail_wrap { 1 << 7 } else { 1 << 15 };
            let flags = flags | more | wrap;
            self.memory.put(at, GUEST + addr);
            self.memory.put(at + 8, *len);
            self.memory.put(at + 12, token);
            if first.is_none() {
                first = Some((at, flags));
            } else {
                self.memory.put(at + 14, flags);
            }
            self.avail += 1;
            if self.avail == self.size {
                (self.avail, self.avail_wrap) = (0, !self.avail_wrap);
            }
        }
        let (at, flags) = first.unwrap();
        self.memory.put(at + 14, flags);
    }

    /// Offers what no driver would: a head past the table, or a buffer past the memory.
    pub(crate) fn break_ring(&mut self) {
        if self.packed {
            self.submit_packed(0, &[(MEMORY, 16, 0)]);
        } else {
            self.memory
                .put(AVAIL + 4 + 2 * u64::from(self.avail % self.size), u16::MAX);
            self.avail = self.avail.wrapping_add(1);
            self.memory.put(AVAIL + 2, self.avail);
        }
    }

    pub(crate) fn notify(&self) {
        fence(Ordering::SeqCst);
        self.kick.write(1).unwrap();
    }

    /// Whether the device asked to be told about what was submitted last.
    pub(crate) fn wants_kick(&self, before: u16) -> bool {
        fence(Ordering::SeqCst);
        assert!(!self.packed, "only split rings are asked here");
        let event = self.memory.get::<u16>(USED + 4 + 8 * u64::from(self.size));
        self.avail.wrapping_sub(event).wrapping_sub(1) < self.avail.wrapping_sub(before)
    }

    pub(crate) fn avail_index(&self) -> u16 {
        self.avail
    }

    /// Asks to be called at the next completion.
    pub(crate) fn want_call(&self) {
        if self.packed {
            self.memory.put(AVAIL + 2, 0u16);
        } else {
            self.memory
                .put(AVAIL + 4 + 2 * u64::from(self.size), self.used);
        }
    }

    /// The used index as the device published it (split).
    pub(crate) fn published(&self) -> u16 {
        self.memory.get(USED + 2)
    }

    /// Waits until so many were given back.
    pub(crate) fn settle(&mut self, count: usize) {
        let deadline = Instant::now() + TIMEOUT;
        let mut done = 0;
        while done < count {
            done += self.reap().len();
            assert!(Instant::now() < deadline, "no completion");
            std::thread::yield_now();
        }
    }

    /// The tokens that were given back since the last look. Each was outstanding, its status is
    /// there, and the used index went forward only.
    pub(crate) fn reap(&mut self) -> Vec<u16> {
        let mut done = Vec::new();
        loop {
            let token = if self.packed {
                let at = DESC + 16 * u64::from(self.used);
                let flags = self.memory.get::<u16>(at + 14);
                let (avail, used) = (flags & 1 << 7 != 0, flags & 1 << 15 != 0);
                if avail != self.used_wrap || used != self.used_wrap {
                    break;
                }
                let token = self.memory.get::<u16>(at + 12);
                // All have three descriptors, but flushes two.
                let flush = self.memory.get::<u32>(HEADERS + 16 * u64::from(token)) == FLUSH;
                let count = match (self.indirect, flush) {
                    (true, _) => 1,
                    (false, true) => 2,
                    (false, false) => 3,
                };
                self.used += count;
                if self.used >= self.size {
                    self.used -= self.size;
                    self.used_wrap = !self.used_wrap;
                }
                token
            } else {
                let moved = self.published().wrapping_sub(self.used);
                assert!(moved <= self.size, "the used index went back");
                if moved == 0 {
                    break;
                }
                let at = USED + 4 + 8 * u64::from(self.used % self.size);
                let head = self.memory.get::<u32>(at) as u16;
                self.used = self.used.wrapping_add(1);
                if self.indirect { head } else { head / 3 }
            };
            let slot = &mut self.outstanding[usize::from(token)];
            assert!(
                std::mem::replace(slot, false),
                "{token} was given back twice"
            );
            let status = self.memory.get::<u8>(STATUS + u64::from(token));
            let kind = self.memory.get::<u32>(HEADERS + 16 * u64::from(token));
            self.failures += usize::from(status != 0);
            let fine = status == 0 || self.may_fail && status == IO_ERROR;
            assert!(fine, "status {status} of {token}, of type {kind}");
            done.push(token);
        }
        done
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.outstanding.iter().filter(|o| **o).count()
    }

    /// Where a frontend that does not remember makes a new backend go on: QEMU takes the used
    /// index of a split ring, and what it said at first for a packed one.
    pub(crate) fn forgetful_base(&self) -> u32 {
        if self.packed {
            self.base
        } else {
            self.published().into()
        }
    }
}
