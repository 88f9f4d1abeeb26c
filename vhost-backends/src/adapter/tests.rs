//! A small backend of the kind people write for `vhost-user-backend`, served by our session to a
//! real frontend.
#![allow(unsafe_code)]
// UNSAFETY: the frontend takes raw buffers.

use super::*;
use crate::session::Server;
use pv_abi::virtio::block::Config;
use std::os::unix::net::UnixListener;
use std::sync::RwLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use vhost::vhost_user::VhostUserProtocolFeatures;
use vhost_user_backend::{VhostUserBackendMut, VringRwLock};
use virtio_driver::{VhostUser, VirtioBlkQueue, VirtioBlkTransport, VirtioFeatureFlags};
use virtio_queue::QueueOwnedT;
use vm_memory::mmap::MmapRegion;
use vm_memory::{Bytes, FileOffset, GuestAddressSpace};
use vmm_sys_util::epoll::EventSet;
use zerocopy::IntoBytes;

/// A disk on which every byte is the low byte of its sector; two queues on two threads.
struct Pattern {
    memory: Option<Memory>,
    events: Arc<AtomicUsize>,
}

impl VhostUserBackendMut for Pattern {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        2
    }

    fn max_queue_size(&self) -> usize {
        256
    }

    fn features(&self) -> u64 {
        feature::VERSION_1 | 1 << 12 | feature::RING_PACKED | 1 << 30
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG
    }

    fn set_event_idx(&mut self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let config = Config {
            capacity: 1024,
            num_queues: 2,
            ..Config::default()
        };
        config.as_bytes()[offset as usize..][..size as usize].to_vec()
    }

    fn update_memory(&mut self, memory: Memory) -> io::Result<()> {
        self.memory = Some(memory);
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        vec![1, 2]
    }

    fn handle_event(
        &mut self,
        event: u16,
        _set: EventSet,
        vrings: &[VringRwLock],
        thread: usize,
    ) -> io::Result<()> {
        assert_eq!((event, vrings.len()), (0, 1));
        assert!(thread < 2);
        self.events.fetch_add(1, Ordering::SeqCst);
        let memory = self.memory.as_ref().unwrap().memory();
        let mut vring = vrings[0].get_mut();
        let chains: Vec<_> = vring
            .get_queue_mut()
            .iter(memory.clone())
            .unwrap()
            .collect();
        for chain in chains {
            let head = chain.head_index();
            let mut sector = 0u64;
            let descs: Vec<_> = chain.collect();
            for desc in &descs {
                if desc.is_write_only() {
                    let byte = if desc.len() == 1 { 0 } else { sector as u8 };
                    let data = vec![byte; desc.len() as usize];
                    memory.write_slice(&data, desc.addr()).unwrap();
                } else {
                    sector = memory
                        .read_obj(
                            desc.addr()
                                .0
                                .checked_add(8)
                                .map(vm_memory::GuestAddress)
                                .unwrap(),
                        )
                        .unwrap();
                }
            }
            vring.add_used(head, 0).unwrap();
        }
        vring.signal_used_queue()
    }
}

#[test]
fn a_foreign_backend_is_served_connection_after_connection() {
    let events = Arc::new(AtomicUsize::new(0));
    let backend = Arc::new(RwLock::new(Pattern {
        memory: None,
        events: events.clone(),
    }));
    let device = Arc::new(Adapter::new(backend).unwrap());
    assert_eq!(device.features(), feature::VERSION_1 | 1 << 12);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sock");
    let server = Server::spawn(device, UnixListener::bind(&path).unwrap()).unwrap();
    for round in 0..3u64 {
        let features = VirtioFeatureFlags::VERSION_1.bits() | 1 << 12;
        let vhost = VhostUser::new(path.to_str().unwrap(), features).unwrap();
        let mut transport = Box::new(vhost) as Box<VirtioBlkTransport>;
        let mut queues = VirtioBlkQueue::<()>::setup_queues(&mut *transport, 2, 16).unwrap();
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(4096).unwrap();
        let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
        let buffer: MmapRegion = MmapRegion::from_file(FileOffset::new(file, 0), 4096).unwrap();
        let at = buffer.as_ptr() as usize;
        transport.map_mem_region(at, 4096, fd, 0).unwrap();
        for (i, queue) in queues.iter_mut().enumerate() {
            let sector = round * 10 + i as u64 + 1;
            let iov = [libc::iovec {
                iov_base: buffer.as_ptr().cast(),
                iov_len: 4096,
            }];
            read(queue, sector * 512, &iov);
            transport.get_submission_notifier(i).notify().unwrap();
            let deadline = Instant::now() + Duration::from_secs(20);
            while queue.completions().next().is_none_or(|c| c.ret != 0) {
                assert!(Instant::now() < deadline);
                std::thread::yield_now();
            }
            let bytes = vm_memory::VolatileMemory::as_volatile_slice(&buffer);
            let mut data = [0; 4096];
            bytes.read_slice(&mut data, 0).unwrap();
            assert_eq!(data, [sector as u8; 4096]);
        }
    }
    server.stop().unwrap();
    assert!(events.load(Ordering::SeqCst) >= 6);
}

fn read(queue: &mut VirtioBlkQueue<'_, ()>, offset: u64, iov: &[libc::iovec]) {
    // SAFETY: the buffer is a mapping that the caller keeps until the request is over.
    unsafe { queue.readv(offset, iov.as_ptr(), iov.len(), ()) }.unwrap();
}
