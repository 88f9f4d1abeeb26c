//! Devices on the command line: `KEY=VALUE,...`, where keys are flags.

use super::program::sentence;
use clap::{ArgAction, Parser};

/// Parses the value of `flag`, whose keys are the flags of `C`. `short` gives other names of some.
/// The error is a sentence.
pub(crate) fn parse<C: Parser>(
    flag: &str,
    short: &[(&str, &str)],
    text: &str,
) -> Result<C, String> {
    let command = C::command();
    let mut line = vec![flag.to_owned()];
    for pair in split(text) {
        let (key, value) = pair.split_once('=').unwrap_or((&pair, "on"));
        let long = short.iter().find(|(name, _)| *name == key);
        let long = long.map_or(key, |(_, long)| long);
        let known = command.get_arguments().find(|a| a.get_long() == Some(long));
        let known = known.ok_or(format!("there is no key {key:?}"))?;
        match (known.get_action(), value) {
            (ArgAction::SetTrue, "on" | "true" | "yes") => line.push(format!("--{long}")),
            (ArgAction::SetTrue, "off" | "false" | "no") => {}
            (ArgAction::SetTrue, _) => return Err(format!("{key} is neither on nor off")),
            _ => line.push(format!("--{long}={value}")),
        }
    }
    C::try_parse_from(line).map_err(|error| sentence(&error))
}

/// At commas, but not at double ones, which stand for one.
fn split(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        if letter == ',' && letters.next_if_eq(&',').is_none() {
            parts.push(String::new());
        } else if let Some(last) = parts.last_mut() {
            last.push(letter);
        }
    }
    parts
}

/// A device's name.
pub(crate) fn parse_name(text: &str, most: usize) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if text.is_empty() || text.len() > most || !text.chars().all(plain) {
        return Err(format!(
            "1 to {most} letters, digits, -, _ and . are a name"
        ));
    }
    Ok(text.to_owned())
}

/// A number of bytes, with K, M or G for powers of 1024.
pub(crate) fn parse_bytes(text: &str) -> Result<u64, String> {
    let (number, shift) = match text.char_indices().last() {
        Some((at, 'k' | 'K')) => (text.get(..at), 10),
        Some((at, 'm' | 'M')) => (text.get(..at), 20),
        Some((at, 'g' | 'G')) => (text.get(..at), 30),
        _ => (Some(text), 0),
    };
    number
        .and_then(|number| number.parse::<u64>().ok())
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or("not a number of bytes, as 4096, 64K, 10M or 1G".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_bytes("512"), Ok(512));
        assert_eq!(parse_bytes("3G"), Ok(3 << 30));
        for bad in ["", "K", "-1", "1T", "99999999999999G", "1\u{e9}"] {
            assert!(parse_bytes(bad).is_err(), "{bad}");
        }
    }
}
