//! What a port carries, as a pcapng file, live (draft-ietf-opsawg-pcapng).
//!
//! Frames are written as they pass, with the direction that they had for the guest, by whoever
//! carries them. A reader that is slow misses frames and never holds any up: beyond a backlog,
//! frames are left out whole. One that hangs up ends the capture.

use super::frame::Frame;
use super::limits::{CAPTURE_SNAP, MAX_CAPTURE_BACKLOG};
use super::port::vectors;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;
use vm_memory::Bytes;

/// Which way a frame goes, seen from the guest. The values are pcapng's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    ToGuest = 1,
    FromGuest = 2,
}

/// A port's capture: on while somebody gave it a descriptor.
#[derive(Debug, Default)]
pub(super) struct Capture {
    on: AtomicBool,
    sink: Mutex<Option<Sink>>,
}

#[derive(Debug)]
struct Sink {
    client: UnixStream,
    /// Blocks that are under way.
    backlog: Vec<u8>,
}

impl Capture {
    /// Whether frames are wanted.
    pub(super) fn is_on(&self) -> bool {
        // Ordering: Relaxed, a frame more or less.
        self.on.load(Ordering::Relaxed)
    }

    /// Writes to `client` from here on, and to nobody else.
    pub(super) fn start(&self, client: UnixStream, name: &str) -> io::Result<()> {
        let mut sink = Sink {
            client,
            backlog: head(name),
        };
        // Whoever has read the head gets every frame from then on: they wait for this lock.
        let mut guard = self.lock();
        self.on.store(true, Ordering::Relaxed);
        if let Err(error) = sink.flush() {
            self.on.store(guard.is_some(), Ordering::Relaxed);
            return Err(error);
        }
        *guard = Some(sink);
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Sink>> {
        self.sink.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes a frame.
    pub(super) fn frame(&self, frame: &Frame<'_>, direction: Direction) {
        let mut guard = self.lock();
        let Some(sink) = guard.as_mut() else { return };
        // Otherwise it is left out.
        if sink.backlog.len() <= MAX_CAPTURE_BACKLOG {
            packet(&mut sink.backlog, frame, direction);
        }
        if sink.flush().is_err() {
            // Nobody reads any more.
            *guard = None;
            self.on.store(false, Ordering::Relaxed);
        }
    }
}

impl Sink {
    fn flush(&mut self) -> io::Result<()> {
        match vectors::send(self.client.as_fd(), &self.backlog, &[]) {
            Ok(n) => {
                self.backlog.drain(..n.min(self.backlog.len()));
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// Appends a block: its kind, its length, its body padded to four bytes, its length again.
fn block(out: &mut Vec<u8>, kind: u32, body: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.extend(kind.to_le_bytes());
    out.extend([0; 4]);
    body(out);
    pad(out, start);
    let len = u32::try_from(out.len() - start + 4)
        .unwrap_or(0)
        .to_le_bytes();
    if let Some(to) = out.get_mut(start + 4..start + 8) {
        to.copy_from_slice(&len);
    }
    out.extend(len);
}

fn pad(out: &mut Vec<u8>, start: usize) {
    let len = (out.len() - start).next_multiple_of(4);
    out.resize(start + len, 0);
}

fn option(out: &mut Vec<u8>, code: u16, value: &[u8]) {
    out.extend(code.to_le_bytes());
    out.extend(u16::try_from(value.len()).unwrap_or(0).to_le_bytes());
    let start = out.len();
    out.extend(value);
    pad(out, start);
}

/// Section header and interface description, with times in nanoseconds.
fn head(name: &str) -> Vec<u8> {
    let mut out = Vec::new();
    block(&mut out, 0x0a0d_0d0a, |out| {
        out.extend(0x1a2b_3c4du32.to_le_bytes());
        out.extend([1, 0, 0, 0]);
        // Of a length that is not known.
        out.extend([0xff; 8]);
    });
    block(&mut out, 1, |out| {
        // Ethernet.
        out.extend([1, 0, 0, 0]);
        out.extend((CAPTURE_SNAP as u32).to_le_bytes());
        option(out, 2, name.as_bytes());
        option(out, 9, &[9]);
        option(out, 0, &[]);
    });
    out
}

/// An enhanced packet block.
fn packet(out: &mut Vec<u8>, frame: &Frame<'_>, direction: Direction) {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let nanos = now.map_or(0, |now| u64::try_from(now.as_nanos()).unwrap_or(u64::MAX));
    let kept = frame.len().min(CAPTURE_SNAP);
    block(out, 6, |out| {
        let start = out.len();
        for word in [
            0,
            (nanos >> 32) as u32,
            nanos as u32,
            // Shorter than 2^17.
            kept as u32,
            frame.len() as u32,
        ] {
            out.extend(word.to_le_bytes());
        }
        let data = out.len();
        out.resize(data + kept, 0);
        let mut rest = out.get_mut(data..).unwrap_or_default();
        for piece in frame.pieces() {
            let n = piece.read(rest, 0).unwrap_or(0);
            rest = rest.get_mut(n..).unwrap_or_default();
            if rest.is_empty() {
                break;
            }
        }
        pad(out, start);
        option(out, 2, &(direction as u32).to_le_bytes());
        option(out, 0, &[]);
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use pv_abi::virtio::net::Header;
    use vm_memory::VolatileSlice;

    #[test]
    fn what_a_slow_reader_leaves_is_bounded() {
        const LEN: usize = 60_000;
        let (client, _reader) = UnixStream::pair().unwrap();
        client.set_nonblocking(true).unwrap();
        let capture = Capture::default();
        capture.start(client, "a").unwrap();
        let mut bytes = vec![0; LEN];
        let pieces = [VolatileSlice::from(&mut bytes[..])];
        // Several times what the backlog and any socket's buffer take.
        for _ in 0..300 {
            let frame = Frame::new(Header::default(), &pieces, LEN);
            capture.frame(&frame, Direction::ToGuest);
        }
        let backlog = capture.lock().as_ref().unwrap().backlog.len();
        assert!(backlog > MAX_CAPTURE_BACKLOG, "{backlog}");
        assert!(backlog < MAX_CAPTURE_BACKLOG + 2 * LEN, "{backlog}");
        assert!(capture.is_on());
    }
}
