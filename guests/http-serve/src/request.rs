//! The head of a request (RFC 9112), parsed or refused.

use crate::limits::MAX_HEAD;
use alloc::string::String;
use alloc::vec::Vec;

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The path, decoded, without the slash in front and without a query.
    pub path: String,
    /// Whether the body is to be left out.
    pub head_only: bool,
    /// Whether another request may follow.
    pub keep_alive: bool,
}

/// What the bytes so far are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// The beginning of a head.
    Partial,
    /// A request, and the bytes that it takes.
    Request(Request, usize),
    /// No request that is answered with anything but this status; the connection ends.
    Refused(u16),
}

/// Looks for a request at the beginning of `input`.
pub fn parse(input: &[u8]) -> Parsed {
    let end = input.windows(4).position(|window| window == b"\r\n\r\n");
    let Some(end) = end else {
        return match input.len() {
            0..=MAX_HEAD => Parsed::Partial,
            _ => Parsed::Refused(431),
        };
    };
    if end > MAX_HEAD {
        return Parsed::Refused(431);
    }
    let Ok(head) = core::str::from_utf8(&input[..end]) else {
        return Parsed::Refused(400);
    };
    match parse_head(head) {
        Ok(request) => Parsed::Request(request, end + 4),
        Err(status) => Parsed::Refused(status),
    }
}

fn parse_head(head: &str) -> Result<Request, u16> {
    let mut lines = head.split("\r\n");
    let mut words = lines.next().unwrap_or("").split(' ');
    let (Some(method), Some(target), Some(version), None) =
        (words.next(), words.next(), words.next(), words.next())
    else {
        return Err(400);
    };
    let mut keep_alive = match version {
        "HTTP/1.1" => true,
        "HTTP/1.0" => false,
        _ => return Err(505),
    };
    for line in lines {
        let (name, value) = line.split_once(':').ok_or(400u16)?;
        let value = value.trim();
        if name.eq_ignore_ascii_case("connection") {
            let says = |word: &str| {
                value
                    .split(',')
                    .any(|v| v.trim().eq_ignore_ascii_case(word))
            };
            keep_alive = (keep_alive || says("keep-alive")) && !says("close");
        } else if (name.eq_ignore_ascii_case("content-length") && value != "0")
            || name.eq_ignore_ascii_case("transfer-encoding")
        {
            // Nothing here takes a body, and one that is not read would pass for a request.
            return Err(413);
        }
    }
    let head_only = match method {
        "GET" => false,
        "HEAD" => true,
        _ => return Err(405),
    };
    let path = target.split(['?', '#']).next().unwrap_or("");
    let path = path.strip_prefix('/').ok_or(400u16)?;
    Ok(Request {
        path: decode(path).ok_or(400u16)?,
        head_only,
        keep_alive,
    })
}

/// Replaces `%41` by `A`.
fn decode(path: &str) -> Option<String> {
    let mut out = Vec::with_capacity(path.len());
    let mut rest = path.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        if byte != b'%' {
            out.push(byte);
            continue;
        }
        let (digits, after) = rest.split_at_checked(2)?;
        let digit = |byte: u8| char::from(byte).to_digit(16);
        out.push(u8::try_from(digit(digits[0])? * 16 + digit(digits[1])?).ok()?);
        rest = after;
    }
    String::from_utf8(out).ok()
}

/// The reverse, for links: everything but letters, digits and a few signs.
pub fn encode(path: &str) -> String {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    let mut out = String::with_capacity(path.len());
    for &byte in path.as_bytes() {
        if byte.is_ascii_alphanumeric() || b"/._~-".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push('%');
            out.push(char::from(HEX[usize::from(byte >> 4)]));
            out.push(char::from(HEX[usize::from(byte & 15)]));
        }
    }
    out
}
