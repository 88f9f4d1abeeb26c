//! The status codes that calls return: our own, stable, never a host errno.

/// The outcome of a call. Zero is success; the numbers never change their meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
#[non_exhaustive]
pub enum Status {
    /// The call was carried out.
    Ok = 0,
    /// No such call number, or its feature was not negotiated.
    UnknownCall = 1,
    /// An argument has a value outside its domain, or an unused one is not zero.
    BadArgument = 2,
    /// An address lies outside the control region and the arena that the call is for.
    BadAddress = 3,
    /// A length is zero, too long, or runs past the end of its region.
    BadLength = 4,
    /// The device or vCPU is not in a state in which this can be done.
    BadState = 5,
    /// No device, vCPU or handler with this index.
    NotFound = 6,
    /// A named limit would be exceeded.
    Limit = 7,
    /// Not possible now; an event will say when to try again.
    Again = 8,
    /// The host could not do it; the VM goes on.
    HostError = 9,
    /// A feature that was not offered.
    NotSupported = 10,
    /// The frame itself is malformed: its flags or reserved fields are not zero.
    BadFrame = 11,
    /// The embedder's handler refused; `value` holds its own code.
    Refused = 12,
}

impl Status {
    /// Every status, in the order of their numbers.
    pub const ALL: [Status; 13] = [
        Status::Ok,
        Status::UnknownCall,
        Status::BadArgument,
        Status::BadAddress,
        Status::BadLength,
        Status::BadState,
        Status::NotFound,
        Status::Limit,
        Status::Again,
        Status::HostError,
        Status::NotSupported,
        Status::BadFrame,
        Status::Refused,
    ];

    /// The number that travels in a frame.
    pub const fn code(self) -> u32 {
        self as u32
    }

    /// The status with this number; `None` for a number that this version does not know.
    pub fn from_code(code: u32) -> Option<Status> {
        Self::ALL.into_iter().find(|s| s.code() == code)
    }

    /// A short lower-case description.
    pub const fn as_str(self) -> &'static str {
        match self {
            Status::Ok => "ok",
            Status::UnknownCall => "unknown call",
            Status::BadArgument => "bad argument",
            Status::BadAddress => "bad address",
            Status::BadLength => "bad length",
            Status::BadState => "bad state",
            Status::NotFound => "not found",
            Status::Limit => "limit exceeded",
            Status::Again => "try again",
            Status::HostError => "host error",
            Status::NotSupported => "not supported",
            Status::BadFrame => "bad frame",
            Status::Refused => "refused by the handler",
        }
    }
}

impl core::fmt::Display for Status {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl core::error::Error for Status {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_dense_and_round_trip() {
        for (i, s) in Status::ALL.into_iter().enumerate() {
            assert_eq!(s.code() as usize, i);
            assert_eq!(Status::from_code(s.code()), Some(s));
        }
        assert_eq!(Status::from_code(Status::ALL.len() as u32), None);
        assert_eq!(Status::from_code(u32::MAX), None);
    }
}
