//! The process accel.
use super::{AccelError, AccelInput, Parts, Reporter};
use std::sync::Arc;
pub(crate) fn create(
    _input: AccelInput,
    _reporter: &Arc<dyn Reporter>,
    _self_reported: bool,
) -> Result<Parts, AccelError> {
    Err(AccelError::Sandbox("to come".into()))
}
