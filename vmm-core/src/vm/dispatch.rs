//! Calls: a frame comes in, is copied once, and is answered.

use super::LogLevel;
use super::events::signal;
use super::shared::Shared;
use super::turns::Place;
use crate::accel::{Reporter, StartState};
use crate::device::{Setup, Slot};
use crate::fault::{ExitReason, Violation};
use crate::image::Access;
use crate::memory::Region;
use crate::memory::map::Source;
use pv_abi::call::{FRAMES, Frame, number};
use pv_abi::feature;
use pv_abi::gate::WAKE_DOORBELL;
use pv_abi::layout::{VMM_BASE, vcpu_page};
use pv_abi::limits::{MAX_MULTICALL, SCRATCH_LEN};
use pv_abi::status::Status;
use pv_abi::vcpu::VcpuPage;
use std::cell::Cell;
use std::mem::offset_of;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

/// Log lines that a guest may emit in each [`LOG_WINDOW`]; the rest is counted and dropped.
const LOG_LINES: u32 = 1000;
const LOG_WINDOW: Duration = Duration::from_secs(1);

/// Status and value.
type Answer = Result<u64, (Status, u64)>;

/// The numbers that are always there, for the counters.
pub(super) const CORE_NUMBERS: [u32; 10] = [
    number::NOP,
    number::NEGOTIATE,
    number::LOG,
    number::PANIC,
    number::CLOCK,
    number::MULTICALL,
    number::DEVICE_ACTIVATE,
    number::DEVICE_RESET,
    number::DEVICE_CONFIG_WRITE,
    number::VCPU_START,
];

impl Shared {
    /// A doorbell that came as an exit.
    ///
    /// One of a queue comes here only while the queue is not active, when it means nothing. Its
    /// eventfd is left alone: a backend has it too, and could have made a write to it block.
    pub(super) fn doorbell(&self, doorbell: u32) {
        let vcpu = doorbell.checked_sub(WAKE_DOORBELL);
        match vcpu.and_then(|vcpu| self.events.wake(vcpu)) {
            Some(event) => {
                let _ = signal(event);
            }
            None if self.events.doorbell(doorbell).is_some() => {}
            None => self.counters.bad_doorbells.add(1),
        }
    }

    /// The `call` slot.
    pub(super) fn call(&self, vcpu: u32, frame: u32) {
        if usize::try_from(frame).is_ok_and(|f| f < FRAMES) {
            let at = vcpu_page(vcpu) - VMM_BASE
                + offset_of!(VcpuPage, frames) as u64
                + u64::from(frame) * size_of::<Frame>() as u64;
            if let Err(error) = self.serve(vcpu, &self.memory.vmm, at, false) {
                self.host_error(error);
            }
        } else {
            // Counted already: the exit was a call.
            let violation = Violation::BadFrameIndex { index: frame };
            self.finish(ExitReason::Violation(violation));
        }
    }

    /// Serves one frame: one copy in, value and then status out.
    fn serve(&self, vcpu: u32, region: &Region, at: u64, nested: bool) -> std::io::Result<()> {
        // The last 64 bytes of a frame are the answer and padding; they are not looked at.
        let words: [u64; 8] = region.read(at)?;
        let [head, a0, a1, a2, a3, a4, a5, tail] = words;
        let [n0, n1, n2, n3, f0, f1, f2, f3] = head.to_le_bytes();
        let called = u32::from_le_bytes([n0, n1, n2, n3]);
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
        let reserved = tail >> 32;
        let answer = if flags != 0 || reserved != 0 {
            Err((Status::BadFrame, 0))
        } else {
            if let Some(counter) = self.counters.calls.get(&called) {
                counter.add(1);
            }
            self.carry_out(vcpu, called, [a0, a1, a2, a3, a4, a5], nested)
        };
        let (status, value) = match answer {
            Ok(value) => (Status::Ok, value),
            Err(refused) => {
                self.counters.refused_calls.add(1);
                refused
            }
        };
        region.write(at + offset_of!(Frame, value) as u64, &value)?;
        // Ordering: Release, so that who polls the status sees the value.
        region
            .word32(at + offset_of!(Frame, status) as u64)?
            .store(status.code(), Ordering::Release);
        Ok(())
    }

