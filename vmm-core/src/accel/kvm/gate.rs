//! Gate bodies for kvm: one `OUT` each.
//!
//! The port says which slot, EAX carries the slot's 32-bit argument. `notify` and `idle` count
//! themselves in the vCPU page, because a doorbell that an ioeventfd answers is never seen here.

use super::{PORT_CALL, PORT_EXIT, PORT_IDLE, PORT_NOTIFY};
use pv_abi::gate::{CALL, CHECKPOINT, EXIT, IDLE, NOTIFY, SLOT_COUNT, SLOT_SIZE};
use pv_abi::vcpu::VcpuPage;
use std::mem::offset_of;

const MOV_EAX_EDI: [u8; 2] = [0x89, 0xf8];
const OUT_DX_EAX: u8 = 0xef;
const RET: u8 = 0xc3;
const UD2: [u8; 2] = [0x0f, 0x0b];
/// `or rax, -1`: [`pv_abi::gate::CHECKPOINT_UNSUPPORTED`].
const OR_RAX_MINUS_ONE: [u8; 4] = [0x48, 0x83, 0xc8, 0xff];

/// `mov edx, port`
fn mov_edx(port: u16) -> [u8; 5] {
    let [lo, hi] = port.to_le_bytes();
    [0xba, lo, hi, 0, 0]
}

/// `inc qword ptr gs:[offset]`
fn inc_gs(offset: usize) -> Vec<u8> {
    let mut code = vec![0x65, 0x48, 0xff, 0x04, 0x25];
    code.extend_from_slice(&u32::try_from(offset).unwrap_or(0).to_le_bytes());
    code
}

/// `mov qword ptr gs:[offset], rdi`
fn store_rdi_gs(offset: usize) -> Vec<u8> {
    let mut code = vec![0x65, 0x48, 0x89, 0x3c, 0x25];
    code.extend_from_slice(&u32::try_from(offset).unwrap_or(0).to_le_bytes());
    code
}

/// The bytes of the gate region, slot by slot.
pub(super) fn bodies() -> Vec<u8> {
    let out = |port| [&MOV_EAX_EDI[..], &mov_edx(port), &[OUT_DX_EAX]].concat();
    let mut gate = Vec::new();
    for slot in 0..SLOT_COUNT {
        let body = match slot {
            CALL => [&out(PORT_CALL)[..], &[RET]].concat(),
            NOTIFY => [
                &inc_gs(offset_of!(VcpuPage, kicks))[..],
                &out(PORT_NOTIFY),
                &[RET],
            ]
            .concat(),
            IDLE => [
                &store_rdi_gs(offset_of!(VcpuPage, idle_ns))[..],
                &inc_gs(offset_of!(VcpuPage, idles)),
                &out(PORT_IDLE),
                &[RET],
            ]
            .concat(),
            // Exiting does not return; if the host came back all the same, fault.
            EXIT => [&out(PORT_EXIT)[..], &UD2].concat(),
            CHECKPOINT => [&OR_RAX_MINUS_ONE[..], &[RET]].concat(),
            _ => UD2.to_vec(),
        };
        let size = usize::try_from(SLOT_SIZE).unwrap_or(0);
        debug_assert!(body.len() <= size);
        gate.extend_from_slice(&body);
        gate.resize(gate.len().next_multiple_of(size), 0xcc);
    }
    gate
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_slot_has_a_body_that_fits() {
        let gate = bodies();
        assert_eq!(gate.len() as u64, SLOT_SIZE * SLOT_COUNT);
        for slot in gate.chunks(SLOT_SIZE as usize) {
            assert!(slot.windows(2).any(|w| w == UD2) || slot.contains(&RET));
        }
    }
}
