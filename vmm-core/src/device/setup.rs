//! Parsing what `DEVICE_ACTIVATE` was given: guest bytes become a [`Setup`] or a status.

use super::DeviceInfo;
use crate::memory::{Arena, GuestMemory};
use pv_abi::device::{DeviceSetup, QueueSetup};
use pv_abi::status::Status;
use pv_abi::virtio::split;

/// One queue, checked: every part lies in the device's arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct QueueConfig {
    pub(crate) size: u16,
    pub(crate) desc: u64,
    pub(crate) avail: u64,
    pub(crate) used: u64,
    pub(crate) vcpu: u32,
}

/// A checked set-up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Setup {
    pub(crate) features: u64,
    pub(crate) config_vcpu: u32,
    pub(crate) queues: Vec<QueueConfig>,
}

impl Setup {
    /// Copies the structure once and checks the copy.
    pub(crate) fn parse(
        memory: &GuestMemory,
        info: &DeviceInfo,
        arena: &Arena,
        vcpus: u32,
        (gpa, len): (u64, u64),
    ) -> Result<Setup, Status> {
        let head_len = size_of::<DeviceSetup>() as u64;
        let queue_len = size_of::<QueueSetup>() as u64;
        let most = head_len + u64::from(info.queue_count) * queue_len;
        if !(head_len + queue_len..=most).contains(&len) {
            return Err(Status::BadLength);
        }
        let found = memory.shared(gpa, len, Some(info.arena));
        let (region, offset) = found.ok_or(Status::BadAddress)?;
        let read = |_| Status::BadAddress;
        let head: DeviceSetup = region.read(offset).map_err(read)?;
        if head.queue_count == 0 || head.queue_count > u32::from(info.queue_count) {
            return Err(Status::BadArgument);
        }
        if len != head_len + u64::from(head.queue_count) * queue_len {
            return Err(Status::BadLength);
        }
        if head.config_vcpu >= vcpus {
            return Err(Status::NotFound);
        }
        let queues = (0..u64::from(head.queue_count))
            .map(|i| {
                let raw = region
                    .read(offset + head_len + i * queue_len)
                    .map_err(read)?;
                parse_queue(&raw, info, arena, vcpus)
            })
            .collect::<Result<Vec<_>, Status>>()?;
        Ok(Setup {
            features: head.features,
            config_vcpu: head.config_vcpu,
            queues,
        })
    }
}

fn parse_queue(
    raw: &QueueSetup,
    info: &DeviceInfo,
    arena: &Arena,
    vcpus: u32,
) -> Result<QueueConfig, Status> {
    let QueueSetup {
        desc,
        avail,
        used,
        size,
        flags,
        vcpu,
    } = *raw;
    if flags != 0 {
        return Err(Status::BadArgument);
    }
    if !size.is_power_of_two() || size < 2 || size > info.max_queue_size {
        return Err(Status::BadLength);
    }
    if vcpu >= vcpus {
        return Err(Status::NotFound);
    }
    let end = arena.gpa + arena.region.len();
    // virtio 1.3 §2.7: alignments of the three parts.
    let parts = [
        (desc, split::desc_len(size), 16),
        (avail, split::avail_len(size), 2),
        (used, split::used_len(size), 4),
    ];
    for (address, len, align) in parts {
        let fits = address >= arena.gpa && address.checked_add(len).is_some_and(|top| top <= end);
        if !fits || !address.is_multiple_of(align) {
            return Err(Status::BadAddress);
        }
    }
    Ok(QueueConfig {
        size,
        desc,
        avail,
        used,
        vcpu,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Backing, Region};
    use std::sync::Arc;

    fn info() -> DeviceInfo {
        DeviceInfo {
            index: 0,
            kind: pv_abi::device::kind::BLOCK,
            name: "disk".into(),
            arena: 0,
            event_base: 0,
            queue_count: 2,
            max_queue_size: 128,
        }
    }

    fn check(change: impl FnOnce(&mut QueueSetup)) -> Result<QueueConfig, Status> {
        let gpa = pv_abi::layout::ARENA_BASE;
        let region = Arc::new(Region::new(2 << 20, Backing::Anonymous).unwrap());
        let mut raw = QueueSetup {
            desc: gpa,
            avail: gpa + 4096,
            used: gpa + 8192,
            size: 128,
            flags: 0,
            vcpu: 0,
        };
        change(&mut raw);
        parse_queue(&raw, &info(), &Arena { gpa, region }, 1)
    }

    #[test]
    fn sizes_at_the_limit_and_past_it() {
        assert!(check(|_| ()).is_ok());
        assert!(check(|q| q.size = 2).is_ok());
        for size in [0, 1, 3, 127, 129, 256, 0x8000, u16::MAX] {
            assert_eq!(check(|q| q.size = size), Err(Status::BadLength), "{size}");
        }
    }

    #[test]
    fn addresses_stay_in_the_arena() {
        let gpa = pv_abi::layout::ARENA_BASE;
        let end = gpa + (2 << 20);
        assert!(check(|q| q.desc = end - 2048).is_ok());
        for desc in [
            0,
            4096,
            gpa - 16,
            gpa + 8,
            end - 2048 + 16,
            end,
            u64::MAX - 15,
            1 << 63,
        ] {
            assert_eq!(
                check(|q| q.desc = desc),
                Err(Status::BadAddress),
                "{desc:#x}"
            );
        }
        assert_eq!(check(|q| q.avail = gpa + 1), Err(Status::BadAddress));
        assert_eq!(check(|q| q.used = gpa + 2), Err(Status::BadAddress));
        assert_eq!(check(|q| q.used = end - 1024), Err(Status::BadAddress));
        assert_eq!(check(|q| q.flags = 1), Err(Status::BadArgument));
        assert_eq!(check(|q| q.vcpu = 1), Err(Status::NotFound));
    }
}
