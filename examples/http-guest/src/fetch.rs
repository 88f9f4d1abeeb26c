//! Fetching every file again and again from several connections, and comparing.

use crate::limits::{FETCH_TIMEOUT, FETCHERS, MAX_HEAD, REQUESTS_PER_CONNECTION};
use anyhow::{Context, Result, bail};
use http_serve::request::encode;
use quickstart::interrupt;
use quickstart::pack::Contents;
use sha2::{Digest, Sha256};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What came of it.
#[derive(Debug, Default)]
pub struct Fetched {
    /// Requests that were made.
    pub requests: u64,
    /// Bytes of files that came.
    pub bytes: u64,
    /// Requests that failed, or whose file was another.
    pub errors: u64,
    /// The first of them.
    pub first_error: Option<String>,
    /// How long it took.
    pub elapsed: Duration,
}

/// Makes `requests` requests, for one file after the other.
///
/// # Errors
///
/// When Ctrl-C comes. Requests that fail are counted.
pub fn run(address: &str, contents: &Contents, requests: u64) -> Result<Fetched> {
    let files: Vec<_> = contents.digests.iter().collect();
    let next = AtomicU64::new(0);
    let outcome = Mutex::new(Fetched::default());
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..FETCHERS {
            scope.spawn(|| {
                let mut client = Client::new(address);
                loop {
                    // Ordering: Relaxed, each number is taken once and means nothing else.
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= requests || interrupt::check().is_err() {
                        return;
                    }
                    let (path, digest) = files[(number % files.len() as u64) as usize];
                    let got = client.fetch(path, digest);
                    let mut outcome = outcome.lock().unwrap_or_else(PoisonError::into_inner);
                    outcome.requests += 1;
                    match got {
                        Ok(bytes) => outcome.bytes += bytes,
                        Err(error) => {
                            outcome.errors += 1;
                            let text = || format!("{path}: {error:#}");
                            outcome.first_error.get_or_insert_with(text);
                        }
                    }
                }
            });
        }
    });
    interrupt::check()?;
    let mut outcome = outcome.into_inner().unwrap_or_else(PoisonError::into_inner);
    outcome.elapsed = start.elapsed();
    Ok(outcome)
}

/// A connection that is made when it is needed, and anew now and then.
struct Client<'a> {
    address: &'a str,
    stream: Option<BufReader<TcpStream>>,
    requests: u64,
}

impl<'a> Client<'a> {
    fn new(address: &'a str) -> Self {
        Client {
            address,
            stream: None,
            requests: 0,
        }
    }

    /// Fetches one file and compares; its length.
    fn fetch(&mut self, path: &str, digest: &[u8]) -> Result<u64> {
        let mut stream = match self.stream.take() {
            Some(stream) if !self.requests.is_multiple_of(REQUESTS_PER_CONNECTION) => stream,
            _ => self.connect()?,
        };
        self.requests += 1;
        let path = encode(path);
        write!(
            stream.get_mut(),
            "GET /{path} HTTP/1.1\r\nHost: {}\r\n\r\n",
            self.address
        )?;
        let length = read_head(&mut stream)?;
        let mut hasher = Sha256::new();
        let mut left = length;
        while left > 0 {
            let data = stream.fill_buf().context("the body broke off")?;
            if data.is_empty() {
                bail!("the body ended {left} bytes early");
            }
            let take = data.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            hasher.update(&data[..take]);
            stream.consume(take);
            left -= take as u64;
        }
        if hasher.finalize()[..] != *digest {
            bail!("{length} bytes came, and they are others");
        }
        self.stream = Some(stream);
        Ok(length)
    }

    fn connect(&self) -> Result<BufReader<TcpStream>> {
        let stream = TcpStream::connect(self.address).context("cannot connect")?;
        stream.set_read_timeout(Some(FETCH_TIMEOUT))?;
        stream.set_write_timeout(Some(FETCH_TIMEOUT))?;
        stream.set_nodelay(true)?;
        Ok(BufReader::with_capacity(64 << 10, stream))
    }
}

/// The length of the body that follows, if the answer is that there is one.
fn read_head(stream: &mut BufReader<TcpStream>) -> Result<u64> {
    let mut length = None;
    let mut first = String::new();
    let mut bytes = 0;
    loop {
        let mut line = String::new();
        let limit = (MAX_HEAD - bytes) as u64;
        let count = stream.by_ref().take(limit).read_line(&mut line);
        bytes += count.context("no answer")?;
        if !line.ends_with("\r\n") {
            bail!("the answer broke off after {bytes} bytes");
        }
        let line = line.trim_end();
        if line.is_empty() {
            break;
        }
        if first.is_empty() {
            first = line.into();
        } else if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            length = value.trim().parse().ok();
        }
    }
    if !first.starts_with("HTTP/1.1 200 ") {
        bail!("the answer is {first:?}");
    }
    length.context("the answer has no length")
}
