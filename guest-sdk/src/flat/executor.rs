//! Running a future on a flat guest's vCPU.

use super::platform::platform;
use core::future::Future;

/// Runs a future on this vCPU, and idles whenever it has nothing to do: [`how`].
///
/// [`how`]: crate::platform::block_on
pub fn block_on<F: Future>(future: F) -> F::Output {
    crate::platform::block_on(platform(), future)
}
