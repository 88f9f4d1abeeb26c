//! Blocking calls on byte slices, by way of bounce buffers in the arena.

use super::{BlockQueue, Completion, Error, Request, Token};
use crate::limits::{BOUNCE_BYTES, BOUNCE_DEPTH};
use crate::platform::{DmaBuf, Platform};
use alloc::collections::VecDeque;
use core::ops::Range;
use pv_abi::virtio::block::{ID_LEN, SECTOR_SIZE, feature};

/// One direction of a transfer, with the bytes.
enum Bytes<'a> {
    Read(&'a mut [u8]),
    Write(&'a [u8]),
}

impl Bytes<'_> {
    fn len(&self) -> usize {
        match self {
            Bytes::Read(bytes) => bytes.len(),
            Bytes::Write(bytes) => bytes.len(),
        }
    }
}

impl<P: Platform> BlockQueue<P> {
    /// Reads whole sectors.
    ///
    /// # Errors
    ///
    /// [`Error`]; some of `out` may have been written then.
    pub fn read_blocking(&mut self, sector: u64, out: &mut [u8]) -> Result<(), Error> {
        self.transfer(sector, Bytes::Read(out))
    }

    /// Writes whole sectors. They are durable after the next [`flush`](Self::flush).
    ///
    /// # Errors
    ///
    /// [`Error`]; some of `data` may have been written then.
    pub fn write_blocking(&mut self, sector: u64, data: &[u8]) -> Result<(), Error> {
        self.transfer(sector, Bytes::Write(data))
    }

    /// Makes every write that has completed durable.
    ///
    /// A device without flushes is write-through: nothing is left to do (virtio 1.3 §5.2.5.2).
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub fn flush(&mut self) -> Result<(), Error> {
        if self.shared.core.features() & feature::FLUSH == 0 {
            return Ok(());
        }
        self.one(Request::Flush).map(|_| ())
    }

    /// Tells the device that sectors are not needed any more.
    ///
    /// # Errors
    ///
    /// [`Error`]; `Unsupported` where discards are not offered.
    pub fn discard(&mut self, sector: u64, count: u32) -> Result<(), Error> {
        self.one(Request::Discard { sector, count }).map(|_| ())
    }

    /// Makes sectors read as zeroes; `unmap` lets the device give their space back.
    ///
    /// # Errors
    ///
    /// [`Error`]; `Unsupported` where write-zeroes is not offered.
    pub fn write_zeroes(&mut self, sector: u64, count: u32, unmap: bool) -> Result<(), Error> {
        self.one(Request::WriteZeroes {
            sector,
            count,
            unmap,
        })
        .map(|_| ())
    }

    /// The device's identification string, padded with zeroes.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub fn id(&mut self) -> Result<[u8; ID_LEN], Error> {
        self.one(Request::GetId)?.id.ok_or(Error::Io)
    }

    /// Submits one request and waits for it.
    fn one(&mut self, request: Request) -> Result<Completion, Error> {
        let token = self.submit_waiting(request)?;
        let completion = self.wait_token(token);
        let completion = completion.inspect_err(|_| self.abandon([token]))?;
        completion.result?;
        Ok(completion)
    }

    /// Submits, after waiting for room if the queue is full.
    fn submit_waiting(&mut self, mut request: Request) -> Result<Token, Error> {
        loop {
            match self.submit(request) {
                Ok(token) => return Ok(token),
                // Only what the ring holds makes room; what is `ready` already does not.
                Err(refused) if refused.error == Error::QueueFull && self.channel.held() != 0 => {
                    self.wait_for(self.ready.len() + 1, None)?;
                    request = refused.request;
                }
                Err(refused) => return Err(refused.error),
            }
        }
    }

    /// Waits for one token; other completions stay for [`poll`](Self::poll).
    fn wait_token(&mut self, token: Token) -> Result<Completion, Error> {
        loop {
            let place = self.ready.iter().position(|done| done.token == token);
            if let Some(completion) = place.and_then(|place| self.ready.remove(place)) {
                return Ok(completion);
            }
            if self.channel.held() == 0 {
                // Cannot be: the token is neither ready nor held. Say so rather than wait for ever.
                return Err(Error::Io);
            }
            self.wait_for(self.ready.len() + 1, None)?;
        }
    }

    /// Moves bytes piece by piece, several pieces in flight.
    fn transfer(&mut self, sector: u64, mut bytes: Bytes<'_>) -> Result<(), Error> {
        let len = bytes.len();
        if !len.is_multiple_of(SECTOR_SIZE as usize) {
            return Err(Error::BadLength);
        }
        let piece = BOUNCE_BYTES.min(self.shared.geometry().max_bytes);
        let mut flying: VecDeque<(Token, Range<usize>)> = VecDeque::new();
        let mut next = 0;
        let mut outcome = Ok(());
        loop {
            while outcome.is_ok() && next < len && flying.len() < BOUNCE_DEPTH {
                let range = next..len.min(next + piece);
                match self.start_piece(sector, &bytes, range.clone()) {
                    Ok(token) => flying.push_back((token, range.clone())),
                    Err(error) => outcome = Err(error),
                }
                next = range.end;
            }
            let Some((token, range)) = flying.pop_front() else {
                return outcome;
            };
            // On `Broken` the buffers stay with the queue; there is nothing to wait for.
            let completion = self.wait_token(token).inspect_err(|_| {
                let flying = flying.iter().map(|(token, _)| *token);
                self.abandon(flying.chain([token]));
            })?;
            outcome = outcome.and(completion.result);
            if let Some(buf) = completion.buf {
                if let Bytes::Read(out) = &mut bytes
                    && completion.result.is_ok()
                {
                    buf.read(0, &mut out[range]);
                }
                self.keep_bounce(buf);
            }
        }
    }

    /// Forgets requests that nobody will ask for.
    fn abandon(&mut self, tokens: impl IntoIterator<Item = Token>) {
        for token in tokens {
            match self.ready.iter().position(|done| done.token == token) {
                Some(place) => drop(self.ready.remove(place)),
                None => drop(self.abandoned.insert(token)),
            }
        }
    }

    fn start_piece(
        &mut self,
        sector: u64,
        bytes: &Bytes<'_>,
        range: Range<usize>,
    ) -> Result<Token, Error> {
        let at = (range.start as u64) / SECTOR_SIZE;
        let sector = sector.checked_add(at).ok_or(Error::OutOfRange)?;
        let mut buf = self.take_bounce(range.len())?;
        let request = match bytes {
            Bytes::Read(_) => Request::Read { sector, buf },
            Bytes::Write(data) => {
                buf.write(0, &data[range]);
                Request::Write { sector, buf }
            }
        };
        self.submit_waiting(request)
    }

    /// A bounce buffer of exactly this length: the one used last, or a new one.
    fn take_bounce(&mut self, len: usize) -> Result<DmaBuf, Error> {
        let place = self.bounce.iter().rposition(|buf| buf.len() == len);
        match place {
            Some(place) => Ok(self.bounce.swap_remove(place)),
            None => Ok(self.alloc(len)?),
        }
    }

    fn keep_bounce(&mut self, buf: DmaBuf) {
        if self.bounce.len() == BOUNCE_DEPTH {
            self.bounce.remove(0);
        }
        self.bounce.push(buf);
    }
}
