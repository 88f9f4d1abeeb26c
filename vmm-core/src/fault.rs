//! Why a guest ended, and who is to blame.
//!
//! [`Fault`] names the three parties that can fail; the one `match` in [`Fault::policy`] is the
//! whole policy. [`ExitReason`] is what the embedder sees.

use std::io;
use std::sync::Arc;

/// What kind of CPU fault ended the guest; the same on every accel.
///
/// Raw vectors differ between hosts (`INT n` is #GP on hardware, #UD on a pagetable-based KVM and a
/// signal in a process), so tests and embedders compare classes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FaultClass {
    /// Integer division: by zero, or the quotient does not fit.
    Divide,
    /// Debug trap or single step.
    Debug,
    /// `INT3`.
    Breakpoint,
    /// An instruction that does not exist, `UD2` included.
    InvalidOpcode,
    /// An instruction that the flat profile bans: privileged, or a way into a kernel.
    Forbidden,
    /// General protection: a non-canonical address, a bad segment.
    Protection,
    /// An address that is not mapped, or not for this kind of access.
    Page,
    /// x87 or SSE exception that the guest unmasked.
    FloatingPoint,
    /// Misaligned access with alignment checks on.
    Alignment,
    /// The host lost the memory behind a guest page.
    Memory,
    /// The CPU gave up without a deliverable exception.
    Shutdown,
    /// Anything else.
    Other,
}

/// General registers at the fault, as far as the accel knows them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
#[non_exhaustive]
pub struct Registers {
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rbp: u64,
    pub rsp: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub rip: u64,
    pub rflags: u64,
}

/// A CPU fault in the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct GuestFault {
    /// The vCPU on which it happened.
    pub vcpu: u32,
    /// What kind.
    pub class: FaultClass,
    /// The x86 vector, or the one that the accel's signal stands for.
    pub vector: u8,
    /// The x86 error code; 0 where the accel does not know it.
    pub error: u64,
    /// Address of the instruction.
    pub rip: u64,
    /// The address that was accessed, for `Page` and `Memory`.
    pub address: Option<u64>,
    /// Registers at the fault.
    pub registers: Registers,
    /// The guest could have forged this report (process accel without ptrace).
    pub self_reported: bool,
}

impl std::fmt::Display for GuestFault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{:?} fault on vCPU {} at {:#x}",
            self.class, self.vcpu, self.rip
        )?;
        if let Some(address) = self.address {
            write!(f, " accessing {address:#x}")?;
        }
        Ok(())
    }
}

/// A rule of the ABI whose breach ends the guest.
///
/// Everything that can be answered with a [`pv_abi::status::Status`] is; these cannot.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Violation {
    /// `call` with a frame index that does not exist.
    #[error(
        "call with frame index {index}, but a vCPU has {} frames",
        pv_abi::call::FRAMES
    )]
    BadFrameIndex {
        /// The index.
        index: u32,
    },
    /// A hand-off word that no gate body writes.
    #[error("the hand-off word holds {word:#x}, which no gate body writes")]
    BadHandOff {
        /// What it holds.
        word: u32,
    },
    /// Port I/O that no gate body makes.
    #[error("port I/O outside the gate: port {port:#x}")]
    BadPort {
        /// The port.
        port: u16,
    },
    /// An access to guest-physical memory that is not there.
    #[error("access to guest-physical address {gpa:#x}, where nothing is mapped")]
    BadPhysicalAddress {
        /// The address.
        gpa: u64,
    },
    /// A system call that the sandbox does not allow.
    #[error("{} from inside the sandbox", system_call(*number))]
    SystemCall {
        /// Its number; `u32::MAX` when it came through another architecture's entry.
        number: u32,
    },
    /// The sandboxed process ended without having been told to.
    #[error("the sandboxed process ended by itself: {how}")]
    ProcessEnded {
        /// Exit code or signal.
        how: String,
    },
    /// No `NEGOTIATE` within the boot deadline.
    #[error("the guest did not negotiate within {deadline_ms} ms of its start")]
    NeverStarted {
        /// The deadline.
        deadline_ms: u64,
    },
}

fn system_call(number: u32) -> String {
    match number {
        u32::MAX => "a 32-bit system call".into(),
        number => format!("system call {number}"),
    }
}

/// The peer of a device is gone.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("backend of device {device} lost: {why}")]
pub struct PeerLost {
    /// Index of the device.
    pub device: u32,
    /// What was seen.
    pub why: String,
}

/// Something failed, and this party is to blame.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The guest broke a rule.
    #[error("the guest broke a rule")]
    Guest(#[from] Violation),
    /// The host could not do something.
    #[error("the host could not do something")]
    Host(#[from] io::Error),
    /// A backend went away.
    #[error(transparent)]
    Backend(#[from] PeerLost),
}

/// What is done about a [`Fault`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// This guest ends with its reason.
    EndGuest,
    /// This request or call fails with a status; the guest goes on.
    FailRequest,
    /// The device goes needs-reset and its backend is brought back.
    Reconnect,
}

impl Fault {
    /// The whole policy: what is done, by who is to blame.
    pub fn policy(&self) -> Policy {
        match self {
            Fault::Guest(_) => Policy::EndGuest,
            Fault::Host(_) => Policy::FailRequest,
            Fault::Backend(_) => Policy::Reconnect,
        }
    }
}

/// Why a VM ended.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum ExitReason {
    /// The guest called the `exit` slot with this code.
    Exited(u32),
    /// The guest panicked; its message, of 2 KiB at most as the guest sent it.
    ///
    /// What is not UTF-8 in it has been replaced, by three bytes each. It may hold line breaks and a
    /// terminal's control sequences, which `Display` of the reason escapes.
    Panicked(String),
    /// A CPU fault in the guest.
    Fault(Box<GuestFault>),
    /// The guest broke a rule that cannot be answered with a status.
    Violation(Violation),
    /// The embedder stopped it.
    Stopped,
    /// The host could not go on running it.
    Host(Arc<io::Error>),
}