    fn carry_out(&self, vcpu: u32, called: u32, args: [u64; 6], nested: bool) -> Answer {
        let plain = |result: Result<u64, Status>| result.map_err(|status| (status, 0));
        let accepted = |bit| self.features.load(Ordering::Relaxed) & bit != 0;
        match called {
            number::NOP => plain(unused(args, 0).map(|()| 0)),
            number::NEGOTIATE => plain(self.negotiate(args)),
            number::LOG => plain(self.log_line(vcpu, args)),
            number::PANIC => plain(self.panic(vcpu, args)),
            number::CLOCK => plain(unused(args, 0).map(|()| self.clock.now_ns())),
            number::MULTICALL if accepted(feature::MULTICALL) && !nested => {
                plain(self.multicall(vcpu, args))
            }
            number::MULTICALL if nested => plain(Err(Status::BadState)),
            number::DEVICE_ACTIVATE => plain(self.activate(args)),
            number::DEVICE_RESET => plain(self.reset(args)),
            number::DEVICE_CONFIG_WRITE => plain(self.config_write(args)),
            number::VCPU_START if accepted(feature::SMP) => plain(self.vcpu_start(args)),
            called => match called.checked_sub(number::EMBEDDER) {
                Some(index) if accepted(feature::EMBEDDER_CALLS) => {
                    self.embedder_call(vcpu, index, args)
                }
                _ => plain(Err(Status::UnknownCall)),
            },
        }
    }

    fn embedder_call(&self, vcpu: u32, index: u32, args: [u64; 6]) -> Answer {
        let deferred = Cell::new(false);
        let slot = usize::try_from(vcpu).unwrap_or(usize::MAX);
        let defer = || {
            deferred.set(true);
            self.turns.defer(slot);
        };
        let wanted = || self.is_running();
        let answer = self
            .registry
            .call((vcpu, index), args, &self.memory, &defer, &wanted);
        if deferred.get() {
            // Guest memory is not written while the VM is paused.
            self.turns.turn(slot, Place::Serving);
        }
        answer.map_err(|refusal| (refusal.status, refusal.code))
    }

    fn negotiate(&self, args: [u64; 6]) -> Result<u64, Status> {
        unused(args, 2)?;
        let [features, abi, ..] = args;
        if features & !feature::ALL != 0 {
            return Err(Status::NotSupported);
        }
        let ours = u64::from(pv_abi::ABI_MAJOR) << 16;
        if abi & !0xffff != ours {
            return Err(Status::BadArgument);
        }
        if self.negotiated.swap(true, Ordering::AcqRel) {
            return Err(Status::BadState);
        }
        self.features.store(features, Ordering::Release);
        let _ = self.negotiated_after.set(self.began.elapsed());
        Ok(features)
    }

