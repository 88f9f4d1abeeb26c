//! What is in guest memory before the first instruction: image, boot block, vCPU pages.

use crate::accel::Accel;
use crate::image::Image;
use crate::memory::GuestMemory;
use crate::memory::map::AddressMap;
use pv_abi::boot::{BootBlock, MAGIC};
use pv_abi::layout::{BOOT_BLOCK_BASE, PAGE_SIZE, VMM_BASE, vcpu_page};
use pv_abi::vcpu::VcpuPage;
use std::io;
use std::mem::offset_of;
use zerocopy::FromZeros;

const _: () = assert!(PAGE_SIZE as usize == size_of::<VcpuPage>());

/// Copies the image's segments to where they belong.
pub(super) fn load(image: &Image, memory: &GuestMemory) -> io::Result<()> {
    for segment in image.segments() {
        let bytes = image.bytes().get(segment.file.clone()).unwrap_or_default();
        let missing = || io::Error::other("a segment lies outside private RAM");
        let (ram, offset) = memory
            .private(segment.gpa, segment.len)
            .ok_or_else(missing)?;
        ram.fill(offset + segment.lead, bytes)?;
    }
    Ok(())
}

/// Writes the boot block; `(vcpus, devices)` are counts.
pub(super) fn write_boot_block(
    memory: &GuestMemory,
    map: &AddressMap,
    accel: Accel,
    (vcpus, devices): (u32, usize),
    features: u64,
    cmdline: &str,
) -> io::Result<()> {
    let mut boot = BootBlock::new_zeroed();
    boot.magic = MAGIC;
    boot.abi_major = pv_abi::ABI_MAJOR;
    boot.abi_minor = pv_abi::ABI_MINOR;
    boot.size = u32::try_from(size_of::<BootBlock>()).map_err(io::Error::other)?;
    boot.accel = accel.abi_code();
    boot.vcpu_count = vcpus;
    boot.features = features;
    boot.baseline = pv_abi::baseline::X86_64_V2;
    boot.device_count = u32::try_from(devices).map_err(io::Error::other)?;
    boot.memory_map_count = u32::try_from(map.boot.len()).map_err(io::Error::other)?;
    boot.cmdline_len = u32::try_from(cmdline.len()).map_err(io::Error::other)?;
    for (to, from) in boot.memory_map.iter_mut().zip(&map.boot) {
        *to = *from;
    }
    for (to, from) in boot.cmdline.iter_mut().zip(cmdline.bytes()) {
        *to = from;
    }
    memory.vmm.write(BOOT_BLOCK_BASE - VMM_BASE, &boot)
}

/// Writes what this vCPU's page says of it.
pub(super) fn write_vcpu_page(memory: &GuestMemory, vcpu: u32, count: u32) -> io::Result<()> {
    let page = vcpu_page(vcpu);
    let at = page - VMM_BASE;
    memory
        .vmm
        .write(at + offset_of!(VcpuPage, self_gpa) as u64, &page)?;
    memory
        .vmm
        .write(at + offset_of!(VcpuPage, index) as u64, &vcpu)?;
    memory
        .vmm
        .write(at + offset_of!(VcpuPage, count) as u64, &count)
}