impl ExitReason {
    /// The guest's exit code, if it exited.
    pub fn code(&self) -> Option<u32> {
        match self {
            ExitReason::Exited(code) => Some(*code),
            _ => None,
        }
    }

    /// The class of the CPU fault, if it was one.
    pub fn fault_class(&self) -> Option<FaultClass> {
        match self {
            ExitReason::Fault(fault) => Some(fault.class),
            _ => None,
        }
    }
}

impl std::fmt::Display for ExitReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ExitReason::Exited(code) => write!(f, "exited with code {code}"),
            ExitReason::Panicked(message) => {
                write!(f, "panicked: {}", message.escape_debug())
            }
            ExitReason::Fault(fault) => fault.fmt(f),
            ExitReason::Violation(violation) => violation.fmt(f),
            ExitReason::Stopped => f.write_str("stopped by the embedder"),
            ExitReason::Host(error) => write!(f, "host error: {error}"),
        }
    }
}

/// Tells the class of a fault from its vector and the bytes at the instruction.
///
/// `code` holds up to 15 bytes at RIP, empty if they cannot be read.
pub(crate) fn classify(vector: u8, code: &[u8]) -> FaultClass {
    if matches!(vector, 6 | 13) && is_forbidden(code) {
        return FaultClass::Forbidden;
    }
    match vector {
        0 => FaultClass::Divide,
        1 => FaultClass::Debug,
        3 => FaultClass::Breakpoint,
        6 => FaultClass::InvalidOpcode,
        7 | 16 | 19 => FaultClass::FloatingPoint,
        10..=13 => FaultClass::Protection,
        14 => FaultClass::Page,
        17 => FaultClass::Alignment,
        18 => FaultClass::Memory,
        8 => FaultClass::Shutdown,
        _ => FaultClass::Other,
    }
}

/// Whether the instruction at hand is one of those the flat profile bans.
fn is_forbidden(code: &[u8]) -> bool {
    // Legacy and REX prefixes in front change nothing about being banned.
    let is_prefix = |b: &u8| matches!(b, 0x40..=0x4f | 0x66 | 0x67 | 0xf0 | 0xf2 | 0xf3);
    let skip = code.iter().take_while(|b| is_prefix(b)).count();
    match code.get(skip..).unwrap_or_default() {
        // INT n; HLT; CLI; STI; IN, OUT and their string forms.
        [
            0xcd | 0xf4 | 0xfa | 0xfb | 0xe4..=0xe7 | 0xec..=0xef | 0x6c..=0x6f,
            ..,
        ] => true,
        // SYSCALL, SYSENTER, WRMSR, RDMSR, RDPMC, MOV CR/DR, CLTS, INVD, WBINVD, CPUID, SYSRET/EXIT.
        [
            0x0f,
            0x05..=0x09 | 0x20..=0x23 | 0x30 | 0x32..=0x35 | 0xa2,
            ..,
        ] => true,
        // LGDT, LIDT, SWAPGS, VMCALL, VMMCALL, XGETBV, XSETBV and the rest of the group.
        [0x0f, 0x00 | 0x01, ..] => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_by_vector_and_opcode() {
        assert_eq!(classify(13, &[0xf4]), FaultClass::Forbidden);
        assert_eq!(classify(6, &[0x0f, 0x05]), FaultClass::Forbidden);
        assert_eq!(classify(6, &[0xcd, 0x80]), FaultClass::Forbidden);
        assert_eq!(classify(13, &[0x66, 0xef]), FaultClass::Forbidden);
        assert_eq!(classify(6, &[0x0f, 0x0b]), FaultClass::InvalidOpcode);
        assert_eq!(classify(13, &[]), FaultClass::Protection);
        assert_eq!(classify(14, &[0xf4]), FaultClass::Page);
        assert_eq!(classify(13, &[0x66; 15]), FaultClass::Protection);
    }

    #[test]
    fn what_a_guest_says_is_escaped() {
        let message = "can't\n\u{1b}[2Jgo on \u{202e}".to_owned();
        let shown = ExitReason::Panicked(message).to_string();
        assert_eq!(shown, r"panicked: can\'t\n\u{1b}[2Jgo on \u{202e}");
    }

    #[test]
    fn a_system_call_is_told_by_its_number_where_it_has_one() {
        let said = |number| Violation::SystemCall { number }.to_string();
        assert_eq!(said(39), "system call 39 from inside the sandbox");
        assert_eq!(
            said(u32::MAX),
            "a 32-bit system call from inside the sandbox"
        );
    }

    #[test]
    fn one_policy_for_each_party() {
        let guest = Fault::Guest(Violation::BadFrameIndex { index: 9 });
        let host = Fault::Host(io::Error::from_raw_os_error(libc::EIO));
        let peer = Fault::Backend(PeerLost {
            device: 0,
            why: "hang-up".into(),
        });
        assert_eq!(guest.policy(), Policy::EndGuest);
        assert_eq!(host.policy(), Policy::FailRequest);
        assert_eq!(peer.policy(), Policy::Reconnect);
    }
}
