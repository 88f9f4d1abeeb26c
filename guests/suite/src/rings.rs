//! Rings that break the rules, made by hand in the arena and given to the real backend.
//!
//! Each is answered in the same way: nothing comes back, the queue is dead until a reset, and after
//! a reset the device serves a good driver. The memory that a descriptor was aimed at is unchanged.
#![allow(unsafe_code)]
// UNSAFETY: looks at private RAM that a descriptor was aimed at.

use crate::devices::{RawSetup, reset};
use crate::{Case, Outcome, ensure, text};
use alloc::vec;
use core::time::Duration;
use guest_sdk::flat::Boot;
use guest_sdk::platform::{DmaBuf, Platform};
use pv_abi::device::kind;
use pv_abi::virtio::desc_flag::{INDIRECT, NEXT, WRITE};
use pv_abi::virtio::feature;

pub const CASES: &[Case] = &[
    ("ring.good", |boot| hostile(boot, Expect::Served, good)),
    ("ring.private_ram", private_ram),
    ("ring.other_arena", other_arena),
    ("ring.unmapped", |boot| {
        hostile(boot, Expect::Dead, |r| r.read_into(0x5000))
    }),
    ("ring.monitor", |boot| {
        hostile(boot, Expect::Dead, |r| {
            r.read_into(pv_abi::layout::MONITOR_BASE)
        })
    }),
    ("ring.wrapping_address", |boot| {
        hostile(boot, Expect::Dead, |r| r.read_into(u64::MAX - 255))
    }),
    ("ring.past_the_arena", |boot| {
        hostile(boot, Expect::Dead, |r| r.read_into(r.arena_end - 256))
    }),
    ("ring.loop_of_one", |boot| {
        hostile(boot, Expect::Dead, |r| r.chain(&[(0, NEXT, 0)]))
    }),
    ("ring.loop_of_two", |boot| {
        hostile(boot, Expect::Dead, |r| {
            r.chain(&[(0, NEXT, 1), (0, NEXT, 0)])
        })
    }),
    ("ring.next_out_of_range", |boot| {
        hostile(boot, Expect::Dead, |r| r.chain(&[(0, NEXT, 5000)]))
    }),
    ("ring.head_out_of_range", |boot| {
        hostile(boot, Expect::Dead, |r| r.offer(SIZE))
    }),
    ("ring.over_long", over_long),
    ("ring.indirect_in_indirect", |boot| {
        hostile(boot, Expect::Dead, |r| r.indirect(&[(INDIRECT, 0)], 16))
    }),
    ("ring.indirect_loop", |boot| {
        hostile(boot, Expect::Dead, |r| r.indirect(&[(NEXT, 0)], 16))
    }),
    ("ring.indirect_odd_length", |boot| {
        hostile(boot, Expect::Dead, |r| r.indirect(&[(0, 0)], 17))
    }),
    ("ring.indirect_empty", |boot| {
        hostile(boot, Expect::Dead, |r| r.indirect(&[], 0))
    }),
    ("ring.indirect_huge", |boot| {
        hostile(boot, Expect::Dead, |r| r.indirect(&[(0, 0)], 16 * 65_535))
    }),
    ("ring.index_jump", |boot| {
        hostile(boot, Expect::Dead, |r| {
            good(r);
            r.publish(SIZE + 1);
        })
    }),
    ("ring.same_head_twice", |boot| {
        hostile(boot, Expect::Any, |r| {
            good(r);
            r.offer(0);
        })
    }),
    ("ring.readable_after_writable", |boot| {
        hostile(boot, Expect::Any, |r| {
            r.chain(&[(0, WRITE | NEXT, 1), (0, 0, 0)])
        })
    }),
    ("ring.no_status_byte", |boot| {
        hostile(boot, Expect::Any, |r| r.chain(&[(0, 0, 0)]))
    }),
    ("ring.short_header", |boot| {
        hostile(boot, Expect::Any, short_header)
    }),
];

/// Entries of the rings made here.
const SIZE: u16 = 64;

enum Expect {
    /// The chain comes back.
    Served,
    /// Nothing comes back.
    Dead,
    /// Either; the device must survive it.
    Any,
}

struct RawRing {
    ring: DmaBuf,
    data: DmaBuf,
    setup: RawSetup,
    offered: u16,
    arena_end: u64,
}

impl RawRing {
    fn desc(&mut self, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let at = usize::from(index) * 16;
        self.ring.write(at, &addr.to_le_bytes());
        self.ring.write(at + 8, &len.to_le_bytes());
        self.ring.write(at + 12, &flags.to_le_bytes());
        self.ring.write(at + 14, &next.to_le_bytes());
    }

    fn avail(&self) -> usize {
        (self.setup.avail - self.ring.gpa()) as usize
    }

    fn publish(&mut self, index: u16) {
        let at = self.avail() + 2;
        core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
        self.ring.write(at, &index.to_le_bytes());
        core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
    }

    /// Makes a head available.
    fn offer(&mut self, head: u16) {
        let at = self.avail() + 4 + usize::from(self.offered % SIZE) * 2;
        self.ring.write(at, &head.to_le_bytes());
        self.offered += 1;
        self.publish(self.offered);
    }

    /// Descriptors of 16 bytes in good memory, with these (unused, flags, next).
    fn chain(&mut self, links: &[(u64, u16, u16)]) {
        let gpa = self.data.gpa();
        for (index, (_, flags, next)) in (0u16..).zip(links) {
            self.desc(index, gpa, 16, *flags, *next);
        }
        self.offer(0);
    }

