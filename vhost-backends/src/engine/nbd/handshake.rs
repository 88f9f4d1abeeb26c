//! Fixed newstyle negotiation with `NBD_OPT_GO` (the NBD protocol, "Newstyle negotiation").

use super::NbdError;
use crate::limits::{MAX_NBD_OPTION, MAX_NBD_REQUEST};
use std::io::{Read, Write};

/// Bytes of an export's name (the protocol's "Values").
pub(super) const MAX_NAME: usize = 4096;

const MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
const FLAG_NO_ZEROES: u16 = 1 << 1;
const OPT_GO: u32 = 7;
const INFO_EXPORT: u16 = 0;
const INFO_BLOCK_SIZE: u16 = 3;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const REP_ERROR: u32 = 1 << 31;

const HAS_FLAGS: u16 = 1 << 0;
const READ_ONLY: u16 = 1 << 1;
const SEND_FLUSH: u16 = 1 << 2;
const SEND_TRIM: u16 = 1 << 5;
const SEND_WRITE_ZEROES: u16 = 1 << 6;
const CAN_MULTI_CONN: u16 = 1 << 8;

/// Replies to one option before the server is taken for a broken one.
const MAX_REPLIES: usize = 64;
/// The largest block size that is believed.
const MOST_BLOCK: u32 = 1 << 16;

/// What the server says of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Export {
    pub(super) len: u64,
    pub(super) read_only: bool,
    pub(super) flush: bool,
    pub(super) trim: bool,
    pub(super) write_zeroes: bool,
    pub(super) multi_conn: bool,
    pub(super) block_min: u32,
    pub(super) block_preferred: u32,
    /// Bytes of one request.
    pub(super) block_max: u32,
}

/// Chooses an export; the connection is ready for requests afterwards.
pub(super) fn negotiate<S>(stream: S, export: &str) -> Result<Export, NbdError>
where
    S: Read + Write,
{
    let mut stream = stream;
    if read_u64(&mut stream)? != MAGIC || read_u64(&mut stream)? != OPTION_MAGIC {
        return Err(NbdError::NotNbd);
    }
    let flags = read_u16(&mut stream)?;
    if flags & FLAG_FIXED_NEWSTYLE == 0 {
        return Err(NbdError::NotNbd);
    }
    let ours = u32::from(flags & (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES));
    stream.write_all(&ours.to_be_bytes())?;
    stream.write_all(&go(export)?)?;
    let mut found = None;
    let mut blocks = None;
    for _ in 0..MAX_REPLIES {
        let (kind, data) = read_reply(&mut stream)?;
        match kind {
            REP_ACK => {
                let (len, flags) = found.ok_or(NbdError::Protocol("no export information"))?;
                return finish(len, flags, blocks);
            }
            REP_INFO => match (u16_at(&data, 0), data.len()) {
                (Some(INFO_EXPORT), 12) => {
                    found = u64_at(&data, 2).zip(u16_at(&data, 10));
                }
                (Some(INFO_BLOCK_SIZE), 14) => {
                    blocks = u32_at(&data, 2)
                        .zip(u32_at(&data, 6))
                        .zip(u32_at(&data, 10));
                }
                // Something that was not asked for.
                _ => {}
            },
            kind if kind & REP_ERROR != 0 => {
                let said = String::from_utf8_lossy(&data);
                // A server's text goes to a terminal.
                let said = said.chars().filter(|c| !c.is_control()).collect::<String>();
                let code = kind & !REP_ERROR;
                return Err(NbdError::Refused(format!("error {code} {said}")));
            }
            _ => {
                return Err(NbdError::Protocol(
                    "an unknown reply to the choice of an export",
                ));
            }
        }
    }
    Err(NbdError::Protocol("replies without end"))
}

