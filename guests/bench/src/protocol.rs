//! What the benchmark's host and guest say to each other; both compile this file.
//!
//! The guest makes one call again and again: its arguments are the outcome of the last command, its
//! value is the next command.

/// The one call, in the embedder's range.
pub const NEXT: u32 = 0;

/// What the guest is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Work {
    /// `count` calls that do nothing.
    Calls = 0,
    /// `count` doorbells of the entropy device.
    Notify = 1,
    /// `count` idles without a wait.
    Idle = 2,
    /// 4 KiB random reads for `count` milliseconds.
    Read = 3,
    /// Idle until the VM is stopped.
    Sleep = 4,
}

impl Work {
    const ALL: [Work; 5] = [
        Work::Calls,
        Work::Notify,
        Work::Idle,
        Work::Read,
        Work::Sleep,
    ];
}

/// One command; travels in 64 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Command {
    /// What to do.
    pub work: Work,
    /// Reads: how many are in flight.
    pub depth: u8,
    /// Reads: how many completions to wait for at a time.
    pub batch: u8,
    /// Reads: how long to look for completions before idling, in microseconds.
    pub spin_us: u8,
    /// How often, or how long.
    pub count: u32,
}

impl Command {
    /// A command without the parameters of reads.
    pub const fn new(work: Work, count: u32) -> Command {
        Command {
            work,
            depth: 0,
            batch: 0,
            spin_us: 0,
            count,
        }
    }

    /// As it travels.
    pub fn encode(self) -> u64 {
        let [a, b, c, d] = self.count.to_le_bytes();
        let head = [self.work as u8, self.depth, self.batch, self.spin_us];
        let [w, x, y, z] = head;
        u64::from_le_bytes([w, x, y, z, a, b, c, d])
    }

    /// What travelled; `None` for work that does not exist.
    pub fn decode(word: u64) -> Option<Command> {
        let [work, depth, batch, spin_us, a, b, c, d] = word.to_le_bytes();
        let work = Work::ALL.into_iter().find(|w| *w as u8 == work)?;
        Some(Command {
            work,
            depth,
            batch,
            spin_us,
            count: u32::from_le_bytes([a, b, c, d]),
        })
    }
}

/// What a command came to: the call's arguments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// TSC ticks from the first to the last piece of work.
    pub ticks: u64,
    /// Pieces of work done.
    pub done: u64,
    /// Reads whose data was not what lies at that place of the disk.
    pub wrong: u64,
}

impl Outcome {
    /// As it travels.
    pub fn to_args(self) -> [u64; 6] {
        [self.ticks, self.done, self.wrong, 0, 0, 0]
    }

    /// What travelled.
    pub fn from_args([ticks, done, wrong, ..]: [u64; 6]) -> Outcome {
        Outcome { ticks, done, wrong }
    }
}
