//! Keeping a vCPU's thread on the CPU of the guest thread that it serves.
//!
//! The two never run at the same time. On one CPU a call is two switches; on two it is two wake-ups
//! of an idle CPU, which cost several times as much, and the scheduler, which wakes a thread where
//! it ran last, leaves them apart for good. So a vCPU thread that sees its guest call from elsewhere
//! time after time moves there once. Its affinity stays what the embedder made it.
#![allow(unsafe_code)]
// UNSAFETY: sched_getcpu, sched_setaffinity and sched_setattr have no wrapper.

/// Calls in a row from another CPU before the first move: far more than chance.
const PATIENCE: u32 = 8;
/// Most patience, which doubles with every move: a scheduler that knows better is left alone.
const MOST_PATIENCE: u32 = 1 << 16;
/// Calls in a row from the same CPU that pay for a move, and give the first patience back.
const SETTLED: u32 = 16;
/// The bits of the kernel's hint that are the CPU; the others are its node.
const CPU_BITS: u32 = 0xfff;

/// The least slice that the kernel grants.
const SLICE_NS: u64 = 100_000;

/// What is known of where the two are.
#[derive(Debug)]
pub(super) struct Placement {
    apart: u32,
    together: u32,
    patience: u32,
}

impl Default for Placement {
    fn default() -> Placement {
        Placement {
            apart: 0,
            together: 0,
            patience: PATIENCE,
        }
    }
}

impl Placement {
    /// Looks at a call; `hint` comes from the guest and may be anything.
    pub(super) fn look(&mut self, hint: u32) {
        let cpu = hint & CPU_BITS;
        // SAFETY: no arguments, no memory.
        let own = unsafe { libc::sched_getcpu() };
        if self.shall_move(u32::try_from(own) == Ok(cpu)) {
            move_to(cpu);
        }
    }

    fn shall_move(&mut self, same: bool) -> bool {
        if same {
            self.apart = 0;
            self.together += 1;
            if self.together >= SETTLED {
                self.together = 0;
                self.patience = PATIENCE;
            }
            return false;
        }
        self.together = 0;
        self.apart += 1;
        if self.apart < self.patience {
            return false;
        }
        self.apart = 0;
        self.patience = (self.patience * 2).min(MOST_PATIENCE);
        true
    }
}

/// Asks the scheduler to run this thread as soon as it is woken: the shortest slice there is.
///
/// The guest then need not wait in the kernel for an answer that comes within its own wake-up call.
/// Kernels before 6.12 know no slices, and nothing changes there.
pub(super) fn serve_promptly() {
    /// `struct sched_attr`, its first version.
    #[repr(C)]
    #[derive(Default)]
    struct Attributes {
        size: u32,
        policy: u32,
        flags: u64,
        nice: i32,
        priority: u32,
        slice_ns: u64,
        deadline: u64,
        period: u64,
    }
    let mut attributes = Attributes::default();
    let size = size_of::<Attributes>();
    // SAFETY: the structure lives here, and the kernel is told its size; 0 is this thread.
    unsafe {
        if libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size, 0) != 0
            || attributes.policy != libc::SCHED_OTHER as u32
        {
            return;
        }
        attributes.slice_ns = SLICE_NS;
        libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0);
    }
}

/// Moves this thread to a CPU that it may use; does nothing for one that it may not.
fn move_to(cpu: u32) {
    let Ok(cpu) = usize::try_from(cpu) else {
        return;
    };
    let size = size_of::<libc::cpu_set_t>();
    // SAFETY: both sets live here; 0 is this thread, which is the library's own. The set has room
    // for every number that CPU_ISSET is asked for, since the kernel's mask has at most as many.
    unsafe {
        let mut allowed: libc::cpu_set_t = std::mem::zeroed();
        let mut one: libc::cpu_set_t = std::mem::zeroed();
        if cpu >= size * 8
            || libc::sched_getaffinity(0, size, &raw mut allowed) != 0
            || !libc::CPU_ISSET(cpu, &allowed)
        {
            return;
        }
        libc::CPU_SET(cpu, &mut one);
        if libc::sched_setaffinity(0, size, &raw const one) == 0 {
            libc::sched_setaffinity(0, size, &raw const allowed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moves_after_a_while_and_ever_less_often() {
        let mut placement = Placement::default();
        let calls_to_move =
            |placement: &mut Placement| (1..=MOST_PATIENCE).find(|_| placement.shall_move(false));
        assert_eq!(calls_to_move(&mut placement), Some(PATIENCE));
        assert_eq!(calls_to_move(&mut placement), Some(PATIENCE * 2));
        for _ in 0..40 {
            calls_to_move(&mut placement);
        }
        assert_eq!(calls_to_move(&mut placement), Some(MOST_PATIENCE));
        assert!((0..SETTLED).all(|_| !placement.shall_move(true)));
        assert_eq!(calls_to_move(&mut placement), Some(PATIENCE));
    }

    #[test]
    fn any_hint_is_survived() {
        let mut placement = Placement::default();
        for hint in [0, 1, 0x7b, CPU_BITS, u32::MAX] {
            for _ in 0..PATIENCE * 4 {
                placement.look(hint);
            }
            move_to(hint);
        }
    }
}
