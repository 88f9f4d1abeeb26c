//! Frames on the stream socket, each with its length in front (32 bits, network order), as the
//! device of a smoltcp stack.

use crate::limits::{MAX_BACKLOG, MAX_FRAME, MAX_FRAMES};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant;
use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;

/// Bytes of the length in front of a frame.
const LENGTH: usize = 4;
/// Bytes of the largest frame that is sent: Ethernet's.
const MTU: usize = 1514;

/// A peer, or the want of one.
#[derive(Debug, Default)]
pub(super) struct Wire {
    stream: Option<UnixStream>,
    /// What was read: frames, and the beginning of one.
    input: Vec<u8>,
    frames: VecDeque<Vec<u8>>,
    /// What the peer has not read yet.
    output: Vec<u8>,
}

impl Wire {
    /// A new peer; what the last one left is forgotten.
    pub(super) fn connect(&mut self, stream: UnixStream) {
        *self = Wire {
            stream: Some(stream),
            ..Wire::default()
        };
    }

    /// Reads what is there; whether anything was.
    pub(super) fn read(&mut self) -> bool {
        let mut buffer = [0; 64 << 10];
        let mut any = false;
        while self.frames.len() < MAX_FRAMES {
            let Some(stream) = &mut self.stream else {
                return any;
            };
            match stream.read(&mut buffer) {
                Ok(0) => self.hang_up(),
                Ok(count) => {
                    any = true;
                    self.input.extend_from_slice(&buffer[..count]);
                    if !self.parse() {
                        // No peer of this protocol: nothing that it says makes sense any more.
                        self.hang_up();
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return any,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => self.hang_up(),
            }
        }
        any
    }

    /// Writes what is to be written, as far as that goes.
    pub(super) fn write(&mut self) {
        let mut done = 0;
        while done < self.output.len() {
            let Some(stream) = &mut self.stream else {
                break;
            };
            match stream.write(&self.output[done..]) {
                Ok(0) => self.hang_up(),
                Ok(count) => done += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => self.hang_up(),
            }
        }
        self.output.drain(..done.min(self.output.len()));
    }

    fn hang_up(&mut self) {
        *self = Wire::default();
    }

    /// Takes the whole frames out of the input; whether it can be input.
    fn parse(&mut self) -> bool {
        let mut at = 0;
        while let Some(length) = self.input.get(at..at + LENGTH) {
            let length = u32::from_be_bytes([length[0], length[1], length[2], length[3]]) as usize;
            if length > MAX_FRAME {
                return false;
            }
            let Some(frame) = self.input.get(at + LENGTH..at + LENGTH + length) else {
                break;
            };
            self.frames.push_back(frame.to_vec());
            at += LENGTH + length;
        }
        self.input.drain(..at);
        true
    }
}

impl Device for Wire {
    type RxToken<'a> = Incoming;
    type TxToken<'a> = Outgoing<'a>;

    fn receive(&mut self, _now: Instant) -> Option<(Incoming, Outgoing<'_>)> {
        if self.output.len() > MAX_BACKLOG {
            return None;
        }
        let frame = self.frames.pop_front()?;
        Some((Incoming(frame), Outgoing(&mut self.output)))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Outgoing<'_>> {
        let room = self.stream.is_some() && self.output.len() <= MAX_BACKLOG;
        room.then_some(Outgoing(&mut self.output))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = MTU;
        capabilities
    }
}

/// A frame that came.
pub(super) struct Incoming(Vec<u8>);

impl RxToken for Incoming {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, take: F) -> R {
        take(&self.0)
    }
}

/// Room for a frame.
pub(super) struct Outgoing<'a>(&'a mut Vec<u8>);

impl TxToken for Outgoing<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, fill: F) -> R {
        let start = self.0.len();
        // The stack asks for no more than the device's limit.
        self.0.extend_from_slice(&(len as u32).to_be_bytes());
        self.0.resize(start + LENGTH + len, 0);
        fill(&mut self.0[start + LENGTH..])
    }
}

/// Accepts the newest of those who want to be the peer.
pub(super) fn accept(listener: &std::os::unix::net::UnixListener) -> io::Result<UnixStream> {
    let (stream, _) = listener.accept()?;
    stream.set_nonblocking(true)?;
    Ok(stream)
}
