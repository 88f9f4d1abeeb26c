//! The card as the device of a network stack, against the real backend.

use crate::net::{MAC, frame};
use crate::{Case, Outcome, ensure, text};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::future::poll_fn;
use core::task::{Context, Poll};
use embassy_net_driver::{Driver, HardwareAddress, LinkState, RxToken as _, TxToken as _};
use guest_sdk::flat::{Boot, Flat, block_on};
use guest_sdk::net::{self, EmbassyDevice};
use guest_sdk::platform::Platform;

pub const CASES: &[Case] = &[("net.embassy", embassy)];

/// Polls until there is something; the vCPU sleeps meanwhile.
fn wait<T>(
    boot: &Boot,
    what: &str,
    mut poll: impl FnMut(&mut Context<'_>) -> Option<T>,
) -> Result<T, String> {
    let start = boot.platform().now_ns();
    block_on(poll_fn(|context| {
        if let Some(done) = poll(context) {
            return Poll::Ready(Ok(done));
        }
        if boot.platform().now_ns() - start > 20_000_000_000 {
            return Poll::Ready(Err(format!("not in time: {what}")));
        }
        Poll::Pending
    }))
}

fn send(boot: &Boot, device: &mut EmbassyDevice<Flat>, bytes: &[u8]) -> Outcome {
    wait(boot, "room to send", |context| {
        let token = device.transmit(context)?;
        token.consume(bytes.len(), |place| place.copy_from_slice(bytes));
        Some(())
    })
}

/// The next frame; it is sent once more with the token that came with it, if that is wanted.
fn receive(boot: &Boot, device: &mut EmbassyDevice<Flat>, again: bool) -> Result<Vec<u8>, String> {
    wait(boot, "a frame", |context| {
        let (came, reply) = device.receive(context)?;
        let bytes = came.consume(|data| data.to_vec());
        if again {
            reply.consume(bytes.len(), |place| place.copy_from_slice(&bytes));
        }
        Some(bytes)
    })
}

/// A pair as the driver of an `embassy-net` stack: frames go round, through a reset as well.
fn embassy(boot: &Boot) -> Outcome {
    let (receiver, transmitter) = net::open(boot.platform(), Some("net")).map_err(text("open"))?;
    let mut device = EmbassyDevice::new(receiver, transmitter);
    ensure!(
        device.hardware_address() == HardwareAddress::Ethernet(MAC),
        "{:?}",
        device.hardware_address()
    );
    let most = device.capabilities().max_transmission_unit;
    ensure!(most == 1514, "frames of {most} bytes");
    wait(boot, "the link", |context| {
        matches!(device.link_state(context), LinkState::Up).then_some(())
    })?;
    for round in 0..2u64 {
        for len in [14, 60, 61, 590, 1513, 1514] {
            let sent = frame(MAC, round, len);
            send(boot, &mut device, &sent)?;
            for again in [true, false] {
                let came = receive(boot, &mut device, again)?;
                ensure!(came == sent, "{len} bytes came otherwise: {again}");
            }
        }
        device.nic().reset();
    }
    ensure!(device.error().is_none(), "{:?}", device.error());
    Ok(())
}
