//! From `_start` to `main` and out again.
#![allow(unsafe_code)]
// UNSAFETY: trusts the start state that the host set up; the macro exports a symbol and a section.

use super::boot::Boot;
use super::{gate, logging, platform};
use core::fmt::Debug;
use pv_abi::boot::{BootBlock, MAGIC};
use pv_abi::call::number;
use pv_abi::{ABI_MAJOR, ABI_MINOR, feature};

/// The code that a VM ends with; 0 means success.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExitCode(pub u32);

impl ExitCode {
    /// All went well.
    pub const SUCCESS: ExitCode = ExitCode(0);
    /// `main` returned an error.
    pub const FAILURE: ExitCode = ExitCode(1);
    /// The guest panicked (the `PANIC` call ends the VM first, where it works).
    pub const PANIC: ExitCode = ExitCode(101);
    /// The host is not one that this guest can run on.
    pub const BAD_HOST: ExitCode = ExitCode(102);
}

/// What `main` may return.
pub trait Termination {
    /// The code to end the VM with; errors are logged here.
    fn report(self) -> ExitCode;
}

impl Termination for () {
    fn report(self) -> ExitCode {
        ExitCode::SUCCESS
    }
}

impl Termination for ExitCode {
    fn report(self) -> ExitCode {
        self
    }
}

impl Termination for core::convert::Infallible {
    fn report(self) -> ExitCode {
        match self {}
    }
}

impl<T: Termination, E: Debug> Termination for Result<T, E> {
    fn report(self) -> ExitCode {
        match self {
            Ok(value) => value.report(),
            Err(error) => {
                log::error!("main: {error:?}");
                ExitCode::FAILURE
            }
        }
    }
}

/// Declares `main` and what the program needs of the host.
///
/// Places the ELF note that every image must carry and defines `_start`. `main` takes a
/// `&`[`Boot`](crate::flat::Boot) and returns anything that is
/// [`Termination`](crate::flat::Termination). Options, in this order: `needs` is a mask of
/// [`pv_abi::feature`] bits without which the host refuses the image, `stack` the bytes of stack for
/// each vCPU.
///
/// ```no_run,standalone_crate
/// guest_sdk::entry!(start, needs = guest_sdk::abi::feature::SMP, stack = 1 << 20);
///
/// fn start(boot: &guest_sdk::flat::Boot) {
///     log::info!("hello from {}", boot.accel());
/// }
/// ```
#[macro_export]
macro_rules! entry {
    ($main:path $(, needs = $needs:expr)? $(, stack = $stack:expr)? $(,)?) => {
        const _: () = {
            #[allow(unsafe_code)]
            #[used]
            #[unsafe(link_section = ".note.paravane")]
            static NOTE: $crate::abi::note::NoteRecord =
                $crate::abi::note::NoteRecord::new(0 $(| $needs)?, 0 $(+ $stack)?);

            // The start state is that of a function which was just called: RDI and RSI hold the
            // arguments, RSP is 8 past a multiple of 16.
            #[allow(unsafe_code)]
            #[unsafe(no_mangle)]
            extern "sysv64" fn _start(
                boot: *const $crate::abi::boot::BootBlock,
                _vcpu: u64,
            ) -> ! {
                // SAFETY: the host starts the image here, once, with the boot block in RDI.
                unsafe {
                    $crate::flat::entry::run(boot, |boot| {
                        $crate::flat::Termination::report($main(boot))
                    })
                }
            }
        };
    };
}

/// Brings the runtime up, runs `main`, ends the VM. For [`entry!`](crate::entry) only.
///
/// # Safety
///
/// Called once, on the boot vCPU of a flat guest, with the address from RDI.
#[doc(hidden)]
pub unsafe fn run(boot: *const BootBlock, main: fn(&Boot) -> ExitCode) -> ! {
    // SAFETY: the host passes a readable boot block that it does not write any more.
    let Some(block) = (unsafe { boot.as_ref::<'static>() }) else {
        gate::exit(ExitCode::BAD_HOST)
    };
    if block.magic != MAGIC
        || block.abi_major != ABI_MAJOR
        || (block.size as usize) < size_of::<BootBlock>()
    {
        gate::exit(ExitCode::BAD_HOST);
    }
    let wanted = block.features & feature::ALL;
    let abi = u64::from(ABI_MAJOR) << 16 | u64::from(ABI_MINOR);
    let (status, features) = gate::call(number::NEGOTIATE, [wanted, abi, 0, 0, 0, 0]);
    if status != 0 {
        gate::exit(ExitCode::BAD_HOST);
    }
    let platform = platform::start(block, features & wanted);
    let boot = Boot::new(block, platform);
    #[cfg(feature = "runtime")]
    // SAFETY: first and only call; the map's usable regions are nobody's yet.
    unsafe {
        super::heap::start(boot.memory_map());
    }
    logging::start(&boot);
    gate::exit(main(&boot))
}
