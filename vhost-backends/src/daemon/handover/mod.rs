//! Hot upgrade: a new daemon takes over what a running one serves.
//!
//! The new one connects to the old one's control socket and asks. The old one stops its queues,
//! drained, and sends a record of what it serves, with every descriptor; the new one checks it
//! as it checks frontends, and says that it is ready. Until it is told to go, the old one can go
//! on as if nothing had happened, and does so at any failure and after [`HANDOVER_SECS`]. From
//! that message on the new one serves, or nobody does, as if a daemon had been killed: never both.
//!
//! | from | frame | carries |
//! |---|---|---|
//! | new | `POST /take-over` | its version of this protocol and its devices' names, as JSON |
//! | old | `HTTP/1.0 101` | or another status and a sentence |
//! | old | member | one device: its name and what it is; descriptors of the device's own |
//! | old | listener | its listening socket |
//! | old | connection | its frontend's; then vhost-user messages that bring a session to its state |
//! | old | begun | bytes and descriptors of a message that its frontend is still sending |
//! | old | admin | a statistics or control socket |
//! | old | end | since when the queues stand still |
//! | new | ready | or refused, with a sentence |
//! | old | go | |
//! | new | serves | how long they stood still |
//!
//! No frontend delays the others, or keeps them from being handed over: one that is in the middle of a
//! message goes on with it, and one whose session cannot be taken up for a reason of its own loses
//! that session and connects again.
//!
//! Frames look like vhost-user messages. `give` is the old side, `take` the new one.
//!
//! [`HANDOVER_SECS`]: crate::limits::HANDOVER_SECS

mod give;
mod take;

pub(super) use give::{GiveUnit, Giver};
pub(super) use take::{Taken, Taking};

use crate::limits::MAX_PAYLOAD;
use crate::session::socket::{Channel, ChannelEnd};
use serde::{Deserialize, Serialize};
use std::os::fd::BorrowedFd;

/// Of everything in this folder. Another one is refused before anything is stopped.
const VERSION: u32 = 1;
/// Frame numbers lie far from those of vhost-user.
const MEMBER: u32 = 0x5056_0001;
const LISTENER: u32 = 0x5056_0002;
const CONNECTION: u32 = 0x5056_0003;
const ADMIN: u32 = 0x5056_0004;
const END: u32 = 0x5056_0005;
const READY: u32 = 0x5056_0006;
const REFUSED: u32 = 0x5056_0007;
const GO: u32 = 0x5056_0008;
const SERVES: u32 = 0x5056_0009;
const BEGUN: u32 = 0x5056_000a;

/// What the new daemon says first.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Hello {
    version: u32,
    members: Vec<String>,
}

/// A socket's file: device and inode.
type Identity = (u64, u64);

/// A device.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct MemberHead {
    name: String,
    /// What the device is, in words of its own: the same on both sides.
    identity: String,
    /// The file of its socket, if the daemon made one.
    socket: Option<Identity>,
}

/// A connection.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ConnectionHead {
    /// Configuration space, as the frontend knows it.
    config: Vec<u8>,
    /// The message that is still coming has more descriptors than are taken.
    #[serde(default)]
    fds_truncated: bool,
}

/// A statistics or control socket.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct AdminHead {
    control: bool,
    socket: Identity,
}

/// The record's end.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct End {
    /// Of the clock that all processes share.
    paused_at_nanos: u64,
}

/// The new daemon serves.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Serves {
    paused_for_nanos: u64,
}

/// Sends a frame with a JSON payload.
fn send(
    channel: &mut Channel<'_>,
    frame: u32,
    payload: &impl Serialize,
    fds: &[BorrowedFd<'_>],
) -> Result<(), String> {
    let payload = serde_json::to_vec(payload).map_err(|error| error.to_string())?;
    if payload.len() > MAX_PAYLOAD {
        return Err("a part of the record is too long".into());
    }
    let sent = channel.send(frame, &payload, fds);
    sent.map_err(|end| in_words(&end))
}

fn parse<'p, T: Deserialize<'p>>(payload: &'p [u8]) -> Result<T, String> {
    serde_json::from_slice(payload).map_err(|error| format!("a malformed record: {error}"))
}

fn in_words(end: &ChannelEnd) -> String {
    match end {
        ChannelEnd::HangUp => "the other daemon hung up".into(),
        ChannelEnd::Half => "the other daemon took too long, or ended".into(),
        other => other.to_string(),
    }
}