fn finish(len: u64, flags: u16, blocks: Option<((u32, u32), u32)>) -> Result<Export, NbdError> {
    let ((min, preferred), max) = blocks.unwrap_or(((1, 4096), MAX_NBD_REQUEST));
    let sound = |v: u32| v.is_power_of_two() && v <= MOST_BLOCK;
    if !sound(min) || max < min.max(512) || flags & HAS_FLAGS == 0 {
        return Err(NbdError::Protocol("an export of an impossible shape"));
    }
    if i64::try_from(len).is_err() {
        return Err(NbdError::Protocol("an export of an impossible size"));
    }
    Ok(Export {
        len,
        read_only: flags & READ_ONLY != 0,
        flush: flags & SEND_FLUSH != 0,
        trim: flags & SEND_TRIM != 0,
        write_zeroes: flags & SEND_WRITE_ZEROES != 0,
        multi_conn: flags & CAN_MULTI_CONN != 0,
        block_min: min,
        block_preferred: if sound(preferred) { preferred } else { min },
        // A multiple of a sector that the least block divides.
        block_max: max.min(MAX_NBD_REQUEST) / min.max(512) * min.max(512),
    })
}

/// The option that chooses an export, and asks for its block sizes.
fn go(export: &str) -> Result<Vec<u8>, NbdError> {
    let name = u32::try_from(export.len()).map_err(|_| NbdError::Address)?;
    let mut option = Vec::with_capacity(64);
    option.extend(OPTION_MAGIC.to_be_bytes());
    option.extend(OPT_GO.to_be_bytes());
    option.extend((4 + name + 2 + 2).to_be_bytes());
    option.extend(name.to_be_bytes());
    option.extend(export.as_bytes());
    option.extend(1u16.to_be_bytes());
    option.extend(INFO_BLOCK_SIZE.to_be_bytes());
    Ok(option)
}

fn read_reply(stream: &mut impl Read) -> Result<(u32, Vec<u8>), NbdError> {
    if read_u64(stream)? != REPLY_MAGIC {
        return Err(NbdError::Protocol("a reply without its magic"));
    }
    if read_u32(stream)? != OPT_GO {
        return Err(NbdError::Protocol("a reply to another option"));
    }
    let kind = read_u32(stream)?;
    let len = read_u32(stream)?;
    if len > MAX_NBD_OPTION {
        return Err(NbdError::Protocol("a reply that is too long"));
    }
    // At most MAX_NBD_OPTION.
    let mut data = vec![0; len as usize];
    stream.read_exact(&mut data)?;
    Ok((kind, data))
}

fn read_u64(stream: &mut impl Read) -> Result<u64, NbdError> {
    let mut bytes = [0; 8];
    stream.read_exact(&mut bytes)?;
    Ok(u64::from_be_bytes(bytes))
}

fn read_u32(stream: &mut impl Read) -> Result<u32, NbdError> {
    let mut bytes = [0; 4];
    stream.read_exact(&mut bytes)?;
    Ok(u32::from_be_bytes(bytes))
}

fn read_u16(stream: &mut impl Read) -> Result<u16, NbdError> {
    let mut bytes = [0; 2];
    stream.read_exact(&mut bytes)?;
    Ok(u16::from_be_bytes(bytes))
}

fn u64_at(data: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(data.get(at..at + 8)?.try_into().ok()?))
}

fn u32_at(data: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(data.get(at..at + 4)?.try_into().ok()?))
}

fn u16_at(data: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(data.get(at..at + 2)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reply_at_the_limit_and_one_past_it() {
        for (len, fits) in [(MAX_NBD_OPTION, true), (MAX_NBD_OPTION + 1, false)] {
            let mut bytes = REPLY_MAGIC.to_be_bytes().to_vec();
            for word in [OPT_GO, REP_INFO, len] {
                bytes.extend(word.to_be_bytes());
            }
            bytes.resize(bytes.len() + len as usize, 7);
            match read_reply(&mut &bytes[..]) {
                Ok((REP_INFO, data)) => assert!(fits && data == vec![7; len as usize]),
                Err(NbdError::Protocol("a reply that is too long")) => assert!(!fits),
                other => panic!("{other:?}"),
            }
        }
    }
}
