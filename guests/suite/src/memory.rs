//! The C memory functions, which the guest has from its runtime and every copy ends in.

use crate::{Case, Outcome, ensure};
use core::hint::black_box;
use guest_sdk::flat::Boot;

pub const CASES: &[Case] = &[("life.memory", memory)];

/// Bytes on each side that nothing may touch, and more than the farthest overlap.
const MARGIN: usize = 160;
const LONGEST: usize = 257;
type Room = [u8; LONGEST + 2 * MARGIN];

/// Each length up to the first that string instructions do, and some around the powers of two.
fn lengths() -> impl Iterator<Item = usize> {
    (0..=80).chain([95, 96, 97, 127, 128, 129, 255, 256, LONGEST])
}

fn memory(_boot: &Boot) -> Outcome {
    let mut fresh: Room = [0; LONGEST + 2 * MARGIN];
    for (at, byte) in fresh.iter_mut().enumerate() {
        *byte = (at * 7 % 251) as u8 ^ (at >> 5) as u8;
    }
    for len in lengths() {
        moves(&fresh, len)?;
        fills(&fresh, len)?;
        compares(&fresh, len)?;
    }
    Ok(())
}

/// Apart, and overlapping at every kind of distance, in both directions.
fn moves(fresh: &Room, len: usize) -> Outcome {
    for distance in [0, 1, 2, 7, 8, 15, 16, 17, 31, 33, 64, 100, 150] {
        for (from, to) in [(MARGIN, MARGIN + distance), (MARGIN, MARGIN - distance)] {
            let mut room = *fresh;
            room.copy_within(black_box(from..from + len), to);
            let right = room.iter().enumerate().all(|(at, byte)| {
                let moved = (to..to + len).contains(&at);
                *byte == fresh[if moved { at - to + from } else { at }]
            });
            ensure!(right, "{len} bytes from {from} to {to}");
        }
    }
    let mut room = [0u8; LONGEST + 2 * MARGIN];
    room[MARGIN..MARGIN + len].copy_from_slice(black_box(&fresh[..len]));
    let copied = room[MARGIN..].iter().zip(fresh).take(len);
    ensure!(copied.clone().all(|(a, b)| a == b), "a copy of {len} bytes");
    let around = room[..MARGIN].iter().chain(&room[MARGIN + len..]);
    ensure!(around.clone().all(|byte| *byte == 0), "around {len} bytes");
    Ok(())
}

fn fills(fresh: &Room, len: usize) -> Outcome {
    let mut room = *fresh;
    room[MARGIN..MARGIN + len].fill(black_box(0xe7));
    let right = room.iter().enumerate().all(|(at, byte)| {
        let filled = (MARGIN..MARGIN + len).contains(&at);
        *byte == if filled { 0xe7 } else { fresh[at] }
    });
    ensure!(right, "a fill of {len} bytes");
    Ok(())
}

/// Equal, and with each byte the first that differs, upwards and downwards.
fn compares(fresh: &Room, len: usize) -> Outcome {
    let left = &fresh[3..3 + len];
    let mut other = *fresh;
    for at in 3..3 + len {
        let byte = fresh[at];
        ensure!(
            black_box(left) == black_box(&other[3..3 + len]),
            "{len} equal bytes"
        );
        for changed in [byte.wrapping_add(1), byte ^ 0x80] {
            other[at] = changed;
            // What comes later does not count.
            if let Some(last) = other[..3 + len].get_mut(at + 1) {
                *last = !*last;
            }
            let right = black_box(&other[3..3 + len]);
            ensure!(left != right, "byte {at} of {len}");
            ensure!(
                left.cmp(right) == byte.cmp(&changed),
                "order of byte {at} of {len}"
            );
            other = *fresh;
        }
    }
    Ok(())
}
