//! One connection: its input, the response that is under way, and what comes next.

use crate::limits::{MAX_HEAD, READ};
use crate::request::{Parsed, Request, parse};
use crate::site::{Found, Site};
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use quickstart_fs::disk::Disk;
use quickstart_fs::files::OpenFile;
use quickstart_fs::walk::WalkError;

/// A client's connection.
#[derive(Debug, Default)]
pub struct Connection {
    input: Vec<u8>,
    response: Option<Response>,
    /// Nothing more is read, and when the response is out the connection ends.
    last: bool,
}

#[derive(Debug)]
struct Response {
    head: Vec<u8>,
    /// Bytes of `head` and of `body` that are out.
    sent: usize,
    body: Body,
}

#[derive(Debug)]
enum Body {
    None,
    Bytes(Arc<[u8]>),
    /// A file, and what was read of it and is not out.
    File(OpenFile, Vec<u8>),
}

impl Connection {
    /// Bytes that it takes now; none while a response is under way and a request waits.
    pub fn wants(&self) -> usize {
        if self.last {
            return 0;
        }
        // A head that is too long must be seen to be.
        (MAX_HEAD + 8).saturating_sub(self.input.len())
    }

    /// Bytes that arrived.
    pub fn receive(&mut self, bytes: &[u8]) {
        self.input.extend_from_slice(bytes);
    }

    /// Whether everything was said and the connection is to be closed.
    pub fn is_over(&self) -> bool {
        self.last && self.response.is_none()
    }

    /// Writes what there is to say, as far as it fits; how much that was.
    ///
    /// # Errors
    ///
    /// When the disk fails in the middle of a response: the connection is of no use then.
    pub fn send<D: Disk>(
        &mut self,
        site: &mut Site<D>,
        out: &mut [u8],
    ) -> Result<usize, WalkError<D::Error>> {
        let mut done = 0;
        while done < out.len() {
            let Some(response) = &mut self.response else {
                if !self.begin(site) {
                    break;
                }
                continue;
            };
            match response.write(site, &mut out[done..])? {
                0 => self.finish(site),
                count => done += count,
            }
        }
        Ok(done)
    }

    /// Lets go of what it holds, when the client has gone.
    pub fn finish<D: Disk>(&mut self, site: &Site<D>) {
        if let Some(Response {
            body: Body::File(file, _),
            ..
        }) = self.response.take()
        {
            site.files.close(file);
        }
    }

    /// Begins the response to the next request; whether there is one.
    fn begin<D: Disk>(&mut self, site: &mut Site<D>) -> bool {
        if self.last {
            return false;
        }
        let (status, body, kind, head_only) = match parse(&self.input) {
            Parsed::Partial => return false,
            Parsed::Refused(status) => {
                self.last = true;
                (status, Body::None, "", false)
            }
            Parsed::Request(request, length) => {
                self.input.drain(..length);
                self.last = !request.keep_alive;
                let (status, body, kind) = answer(site, &request);
                (status, body, kind, request.head_only)
            }
        };
        let (body, kind) = match body {
            // A few words for people.
            Body::None => {
                let words = alloc::format!("{status} {}\n", reason(status));
                (Body::Bytes(words.into_bytes().into()), "text/plain")
            }
            body => (body, kind),
        };
        let length = match &body {
            Body::None => 0,
            Body::Bytes(bytes) => bytes.len() as u64,
            Body::File(file, _) => u64::from(file.left()),
        };
        let head = head(status, kind, length, self.last);
        let response = Response {
            head: head.into_bytes(),
            sent: 0,
            body,
        };
        self.response = Some(response);
        if head_only {
            self.finish_body(site);
        }
        true
    }

    fn finish_body<D: Disk>(&mut self, site: &Site<D>) {
        if let Some(response) = &mut self.response
            && let Body::File(file, _) = core::mem::replace(&mut response.body, Body::None)
        {
            site.files.close(file);
        }
    }
}

fn answer<D: Disk>(site: &mut Site<D>, request: &Request) -> (u16, Body, &'static str) {
    match site.find(&request.path) {
        Ok(Found::Bytes(bytes, kind)) => (200, Body::Bytes(bytes), kind),
        Ok(Found::File(file, kind)) => (200, Body::File(file, Vec::new()), kind),
        Ok(Found::Nothing) => (404, Body::None, ""),
        // The disk failed, or too many files are open: nothing was said yet, so this can be.
        Err(_) => (503, Body::None, ""),
    }
}

impl Response {
    /// Writes the next bytes; 0 at the end.
    fn write<D: Disk>(
        &mut self,
        site: &Site<D>,
        out: &mut [u8],
    ) -> Result<usize, WalkError<D::Error>> {
        let from = if self.sent < self.head.len() {
            &self.head[self.sent..]
        } else {
            let sent = self.sent - self.head.len();
            match &mut self.body {
                Body::None => &[],
                Body::Bytes(bytes) => bytes.get(sent..).unwrap_or_default(),
                Body::File(file, read) => {
                    if read.is_empty() {
                        *read = vec![0; READ];
                        let count = site.files.read(file, read)?;
                        read.truncate(count);
                    }
                    let count = read.len().min(out.len());
                    out[..count].copy_from_slice(&read[..count]);
                    read.drain(..count);
                    return Ok(count);
                }
            }
        };
        let count = from.len().min(out.len());
        out[..count].copy_from_slice(&from[..count]);
        self.sent += count;
        Ok(count)
    }
}

fn head(status: u16, kind: &str, length: u64, last: bool) -> String {
    let reason = reason(status);
    let connection = if last { "close" } else { "keep-alive" };
    alloc::format!(
        "HTTP/1.1 {status} {reason}\r\nServer: paravane\r\nContent-Type: {kind}\r\n\
         Content-Length: {length}\r\nConnection: {connection}\r\n\r\n"
    )
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        400 => "Bad Request",
        404 => "Not Found",
        405 => "Method Not Allowed",
        413 => "Content Too Large",
        431 => "Request Header Fields Too Large",
        503 => "Service Unavailable",
        505 => "HTTP Version Not Supported",
        _ => "",
    }
}