    /// Copies text out of a vCPU's scratch area.
    fn scratch_text(&self, vcpu: u32, len: u64) -> Result<String, Status> {
        let len = usize::try_from(len).ok().filter(|l| *l <= SCRATCH_LEN);
        let mut bytes = vec![0; len.ok_or(Status::BadLength)?];
        let at = vcpu_page(vcpu) - VMM_BASE + offset_of!(VcpuPage, scratch) as u64;
        self.memory
            .vmm
            .read_bytes(at, &mut bytes)
            .map_err(|_| Status::HostError)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn log_line(&self, vcpu: u32, args: [u64; 6]) -> Result<u64, Status> {
        unused(args, 2)?;
        let [level, len, ..] = args;
        let level = LogLevel::from_code(level).ok_or(Status::BadArgument)?;
        let text = self.scratch_text(vcpu, len)?;
        {
            let mut budget = self
                .log_budget
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            if budget.0.elapsed() >= LOG_WINDOW {
                *budget = (Instant::now(), 0);
            }
            if budget.1 >= LOG_LINES {
                self.counters.log_dropped.add(1);
                return Ok(0);
            }
            budget.1 += 1;
        }
        (self.log)(level, &text);
        Ok(0)
    }

    fn panic(&self, vcpu: u32, args: [u64; 6]) -> Result<u64, Status> {
        unused(args, 1)?;
        let [len, ..] = args;
        let message = self.scratch_text(vcpu, len)?;
        self.finish(ExitReason::Panicked(message));
        Ok(0)
    }

    fn multicall(&self, vcpu: u32, args: [u64; 6]) -> Result<u64, Status> {
        unused(args, 2)?;
        let [gpa, count, ..] = args;
        if count == 0 || count > MAX_MULTICALL {
            return Err(Status::Limit);
        }
        let size = size_of::<Frame>() as u64;
        if !gpa.is_multiple_of(align_of::<Frame>() as u64) {
            return Err(Status::BadAddress);
        }
        let found = self.memory.shared(gpa, count * size, None);
        let (region, offset) = found.ok_or(Status::BadAddress)?;
        for index in 0..count {
            if !self.is_running() {
                return Ok(index);
            }
            let served = self.serve(vcpu, region, offset + index * size, true);
            served.map_err(|_| Status::HostError)?;
        }
        Ok(count)
    }

    fn device(&self, index: u64) -> Result<&Arc<Slot>, Status> {
        let index = usize::try_from(index).map_err(|_| Status::NotFound)?;
        self.devices.get(index).ok_or(Status::NotFound)
    }

    fn activate(&self, args: [u64; 6]) -> Result<u64, Status> {
        unused(args, 3)?;
        let [index, gpa, len, ..] = args;
        let slot = self.device(index)?;
        let arena = &slot.io.arena;
        let setup = Setup::parse(&self.memory, &slot.info, arena, self.vcpus, (gpa, len))?;
        let accel = self.accel.get().ok_or(Status::HostError)?;
        for (doorbell, _) in (slot.info.event_base..).zip(&setup.queues) {
            accel
                .watch_doorbell(doorbell)
                .map_err(|_| Status::HostError)?;
        }
        let wait_for = |vcpu, event, on| accel.wait_for(vcpu, event, on);
        slot.activate(setup, &wait_for).map(u64::from)
    }

    fn reset(&self, args: [u64; 6]) -> Result<u64, Status> {
        unused(args, 1)?;
        let [index, ..] = args;
        self.device(index)?
            .reset()
            .map(|state| u64::from(state.code()))
    }

    fn config_write(&self, args: [u64; 6]) -> Result<u64, Status> {
        unused(args, 4)?;
        let [index, offset, width, value, ..] = args;
        self.device(index)?
            .config_write(offset, width, value)
            .map(|()| 0)
    }

    fn vcpu_start(&self, args: [u64; 6]) -> Result<u64, Status> {
        unused(args, 3)?;
        let [index, entry, argument, ..] = args;
        if index == 0 || index >= u64::from(self.vcpus) {
            return Err(Status::NotFound);
        }
        let executable = self.map.mappings.iter().any(|m| {
            m.source == Source::RamLow
                && m.access == Access::ReadExecute
                && entry
                    .checked_sub(m.gpa)
                    .is_some_and(|offset| offset < m.len)
        });
        if !executable {
            return Err(Status::BadAddress);
        }
        let index = usize::try_from(index).map_err(|_| Status::NotFound)?;
        let top = self
            .map
            .stack_tops
            .get(index)
            .copied()
            .ok_or(Status::NotFound)?;
        let state = StartState {
            rip: entry,
            rsp: top - 8,
            rdi: argument,
            rsi: index as u64,
        };
        let accel = self.accel.get().ok_or(Status::HostError)?;
        for woken in [0, index] {
            let doorbell = u32::try_from(woken).map_err(|_| Status::NotFound)? + WAKE_DOORBELL;
            accel
                .watch_doorbell(doorbell)
                .map_err(|_| Status::HostError)?;
        }
        if self.turns.start(index, state) {
            Ok(0)
        } else {
            Err(Status::BadState)
        }
    }
}

/// Unused arguments are zero.
fn unused(args: [u64; 6], used: usize) -> Result<(), Status> {
    let rest = args.get(used..).unwrap_or_default();
    if rest.iter().all(|a| *a == 0) {
        Ok(())
    } else {
        Err(Status::BadArgument)
    }
}