    /// One descriptor that points at a table with these (flags, next), said to be `len` long.
    fn indirect(&mut self, links: &[(u16, u16)], len: u32) {
        let gpa = self.data.gpa();
        for (index, (flags, next)) in links.iter().enumerate() {
            let at = 1024 + index * 16;
            self.data.write(at, &gpa.to_le_bytes());
            self.data.write(at + 8, &16u32.to_le_bytes());
            self.data.write(at + 12, &flags.to_le_bytes());
            self.data.write(at + 14, &next.to_le_bytes());
        }
        self.desc(0, gpa + 1024, len, INDIRECT, 0);
        self.offer(0);
    }

    /// A read request whose 512 bytes of data go to this address.
    fn read_into(&mut self, address: u64) {
        let gpa = self.data.gpa();
        self.desc(0, gpa, 16, NEXT, 1);
        self.desc(1, address, 512, NEXT | WRITE, 2);
        self.desc(2, gpa + 4000, 1, WRITE, 0);
        self.offer(0);
    }

    fn used_index(&self) -> u16 {
        let at = (self.setup.used - self.ring.gpa()) as usize + 2;
        let mut index = [0; 2];
        self.ring.read(at, &mut index);
        u16::from_le_bytes(index)
    }
}

fn good(ring: &mut RawRing) {
    let gpa = ring.data.gpa();
    ring.read_into(gpa + 512);
}

fn short_header(ring: &mut RawRing) {
    let gpa = ring.data.gpa();
    ring.desc(0, gpa, 8, NEXT, 1);
    ring.desc(1, gpa + 4000, 1, WRITE, 0);
    ring.offer(0);
}

fn over_long(boot: &Boot) -> Outcome {
    hostile(boot, Expect::Any, |ring| {
        let gpa = ring.data.gpa();
        for index in 0..SIZE {
            let last = index + 1 == SIZE;
            ring.desc(index, gpa, 16, if last { 0 } else { NEXT }, index + 1);
        }
        ring.offer(0);
    })
}

fn private_ram(boot: &Boot) -> Outcome {
    let canary = vec![0xa5u8; 1024];
    let address = canary.as_ptr() as u64;
    hostile(boot, Expect::Dead, |ring| ring.read_into(address))?;
    // SAFETY: the vector is alive; volatile, because a device may have written it.
    let same = (0..1024).all(|i| unsafe { canary.as_ptr().add(i).read_volatile() } == 0xa5);
    ensure!(same, "private RAM was written");
    Ok(())
}

fn other_arena(boot: &Boot) -> Outcome {
    let table = boot.platform().device_table();
    let other = table
        .find(kind::BLOCK, Some("other"))
        .ok_or("no other disk")?;
    let arena = boot.platform().arena(other.arena).ok_or("no arena")?;
    let mut canary = arena.alloc(512).map_err(text("alloc"))?;
    canary.write(0, &[0x5a; 512]);
    let address = canary.gpa();
    hostile(boot, Expect::Dead, |ring| ring.read_into(address))?;
    let mut back = [0; 512];
    canary.read(0, &mut back);
    ensure!(back == [0x5a; 512], "another device's arena was written");
    Ok(())
}

fn hostile(boot: &Boot, expect: Expect, spoil: impl FnOnce(&mut RawRing)) -> Outcome {
    let disk = boot
        .platform()
        .device_table()
        .find(kind::BLOCK, Some("disk"))
        .ok_or("no disk")?;
    let arena = boot.platform().arena(disk.arena).ok_or("no arena")?;
    let ring = arena.alloc_aligned(8192, 4096).map_err(text("alloc"))?;
    ring.zero();
    let data = arena.alloc_aligned(8192, 4096).map_err(text("alloc"))?;
    data.zero();
    let mut setup = RawSetup::at(ring.gpa(), SIZE);
    setup.features |= feature::INDIRECT_DESC & disk.features;
    let arena_end = arena.gpa() + arena.len();
    let mut ring = RawRing {
        ring,
        data,
        setup,
        offered: 0,
        arena_end,
    };
    let device = u64::from(disk.index);
    setup.activate(boot, device).map_err(text("activate"))?;
    spoil(&mut ring);
    boot.platform().notify(disk.queue_event(0));
    let start = boot.platform().now_ns();
    let served = loop {
        let index = ring.used_index();
        if index != 0 {
            break index;
        }
        if boot.platform().now_ns() - start > 150_000_000 {
            break 0;
        }
        boot.platform().idle(Some(Duration::from_millis(5)));
        boot.platform().take_events(0, u64::MAX);
    };
    match expect {
        Expect::Served => ensure!(served == 1, "a good request was not served"),
        Expect::Dead => ensure!(served == 0, "{served} chains came back"),
        Expect::Any => {}
    }
    reset(boot, device).map_err(text("reset"))?;
    let mut queue = guest_sdk::block::open(boot.platform(), Some("disk")).map_err(text("open"))?;
    queue
        .write_blocking(0, &[0x77; 4096])
        .map_err(text("write after the reset"))?;
    let mut back = vec![0; 4096];
    queue
        .read_blocking(0, &mut back)
        .map_err(text("read after the reset"))?;
    ensure!(
        back.iter().all(|b| *b == 0x77),
        "wrong data after the reset"
    );
    Ok(())
}
